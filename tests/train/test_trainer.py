"""The training loop: order and dropout from (seed, step), penalties, accumulation, checkpoints of changes only."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.digests import tensors_digest
from weft.errors import WeftError
from weft.memory import lean, lean_report
from weft.memory.lesson import Lesson
from weft.rules import Rule
from weft.rules.support import move
from weft.terms import MovingSparse
from weft.train.checkpoints import WEIGHTS_FILE, Changes, last_checkpoint
from weft.train.examples import Example
from weft.train.order import Order, derived_seed
from weft.train.packing import rows
from weft.train.recipe import Recipe
from weft.train.trainer import train


def model_of(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        attention_dropout=dropout, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def data(count=12, window=16):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 61, (length,), generator=generator) for length in range(6, 6 + count)]
    return rows([Example(i, torch.ones(len(i), dtype=torch.bool)) for i in ids], window)


def go(directory, model=None, rule=None, rows_of=None, teacher=None, **settings):
    model = model or model_of()
    recipe = Recipe(**{"steps": 6, "lr": 1e-2, "window": 16, "batch": 2, "save_every": 2, "log_every": 1, **settings})
    directory.mkdir(exist_ok=True)
    log = train(
        model,
        rows_of or data(),
        recipe,
        directory,
        optimizer=lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr),
        rules=[rule] if rule else [],
        teacher=teacher,
    )
    return model, log


def assert_same(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_order_visits_every_row_once_an_epoch_and_depends_on_the_seed_alone():
    order = list(Order(10, 25, seed=3))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and len(order) == 25
    assert order[:10] != order[10:20]
    assert list(Order(10, 25, seed=3)) == order and list(Order(10, 25, seed=4)) != order
    assert list(Order(10, 15, seed=3)) == order[:15]
    assert len({derived_seed(s, t) for s in range(40) for t in range(40)}) == 1600


def test_same_seed_same_weights_and_other_seed_others(tmp_path):
    (a, log), (b, _), (c, _) = go(tmp_path / "a"), go(tmp_path / "b"), go(tmp_path / "c", seed=1)
    assert_same(a, b)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.parametrize("step", [3, 6])
def test_going_on_from_any_checkpoint_gives_the_same_bits(tmp_path, step):
    """With dropout, whose random numbers come from the seed and the step alone: the saved random state is not
    needed.
    """
    whole, log = go(tmp_path / "a", model_of(0.3), save_every=3)
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / f"checkpoint-{step}", tmp_path / "b" / f"checkpoint-{step}")
    (tmp_path / "b" / f"checkpoint-{step}" / "rng_state.pth").unlink()
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    torch.manual_seed(99)
    resumed, again = go(tmp_path / "b", model_of(0.3), save_every=3)
    assert_same(whole, resumed)
    assert [x["loss"] for x in again if "loss" in x] == [x["loss"] for x in log if "loss" in x]


def test_accumulated_batches_are_one_large_batch(tmp_path):
    a, _ = go(tmp_path / "a", batch=4, accumulate=1, steps=3)
    b, _ = go(tmp_path / "b", batch=1, accumulate=4, steps=3)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing_with_frozen_embeddings(tmp_path):
    def frozen():
        model = model_of()
        model.model.embed_tokens.weight.requires_grad_(False)
        return model

    a, _ = go(tmp_path / "a", frozen(), steps=3)
    b, _ = go(tmp_path / "b", frozen(), steps=3, checkpointing=True)
    assert not torch.equal(a.model.layers[0].mlp.up_proj.weight, model_of().model.layers[0].mlp.up_proj.weight)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    assert b.config.use_cache and not b.training


class Watch(Rule):
    """Notes what the memory saver does while training."""

    def before_step(self, model, step):
        self.report = lean_report(model)


@pytest.mark.parametrize("before", [False, True])
def test_training_is_lean_unless_told_otherwise_and_leaves_the_model_as_it_was(tmp_path, before):
    def made():
        return lean(model_of(), on=before)

    on, off = Watch(), Watch()
    a, log = go(tmp_path / "a", made(), on)
    _, plain = go(tmp_path / "b", model_of(), off, lean=False)
    assert on.report.lean["causal_lm"] == 1 and not on.report.left
    assert not off.report.lean
    assert bool(lean_report(a).lean) is before
    for x, y in zip(log, plain, strict=True):
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), abs=1e-4)
    assert a(torch.tensor([[3, 4]])).logits is not None


class Pull(Rule):
    """penalty = strength * ||W||^2 of one weight; notes the gradient it sees."""

    def __init__(self, strength):
        self.strength = strength

    def penalty(self, model):
        return self.strength * model.model.layers[0].mlp.up_proj.weight.square().sum()

    def before_step(self, model, step):
        self.gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (1, 4)])
def test_a_penalty_enters_the_gradient_once_a_step(tmp_path, batch, accumulate):
    kwargs = {"steps": 1, "clip": 0, "batch": batch, "accumulate": accumulate}
    none, some = Pull(0.0), Pull(3.0)
    go(tmp_path / "a", rule=none, **kwargs)
    go(tmp_path / "b", rule=some, **kwargs)
    expected = 2 * 3.0 * model_of().model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(some.gradient - none.gradient, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_weights_are_trained_in_fp32_and_given_back(tmp_path):
    seen = []

    class Look(Rule):
        def before_step(self, model, step):
            seen.append({p.dtype for p in model.parameters() if p.requires_grad})

    model = model_of(dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    go(tmp_path / "a", model, Look(), steps=3)
    assert seen == [{torch.float32}] * 3
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_a_checkpoint_holds_what_changed_and_nothing_else(tmp_path):
    model = model_of()
    model.requires_grad_(False)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.requires_grad_(True)

    class Touch(Rule):
        def after_step(self, model, step):
            mlp.gate_proj.weight.mul_(0.5)

    go(tmp_path / "a", model, Touch(), steps=2)
    saved = load_file(tmp_path / "a" / "checkpoint-2" / WEIGHTS_FILE)
    prefix = "model.layers.0.mlp."
    assert set(saved) == {prefix + "up_proj.weight", prefix + "gate_proj.weight"}
    other = model_of()
    other.requires_grad_(False)
    Changes(other).load(tmp_path / "a" / "checkpoint-2")
    assert_same(model, other)
    with pytest.raises(WeftError, match="it is another model's"):
        Changes(torch.nn.Linear(2, 2)).load(tmp_path / "a" / "checkpoint-2")


def test_incomplete_checkpoints_are_passed_over_and_removed(tmp_path):
    go(tmp_path / "a")
    assert last_checkpoint(tmp_path / "a").name == "checkpoint-6"
    (tmp_path / "a" / "checkpoint-6" / "weft_rules.safetensors").unlink()
    assert last_checkpoint(tmp_path / "a").name == "checkpoint-4"
    assert not (tmp_path / "a" / "checkpoint-6").exists()
    assert last_checkpoint(tmp_path) is None


def test_metrics_are_one_json_object_a_line(tmp_path):
    go(tmp_path / "a", warmup=3, schedule="linear")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2, 2e-2 / 3, 1e-2 / 3])


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path):
    class Break(Rule):
        def after_step(self, model, step):
            if step == 3:
                model.lm_head.weight.data.fill_(float("nan"))

    with pytest.raises(WeftError, match="The loss is not finite at step 4: lower --lr"):
        go(tmp_path / "a", rule=Break(), save_every=2)
    assert last_checkpoint(tmp_path / "a").name == "checkpoint-2"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "--steps is 0: give at least 1"),
        ({"lr": 0.0}, "--lr is 0.0: give a learning rate above 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"window": 1}, "--window is 1: give at least 2"),
        ({"save_every": 0}, "--save-every is 0"),
        ({"warmup": 300}, "--warmup is 300: give a number of steps from 0 to --steps, 200"),
        ({"schedule": "cosin"}, "no learning-rate schedule called 'cosin'; the nearest are: cosine"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_a_sentence(settings, sentence):
    with pytest.raises(WeftError, match=sentence):
        Recipe(**settings)


def test_a_checkpoint_is_not_gone_on_with_on_other_data_or_another_model(tmp_path):
    def frozen(seed=0):
        model = model_of()
        model.requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        model.model.layers[1].mlp.up_proj.weight.data += seed
        return model

    go(tmp_path / "a", frozen(), steps=4)
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    with pytest.raises(WeftError, match=r"with other inputs: the training data changed since"):
        go(tmp_path / "a", frozen(), steps=4, rows_of=data(11))
    with pytest.raises(WeftError, match=r"with other inputs: the frozen weights of the model changed since"):
        go(tmp_path / "a", frozen(1), steps=4)
    trained = frozen()
    trained.model.layers[0].mlp.up_proj.weight.data += 1  # lies in the checkpoint
    go(tmp_path / "a", trained, steps=4)


def test_a_checkpoint_is_not_gone_on_with_under_other_codes_of_a_teacher(tmp_path):
    def teacher(method="rtn", **options):
        known = model_of()
        weft.compress(known, [(method, {"bits": 3, "group": 8, **options})])
        return known.requires_grad_(False), Lesson()

    go(tmp_path / "a", teacher=teacher(), steps=4)
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    with pytest.raises(WeftError, match=r"with other inputs: the teacher changed since"):
        go(tmp_path / "a", teacher=teacher(clip=True), steps=4)
    go(tmp_path / "a", teacher=teacher(), steps=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_digest_sees_every_value_and_its_place(dtype, monkeypatch):
    monkeypatch.setattr("weft.digests.CHUNK", 5)
    x = torch.arange(35).remainder(2).to(dtype).reshape(5, 7)
    digests = {tensors_digest([x]), tensors_digest([x.flatten()]), tensors_digest([x.roll(1, 1)])}
    other = x.clone()
    other[4, 6] = 1 - int(x[4, 6])
    assert len({*digests, tensors_digest([other])}) == 4
    assert tensors_digest([x.clone()]) == tensors_digest([x.T.contiguous().T]) == tensors_digest([x])


def test_a_buffer_that_was_empty_is_empty_again(tmp_path):
    """Entries that settled after the best checkpoint are not left in the model that it is loaded into."""
    model = torch.nn.Module()
    model.term = MovingSparse.at(torch.tensor([0, 5]), 4, 4, dtype=torch.float32)
    changes = Changes(model)
    changes.save(tmp_path)
    before = model.term.dense()
    model.term.values.data += 1
    move(model.term, torch.tensor([1, 5]), {}, settle=True)
    assert model.term.settled.numel() == 1
    changes.load(tmp_path)
    assert torch.equal(model.term.dense(), before) and not model.term.settled_positions.numel()
