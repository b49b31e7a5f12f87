"""Held-out loss of every optimizer after the same steps on the same tokens, each at its own learning rate.

    python benchmarks/pretrain_table.py                                    # 9m on two CPU cores, some 15 minutes
    python benchmarks/pretrain_table.py --device cuda --size 60m --steps 10000 --batch 512 --window 256 --refresh 200 \\
        --text TEXT --tokenizer MODEL

Learning rates lie on the lattice centre * step^k; from the published centre the search goes on while a neighbour is
better, so the chosen rate beats both its neighbours (at most --tries runs an optimizer; a rate at the edge is marked).
Then GaLore with the warm-started subspace runs against the exact SVD at one rate, with several seeds: the difference is
to be smaller than the spread over seeds. Data: Python's own sources unless --text is given; loss on held-out ones.
Writes benchmarks/results/pretrain_table_<device>_<size>_<steps>[_structures|_precision].json.

Structures in the place of matrices, each over seeds at its tuned rate, and beside it plain low rank at the rank that
takes the same bytes (weights, gradients, moments):

    python benchmarks/pretrain_table.py --structures --tries 3             # an hour; it goes on where it was stopped
    python benchmarks/pretrain_table.py --structures --tries 1 --steps 500 --rates FILE    # at the rates of that table

The same of weights and moments in fewer bits, all at one rate:

    python benchmarks/pretrain_table.py --precision --batch 4
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from search import tuned
from torch import nn

from weft.embedded.text import calibration_files, default_text
from weft.errors import WeftError
from weft.runs.loading import load_tokenizer
from weft.terms import TrainedFloat
from weft.train.callback import RULES_FILE
from weft.train.recipe import Recipe
from weft.train.sizes import SIZES
from weft.train.sources import read_texts, source_files
from weft.verbs.fresh import Structure
from weft.verbs.pretrain import build, pretrain

Row = tuple[float, dict[str, Any]]
Run = Callable[[str, float, int], dict[str, Any]]  # (name, learning rate, seed) -> loss, bytes, seconds

WARM, EXACT = "GaLore, warm-started", "GaLore, exact SVD"
PLAIN = "low rank, AdamW"


def optimizers(rank: int, density: float, refresh: int) -> dict[str, tuple[float, dict[str, Any]]]:
    """Name -> (published learning rate, arguments of `pretrain` and of the optimizer)."""
    subspace = {"rank": rank, "refresh": refresh}
    return {
        "AdamW": (1e-3, {"optimizer": "adamw"}),
        # the control: GaLore's two rates (embeddings and head at lr, matrices at a quarter of it) without a projection
        "AdamW, GaLore's rates": (1e-2, {"optimizer": "galore", "rank": rank, "projection": "identity"}),
        WARM: (1e-2, {"optimizer": "galore", **subspace}),
        EXACT: (1e-2, {"optimizer": "galore", **subspace, "projection": "svd"}),
        "Fira": (1e-2, {"optimizer": "fira", **subspace}),
        "FRUGAL": (
            1e-3,
            {"optimizer": "frugal", "rank": density, "refresh": refresh, "projection": "columns", "side": "short"},
        ),
        "APOLLO": (1e-2, {"optimizer": "apollo", **subspace}),
        "DCT-AdamW": (1e-3, {"optimizer": "dct_adamw", "rank": rank}),
        "SinkGD": (2e-2, {"optimizer": "sinkgd"}),
        "Muon": (1e-3, {"optimizer": "muon"}),
        "SCALE": (1e-3, {"optimizer": "scale"}),
    }


def structures(rank: int) -> dict[str, tuple[float, dict[str, Any]]]:
    """The same of what is trained in the place of dense matrices, the references first."""

    def under(structure: str, rank: int | None = None, optimizer: str = "adamw", **options: Any) -> dict[str, Any]:
        return {"optimizer": optimizer, "structure": (structure, rank, options)}

    return {
        "AdamW": (1e-3, {"optimizer": "adamw"}),
        "Muon": (1e-3, {"optimizer": "muon"}),
        "SCALE": (1e-3, {"optimizer": "scale"}),
        PLAIN: (1e-3, under("low-rank", rank)),
        "low rank, Spectron": (1e-3, under("low-rank", rank, "spectron")),
        "SLTrain": (3e-3, under("sltrain", rank)),
        "LOST": (1e-3, under("lost", rank)),
        "CoLA": (1e-3, under("cola", rank)),
        "SST": (1e-3, under("sst", rank)),
        "Maestro": (1e-3, under("maestro")),
        "Monarch": (1e-3, under("monarch", blocks=4)),
        "SPDF, sparse phase": (1e-3, under("spdf")),
        "N:M gradient flow, 2:4": (1e-3, under("nm-gradient-flow")),
        "TRP, from scratch": (1e-3, under("trp")),
        "weight compander": (1e-3, under("weight-compander")),
        "BitNet b1.58": (1e-3, under("bitnet-1.58")),
        "iFairy": (1e-3, under("ifairy")),
    }


def precisions() -> dict[str, tuple[float, dict[str, Any]]]:
    """The same of weights and moments in fewer bits: AdamW throughout."""
    half: dict[str, Any] = {"dtype": torch.bfloat16}
    return {
        "fp32": (1e-3, {"optimizer": "adamw"}),
        "fp32, moments in a dynamic code of 8 bits": (1e-3, {"optimizer": "adamw_8bit"}),
        "fp32, moments in float8": (1e-3, {"optimizer": "adamw_fp8"}),
        "bf16, rounded to the nearest": (1e-3, {"optimizer": "adamw_fp8", **half}),
        "bf16, rounded at random": (1e-3, {"optimizer": "adamw_fp8", "rounding": "stochastic", **half}),
        "float8 (dqt), the rest fp32": (1e-3, {"optimizer": "adamw_fp8", "structure": ("dqt", None, {})}),
        "float8 (dqt), the rest bf16, rounded at random": (
            1e-3,
            {"optimizer": "adamw_fp8", "rounding": "stochastic", "structure": ("dqt", None, {}), **half},
        ),
    }


def held_bytes(model: nn.Module) -> int:
    """Weights, and the gradients of what is trained."""
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    codes = [m for m in model.modules() if isinstance(m, TrainedFloat)]
    held += sum(m.in_features * m.out_features * m.carrier.element_size() for m in codes)
    return held + sum(p.nbytes for p in model.parameters() if p.requires_grad)


def runner(args: argparse.Namespace, table: dict[str, Row]) -> Run:
    """One training run of the table; a diverged one has an infinite loss."""
    tokenizer = load_tokenizer(args.tokenizer)
    files = source_files(args.text) if args.text else calibration_files()
    held_out = read_texts(args.eval_text) if args.eval_text else [default_text("evaluation")]

    @functools.cache
    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        options = dict(table[name][1])
        structure = Structure.of(*options.pop("structure")) if "structure" in options else None
        dtype = options.pop("dtype", torch.float32)
        model, _ = build(args.size, tokenizer, args.window, seed, structure=structure, dtype=dtype)
        held = held_bytes(model)
        recipe = Recipe(
            steps=args.steps, lr=lr, window=args.window, batch=args.batch, warmup=args.steps // 10, clip=0.0,
            save_every=args.steps, log_every=args.steps, seed=seed,
        )  # fmt: skip
        began, worked = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = pretrain(
                    model.to(args.device), tokenizer, files, recipe, Path(scratch), evaluation=held_out,
                    eval_windows=args.eval_windows, structure=structure, **options,
                )  # fmt: skip
            except WeftError as error:
                if "not finite" not in str(error):
                    raise
                found = {"perplexity": math.inf, "optimizer_bytes": 0, "parameters": 0}
            rules = sum(file.stat().st_size for file in Path(scratch).glob(f"*-{args.steps}/{RULES_FILE}"))
        loss = math.log(found["perplexity"])
        result = {"lr": lr, "loss": loss if loss == loss else math.inf}
        result |= {key: found[key] for key in ("optimizer_bytes", "parameters")}
        result["bytes"] = held + found["optimizer_bytes"] + rules  # weights, gradients, moments
        result["seconds"], result["processor_seconds"] = time.perf_counter() - began, time.process_time() - worked
        print(
            f"  {name:<24} lr {lr:<9.3g} seed {seed}  loss {result['loss']:.4f}  {result['seconds']:.1f} s", flush=True
        )
        return result

    return run


def seeds_of(lr: float, seeds: int, run: Run) -> dict[str, Any]:
    """Warm-started against exact at one rate: losses by seed, their differences, and the spread over seeds."""
    losses = {name: [run(name, lr, seed)["loss"] for seed in range(seeds)] for name in (EXACT, WARM)}
    differences = [warm - exact for warm, exact in zip(losses[WARM], losses[EXACT], strict=True)]
    spread = statistics.stdev(losses[EXACT])
    mean = statistics.fmean(differences)
    return {
        "lr": lr, "losses": losses, "differences": differences, "mean_difference": mean, "seed_spread": spread,
        "within_seed_noise": mean < spread,
    }  # fmt: skip


def over_seeds(name: str, row: dict[str, Any], seeds: int, run: Run) -> dict[str, Any]:
    """The losses of a row at its rate, the seed that it was tuned on first."""
    return {**row, "losses": [run(name, row["lr"], seed)["loss"] for seed in range(seeds)]}


def equal_bytes(row: dict[str, Any], args: argparse.Namespace, table: dict[str, Row], run: Run, lr: float) -> Any:
    """Plain low rank at the rank whose weights, gradients and moments take the bytes of the row; None where even its
    smallest takes more. Ranks end where the factors have as many numbers as the matrix.
    """
    width = SIZES[args.size][0]
    low, high = (run(named(rank, table), lr, 0)["bytes"] for rank in (width // 8, width // 4))
    rank = width // 8 + round((row["bytes"] - low) * (width // 8) / (high - low))
    if rank < 1:
        return None
    rank = min(rank, width // 2)
    found = run(named(rank, table), lr, 0)
    return {"rank": rank, **over_seeds(named(rank, table), found, args.seeds, run)}


def named(rank: int, table: dict[str, Row]) -> str:
    """The name of plain low rank at another rank, a row of its own."""
    if rank == table[PLAIN][1]["structure"][1]:
        return PLAIN
    name = f"low rank {rank}, AdamW"
    table[name] = (table[PLAIN][0], {"optimizer": "adamw", "structure": ("low-rank", rank)})
    return name


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="9m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, help="default: a quarter of the model's width, as published")
    parser.add_argument("--refresh", type=int, default=25)
    parser.add_argument("--grid", type=float, default=3.0, help="the factor between two learning rates")
    parser.add_argument("--tries", type=int, default=5, help="most learning rates an optimizer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--structures", action="store_true", help="the rows of what stands in the place of matrices")
    parser.add_argument("--precision", action="store_true", help="the rows of weights and moments in fewer bits")
    parser.add_argument("--rates", type=Path, help="a table of fewer steps, at whose rates the search begins")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokenizer", default="pico")
    parser.add_argument("--text", type=Path, nargs="*")
    parser.add_argument("--eval-text", type=Path, nargs="*")
    parser.add_argument("--eval-windows", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser


def main() -> None:
    args = arguments().parse_args()
    rank = args.rank or SIZES[args.size][0] // 4
    kind = "_structures" if args.structures else "_precision" if args.precision else ""
    path = args.output / f"pretrain_table_{args.device}_{args.size}_{args.steps}{kind}.json"
    args.output.mkdir(exist_ok=True)
    record = seeds_table(args, rank, path) if kind else optimizers_table(args, rank)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['seconds']:.0f} s; written to {path}")


def chosen(args: argparse.Namespace, table: dict[str, Row]) -> list[str]:
    return [n for n in table if not args.only or any(part.lower() == n.lower() for part in args.only)]


def optimizers_table(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    table = optimizers(rank, rank / SIZES[args.size][0], args.refresh)
    run, began, rows = runner(args, table), time.perf_counter(), {}
    for name in chosen(args, table):
        rows[name] = tuned(table[name][0], args.grid, args.tries, lambda lr, name=name: run(name, lr, 0))
    both = {WARM, EXACT} <= rows.keys() and args.seeds > 1
    compared = seeds_of(rows[EXACT]["lr"], args.seeds, run) if both else None
    show(rows, compared)
    found = {**environment(args), "rank": rank, "rows": rows, "warm_against_exact": compared}
    return {**found, "seconds": time.perf_counter() - began}


def seeds_table(args: argparse.Namespace, rank: int, path: Path) -> dict[str, Any]:
    """Every row tuned, over seeds, and plain low rank at its bytes; kept after each row, so that a run goes on."""
    found = {**environment(args), "rank": rank, "rows": {}, "seconds": 0.0}
    if path.exists() and (before := json.loads(path.read_text()))["arguments"] == found["arguments"]:
        found = before
    table = structures(rank) if args.structures else precisions()
    rates = {} if args.rates is None else {n: r["lr"] for n, r in json.loads(args.rates.read_text())["rows"].items()}
    run, rows = runner(args, table), found["rows"]
    for name in chosen(args, table):
        if name in rows:
            continue
        began = time.perf_counter()
        tries = 1 if args.precision else args.tries
        row = tuned(rates.get(name, table[name][0]), args.grid, tries, lambda lr, name=name: run(name, lr, 0))
        rows[name] = over_seeds(name, row, args.seeds, run)
        if PLAIN in rows and name != PLAIN:
            rows[name]["plain"] = equal_bytes(row, args, table, run, rows[PLAIN]["lr"])
        found["seconds"] += time.perf_counter() - began
        path.write_text(json.dumps(found, indent=1) + "\n")
    show(rows, None)
    return found


def show(rows: dict[str, Any], compared: dict[str, Any] | None) -> None:
    print(f"\n{'optimizer':<26}{'lr':>9}{'loss':>9}{'perplexity':>12}{'state MB':>10}")
    for name, row in rows.items():
        numbers = f"{row['loss']:>9.4f}{math.exp(row['loss']):>12.2f}{row['optimizer_bytes'] / 1e6:>10.2f}"
        print(f"{name:<26}{row['lr']:>9.2g}{numbers}{'   (edge of the grid)' if row['at_the_edge'] else ''}")
    if compared is not None:
        differences = ", ".join(f"{d:+.4f}" for d in compared["differences"])
        verdict = "within" if compared["within_seed_noise"] else "ABOVE"
        print(
            f"\nwarm-started minus exact at lr {compared['lr']:.2g}, by seed: {differences}; "
            f"mean {compared['mean_difference']:+.4f}, {verdict} the spread over seeds, {compared['seed_spread']:.4f}"
        )


def environment(args: argparse.Namespace) -> dict[str, Any]:
    given = {k: v for k, v in vars(args).items() if k not in ("output", "text", "eval_text", "tokenizer", "rates")}
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "date": date.today().isoformat(),
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "arguments": given | {"text": "given" if args.text else "the Python standard library"},
    }


if __name__ == "__main__":
    main()
