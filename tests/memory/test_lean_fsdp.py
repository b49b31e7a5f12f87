"""Two processes, FSDP2: a lean sharded model has the gradients of the whole one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.processes import together
from weft.memory import lean

pytestmark = pytest.mark.distributed


def _worker(rank, folder, home):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    spec = importlib.util.spec_from_file_location("models", home)
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for order in ("lean, then shard", "shard, then lean", "head sharded alone"):
            for adapted in (True, False):
                model = models.make_model("llama")
                model = models.put_on(model) if adapted else model
                plain, expected = models.train_step(model)
                model.zero_grad()
                if order.startswith("lean"):
                    lean(model)
                for block in model.model.layers:
                    fully_shard(block)
                if order.startswith("head"):
                    fully_shard(model.lm_head)
                fully_shard(model)
                output, grads = models.train_step(lean(model))
                torch.testing.assert_close(output.loss, plain.loss)
                assert (output.logits is None) is (not order.startswith("head"))
                grads = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
                models.assert_same(grads, expected, 1e-5)
        if rank == 0:
            (Path(folder) / "passed").touch()
    finally:
        dist.destroy_process_group()


def test_gradients_of_a_sharded_model(tmp_path):
    home = str(Path(__file__).with_name("conftest.py"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    together(_worker, str(tmp_path), home)
    assert (tmp_path / "passed").exists()
