"""What each of two gloo processes does for test_adaptive_batch.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.optim import AdaptiveBatch

MICRO, STEPS = 2, 12


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return net.double()


def train(net: nn.Module, rank: int = 0, world: int = 1, quiet: bool = False) -> list[dict[str, Any]]:
    """The controller's state after each step; micro-batch number i of a step is process i % world's."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    # so strict that each growth is the bound: one and two processes round other sizes to other multiples
    batch = AdaptiveBatch(net.parameters(), micro=MICRO, start=4, limit=32, eta=0.5, every=2, growth=2.0, beta=0.5)
    states = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for i in range(batch.accumulation * world):
            x = torch.randn(MICRO, 6, generator=generator, dtype=torch.float64)
            y = torch.randn(MICRO, 1, generator=generator, dtype=torch.float64) + x.sum(1, keepdim=True)
            if i % world == rank:
                last = i // world == batch.accumulation - 1
                with net.no_sync() if quiet and not last else nullcontext():  # type: ignore[operator]
                    (nn.functional.mse_loss(net(x), y) / batch.accumulation).backward()
        batch.update()
        optimizer.step()
        states.append(batch.state_dict())
    return states


def work(rank: int, world: int, out: Path) -> None:
    results = {str(quiet): train(DistributedDataParallel(model()), rank, world, quiet) for quiet in (False, True)}
    torch.save(results, out / f"rank{rank}.pt")


def process(rank: int, folder: str) -> None:
    """One of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work(rank, 2, Path(folder))
    dist.destroy_process_group()
