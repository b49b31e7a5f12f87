"""What trained codes win: a model in few bits, tuned on the same rows, at the same bytes.

    python benchmarks/code_tuning.py
    python benchmarks/code_tuning.py --model path/to/model --bits 2 --steps 200

GPTQ's codes of `--bits` bits are left as they are, then tuned with the dense model as the teacher: scales and all that
is not quantised alone (pv-tuning with tau=0), with straight-through targets for every code (tau=1, decay=0), with those
under PV-Tuning's cap (decay=0, the published command's), and by pv-tuning, at several rates of codes. All of them store
the same bytes. Text: Python's own sources; perplexity on files that no calibration or training has seen. Prints a table
and writes it as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from weft.embedded.text import calibration_files, default_text
from weft.files import write_json
from weft.runs.loading import load_model, load_tokenizer
from weft.runs.record import begin
from weft.train.sources import read_texts
from weft.verbs.compress import run as compress
from weft.verbs.evaluate import evaluate
from weft.verbs.finetune import finetune

WINDOWS = 48
"""Of the text that perplexity is measured on."""


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "code_tuning.json")
    options = parser.parse_args()
    record = begin("code_tuning", vars(options), seed=options.seed)
    rows = [measured("dense", options.model, options.window)]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "coded"
        how: dict[str, Any] = {
            "bits": options.bits,
            "group": options.group,
            "seed": options.seed,
            "windows": 16,
            "window": 256,
        }
        compress(options.model, out, method="gptq", budget=f"{options.bits + 1}bits", allocate="equal", **how)
        rows.append(measured("gptq", out, options.window))
        for name, settings in ways(options.code_rates):
            rows.append(tuned(name, out, settings, options))
    about = {"date": record.started, "device": record.device or "cpu", "versions": record.versions}
    arguments = {key: value for key, value in record.arguments.items() if key != "out"}
    options.out.parent.mkdir(exist_ok=True)
    write_json(options.out, about | {"arguments": arguments, "rows": rows})
    print(f"written: {options.out}")


def ways(rates: list[float]) -> list[tuple[str, dict[str, float]]]:
    """The tunings by name, and their options."""
    found = [("scales alone", {"tau": 0.0})]
    for rate in rates:
        found.append((f"straight-through, {rate:g}", {"tau": 1.0, "decay": 0.0, "code_lr": rate}))
        found.append((f"capped straight-through, {rate:g}", {"decay": 0.0, "code_lr": rate}))
        found.append((f"pv-tuning, {10 * rate:g}", {"decay": 1.0, "code_lr": 10 * rate, "trust": 0.003}))
    return found


def tuned(name: str, directory: Path, settings: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """One tuning, and what it leaves."""
    model, tokenizer, teacher = load_model(str(directory)), load_tokenizer(str(directory)), load_model(options.model)
    recipe = {key: getattr(options, key) for key in ("steps", "batch", "window", "lr", "seed")}
    texts = read_texts(calibration_files())
    done = finetune(model, tokenizer, texts, "pv-tuning", teacher=teacher, **recipe, **settings)
    found = evaluate(model, tokenizer, default_text("evaluation"), options.window, windows=WINDOWS)
    row = {"name": name, **settings, "perplexity": found["perplexity"], "bytes": found["bytes"]}
    return shown(row | {"seconds": done["seconds"]})


def measured(name: str, directory: str | Path, window: int) -> dict[str, Any]:
    """A model as it is."""
    model, tokenizer = load_model(str(directory)), load_tokenizer(str(directory))
    found = evaluate(model, tokenizer, default_text("evaluation"), window, windows=WINDOWS)
    return shown({"name": name, "perplexity": found["perplexity"], "bytes": found["bytes"]})


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    seconds = f"{row['seconds']:.0f} s" if "seconds" in row else ""
    print(f"{row['name']:34} {row['perplexity']:10.3f} {row['bytes']:12,} {seconds}", flush=True)
    return row


if __name__ == "__main__":
    main()
