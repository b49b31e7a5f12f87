"""What a plan says of compression is what it holds; methods that a plan cannot know are told apart."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.memory.live import Live
from weft.verbs import plan_compress
from weft.verbs.compress import compress
from weft.verbs.plan import run

WINDOW, BATCHES, ROWS = 64, 8, 4


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=4,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def directory(config, tmp_path_factory):
    place = tmp_path_factory.mktemp("planned")
    config.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("method", ["kfac-svd", "int8"])
def test_a_plan_from_three_blocks_is_what_five_hold(config, directory, method):
    (said,) = run(directory, memory="1GB", task="compress", methods=method, window=WINDOW, device="cpu")["methods"]
    model = LlamaForCausalLM(copy.deepcopy(config)).eval()
    ids = torch.randint(600, (BATCHES, ROWS, WINDOW), generator=torch.Generator().manual_seed(0))
    with Live() as live:
        weights = live.count([*model.parameters(), *model.buffers()])
        pass
        compress(model, method, batches=[{"input_ids": rows} for rows in ids])
    assert said["weights"] == weights
    assert said["peak_bytes"] == pytest.approx(live.peak, rel=0.05)
    left = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert said["disk"] == pytest.approx(left, rel=0.02)
    assert (said["statistics"] > 0) == (method == "kfac-svd")


def test_what_follows_from_values_or_takes_columns_one_by_one_is_not_planned(directory, monkeypatch):
    ask = {"memory": "1GB", "task": "compress", "window": 16, "device": "cpu"}
    (row,) = run(directory, methods="wanda", **ask)["methods"]
    assert row["peak_bytes"] is None and "depends on values" in row["reason"]
    monkeypatch.setattr(plan_compress._Bounded, "left", 100)
    (row,) = run(directory, methods="svd", **ask)["methods"]
    assert "too many small steps" in row["reason"]


def test_what_does_not_fit_is_refused(directory):
    with pytest.raises(WeftError, match="compress takes at least .* by int8"):
        run(directory, memory="300KB", task="compress", methods="int8", window=16, device="cpu")
