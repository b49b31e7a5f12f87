"""Rules that grow, freeze, gate and penalise do on two processes (FSDP2), by their optimizers, what they do on one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.processes import together
from weft.methods import METHODS
from weft.rules import Rules
from weft.testing_adapters import adapted, task
from weft.verbs.adapt import make_optimizer, rules

OPTIONS: dict[str, dict[str, Any]] = {
    "sora": {"xi": 0.05, "penalty": 0.1},
    "increlora": {"warmup": 0, "interval": 1, "ramp": 2},
    "lamda": {"steps": 4, "eta": 0.6},
    "lora-ggpo": {"sigma": 0.3},
    "ce-ssl": {"p": 0.5},
    "deft": {"eps": 1e-2},
}


def losses(model: nn.Module) -> list[float]:
    """Of four steps by the method's own optimizer, on the same batches in every process."""
    rule, optimizer, found = Rules(rules(model)), make_optimizer(model, 1e-2), []
    rule.bind(optimizer)
    rule.start(model, steps=100)
    for step in range(1, 5):
        torch.manual_seed(step)
        loss = model.train()(**task()[step % 4]).loss
        rule.update(model, optimizer, loss, step)
        found.append(float(loss.detach()))
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, options in OPTIONS.items():
        alone, sharded = adapted(METHODS[name], **options), adapted(METHODS[name], **options)
        for block in sharded.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        expected, got = losses(alone), losses(sharded)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0, msg=f"{name}: {got}, alone {expected}")
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_processes_follow_one(tmp_path: Path) -> None:
    together(worker, str(tmp_path))
