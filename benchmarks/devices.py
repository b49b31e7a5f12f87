"""Every registered method on a GPU beside a CPU: the same small model, seeds and batches; the losses must agree.

    python benchmarks/devices.py --json FILE            # on a GPU
    python benchmarks/devices.py --device cpu           # the CPU beside itself, which checks this script

A compressed model has one loss, a trained one that of every step. What a device draws for itself (dropout) differs, so
trained models are compared at their start and must then learn as well. Each method is a line of FILE; the exit status
is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weft
from weft.errors import WeftError
from weft.grafts import GRAFTS
from weft.methods import METHODS, Method
from weft.optim import OPTIMIZERS
from weft.rules import Rules
from weft.testing_adapters import task, tiny_llama
from weft.verbs.adapt import adapt, make_optimizer, rules
from weft.verbs.fresh import Structure, restructure

Losses = Callable[[str], list[float]]  # device -> losses

STEPS = 6
BUDGETS = {"compress": 0.6, "compensate": "12 bits"}
OPTIONS: dict[str, dict[str, Any]] = {"sltrain": {"density": 0.1}, "lost": {"density": 0.25}, "lst": {"reduction": 2}}
"""What so small a model needs."""
CODES = {"pv-tuning": "rtn", "tiny-training": "rtn"}
"""What is trained as codes, and whose they are."""


def batches(device: str) -> list[dict[str, torch.Tensor]]:
    return [{key: value.to(device) for key, value in batch.items()} for batch in task()]


def mean_loss(model: nn.Module, device: str) -> float:
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches(device)) / len(task())


def trained(model: nn.Module, optimizer: Any, given: list[Any], device: str) -> list[float]:
    """The losses of some steps with a method's rules."""
    rule, losses, data = Rules(given), [], batches(device)
    rule.bind(optimizer)
    rule.start(model, steps=20)
    model.train()
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        loss = model(**data[0]).loss
        rule.update(model, optimizer, loss, step)
        losses.append(float(loss.detach()))
    return losses


def compressed(method: Method, device: str) -> list[float]:
    model = tiny_llama().to(device)
    chain: list[Any] = ["nf2", method] if method.kind == "compensate" else [method]
    try:
        weft.compress(model, chain, budget=BUDGETS.get(method.kind), batches=batches(device))
    except WeftError as error:
        if "several sizes" not in str(error):
            raise
        weft.compress(model, chain, budget="7 bits", batches=batches(device))
    return [mean_loss(model, device)]


def adapted(method: Method, device: str) -> list[float]:
    base = tiny_llama().to(device)
    stats = weft.calibrate(base, batches(device), method.needs) if method.needs else None
    model = adapt(base, method, 4, stats=stats, seed=3)
    losses = trained(model, make_optimizer(model, 5e-3), rules(model), device)
    if "merges" not in method.exempt:
        model.eval()
        before = mean_loss(model, device)
        weft.merge_adapter(model)
        merged = mean_loss(model, device)
        assert abs(merged - before) < 1e-3 * before, f"merged {merged}, before {before}"
    return losses


def structured(method: Method, device: str) -> list[float]:
    model = tiny_llama().to(device)
    structure = Structure.of(method, 4 if method.ranked else None, OPTIONS.get(method.name, {}))
    if method.name in CODES:
        weft.compress(model, CODES[method.name], budget="6 bits", batches=batches(device))
    original = structure.original(model)
    restructure(model.cpu(), structure)
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    return trained(model, optimizer, structure.rules(model, 0, original), device)


def optimised(record: Any, device: str) -> list[float]:
    model = tiny_llama().to(device)
    options: dict[str, Any] = {"rank": 0.25} if record.ranked and record.by_size else {}
    optimizer = record(model, lr=record.rate if record.backward else 1e-2, **options)
    if record.backward:
        return trained(model, optimizer, [], device)
    data = batches(device)
    return [float(optimizer.step(lambda: model(**data[0]).loss)) for _ in range(STEPS)]


def grafted(name: str, device: str) -> float:
    return mean_loss(weft.adapt(tiny_llama().to(device), name, **OPTIONS.get(name, {})), device)


def cases() -> Iterator[tuple[str, Losses]]:
    kinds = {"compress": compressed, "quantize": compressed, "compensate": compressed, "adapt": adapted}
    for name, method in METHODS.items():
        work = {**kinds, "pretrain": structured, "train": structured}.get(method.kind)
        if work is not None and method.split is not None:
            yield f"{method.kind} {name}", lambda device, work=work, method=method: work(method, device)
    for name, record in OPTIMIZERS.items():
        if not record.loop:
            yield f"optimizer {name}", lambda device, record=record: optimised(record, device)
    for name in GRAFTS:
        yield f"graft {name}", lambda device, name=name: [grafted(name, device)]


def compare(work: Losses, device: str) -> dict[str, Any]:
    """The losses of both devices; raises AssertionError where they differ."""
    began = time.perf_counter()
    here, there = work("cpu"), work(device)
    row = {"cpu": here, device: there, "seconds": time.perf_counter() - began}
    assert all(loss == loss for loss in there), f"not a number: {row}"
    assert abs(here[0] - there[0]) <= 5e-3 * abs(here[0]), f"the first loss differs: {row}"
    fell = here[0] - here[-1]
    assert fell <= 0 or there[0] - there[-1] >= 0.5 * fell, f"the loss does not fall as on the CPU: {row}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    failed = 0
    for name, work in cases():
        if not any(part in name for part in args.only):
            continue
        row: dict[str, Any] = {"item": name}
        try:
            row |= {"status": "agrees", **compare(work, args.device)}
        except Exception as error:  # the next goes on, whatever this one met
            failed += 1
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:1500]}
        print(json.dumps(row), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
