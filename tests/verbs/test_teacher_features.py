"""`weft finetune --teacher-features`: what it does to a cut model, its resumption, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from weft.errors import WeftError
from weft.rules.features import Features
from weft.terms.units import Kept, counts_of, cut
from weft.verbs import finetune as verb
from weft.verbs.finetune import finetune, run

TEXT = "".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(120))
SHORT = {"steps": 6, "lr": 1e-2, "window": 32, "batch": 2, "log_every": 1, "save_every": 2}


@pytest.fixture
def tokenizer(tiny_directory):
    return AutoTokenizer.from_pretrained(tiny_directory)


def dense(directory):
    """The tiny model with blocks that do something."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for layer in model.model.layers.parameters():
            layer.mul_(3)
    return model


def pruned(model, channels=32, blocks=(1,)):
    """What is left with so many channels and these blocks."""
    counts = counts_of(model)
    own = [[torch.arange(counts[axis])] * counts["blocks"] for axis in ("heads", "neurons")]
    return cut(model, Kept(torch.tensor(blocks), torch.arange(channels), *own))


def error(model, teacher, tokenizer):
    """The rule's own figure on the text."""
    rule = Features(teacher, 1.0)
    rule.start(model, steps=1)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :120]
    with torch.no_grad():
        teacher.eval()(ids)
        model.eval()(ids)
    found = float(rule.penalty(model))
    rule.close()
    return found


@pytest.mark.parametrize("how", [{}, {"checkpointing": True, "lean": False, "accumulate": 2}])
def test_a_shallower_model_comes_nearer_to_the_teachers_states(tiny_directory, tokenizer, how):
    teacher = dense(tiny_directory)
    found = {}
    for weight in (None, 1.0):
        model = pruned(teacher)
        before = error(model, teacher, tokenizer)
        finetune(model, tokenizer, TEXT, "full", **SHORT | how, teacher=teacher, teacher_features=weight)
        found[weight] = error(model, teacher, tokenizer)
        blocks = [*model.model.layers, *teacher.model.layers]
        assert not any(block._forward_hooks for block in blocks) and not teacher.model._forward_pre_hooks
    assert found[1.0] < 0.9 * min(before, found[None])


def test_micro_batches_count_as_one_batch(tiny_directory, tokenizer):
    """The first step's loss: of packed rows, in which all tokens count, the mean of means is the mean."""
    losses = []
    for split in ({"batch": 4}, {"batch": 2, "accumulate": 2}):
        teacher = dense(tiny_directory)
        settings = {**SHORT, **split, "steps": 1}
        done = finetune(pruned(teacher), tokenizer, TEXT, "full", **settings, teacher=teacher, teacher_features=5.0)
        losses.append(done["loss_first"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bits_and_with_the_same_weight_alone(
    tiny_directory, tokenizer, tmp_path
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    def go(directory, weight=0.5, **more):
        teacher = dense(tiny_directory)
        model = pruned(teacher)
        how = {"teacher": teacher, "teacher_features": weight, "directory": tmp_path / directory}
        finetune(model, tokenizer, TEXT, "full", **{**SHORT, **how, **more})
        return dict(model.named_parameters())

    whole = go("whole")
    go("cut", callbacks=[Stop()])
    for other in (0.25, None):
        with pytest.raises(WeftError, match="the teacher changed since"):
            go("cut", other)
    again = go("cut")
    assert all(torch.equal(again[name], parameter) for name, parameter in whole.items())
    alone = go("alone", None)
    assert not all(torch.equal(alone[name], parameter) for name, parameter in whole.items())


def test_the_command_says_its_weight_and_refuses_before_a_model_is_loaded(tiny_directory, tmp_path, monkeypatch):
    data, teacher = tmp_path / "data.txt", tmp_path / "narrow"
    data.write_text(TEXT)
    given = {"method": "full", "data": data, **SHORT, "steps": 1, "device": "cpu"}
    own = {"teacher": str(tiny_directory), "teacher_features": 2.0}
    done = run(str(tiny_directory), tmp_path / "out", **given, **own)
    assert done["loss_first"] < 1e-5  # the model is its teacher
    assert json.loads((tmp_path / "out/run.json").read_text())["arguments"]["teacher_features"] == 2.0
    pruned(dense(tiny_directory), channels=16, blocks=(0, 1)).save_pretrained(teacher)
    AutoTokenizer.from_pretrained(tiny_directory).save_pretrained(teacher)
    monkeypatch.setattr(verb, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    for changes, sentence in (
        ({"teacher": None}, "--teacher-features is for a teacher that you name: give --teacher MODEL too"),
        ({"teacher_features": 0.0}, "The features cannot count 0.0 times: give a weight above 0"),
        ({"teacher_features": float("nan")}, "The features cannot count nan times"),
        ({"teacher": str(teacher)}, "The model is 32 channels wide and its teacher 16: --teacher-features compares"),
    ):
        with pytest.raises(WeftError, match=sentence):
            run(str(tiny_directory), tmp_path / "refused", **given, **own | changes)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "refused.partial").exists()


def test_a_model_with_more_blocks_or_another_width_cannot_follow(tiny_directory, tokenizer):
    model = dense(tiny_directory)
    for teacher, sentence in (
        (pruned(model), "The model has 2 blocks and the teacher 1"),
        (pruned(model, channels=16), "The model is 32 channels wide and its teacher 16"),
    ):
        with pytest.raises(WeftError, match=sentence):
            finetune(model, tokenizer, TEXT, "full", **SHORT, teacher=teacher, teacher_features=1.0)
