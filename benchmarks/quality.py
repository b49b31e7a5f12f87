"""Is the quality of a compressed model predicted before it is compressed?

    python benchmarks/quality.py MODEL... --text FILE [--json FILE]

weft        the rise of the loss in nats a token that `weft inspect --data` predicts, by nothing but the statistics of
            the first half of the text
published   the share that is removed times the mean stable rank (Xu, 2026, arXiv 2604.18085), which needs a line that
            is fitted to other runs: here, for each run, the one through 0 and all other runs of its method (by least
            squares of the logarithms, which judges it by what it is judged by)

Both are held against the rise that is measured on the second half, of kfac-svd with the ranks that the allocation
`best` takes, and, for the second, of svd with uniform ranks too. The error is the factor between the two, as a median
and at most; beside it stand Pearson's correlations, which is what was published.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import weft
from weft.runs.loading import load_model, load_tokenizer
from weft.stats.calibrate import calibrate, mean_loss
from weft.train.sources import read_texts
from weft.train.windows import calibration_batches
from weft.verbs.inspect import inspect
from weft.verbs.moments import UNIT


def runs(name: str, texts: Sequence[str], windows: int, window: int) -> list[dict[str, Any]]:
    """Predictions and what came of them, of one model."""
    model, tokenizer, text = load_model(name, dtype="float32"), load_tokenizer(name), "\n\n".join(texts)
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    seen, judged = (calibration_batches(tokenizer, [half], windows=windows, window=window, batch=1) for half in halves)
    whole, report = mean_loss(model, judged), inspect(model, "*layers*", batches=seen)
    stats = calibrate(model, seen, UNIT, layers=[matrix.name for matrix in report.matrices])
    rows = []
    for one in report.outlook:
        for method in ("kfac-svd", "svd"):
            other = copy.deepcopy(model)
            weft.compress(other, method, layers="*layers*", budget=one.keep, batches=seen, stats=stats)
            row = {"model": Path(name).name, "method": method, "keep": one.keep, "score": one.score}
            rows.append(row | {"predicted": one.loss, "rise": mean_loss(other, judged) - whole})
            print(rows[-1], flush=True)
    return rows


def scaled(rows: Sequence[dict[str, Any]]) -> list[float]:
    """What the published score predicts of each run, by the line of all others."""
    logs = [math.log(row["rise"] / row["score"]) for row in rows]
    return [row["score"] * math.exp(statistics.fmean(logs[:i] + logs[i + 1 :])) for i, row in enumerate(rows)]


def errors(predicted: Sequence[float], real: Sequence[float]) -> dict[str, float]:
    """Factors between the two, and their correlation."""
    factors = sorted(math.exp(abs(math.log(p / r))) for p, r in zip(predicted, real, strict=True))
    pearson = statistics.correlation(predicted, real)
    return {"n": len(real), "median_factor": statistics.median(factors), "most": factors[-1], "pearson": pearson}


def main() -> None:
    """Print the errors of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for name in args.models for row in runs(name, read_texts(args.text), args.windows, args.window)]
    rows = [row for row in rows if row["rise"] > 0]
    found = {}
    for method in ("kfac-svd", "svd"):
        own = [row for row in rows if row["method"] == method]
        rises = [row["rise"] for row in own]
        found[f"published, {method}"] = errors(scaled(own), rises)
        if method == "kfac-svd":
            found["weft, kfac-svd"] = errors([row["predicted"] for row in own], rises)
    for name, one in found.items():
        print(name, {key: round(value, 2) for key, value in one.items()})
    if args.json:
        settings = {"text": Path(args.text).name, "windows": args.windows, "window": args.window}
        settings |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"settings": settings, "errors": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
