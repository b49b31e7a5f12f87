"""Perplexity of every compression method under every allocation and budget, on one model, one calibration set, one
held-out text.

    python benchmarks/compression_table.py MODEL [--budgets 0.9 0.8 0.7 0.6 0.5] [--windows 32] [--window 512]
        [--seed 0] [--steps] [--sequential] [--json FILE]

MODEL is a directory, a Hub id or `pico`. Calibration: windows of the Python standard library; evaluation: the first 24
windows of its held-out files. The statistics are collected once, each method factorises once, and every allocation
spends each budget on those same factors. `--steps` adds the rows that lie between `best` and `lems-search`: each takes
one more of the steps of `lems` (its measured point, its depth factor, its integer program, its search). Rows of other
methods and allocations that FILE holds already are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.allocate import ALLOCATIONS, Budget, greedy, lems
from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.methods import METHODS
from weft.methods.base import LowRankSplit
from weft.runs.loading import load_model, load_tokenizer
from weft.runs.pieces import Store
from weft.stats.calibrate import calibrate
from weft.terms.layers import linear_layers
from weft.train.windows import calibration_batches
from weft.verbs.compress import compress
from weft.verbs.divergence import divergence
from weft.verbs.evaluate import evaluate
from weft.verbs.placing import measure, one_shot
from weft.verbs.survey import Plan, offered, survey

COMPRESS = [m.name for m in METHODS.values() if m.kind == "compress" and isinstance(m.split, LowRankSplit)]
OWN = {"asvd": "asvd", "lems": "kfac-svd", "lems-search": "kfac-svd"}
"""Allocations that cost a forward pass a layer and more, with the method that they are measured on."""


def main() -> None:
    args = arguments()
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
    stats = calibrate(model, data, needs, cache=args.cache)
    seconds = {"calibration, all statistics": time.perf_counter() - began}
    dense = perplexity(model)
    print(f"dense {dense:.3f}; calibration {seconds['calibration, all statistics']:.1f} s", flush=True)

    rows = []
    for method in methods:
        for row in allocated(model, method, args, data, stats, perplexity, seconds):
            rows.append(row)
            show(row, args.budgets)
            write(args, dense, rows, seconds)
    for name in ("svd-llm", "kfac-svd") if args.sequential else ():
        rows.append(walked(model, name, data, stats, perplexity, args.budgets, seconds))
        show(rows[-1], args.budgets)
        write(args, dense, rows, seconds)
    for name, value in seconds.items():
        print(f"{name}: {value:.1f} s")
    print("best worse than uniform:", losses(rows) or "nowhere")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", default=COMPRESS)
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", action="store_true", help="add what each step of lems buys, on kfac-svd")
    parser.add_argument(
        "--sequential", action="store_true", help="add kfac-svd and svd-llm walked sequentially (minutes a row)"
    )
    parser.add_argument("--cache", type=Path, help="a directory for the statistics")
    parser.add_argument("--json", type=Path, help="write the table here")
    return parser.parse_args()


def allocated(
    model: Any, method: Any, args: argparse.Namespace, data: Any, stats: Any, perplexity: Any, seconds: Any
) -> Iterator[dict[str, Any]]:
    """The rows of one method: its factors under every allocation."""
    reads = ("spectrum", "weight_spectrum", "losses", "measure")
    plan = Plan(method=method, options=method.options({}), layers=tuple(linear_layers(model)), reads=reads)
    store = Store()
    began = time.perf_counter()
    infos = survey(model, plan, offered(model, plan), data, stats, store)
    seconds[f"factorisation, {method.name}"] = time.perf_counter() - began
    tools = {
        "measure": cached(measure(model, plan, data, store)),
        "divergence": timed(divergence(model, plan, data, store), f"divergences, {method.name}", seconds),
    }
    for name, allocate in allocations(method.name, args, tools).items():
        row: dict[str, Any] = {"method": method.name, "allocate": name, "perplexity": {}}
        for budget in args.budgets:
            allowed = Budget(budget).allowed([info.shape for info in infos.values()], other_bytes=0)
            try:
                chosen = allocate(infos, allowed)
            except WeftError as error:
                row["perplexity"][str(budget)] = str(error)
                continue
            compressed = copy.deepcopy(model)
            one_shot(compressed, plan, {layer: choice.size for layer, choice in chosen.items()}, store)
            row["perplexity"][str(budget)] = perplexity(compressed)
        yield row


def allocations(method: str, args: argparse.Namespace, tools: Any) -> dict[str, Callable[[Any, int], Any]]:
    """Those asked for by name, the costly ones for one method only; and the steps of lems."""
    found: dict[str, Callable[[Any, int], Any]] = {}
    for name in args.allocations:
        if name in OWN and OWN[name] != method:
            continue
        if name == "lems" and args.steps:
            found["lems: point"] = lambda infos, allowed: by_greedy(infos, allowed, tools["divergence"], gamma=0.0)
            found["lems: point, depth"] = lambda infos, allowed: by_greedy(infos, allowed, tools["divergence"], 5.0)
            found["lems: point, program"] = lambda infos, allowed: lems.allocate(
                infos, allowed, divergence=tools["divergence"], gamma=0.0
            )
        extra = {read: tools[read] for read in ALLOCATIONS[name].reads if read in tools}
        found[name] = lambda infos, allowed, name=name, extra=extra: ALLOCATIONS[name].allocate(  # type: ignore[misc]
            infos, allowed, **extra
        )
    return found


def by_greedy(infos: Any, allowed: int, diverge: Any, gamma: float) -> Any:
    """The curves of lems spent by the greedy of `best`."""
    factors = lems.depth_factors((info.depth for info in infos.values()), 0.0, gamma)
    curves = {
        name: [choice._replace(loss=choice.loss * factors[infos[name].depth]) for choice in curve]
        for name, curve in lems.calibrated(infos, diverge).items()
    }
    found = greedy.solve(curves, allowed)
    if found is None:
        raise WeftError("The smallest sizes exceed the budget.")
    return found


def cached(measure: Any) -> Any:
    @cache
    def once(name: str, sizes: tuple[int, ...]) -> list[float]:
        found: list[float] = measure(name, sizes)
        return found

    return lambda name, sizes: once(name, tuple(sizes))


def timed(function: Any, what: str, seconds: dict[str, float]) -> Any:
    """The function, its seconds added up."""

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        found = function(*args)
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - began
        return found

    return call


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
    print(f"{row['method']:22} {row['allocate']:20} {shown}", flush=True)


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """Where `best` gave a higher perplexity than `uniform`."""
    by = {(row["method"], row["allocate"]): row["perplexity"] for row in rows}
    return [
        f"{method} at {budget}: {best[budget]:.3f} against {by[method, 'uniform'][budget]:.3f}"
        for (method, allocation), best in by.items()
        if allocation == "best" and (method, "uniform") in by
        for budget in best.keys() & by[method, "uniform"].keys()
        if best[budget] > by[method, "uniform"][budget]
    ]


def write(args: argparse.Namespace, dense: float, rows: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    """The report so far, with what the file held of other rows and budgets; another seed's rows go to its "draws"."""
    if not args.json:
        return
    ours = {**environment(args), "dense": dense, "rows": rows, "seconds": seconds}
    before = json.loads(args.json.read_text()) if args.json.is_file() else ours
    args.json.write_text(json.dumps(merged(before, ours), indent=2) + "\n")


def merged(before: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """One report of two."""
    seed = ours["arguments"]["seed"]
    if seed != before["arguments"]["seed"]:
        draws = before.get("draws", {})
        return {**before, "draws": {**draws, str(seed): joined(draws.get(str(seed), []), ours["rows"])}}
    report = {**before, **ours, "rows": joined(before["rows"], ours["rows"])}
    for name in ("budgets", "methods", "allocations"):
        there = list(dict.fromkeys([*before["arguments"][name], *ours["arguments"][name]]))
        report["arguments"] |= {name: sorted(there, reverse=True) if name == "budgets" else there}
    report |= {"seconds": {**before["seconds"], **ours["seconds"]}, "best_worse_than_uniform": losses(report["rows"])}
    return report


def joined(before: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both, by method and allocation; where both measured a budget, ours."""
    rows = {(row["method"], row["allocate"]): row for row in before}
    for row in ours:
        old = rows.get((row["method"], row["allocate"]), row)
        rows[row["method"], row["allocate"]] = {**row, "perplexity": {**old["perplexity"], **row["perplexity"]}}
    return list(rows.values())


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
        "arguments": {key: value for key, value in vars(args).items() if key not in ("json", "cache", "model")}
        | {"model": Path(args.model).name},
    }


if __name__ == "__main__":
    main()
