"""The methods that are a rule during training, in the Trainer: lean, checkpointed, in micro-batches, interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weft.methods import METHODS
from weft.testing_adapters import adapted, task
from weft.train.examples import Example
from weft.train.packing import rows
from weft.train.recipe import Recipe
from weft.train.trainer import train
from weft.verbs.adapt import make_optimizer, rules

STEPS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "sora": {"xi": 0.05, "penalty": 0.1},
    "allora": {},
    "dylora": {},
    "increlora": {"warmup": 0, "interval": 1, "ramp": 2},
    "lamda": {"steps": STEPS, "eta": 0.6},
    "lora-ggpo": {"sigma": 0.3},
    "ce-ssl": {"p": 0.5},
    "deft": {"eps": 1e-2},
}


def go(name: str, directory: Path, **settings: Any) -> nn.Module:
    model = adapted(METHODS[name], **OPTIONS[name])
    recipe = Recipe(
        **{"steps": STEPS, "lr": 1e-2, "window": 16, "batch": 2, "accumulate": 2, "save_every": 2, **settings}
    )
    examples = [Example(ids, torch.ones(16, dtype=torch.bool)) for batch in task() for ids in batch["input_ids"]]
    directory.mkdir(exist_ok=True)
    train(
        model,
        rows(examples, 16),
        recipe,
        directory,
        optimizer=lambda: make_optimizer(model, recipe.lr),
        rules=rules(model),
    )
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_an_interrupted_run_ends_on_the_same_bytes(name: str, tmp_path: Path) -> None:
    whole = go(name, tmp_path / "a").state_dict()
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    resumed = go(name, tmp_path / "b").state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    start = adapted(METHODS[name], **OPTIONS[name]).state_dict()
    assert not all(torch.equal(whole[key], start[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_checkpointing_changes_nothing_but_rounding(name: str, tmp_path: Path) -> None:
    plain, again = go(name, tmp_path / "a"), go(name, tmp_path / "b", checkpointing=True)
    for (key, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=key)
