"""What each of two gloo processes does for test_stateless_distributed.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import weft.optim as wo

STEPS = 20


class Model(nn.Module):
    """Two blocks, one with a number of rows that two does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)])
        self.head = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = 0.4 * torch.randn(p.shape, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0](x).tanh()))


def noisy_sgd(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wo.add_gradient_noise(optimizer, eta=0.3, scale="relative")
    return optimizer


MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sinkgd": wo.sinkgd,
    "sign": wo.sign,
    "noise": noisy_sgd,
}


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This process's half of the step's eight examples."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x[rank::world], y[rank::world]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world: int = 1) -> None:
    for step in range(STEPS):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def train_blind(rank: int = 0, world: int = 1) -> tuple[list[Tensor], Tensor]:
    """Zeroth-order steps; the weights and the log."""
    model = Model()
    optimizer = wo.mezo(model, lr=1e-2, samples=2)
    for step in range(STEPS):
        x, y = batch(step, rank, world)
        optimizer.step(lambda x=x, y=y: nn.functional.mse_loss(model(x), y))
    return whole(model), optimizer.log().differences


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def work(rank: int, world: int, out: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, object] = {}
    for name, make in MAKE.items():
        sharded = fully_shard(Model(), mesh=mesh)
        train(sharded, make(sharded), rank, world)
        results[f"{name} fsdp"] = whole(sharded)
        replica = Model()
        train(DistributedDataParallel(replica), make(replica), rank, world)
        results[f"{name} ddp"] = whole(replica)
    results["mezo"], results["log"] = train_blind(rank, world)
    try:
        wo.mezo(fully_shard(Model(), mesh=mesh))
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save(results, out / f"rank{rank}.pt")


def process(rank: int, folder: str) -> None:
    """One of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work(rank, 2, Path(folder))
    dist.destroy_process_group()
