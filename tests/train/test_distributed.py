"""Two gloo processes train what one does with their batches put together, and save one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import launched
from weft.rules import Rule
from weft.train.recipe import Recipe
from weft.train.trainer import train

from .test_trainer import data, model_of

SETTINGS = {"steps": 4, "lr": 1e-2, "window": 16, "save_every": 2, "log_every": 1}


class Pull(Rule):
    """A penalty, which every process adds and their average must hold once."""

    def penalty(self, model):
        return 0.5 * model.model.layers[0].mlp.up_proj.weight.square().sum()


def go(directory, batch):
    model = model_of()
    recipe = Recipe(**SETTINGS, batch=batch)
    train(model, data(), recipe, directory, optimizer=lambda: torch.optim.AdamW(model.parameters()), rules=[Pull()])
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def process(rank, directory):
    torch.save(go(Path(directory) / "two", batch=2), Path(directory) / f"{rank}.pt")


@pytest.mark.distributed
def test_two_processes_train_what_one_does_with_both_batches(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launched(process, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = go(tmp_path / "one", batch=4)
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, atol=1e-5, rtol=1e-4)
    assert sorted(p.name for p in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
