"""Perplexity of every compression method under every allocation and budget, on one model, one calibration set, one
held-out text.

    python benchmarks/compression_table.py MODEL [--budgets 0.9 0.8 0.7 0.6 0.5] [--windows 32] [--window 512] [--seed
    0] [--sequential]

MODEL is a directory, a Hub id or `pico`. Calibration: windows of the Python standard library; evaluation: the first 24
windows of its held-out files. The statistics are collected once, each method factorises once, and every allocation
spends each budget on those same factors.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.allocate import ALLOCATIONS, Budget
from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.methods import METHODS
from weft.runs.loading import load_model, load_tokenizer
from weft.runs.pieces import Store
from weft.stats.calibrate import calibrate
from weft.terms.layers import linear_layers
from weft.train.windows import calibration_batches
from weft.verbs.compress import compress
from weft.verbs.evaluate import evaluate
from weft.verbs.placing import measure as measuring
from weft.verbs.placing import one_shot
from weft.verbs.survey import Plan, offered, survey

READS = ("spectrum", "weight_spectrum", "losses", "measure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS.values() if m.kind == "compress"])
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sequential", action="store_true", help="add kfac-svd and svd-llm walked sequentially (minutes a row)"
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    held_out = default_text("evaluation")
    data = calibration_batches(
        tokenizer, [default_text("calibration")], windows=args.windows, window=args.window, seed=args.seed
    )

    def perplexity(compressed: Any) -> float:
        return float(evaluate(compressed, tokenizer, held_out, window=args.window, windows=24)["perplexity"])

    methods = [METHODS[name] for name in args.methods]
    needs = {need for method in methods for need in method.needs} | {"input_moment", "output_grad_moment"}
    began = time.perf_counter()
    stats = calibrate(model, data, needs)
    seconds = {"calibration, all statistics": time.perf_counter() - began}
    dense = perplexity(model)
    print(f"dense {dense:.3f}; calibration {seconds['calibration, all statistics']:.1f} s", flush=True)

    rows = []
    for method in methods:
        plan = Plan(method=method, options=dict(method.defaults), layers=tuple(linear_layers(model)), reads=READS)
        store = Store()
        began = time.perf_counter()
        infos = survey(model, plan, offered(model, plan), data, stats, store)
        seconds[f"factorisation, {method.name}"] = time.perf_counter() - began
        measure = cached(measuring(model, plan, data, store))
        for allocation in allocations(method.name, args.allocations):
            row: dict[str, Any] = {"method": method.name, "allocate": allocation, "perplexity": {}}
            for budget in args.budgets:
                extra = {"measure": measure} if "measure" in ALLOCATIONS[allocation].reads else {}
                allowed = Budget(budget).allowed([info.shape for info in infos.values()], other_bytes=0)
                try:
                    chosen = ALLOCATIONS[allocation].allocate(infos, allowed, **extra)
                except WeftError as error:
                    row["perplexity"][str(budget)] = str(error)
                    continue
                compressed = copy.deepcopy(model)
                one_shot(compressed, plan, {name: choice.size for name, choice in chosen.items()}, store)
                row["perplexity"][str(budget)] = perplexity(compressed)
            rows.append(row)
            show(row, args.budgets)
    for name in ("svd-llm", "kfac-svd") if args.sequential else ():
        rows.append(walked(model, name, data, stats, perplexity, args.budgets, seconds))
        show(rows[-1], args.budgets)

    for name, value in seconds.items():
        print(f"{name}: {value:.1f} s")
    report = {
        **environment(args),
        "dense": dense,
        "rows": rows,
        "seconds": seconds,
        "best_worse_than_uniform": losses(rows),
    }
    print("best worse than uniform:", report["best_worse_than_uniform"] or "nowhere")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def allocations(method: str, asked: list[str]) -> list[str]:
    """Those asked for; the sensitivity search, which costs a pass over the text a layer and share, for its own method
    only.
    """
    return [name for name in asked if name != "asvd" or method == "asvd"]


def cached(measure: Any) -> Any:
    @cache
    def once(name: str, ranks: tuple[int, ...]) -> list[float]:
        found: list[float] = measure(name, ranks)
        return found

    return lambda name, ranks: once(name, tuple(ranks))


def walked(
    model: Any, name: str, data: Any, stats: Any, perplexity: Any, budgets: list[float], seconds: Any
) -> dict[str, Any]:
    """The method's own allocation, each layer refactorised on the inputs of the model compressed before it, half its
    drift corrected.
    """
    row: dict[str, Any] = {"method": f"{name}, sequential", "allocate": METHODS[name].allocate, "perplexity": {}}
    for budget in budgets:
        compressed = copy.deepcopy(model)
        done = compress(compressed, name, budget=budget, batches=data, stats=stats, sequential=True, correction=0.5)
        seconds[f"sequential walk, {name}"] = done.seconds["replace"]
        row["perplexity"][str(budget)] = perplexity(compressed)
    return row


def show(row: dict[str, Any], budgets: list[float]) -> None:
    cells = (row["perplexity"][str(b)] for b in budgets)
    shown = "  ".join(f"{cell:8.3f}" if isinstance(cell, float) else "  out of reach" for cell in cells)
    print(f"{row['method']:22} {row['allocate']:8} {shown}", flush=True)


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """Where `best` gave a higher perplexity than `uniform`."""
    by = {(row["method"], row["allocate"]): row["perplexity"] for row in rows}
    return [
        f"{method} at {budget}: {best[budget]:.3f} against {by[method, 'uniform'][budget]:.3f}"
        for (method, allocation), best in by.items()
        if allocation == "best"
        for budget in best
        if best[budget] > by[method, "uniform"][budget]
    ]


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "arguments": {key: value for key, value in vars(args).items() if key not in ("json", "model")}
        | {"model": Path(args.model).name},
    }


if __name__ == "__main__":
    main()
