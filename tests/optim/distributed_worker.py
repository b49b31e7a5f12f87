"""What each of two gloo processes does for test_distributed.py: train and save every preset, sharded or replicated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import weft.optim as wo

STEPS = 50
PRESETS = ["galore", "galore_8bit", "fira", "frugal", "apollo", "apollo_mini", "dct_adamw", "gradnormlorp", "svd"]


class Model(nn.Module):
    """Two blocks whose weights have more rows than columns, fewer, and a number of rows that two does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 33, bias=False), nn.Tanh(), nn.Linear(33, 16)) for _ in range(2)
        )
        self.head = nn.Linear(16, 5)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = 0.4 * torch.randn(p.shape, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This process's half of the step's eight examples."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return x[rank::world], y[rank::world]


def prepare(name: str, model: nn.Module) -> None:
    """What must happen to the model before it is sharded."""
    if name == "gradnormlorp":
        wo.normalize_weights(model, [n for n, _ in wo.split_parameters(model)[0]])


def make(name: str, model: nn.Module, **options: Any) -> Any:
    rank = {"frugal": 0.25, "apollo_mini": 1}.get(name, 4)
    columns = {"projection": "columns"} if name == "frugal" else {}
    if name == "svd":
        return wo.galore(model, rank=rank, lr=1e-3, refresh=20, projection="svd", **options)
    return wo.OPTIMIZERS[name](model, rank=rank, lr=1e-3, refresh=20, **columns, **options)


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def save(directory: Path, model: nn.Module, optimizer: Any) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory)


def load(directory: Path, model: nn.Module, optimizer: Any) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def sharded(name: str, mesh: Any) -> nn.Module:
    model = Model()
    prepare(name, model)
    return fully_shard(model, mesh=mesh)


def work(rank: int, world: int, out: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for name in PRESETS:
        model = sharded(name, mesh)
        optimizer = make(name, model)
        train(model, optimizer, range(STEPS // 2), rank, world)
        save(out / f"{name}.two", model, optimizer)
        train(model, optimizer, range(STEPS // 2, STEPS), rank, world)
        results = {"fsdp": whole(model), "local_bytes": optimizer.state_bytes()}
        again = sharded(name, mesh)
        resumed = make(name, again)
        load(out / f"{name}.two", again, resumed)
        train(again, resumed, range(STEPS // 2, STEPS), rank, world)
        results["resumed"] = whole(again)
        widened = sharded(name, mesh)
        from_one = make(name, widened)
        load(out / f"{name}.one", widened, from_one)
        train(widened, from_one, range(STEPS // 2, STEPS), rank, world)
        results["from_one"] = whole(widened)
        plain = Model()
        prepare(name, plain)
        optimizer = make(name, plain)
        train(DistributedDataParallel(plain), optimizer, range(STEPS), rank, world)
        results["ddp"] = whole(plain)
        if rank == 0:
            torch.save(results, out / f"{name}.pt")


def process(rank: int, folder: str) -> None:
    """One of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous.2", rank=rank, world_size=2)
    work(rank, 2, Path(folder))
    dist.destroy_process_group()
