"""The standing checks on a GPU, in order of worth, within a time.

    python benchmarks/gpu.py --minutes 9 --out DIR
    python benchmarks/gpu.py --dry-run --out DIR     # tiny shapes on a CPU

Every step is a process of its own, ended when its share of the time that is left is spent. Each figure is a line of
DIR/gpu.jsonl as soon as it is known. What fails is recorded with its error, a peer that is not installed as absent.
The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PEERS = {"peft", "galore_torch", "apollo_torch", "bitsandbytes", "cut_cross_entropy"}
Item = Callable[[str, Callable[[], dict[str, Any]]], None]


def write(path: Path, row: dict[str, Any]) -> None:
    """One line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps(row), flush=True)


def record(path: Path, step: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Run one item of a step and write what came of it."""
    began, row = time.perf_counter(), {"step": step, "item": name}
    try:
        row |= {"status": "measured", **work()}
    except Exception as error:  # the next item goes on, whatever this one met
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in PEERS
        row |= {"status": "absent" if absent else "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    write(path, row | {"seconds": time.perf_counter() - began})


def kernels_step(item: Item, dry: bool, device: str) -> None:
    import kernels

    for name, case in kernels.cases("tiny" if dry else "large", device).items():
        item(name, case)


def optimizer_step(item: Item, dry: bool, device: str) -> None:
    import optim_step
    from shapes import SIZES

    shape, dtype = SIZES["tiny" if dry else "1b"], torch.float32 if dry else torch.bfloat16
    slow = [] if dry else [["weft galore, compiled"], ["weft apollo, compiled"], ["weft fira, compiled"]]
    alone = [["AdamW (torch, fused)"], ["weft galore"], ["weft apollo"], ["weft fira"]]
    in_turn = [["weft apollo", "apollo-torch"], ["weft galore", "galore-torch"]]
    for names in [*alone, *in_turn, *slow]:
        refreshes = 0 if "galore-torch" in names else 2  # it takes most of a minute for one: cold against cold
        measure = functools.partial(optim_step.measure, shape, shape.rank, dtype, device, 3 if dry else 10, names)
        item(" and ".join(names), functools.partial(measure, refreshes))


def lora_step(item: Item, dry: bool, device: str) -> None:
    import finetune_step

    size, dtype, place = "tiny" if dry else "1.3b", torch.float32 if dry else torch.bfloat16, torch.device(device)
    measure = functools.partial(
        finetune_step.measure, size, finetune_step.SHAPES[size], dtype, place, 1, 2 if dry else 20
    )
    for name, wrap in finetune_step.VARIANTS.items():
        item(name, lambda name=name, wrap=wrap: measure({name: wrap})[name])
    item("all in turn", lambda: finetune_step.in_turn(size, dtype, place, 1, 2 if dry else 20))


def factorisation_step(item: Item, dry: bool, device: str) -> None:
    import factorisation

    for out, inn in [(32, 48)] if dry else [(2048, 2048), (4096, 4096), (4096, 11008)]:
        rank = int(0.6 * out * inn / (out + inn))
        for name, work in factorisation.contenders(out, inn, rank, torch.device(device)).items():
            item(f"{out}x{inn}, {name}", lambda work=work: {"ms": 1e3 * factorisation.measured(work, 3, device)[0]})


def layers_step(item: Item, dry: bool, device: str) -> None:
    import layers

    dtype, cold = (torch.float32, 10**4) if dry else (torch.bfloat16, layers.COLD)
    for shape in layers.SHAPES["tiny" if dry else "large"]:
        for kind in layers.KINDS:
            item(f"{shape[0]}x{shape[1]}, {kind}", functools.partial(layers.measure, kind, shape, dtype, device, cold))


def training_step(item: Item, dry: bool, device: str) -> None:
    import pretrain_table as table

    given = ["--size", "9m", "--steps", "3", "--window", "16", "--batch", "2", "--eval-windows", "2"]
    if not dry:
        given = ["--size", "60m", "--steps", "300", "--window", "256", "--batch", "32", "--refresh", "100"]
    args = table.arguments().parse_args([*given, "--device", device])
    width = table.SIZES[args.size][0]
    every = table.optimizers(width // 4, 0.25, args.refresh)
    run = table.runner(args, every)
    for name in ("AdamW", table.WARM):
        item(name, lambda name=name: {"tokens": args.steps * args.window * args.batch, **run(name, every[name][0], 0)})


def structures_step(item: Item, dry: bool, device: str) -> None:
    import pretrain_step as structures

    size, rank, batch, window, names = "60m", 128, 32, 256, structures.METHODS
    if dry:
        size, rank, batch, window, names = "9m", 8, 1, 16, structures.METHODS[1:3]
    ids = torch.arange(batch * window, device=device).view(batch, window) % structures.WORDS
    item("in turn", lambda: structures.measure(names, size, rank, ids, 2 if dry else 10))


def devices_step(item: Item, dry: bool, device: str) -> None:
    import devices

    for name, work in itertools.islice(devices.cases(), 1 if dry else None):
        item(name, functools.partial(devices.compare, work, device))


STEPS: dict[str, tuple[float, Callable[[Item, bool, str], None]]] = {  # name -> share of the time, work
    "kernels": (1.0, kernels_step),
    "optimizer steps": (3.0, optimizer_step),
    "LoRA step": (2.0, lora_step),
    "factorisation": (1.0, factorisation_step),
    "layers": (1.0, layers_step),
    "training": (2.0, training_step),
    "structures": (0.8, structures_step),
    "methods": (1.5, devices_step),
}


def work(name: str, path: Path, dry: bool) -> None:
    """A step, in its process."""
    if dry:
        torch.set_num_threads(1)
    STEPS[name][1](functools.partial(record, path, name), dry, "cpu" if dry else "cuda")


def bounded(name: str, path: Path, dry: bool, limit: float) -> None:
    """Run a step for at most `limit` seconds, and write how it ended."""
    process = multiprocessing.get_context("fork" if dry else "spawn").Process(target=work, args=(name, path, dry))
    began = time.perf_counter()
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        process.kill()
        process.join()
    status = "out of time" if late else "done" if process.exitcode == 0 else "failed"
    row: dict[str, Any] = {"step": name, "status": status, "exit_code": process.exitcode, "limit_s": limit}
    write(path, row | {"seconds": time.perf_counter() - began})


def setting(dry: bool) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "transformers", "weft", *sorted(peer.replace("_", "-") for peer in PEERS)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    device = platform.processor() or platform.machine() if dry else torch.cuda.get_device_name()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"step": "setting", "date": now, "device": device, "cuda": torch.version.cuda, "versions": versions,
            "python": platform.python_version(), "dry_run": dry}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    path = args.out / "gpu.jsonl"
    if path.exists():
        parser.error(f"{path} holds results already; give another --out.")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run checks everything on a CPU.")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run and args.minutes:  # what steps import, once: they are forked
        steps = ("devices", "finetune_step", "kernels", "layers", "optim_step", "pretrain_step", "pretrain_table")
        for module in (*steps, "peft"):
            importlib.import_module(module)
    end = time.perf_counter() + 60 * args.minutes
    write(path, setting(args.dry_run))
    shares = {name: share for name, (share, _) in STEPS.items()}
    for name in STEPS:
        left = end - time.perf_counter()
        bounded(name, path, args.dry_run, max(0.0, left) * shares[name] / sum(shares.values()))
        del shares[name]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sys.exit(any(row.get("status") == "failed" for row in rows))


if __name__ == "__main__":
    main()
