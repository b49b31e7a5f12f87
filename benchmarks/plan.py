"""What `weft plan` says of a fine-tuning job, against what the job holds.

    python benchmarks/plan.py                                 # 9m and two smaller, on a CPU
    python benchmarks/plan.py --sizes 9m 35m 60m
    python benchmarks/plan.py --seconds                       # the time of a step, tiny and 9m

Each job is `weft finetune` itself in a process of its own, two steps of it, with every storage counted that is alive
(`weft.memory.live.Live`); the plan knows nothing but the configuration. Peaks are to be within 10 %. Then, at the edge:
of each job, the largest batch that the plan says fits in twice the peak of one row is run, and one row more.
Writes benchmarks/results/plan_cpu.json.

With --seconds, the time of a step is compared instead: of a job of eight steps less one of two, a sixth. Both are
processor time of one thread, which other work on the machine does not lengthen (it does make it slower, by taking turns
with the cache). Writes benchmarks/results/plan_seconds_cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from weft.embedded.text import default_text
from weft.memory.live import Live
from weft.plan.work import rates_of
from weft.runs.loading import load_tokenizer
from weft.train.sizes import configuration, fresh_model
from weft.verbs.finetune import finetune
from weft.verbs.plan import run
from weft.verbs.plan_jobs import Job
from weft.verbs.quantize import quantize

JOBS = ("lora", "nf4+lora", "full", "full+galore")
SIZES = ("tiny", "9m", "35m")
TINY = (64, 176, 6, 4)


def shaped(size: str, tokenizer: PreTrainedTokenizerBase, window: int) -> LlamaConfig:
    """The configuration of a size, or of a smaller one with more blocks."""
    config = configuration("9m" if size == "tiny" else size, tokenizer, window)
    if size == "tiny":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name, value in zip((*names, "num_key_value_heads", "head_dim"), (*TINY, 4, 16), strict=True):
            setattr(config, name, value)
    return config


def measured(directory: Path, name: str, batch: int, window: int, lean: bool) -> int:
    """Bytes at the peak of two steps of the job."""
    tokenizer, job = load_tokenizer("pico"), Job.parse(name, "finetune")
    model = fresh_model(LlamaConfig.from_pretrained(directory), 0)
    if job.scheme is not None:
        quantize(model, job.scheme)
    with Live() as live:
        live.count([*model.parameters(), *model.buffers()])
        settings = {"steps": 2, "batch": batch, "window": window, "lean": lean}
        finetune(
            model, tokenizer, default_text("evaluation")[:40_000], str(job.method), optimizer=job.optimizer, **settings
        )
        return live.peak


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def timed(directory: Path, name: str, batch: int, window: int, lean: bool) -> float:
    """Seconds of processor time of a step of the job."""
    tokenizer, job = load_tokenizer("pico"), Job.parse(name, "finetune")
    text, spent = default_text("evaluation")[:40_000], []
    for steps in (2, 2, 8):  # the first of which warms up
        model = fresh_model(LlamaConfig.from_pretrained(directory), 0)
        if job.scheme is not None:
            quantize(model, job.scheme)
        settings = {"steps": steps, "batch": batch, "window": window, "lean": lean}
        began = time.process_time()
        finetune(model, tokenizer, text, str(job.method), optimizer=job.optimizer, **settings)
        spent.append(time.process_time() - began)
    return (spent[2] - spent[1]) / 6


def compared_time(directory: Path, name: str, window: int, lean: bool) -> dict[str, Any]:
    """The step of a job of two rows, planned and measured."""
    ask: dict[str, Any] = {"methods": name, "window": window, "lean": lean, "device": "cpu"}
    (said,) = run(str(directory), memory="1TB", batch=2, **ask)["methods"]
    real = apart(timed, directory, name, 2, window, lean)
    row = {"size": directory.name, "method": name, "window": window, "lean": lean, "planned": said["seconds"]}
    return row | {"measured": real, "ratio": said["seconds"] / real}


def compared(directory: Path, name: str, window: int, lean: bool, edge: bool) -> dict[str, Any]:
    """A job of two rows, planned and measured; with `edge`, also the largest that fits, and one row more."""
    ask: dict[str, Any] = {"methods": name, "window": window, "lean": lean, "device": "cpu"}
    began = time.perf_counter()
    (said,) = run(str(directory), memory="1TB", batch=2, **ask)["methods"]
    seconds = time.perf_counter() - began
    real = apart(measured, directory, name, 2, window, lean)
    row = {"size": directory.name, "method": name, "window": window, "lean": lean, "planned": said["peak_bytes"]}
    row |= {"measured": real, "ratio": said["peak_bytes"] / real, "plan_seconds": seconds}
    if edge:
        memory = 2 * said["least_bytes"]
        (told,) = run(str(directory), memory=f"{memory}B", **ask)["methods"]
        batch = told["batch"]
        here, more = (apart(measured, directory, name, b, window, lean) for b in (batch, batch + 1))
        row["edge"] = {"memory": memory, "batch": batch, "measured": here, "measured_with_one_more": more}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--windows", type=int, nargs="*", default=(128, 256))
    parser.add_argument("--seconds", action="store_true", help="compare the time of a step, not its memory")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/weft-plan"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.seconds:
        timings(args)
        return
    rows = []
    print(
        f"{'size':<6}{'method':<14}{'window':>7}{'lean':>6}{'planned MB':>12}{'measured MB':>13}{'ratio':>8}",
        flush=True,
    )
    for size in args.sizes:
        directory = args.scratch / size
        shaped(size, load_tokenizer("pico"), max(args.windows)).save_pretrained(directory)
        for name, window, lean in ((n, w, lean) for n in JOBS for w in args.windows for lean in (True, False)):
            edge = lean and window == min(args.windows) and size == args.sizes[0]
            row = compared(directory, name, window, lean, edge)
            rows.append(row)
            mega = (f"{row[key] / 1e6:>{wide}.1f}" for key, wide in (("planned", 12), ("measured", 13)))
            print(f"{size:<6}{name:<14}{window:>7}{lean!s:>6}{''.join(mega)}{row['ratio']:>8.3f}", flush=True)
            if edge:
                print("      edge:", {key: value for key, value in row["edge"].items()}, flush=True)
        path = written(rows, args.output)
    print(f"worst ratio {max((r['ratio'] for r in rows), key=lambda r: abs(r - 1)):.3f}; written to {path}")


def timings(args: argparse.Namespace) -> None:
    """Compare the time of steps."""
    rows = []
    for size in (size for size in args.sizes if size != "35m"):
        directory = args.scratch / size
        shaped(size, load_tokenizer("pico"), max(args.windows)).save_pretrained(directory)
        for name, window in itertools.product((*JOBS, "dora"), args.windows):
            rows.append(compared_time(directory, name, window, True))
            row = rows[-1]
            print(f"{size:<6}{name:<14}{window:>7}{row['planned']:>9.3f}{row['measured']:>9.3f}{row['ratio']:>7.2f}")
    rates = rates_of(torch.device("cpu"), 1)
    measured = {"product": rates.product(torch.float32), "bandwidth": rates.bandwidth, "call": rates.call}
    path = written(rows, args.output, "plan_seconds_cpu.json", {"rates": measured | {"factor": rates.factor}})
    errors = sorted(abs(row["ratio"] - 1) for row in rows)
    print(f"error {statistics.median(errors):.0%} (median), {errors[-1]:.0%} at most; written to {path}")


def written(rows: list[dict[str, Any]], output: Path, name: str = "plan_cpu.json", more: Any = ()) -> Path:
    """The file of what is measured so far."""
    record: dict[str, Any] = {"rows": rows, "dtype": "float32", "torch": torch.__version__, **dict(more)}
    record |= {"device": platform.processor() or platform.machine()}
    path = output / name
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
