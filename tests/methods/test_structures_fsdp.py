"""Rules and optimizers of pre-training in structure do on two processes (FSDP2) what they do on one."""

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
from transformers import LlamaConfig, LlamaForCausalLM

from tests.processes import together
from weft.rules import Rules
from weft.train.optimizers import make_optimizer
from weft.verbs.fresh import Structure, restructure

CASES: list[tuple[str, int | None, dict[str, Any], str]] = [
    ("trp", None, {"energy": 0.8, "every": 2}, "adamw"),
    ("pela", None, {"ratio": 1.5}, "adamw"),
    ("spdf", None, {"sparsity": 0.5}, "adamw"),
    ("nm-gradient-flow", None, {}, "adamw"),
    ("sst", 8, {"every": 2}, "adamw"),
    ("maestro", None, {"every": 2, "threshold": 0.3}, "adamw"),
    ("low-rank", 8, {}, "spectron"),
]


def plain() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def losses(structure: Structure, optimizer: str, mesh: Any = None) -> list[float]:
    """Of five steps, on the same batch in every process."""
    model = plain()
    original = structure.original(model)
    restructure(model, structure)
    if mesh is not None:
        shard(model, mesh)
    rule = Rules(structure.rules(model, 0, original))
    made, found = make_optimizer(optimizer, model, 3e-3, 0.0, 0, {}), []
    rule.bind(made)
    rule.start(model.train(), steps=6)
    ids = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(1))
    for step in range(1, 6):
        loss = model(input_ids=ids, labels=ids).loss
        rule.update(model, made, loss, step)
        found.append(float(loss.detach()))
    return found


def shard(model: nn.Module, mesh: Any) -> None:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, size, options, optimizer in CASES:
        structure = Structure.of(name, size, options)
        alone, sharded = losses(structure, optimizer), losses(structure, optimizer, mesh)
        torch.testing.assert_close(sharded, alone, rtol=1e-4, atol=0, msg=f"{name}: {sharded}, alone {alone}")
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_processes_follow_one(tmp_path: Path) -> None:
    together(worker, str(tmp_path))
