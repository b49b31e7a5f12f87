"""Do fitted intervals hold planted laws? A hundred draws of noisy runs each, and the share whose interval holds.

    python benchmarks/scaling_fit.py --bootstrap 40 --out benchmarks/results/scaling_fit.json

Asked: 95 of 100, for the floor and every exponent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np

from weft.scaling import fit

CASES = {
    "12 runs, 3 decades of tokens, noise 0.3 %": ({"tokens": np.logspace(6, 9, 12)}, 0.003),
    "12 runs, 3 decades of tokens, noise 1 %": ({"tokens": np.logspace(6, 9, 12)}, 0.01),
    "16 runs, parameters and tokens, noise 0.3 %": (
        dict(zip(("parameters", "tokens"), np.array(list(itertools.product(
            np.logspace(7, 9.5, 4), np.logspace(8.5, 11, 4)))).T, strict=True)), 0.003,
    ),
}  # fmt: skip
TRUE = {"floor": 1.7, "tokens": 0.28, "parameters": 0.34}
SCALE = {"tokens": 420.0, "parameters": 400.0}


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100, help="laws a case")
    parser.add_argument("--bootstrap", type=int, default=100, help="resamplings a fit, from which its interval is")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = {}
    for name, (quantities, noise) in CASES.items():
        began, held, width = time.perf_counter(), Counter[str](), Counter[str]()
        loss = TRUE["floor"] + sum(SCALE[q] / x ** TRUE[q] for q, x in quantities.items())
        for draw in range(given.draws):
            noisy = loss * np.exp(noise * np.random.default_rng(draw).standard_normal(len(loss)))
            for what, (low, high) in fit(quantities, noisy, draws=given.bootstrap, seed=draw).intervals.items():
                held[what] += low <= TRUE[what] <= high
                width[what] += (high - low) / given.draws
        found[name] = {"held": dict(held), "mean_width": dict(width), "of": given.draws}
        print(f"{name}: {dict(held)} of {given.draws}, {time.perf_counter() - began:.0f} s", flush=True)
    if given.out:
        record = {
            "device": platform.processor() or platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
            "bootstrap": given.bootstrap,
            "cases": found,
        }
        given.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
