"""Chosen entries with two processes: the same choice on both, from the gradients of both, and under FSDP2 as alone."""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.methods.moving import moving_terms
from tests.processes import context
from weft.io.adapters import save_adapter
from weft.methods import METHODS
from weft.rules import Rules
from weft.testing_adapters import adapted, task
from weft.verbs.adapt import make_optimizer, rules

WORLD = 2
LIFT = {"filter_rank": 1, "interval": 1}
SFT = {"interval": 3, "phase": 2}


def steps(model: nn.Module, inner: nn.Module, optimizer: torch.optim.Optimizer, part: slice, count: int) -> None:
    """Train on a part of each batch."""
    rule = Rules(rules(inner))
    rule.bind(optimizer)
    rule.start(inner, steps=100)
    model.train()
    for step in range(1, count + 1):
        model(**{key: tensor[part] for key, tensor in task()[step % 4].items()}).loss.backward()
        rule.before_step(inner, step)
        optimizer.step()
        rule.after_step(inner, step)
        optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": tensor.detach().clone()
        for layer, term in moving_terms(model, "default").items()
        for name, tensor in term.state_dict().items()
    }


def sharded_lift(rank: int, directory: Path) -> None:
    """Three moves under FSDP2 end where they end alone, and the file holds all of it."""
    alone, sharded = adapted(METHODS["lift"], **LIFT), adapted(METHODS["lift"], **LIFT)
    for block in sharded.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (WORLD,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
    for model in (alone, sharded):
        trained = [p for p in model.parameters() if p.requires_grad]
        steps(model, model, torch.optim.AdamW(trained, lr=0.05, eps=1e-3, weight_decay=0.0), slice(None), 3)
    save_adapter(sharded, directory / "lift", format="weft")
    saved = load_file(directory / "lift" / "weft_adapter.safetensors")
    for name, tensor in state_of(alone).items():
        layer, _, key = name.rpartition(".")
        torch.testing.assert_close(saved[f"{layer}.main.{key}"], tensor, rtol=1e-3, atol=1e-5)
    assert any(len(t) for name, t in saved.items() if name.endswith("settled")), "nothing has moved"


def replicated_sft(rank: int, directory: Path) -> None:
    """Each process sees half of every batch; both choose what was seen by both."""
    model = adapted(METHODS["sft"], **SFT)
    half = slice(rank * 2, rank * 2 + 2)
    wrapped = DistributedDataParallel(model)
    steps(wrapped, model, make_optimizer(model, 1e-2), half, 5)
    torch.save({"state": state_of(model)}, directory / f"sft{rank}.pt")


def worker(rank: int, directory: str, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    try:
        for case in (sharded_lift, replicated_sft):
            case(rank, Path(directory))
            results[(case.__name__, rank)] = ""
            dist.barrier()
    except Exception:
        results[("failed", rank)] = traceback.format_exc()
        raise SystemExit(1) from None
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes() -> Any:
    with tempfile.TemporaryDirectory() as directory, context().Manager() as manager:
        results = manager.dict()
        processes = [context().Process(target=worker, args=(rank, directory, results)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.is_alive():
                process.kill()
        files = [Path(directory) / f"sft{rank}.pt" for rank in range(WORLD)]
        states = [torch.load(file, weights_only=True)["state"] for file in files if file.is_file()]
        yield dict(results), states


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
@pytest.mark.parametrize("case", ["sharded_lift", "replicated_sft"])
def test_two_processes(case: str, outcomes: Any) -> None:
    results, _ = outcomes
    assert all(results.get((case, rank)) == "" for rank in range(WORLD)), results


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_both_processes_choose_the_same_entries(outcomes: Any) -> None:
    first, second = outcomes[1]
    start = state_of(adapted(METHODS["sft"], **SFT))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in first.items() if name.endswith("positions"))
