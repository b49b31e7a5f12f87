"""What `weft pretrain --plan` says of a step, against what a real one holds.

    python benchmarks/pretrain_memory.py                      # 9m on a CPU, a minute
    python benchmarks/pretrain_memory.py --size 60m

The plan runs the step on tensors without values; the real one is counted by the same means, storage by storage
(`weft.memory.live.Live`), and the two peaks are to be within 5 %. Writes
benchmarks/results/pretrain_memory_cpu_<size>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from weft.memory import lean
from weft.plan.step import planned, step_bytes
from weft.plan.supposed import Supposed
from weft.runs.loading import load_tokenizer
from weft.train.optimizers import make_optimizer
from weft.train.recipe import Recipe
from weft.train.sizes import SIZES
from weft.verbs.fresh import Structure
from weft.verbs.pretrain import build

METHODS = (
    None, "low-rank", "sltrain", "lost", "cola", "sst", "maestro", "monarch", "weight-compander", "trp", "spdf",
    "nm-gradient-flow", "bitnet-1.58",
)  # fmt: skip


def compared(size: str, method: str | None, recipe: Recipe) -> dict[str, Any]:
    """Planned and measured bytes of a method at a size, with AdamW."""
    tokenizer = load_tokenizer("pico")
    structure = None if method is None else Structure.of(method)

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("adamw", model, recipe.lr, 0.0, 0, {})

    with torch.device("meta"), Supposed():
        empty, _ = build(size, tokenizer, recipe.window, 0, structure=structure)
    said = planned(empty, make, recipe)
    model, _ = build(size, tokenizer, recipe.window, 0, structure=structure)
    lean(model.train())
    ids = torch.randint(len(tokenizer), (recipe.batch, recipe.window), generator=torch.Generator().manual_seed(0))
    real = step_bytes(model, make(model), ids)
    return {"method": method or "dense", "planned": said, "measured": real}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="9m")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = [compared(args.size, method, Recipe(window=args.window, batch=args.batch)) for method in METHODS]
    print(f"{'method':<18}{'planned MB':>12}{'measured MB':>13}{'ratio':>8}")
    for row in rows:
        said, real = row["planned"]["peak_bytes"], row["measured"]["peak_bytes"]
        row["ratio"] = said / real
        print(f"{row['method']:<18}{said / 1e6:>12.1f}{real / 1e6:>13.1f}{row['ratio']:>8.3f}")
    record = {"size": args.size, "window": args.window, "batch": args.batch, "dtype": "float32", "rows": rows}
    record |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    path = args.output / f"pretrain_memory_cpu_{args.size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
