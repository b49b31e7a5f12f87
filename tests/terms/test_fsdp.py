"""FSDP2 on two processes trains every kind of term as one process does, and gathers the same state."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from tests.processes import together
from weft.terms import TERMS, SumLinear
from weft.testing import example

OUT, IN, STEPS = 12, 8, 3


class AllKinds(nn.Module):
    """One layer of each kind of term, each beside a low-rank one, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for number, kind in enumerate(TERMS):
            terms = {"own": example(kind, number), "low_rank": example("low_rank", 100 + number)}
            self.layers[kind] = SumLinear(terms, torch.linspace(-1, 1, OUT) if number % 2 else None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers.values()]).tanh().mean(0)


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = 24  # as many as a sum that is built for the moment asks for, on each process
    return torch.randn(rows, IN, generator=generator), torch.randn(rows, OUT, generator=generator)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sharded = AllKinds()
    for layer in sharded.layers.values():
        fully_shard(layer)
    fully_shard(sharded)
    x, y = data()
    train(sharded, x.chunk(2)[rank], y.chunk(2)[rank])
    local = {name: p.to_local().numel() for name, p in sharded.named_parameters()}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(sharded, options=whole)
    fresh = AllKinds()
    for layer in fresh.layers.values():
        fully_shard(layer)
    set_model_state_dict(
        fresh,
        copy.deepcopy(state) if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    again = get_model_state_dict(fresh, options=whole)
    if rank == 0:
        torch.save({"state": state, "again": again, "local": local}, f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("fsdp")
    together(worker, str(folder))
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone() -> AllKinds:
    model = AllKinds()
    train(model, *data())
    return model


@pytest.mark.distributed
@pytest.mark.parametrize("kind", TERMS)
def test_two_processes_equal_one(kind: str, result: dict[str, dict[str, Tensor]], alone: AllKinds) -> None:
    start = AllKinds().layers[kind].state_dict()
    moved = 0
    for name, expected in alone.layers[kind].state_dict().items():
        key = f"layers.{kind}.{name}"
        torch.testing.assert_close(result["state"][key], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(result["again"][key], result["state"][key]), "loading what was gathered changed it"
        moved += not torch.equal(expected, start[name])
    assert moved >= 2, "training changed hardly anything"


@pytest.mark.distributed
def test_each_process_holds_half(result: dict[str, dict[str, Tensor]], alone: AllKinds) -> None:
    whole = sum(p.numel() for p in alone.parameters())
    assert sum(result["local"].values()) < 0.6 * whole
