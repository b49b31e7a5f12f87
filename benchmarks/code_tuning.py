"""What training wins for a model in few bits, on the same rows, at the same bytes or beside them.

    python benchmarks/code_tuning.py
    python benchmarks/code_tuning.py --model path/to/model --bits 2 --steps 200 --text wikitext=FILE

GPTQ's codes of `--bits` bits are left as they are (and those of round to nearest and signround), then tuned with the
dense model as the teacher: scales and all that is not quantised alone (pv-tuning with tau=0), with straight-through
targets for every code (tau=1, decay=0), with those under PV-Tuning's cap (decay=0, the published command's), and by
pv-tuning, at several rates of codes; by tiny-training, and by int2.1, whose factors are bytes more; and qvgen trains
the dense model towards codes, in groups of a row. Text: Python's own sources; perplexity on files that no calibration
or training has seen, and on `--text`. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from weft.embedded.text import calibration_files, default_text
from weft.files import write_json
from weft.io.precision import bits_per_weight
from weft.runs.loading import load_model, load_tokenizer
from weft.runs.record import begin
from weft.train.sources import read_texts
from weft.verbs.compress import run as compress
from weft.verbs.evaluate import evaluate
from weft.verbs.finetune import finetune

WINDOWS = 24
"""Of the text that perplexity is measured on."""
CODES = ("gptq", "rtn", "signround")
"""What is measured as it is; the first is what is tuned."""


class Way(NamedTuple):
    """One tuning of a coded model, or of the dense one."""

    name: str
    method: str
    settings: dict[str, Any]
    dense: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--code-rates", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE to judge on besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "code_tuning.json")
    options = parser.parse_args()
    record = begin("code_tuning", vars(options), seed=options.seed)
    rows = [measured("dense", options.model, options)]
    with tempfile.TemporaryDirectory() as scratch:
        for method in CODES:
            rows.append(measured(method, coded(method, Path(scratch) / method, options), options))
        for way in ways(options.code_rates, options.bits):
            rows.append(tuned(way, options.model if way.dense else Path(scratch) / CODES[0], options))
    about = {"date": record.started, "device": record.device or "cpu", "versions": record.versions}
    arguments = {key: value for key, value in record.arguments.items() if key not in ("out", "text")}
    arguments |= {"model": Path(options.model).name, "texts": ["python", *(name for name, _ in judged(options))]}
    options.out.parent.mkdir(exist_ok=True)
    write_json(options.out, about | {"arguments": arguments, "rows": rows})
    print(f"written: {options.out}")


def coded(method: str, out: Path, options: argparse.Namespace) -> Path:
    """The model in codes of one width."""
    how: dict[str, Any] = {"seed": options.seed, "windows": 16, "window": 256, "allocate": "equal"}
    own = {"bits": options.bits, "group": options.group}
    compress(str(options.model), out, method=method, budget=f"{options.bits + 1}bits", **how, **own)
    return out


def ways(rates: list[float], bits: int) -> list[Way]:
    """The tunings."""
    found = [Way("scales alone", "pv-tuning", {"tau": 0.0})]
    for rate in rates:
        found += [
            Way(f"straight-through, {rate:g}", "pv-tuning", {"tau": 1.0, "decay": 0.0, "code_lr": rate}),
            Way(f"capped straight-through, {rate:g}", "pv-tuning", {"decay": 0.0, "code_lr": rate}),
            Way(f"pv-tuning, {10 * rate:g}", "pv-tuning", {"decay": 1.0, "code_lr": 10 * rate, "trust": 0.003}),
        ]
    found += [Way("tiny-training", "tiny-training", {}), Way("int2.1, rank 16", "int2.1", {"rank": 16})]
    return [*found, Way("qvgen", "qvgen", {"bits": bits}, dense=True)]


def tuned(way: Way, source: str | Path, options: argparse.Namespace) -> dict[str, Any]:
    """One tuning, and what it leaves."""
    model, tokenizer, teacher = load_model(str(source)), load_tokenizer(str(source)), load_model(options.model)
    recipe = {key: getattr(options, key) for key in ("steps", "batch", "window", "lr", "seed")}
    texts = read_texts(calibration_files())
    done = finetune(model, tokenizer, texts, way.method, teacher=teacher, **recipe, **way.settings)
    about = {"name": way.name, "method": way.method, **way.settings}
    return shown(about | perplexities(model, tokenizer, options) | {"seconds": done["seconds"]})


def measured(name: str, directory: str | Path, options: argparse.Namespace) -> dict[str, Any]:
    """A model as it is."""
    model, tokenizer = load_model(str(directory)), load_tokenizer(str(directory))
    return shown({"name": name} | perplexities(model, tokenizer, options))


def perplexities(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """On every text, with the bytes of the model and the bits a weight of its layers."""
    texts = {"python": default_text("evaluation"), **{name: read_texts(file) for name, file in judged(options)}}
    found = {name: evaluate(model, tokenizer, text, options.window, windows=WINDOWS) for name, text in texts.items()}
    sizes = {"bytes": found["python"]["bytes"], "bits": bits_per_weight(model)}
    return {"perplexity": {name: one["perplexity"] for name, one in found.items()}, **sizes}


def judged(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, file) of the further texts."""
    return [(name, file) for name, _, file in (text.partition("=") for text in options.text)]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    seconds = f"{row['seconds']:.0f} s" if "seconds" in row else ""
    words = " ".join(f"{value:10.3f}" for value in row["perplexity"].values())
    print(f"{row['name']:34} {words} {row['bits']:6.3f} {row['bytes']:12,} {seconds}", flush=True)
    return row


if __name__ == "__main__":
    main()
