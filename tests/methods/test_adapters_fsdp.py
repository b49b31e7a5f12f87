"""Every adapter method under FSDP2: two processes train to the same numbers as one, and what is saved contains every
shard.
"""

from __future__ import annotations

import json
import os
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
from torch.distributed.tensor import DTensor

from tests.processes import context
from weft.io.adapters import save_adapter
from weft.io.base import Base, base_of
from weft.methods import METHODS, Method
from weft.rules import Rules
from weft.terms.adapters import find_adapter
from weft.testing_adapters import adapted, task
from weft.verbs.adapt import parameter_groups, rules, trainable

ADAPTERS = [name for name, method in METHODS.items() if method.kind == "adapt"]
WORLD = 2


def two_steps(model: nn.Module) -> list[float]:
    """Two steps of SGD (Adam would magnify rounding) with the method's rules, on the same batches in every process."""
    rule = Rules(rules(model))
    optimizer = torch.optim.SGD(parameter_groups(model, 0.05))
    rule.bind(optimizer)
    rule.start(model, steps=100)
    losses = []
    for step in (1, 2):
        torch.manual_seed(step)
        loss = model.train()(**task()[step]).loss
        rule.update(model, optimizer, loss, step)
        losses.append(float(loss.detach()))
    return losses


def check(method: Method, directory: Path) -> None:
    alone, sharded = adapted(method), adapted(method)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in trainable(sharded).parameters.values())
    expected, got = two_steps(alone), two_steps(sharded)
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=1e-4), f"losses {got}, alone {expected}"
    path = directory / method.name
    save_adapter(sharded, path, format="weft")
    saved = load_file(path / "weft_adapter.safetensors")
    written = json.loads((path / "weft_adapter.json").read_text())["base"]
    assert Base.from_json(written).samples == base_of(alone, find_adapter(alone).terms).samples, (
        "fingerprint of a shard"
    )
    own = _own(alone)
    assert own.keys() <= saved.keys(), "tensors are missing from the file"
    for name, tensor in own.items():
        assert saved[name].shape == tensor.shape, f"{name} is a shard of shape {tuple(saved[name].shape)}"
        assert torch.allclose(saved[name], tensor, rtol=1e-3, atol=1e-5), f"{name} differs"


def _own(model: nn.Module) -> dict[str, Tensor]:
    found = find_adapter(model)
    return {
        name.replace(".terms.default.", ".main.").replace(".terms.default_", "."): p.detach()
        for name, p in found.named_parameters()
    }


def worker(rank: int, directory: str, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    for name in ADAPTERS:
        if "fsdp2" in METHODS[name].exempt:
            continue
        try:
            check(METHODS[name], Path(directory))
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        results[(name, rank)] = outcome
        if outcome:  # the other process may be waiting in a collective: this pair is lost
            os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, int], str]:
    with tempfile.TemporaryDirectory() as directory, context().Manager() as manager:
        results = manager.dict()
        processes = [context().Process(target=worker, args=(rank, directory, results)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            if process.is_alive():
                process.kill()
        return dict(results)


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
@pytest.mark.parametrize("name", ADAPTERS)
def test_two_processes(name: str, outcomes: dict[tuple[str, int], str]) -> None:
    if "fsdp2" in METHODS[name].exempt:
        pytest.skip(METHODS[name].exempt["fsdp2"])
    for rank in range(WORLD):
        if outcomes.get((name, rank)):
            pytest.fail(outcomes[(name, rank)])
    failed = sorted({method for (method, _), outcome in outcomes.items() if outcome})
    assert all((name, rank) in outcomes for rank in range(WORLD)), (
        f"not reached; the pair ended in {failed or 'a hang'}"
    )
