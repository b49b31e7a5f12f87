"""What a dense teacher adds to recovery: a compressed model trained on the same tokens in several ways.

    python benchmarks/teaching.py
    python benchmarks/teaching.py --model path/to/model --steps 200 --seeds 3 --text wikitext=FILE

The model is compressed in two ways, by kfac-svd (its layers are factors then) and by minitron (fewer blocks), and all
that is left is trained: on the text's own tokens, on the dense model's predictions, on the most likely of them alone,
on both, and on predictions and hidden states. Every way at its best rate of the first seed, then with further seeds of
rows. Text: Python's own sources; perplexity on files that no calibration or training has seen, and on `--text`. What
is there is written after each way.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from code_tuning import judged, perplexities

from weft.embedded.text import calibration_files
from weft.files import write_json
from weft.runs.loading import load_model, load_tokenizer
from weft.runs.record import begin
from weft.train.sources import read_texts
from weft.verbs.compress import run as compress
from weft.verbs.finetune import finetune

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "kfac-svd": {"method": "kfac-svd", "allocate": "best"},
    "minitron, blocks": {"method": "minitron", "axes": "blocks"},
}
WAYS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "predictions": {"teacher_labels": 0.0},
    "predictions, the 64 most likely": {"teacher_labels": 0.0, "teacher_top": 64},
    "predictions and tokens": {"teacher_labels": 0.5},
    "predictions and states": {"teacher_labels": 0.0, "teacher_features": 1.0},
}
"""How the teacher is followed; one without settings has none."""


def main() -> None:
    options = arguments()
    record = begin("teaching", vars(options), seed=0)
    said = {key: value for key, value in record.arguments.items() if key not in ("out", "text")}
    said |= {"model": Path(options.model).name, "texts": ["python", *(name for name, _ in judged(options))]}
    about = {"date": record.started, "device": record.device or "cpu", "versions": record.versions, "arguments": said}
    rows = [{"compressed": "", "way": "", **measured(options.model, options)}]
    for name, how in COMPRESSIONS.items():
        with tempfile.TemporaryDirectory() as scratch:
            small = Path(scratch) / "small"
            compress(options.model, small, budget=options.budget, seed=0, windows=32, window=options.window, **how)
            rows.append({"compressed": name, "way": "", **measured(small, options)})
            for way in WAYS:
                rates = {rate: trained(small, name, way, rate, 0, options) for rate in options.rates}
                best = min(rates, key=lambda rate: rates[rate]["perplexity"]["python"])
                more = [trained(small, name, way, best, seed, options) for seed in range(1, options.seeds)]
                rows += [*rates.values(), *more]
                write_json(options.out, about | {"rows": rows})
    print(f"written: {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE to judge on besides")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "teaching.json")
    return parser.parse_args()


def trained(small: Path, name: str, way: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The compressed model after a run, measured."""
    model, tokenizer, settings = load_model(str(small)), load_tokenizer(str(small)), dict(WAYS[way])
    teacher = load_model(options.model) if settings else None
    recipe = {key: getattr(options, key) for key in ("steps", "batch", "window")}
    done = finetune(
        model, tokenizer, read_texts(calibration_files()), "full", teacher=teacher, lr=rate, seed=seed,
        warmup=options.steps // 10, **recipe, **settings,
    )  # fmt: skip
    row = {"compressed": name, "way": way, "rate": rate, "seed": seed, **perplexities(model, tokenizer, options)}
    return shown(row | {"seconds": done["seconds"]})


def measured(place: str | Path, options: argparse.Namespace) -> dict[str, Any]:
    """A model as it is."""
    return shown(perplexities(load_model(str(place)), load_tokenizer(str(place)), options))


def shown(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
