"""Two processes follow one: FSDP2 and DDP trajectories, resumed and resharded checkpoints, for every preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.optim import distributed_worker as worker
from tests.processes import together

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of processes for the module; before it, one process trains and saves its checkpoints at halfway."""
    out = tmp_path_factory.mktemp("runs")
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous.1", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in worker.PRESETS:
            model = worker.sharded(name, mesh)
            optimizer = worker.make(name, model)
            worker.train(model, optimizer, range(worker.STEPS // 2))
            worker.save(out / f"{name}.one", model, optimizer)
        together(worker.process, str(out))
        for name in worker.PRESETS:
            model = worker.sharded(name, mesh)
            optimizer = worker.make(name, model)
            worker.load(out / f"{name}.two", model, optimizer)
            worker.train(model, optimizer, range(worker.STEPS // 2, worker.STEPS))
            torch.save(worker.whole(model), out / f"{name}.narrowed.pt")
    finally:
        torch.distributed.destroy_process_group()
    return out


def alone(name: str, **options: Any) -> list[torch.Tensor]:
    """The single-process trajectory."""
    model = worker.Model()
    worker.prepare(name, model)
    optimizer = worker.make(name, model, **options)
    worker.train(model, optimizer, range(worker.STEPS))
    return worker.whole(model)


def far(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x - y).detach().abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", worker.PRESETS)
def test_two_processes_follow_one(name: str, runs: Path) -> None:
    results = torch.load(runs / f"{name}.pt", weights_only=True)
    right = alone(name, side="right")  # what a sharded weight gets: the projection of the unsharded side
    assert far(results["fsdp"], right) < 1e-5
    assert far(results["ddp"], alone(name)) < 1e-5
    assert far(results["resumed"], results["fsdp"]) == 0
    assert far(results["from_one"], right) < 1e-5
    narrowed = torch.load(runs / f"{name}.narrowed.pt", weights_only=True)
    assert far(narrowed, right) < 1e-5
    model = worker.Model()
    worker.prepare(name, model)
    moved = far(right, worker.whole(model))
    assert moved > 1e-3  # it did train


def test_each_process_holds_its_share_of_the_moments(runs: Path) -> None:
    local = torch.load(runs / "galore.pt", weights_only=True)["local_bytes"]
    model = worker.Model()
    optimizer = worker.make("galore", model, side="right")
    worker.train(model, optimizer, range(1))
    states = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp")]
    moments = sum(t.numel() * t.element_size() for t in states)
    replicated = optimizer.state_bytes() - moments  # bases and counters
    assert replicated < local <= replicated + 0.55 * moments
