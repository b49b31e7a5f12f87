"""The plan of a step's memory: the parts of a real step, without one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from weft.cli import app
from weft.errors import WeftError
from weft.memory import lean
from weft.memory.live import Live
from weft.plan import BLOCKS
from weft.plan.step import planned, step_bytes
from weft.train.modes import checkpointing
from weft.train.optimizers import make_optimizer
from weft.train.recipe import Recipe
from weft.verbs.fresh import Structure, restructure
from weft.verbs.pretrain import run

RECIPE = Recipe(window=64, batch=4)


def model(method: str | None, layers: int = 4, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    return made if method is None else restructure(made, Structure.of(method))


@pytest.mark.parametrize(
    ("method", "optimizer", "tied"),
    [(None, "adamw", True), ("sltrain", "adamw", False), ("lost", "muon", False), ("low-rank", "galore", True)],
)
def test_the_plan_is_what_a_step_holds(method, optimizer, tied):
    options = {"rank": 4} if optimizer == "galore" else {}

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(optimizer, model, 1e-3, 0.0, 0, options)

    with torch.device("meta"):
        empty = model(method, tied=tied)
    said = planned(empty, make, RECIPE)
    whole = lean(model(method, tied=tied).train())
    ids = torch.randint(500, (RECIPE.batch, RECIPE.window), generator=torch.Generator().manual_seed(0))
    real = step_bytes(whole, make(whole), ids)
    trained = 4 * sum(p.numel() for p in whole.parameters())
    assert said["weights_bytes"] == real["weights_bytes"] >= trained
    assert said["gradients_bytes"] == pytest.approx(trained, rel=0.001)
    for part in ("gradients_bytes", "moments_bytes", "activations_bytes", "peak_bytes"):
        assert said[part] == pytest.approx(real[part], rel=0.05), part
    parts = [value for name, value in said.items() if name not in ("peak_bytes", "parameters")]
    assert min(parts) >= 0 and (sum(parts) == said["peak_bytes"] or not said["workspace_bytes"])


def test_a_plan_knows_that_activations_are_computed_again():
    with torch.device("meta"):
        empty = model(None)
    recipe = Recipe(window=64, batch=4, checkpointing=True, lean=False)
    said = planned(empty, lambda m: make_optimizer("adamw", m, 1e-3, 0.0, 0, {}), recipe)
    whole = model(None).train()
    optimizer = make_optimizer("adamw", whole, 1e-3, 0.0, 0, {})
    with checkpointing(whole, True):
        real = step_bytes(whole, optimizer, torch.zeros(RECIPE.batch, RECIPE.window, dtype=torch.long))
    for part in ("activations_bytes", "peak_bytes"):
        assert said[part] == pytest.approx(real[part], rel=0.02), part


def test_a_plan_computes_in_half_precision_where_the_run_does():
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return make_optimizer("adamw", model, 1e-3, 0.0, 0, {})

    recipe, found = Recipe(window=64, batch=4, autocast=True), {}
    for half in (True, False):
        with torch.device("meta"):
            empty = model(None)
        found[half] = planned(empty, make, replace(recipe, autocast=half))
    whole = lean(model(None).train())
    whole.forward = torch.autocast("cpu", torch.bfloat16)(whole.forward)
    real = step_bytes(whole, make(whole), torch.zeros(4, 64, dtype=torch.long))
    for part in ("activations_bytes", "peak_bytes"):
        assert found[True][part] == pytest.approx(real[part], rel=0.05), part
    assert found[True]["activations_bytes"] < 0.9 * found[False]["activations_bytes"]


@pytest.mark.parametrize("method", [None, "low-rank"])
def test_no_more_blocks_are_run_of_a_deeper_model(monkeypatch, method):
    passed = []
    block = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **rest: passed.append(1) or block(*args, **rest))
    counts = set()
    for layers in (4, 12):
        with torch.device("meta"):
            empty = model(method, layers)
        planned(empty, lambda m: make_optimizer("adamw", m, 1e-3, 0.0, 0, {}), RECIPE)
        counts.add(len(passed))
        passed.clear()
    assert counts == {2 * BLOCKS["training"]}, "two passes over these blocks"


def test_live_counts_a_storage_once_and_as_long_as_it_is_there():
    with Live() as live:
        x = torch.zeros(100)
        y = x.view(10, 10)[2:]
        assert live.now == 400
        z = x * 2
        assert live.now == live.peak == 800
        del z
        assert live.now == 400 and live.peak == 800
        del x
        assert live.now == 400, "a view holds its storage"
        del y
        assert live.now == 0


def test_the_exact_call():
    line = "pretrain --size 9m --method sltrain --rank 64 --plan --json --window 64 --batch 1"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["method"] == "sltrain" and said["rank"] == 64 and said["weights_bytes"] > 4 * said["parameters"]
    assert said["moments_bytes"] == pytest.approx(8 * said["parameters"], rel=0.01)


def test_a_method_whose_rules_read_values_is_planned():
    """The draw of maestro's rule, and the start of lost's factors, ask for values that a plan's tensors lack."""
    assert run(size="9m", method="maestro", plan=True, window=32, batch=1)["peak_bytes"] > 0


def test_without_a_plan_there_must_be_a_directory():
    with pytest.raises(WeftError, match="Give the directory to write: -o OUT"):
        run(steps=2)
