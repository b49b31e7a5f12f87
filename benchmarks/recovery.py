"""Recovery after compression: the low-rank components alone against every parameter, on the same tokens.

    python benchmarks/recovery.py
    python benchmarks/recovery.py --model path/to/model --steps 200 --rates 1e-4 3e-4 1e-3

The model is compressed to `--budget` of its linear parameters in two ways (WeLore as published, and kfac-svd with its
best allocation). Each result is then fine-tuned on the same rows in the same order, once training its low-rank
components and once training everything, at each learning rate, every run in a process of its own. Text: Python's own
sources; perplexity on files that no model, calibration or training has seen. Prints a table and writes it as JSON.

Memory is given twice: the resident high-water mark of the process (torch and transformers included; on a GPU, CUDA's
peak), and what training must hold whatever the batch: weights, gradients and the two AdamW moments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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

COMPRESSIONS = (("welore", "welore"), ("kfac-svd", "best"))
WAYS = {"low-rank only": "welore", "full": "full"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    options = parser.parse_args()

    record = begin("recovery", vars(options), seed=options.seed)
    dense = alone(measure, options.model)
    print(f"dense: perplexity {dense['perplexity']:.3f}, {dense['parameters']:,} parameters", flush=True)
    rows = []
    for method, allocate in COMPRESSIONS:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "compressed"
            settings = {"method": method, "allocate": allocate, "budget": options.budget, "seed": options.seed}
            alone(compress, options.model, out, **settings)
            start = alone(measure, out)
            print(f"{method} at {options.budget}: perplexity {start['perplexity']:.3f}", flush=True)
            for way in WAYS:
                for rate in options.rates:
                    row = {"method": method, "allocate": allocate, "way": way, "rate": rate}
                    row |= {"compressed": start["perplexity"], **alone(recover, out, WAYS[way], rate, vars(options))}
                    print(line(row), flush=True)
                    rows.append(row)
    about = {"date": record.started, "device": record.device or "cpu", "versions": record.versions}
    arguments = {key: value for key, value in record.arguments.items() if key != "out"}
    result = about | {"arguments": arguments, "dense": dense, "rows": rows}
    options.out.parent.mkdir(exist_ok=True)
    write_json(options.out, result | {"verdicts": verdicts(rows)})
    print(f"written: {options.out}")


def alone(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The call in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def measure(model: str | Path) -> dict[str, Any]:
    """Perplexity and size of a model, on 24 held-out windows of 512 tokens."""
    text = default_text("evaluation")
    return evaluate(load_model(str(model)), load_tokenizer(str(model)), text, window=512, windows=24)


def recover(directory: Path, method: str, rate: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tune one compressed model one way, and measure it."""
    model, tokenizer = load_model(str(directory)), load_tokenizer(str(directory))
    keys = ("steps", "batch", "window", "seed")
    done = finetune(
        model, tokenizer, read_texts(calibration_files()), method, lr=rate, warmup=options["steps"] // 10,
        **{key: options[key] for key in keys},
    )  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "perplexity": evaluate(model, tokenizer, default_text("evaluation"), window=512, windows=24)["perplexity"],
        "trainable_parameters": done["trainable_parameters"],
        "parameters": done["parameters"],
        "tokens": options["steps"] * options["batch"] * options["window"],
        "state_bytes": weights + 12 * done["trainable_parameters"],  # fp32 gradient and two moments
        "peak_memory_bytes": done["peak_memory_bytes"],
        "seconds": done["seconds"],
    }


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['method']:9} {row['way']:13} lr {row['rate']:.0e}  perplexity {row['perplexity']:7.3f}  "
        f"trainable {row['trainable_parameters'] / 1e6:6.2f} M  state {row['state_bytes'] / 2**20:6.0f} MiB  "
        f"peak {row['peak_memory_bytes'] / 2**20:6.0f} MiB  {row['seconds']:5.0f} s"
    )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each compression, which way was better at its own best learning rate, and by how much."""
    sentences = []
    for method, _ in COMPRESSIONS:
        best = {
            way: min((r for r in rows if (r["method"], r["way"]) == (method, way)), key=lambda r: r["perplexity"])
            for way in WAYS
        }
        ours, full = (best[way]["perplexity"] for way in WAYS)
        sentences.append(
            f"{method}: low-rank components {ours:.3f}, full {full:.3f}: the low-rank components alone are "
            f"{abs(ours / full - 1):.1%} {'better' if ours < full else 'worse'}"
        )
        print(sentences[-1])
    return sentences


if __name__ == "__main__":
    main()
