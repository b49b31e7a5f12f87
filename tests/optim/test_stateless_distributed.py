"""SinkGD, sign, gradient noise and zeroth-order training: two processes follow one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim import stateless_worker as worker
from tests.processes import together

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("stateless")
    together(worker.process, str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", worker.MAKE)
def test_sharded_and_replicated_runs_follow_one_process(ranks: list[dict[str, Any]], name: str, kind: str) -> None:
    model = worker.Model()
    worker.train(model, worker.MAKE[name](model))
    for ours, theirs in zip(worker.whole(model), ranks[0][f"{name} {kind}"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_zeroth_order_processes_share_scalars_and_stay_equal(ranks: list[dict[str, Any]]) -> None:
    weights, log = worker.train_blind()
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["mezo"], ranks[1]["mezo"], strict=True))
    torch.testing.assert_close(ranks[0]["log"], log, rtol=1e-4, atol=1e-8)
    for ours, theirs in zip(weights, ranks[0]["mezo"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sharded_weights_are_refused_by_zeroth_order(ranks: list[dict[str, Any]]) -> None:
    assert "is sharded" in ranks[0]["refusal"]
