"""The teacher's features: the rule beside the lesson against loops over tokens, and what it keeps and when."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from weft.errors import WeftError
from weft.memory import lean
from weft.memory.lesson import Lesson
from weft.memory.teaching import taught
from weft.rules import Rules
from weft.rules.features import Features, followed

WEIGHT = 0.7


def make_model(family="llama", blocks=2, seed=0):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    own = {"gpt2": {"n_embd": 16, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}}
    config = AutoConfig.for_model(
        family, vocab_size=61, num_hidden_layers=blocks, **own.get(family, shape), bos_token_id=1, eos_token_id=2
    )
    config.use_cache = False  # as in training: with a cache, documents in one row would see each other
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double().train()


def make_batch(padded=True):
    """Two rows of 9 tokens; of the second, 4 are padding, and "packed" ones of two documents each."""
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    if padded == "packed":
        return batch | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 0, 0, 0, 0]])}
    return batch | ({"attention_mask": mask} if padded else {})


def states(model, batch):
    """What each block puts out, as transformers lists it; of the last, what goes into the norm behind it."""
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    last = []
    handle = norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    handle.remove()
    return [*hidden[1:-1], *last]


def written_out(student, teacher, batch, follows):
    """The mean over blocks and tokens that are no padding of |h_s - h_t|^2 / |h_t|^2, one at a time."""
    with torch.no_grad():
        known = states(teacher, batch)
    mask = batch["labels"] != -100  # of nothing but padding
    found = []
    for mine, place in zip(states(student, batch), follows, strict=True):
        for row, column in mask.nonzero().tolist():
            h, t = mine[row, column], known[place][row, column]
            found.append(sum((a - b) ** 2 for a, b in zip(h, t, strict=True)) / sum(b * b for b in t.tolist()))
    return sum(found) / len(found)


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)


@pytest.mark.parametrize(("family", "how"), [
    ("llama", "plain"), ("llama", "lean"), ("llama", "checkpointing"), ("llama", "both"), ("gpt2", "both"),
])  # fmt: skip
@pytest.mark.parametrize("padded", [False, True, "packed"])
def test_the_step_has_the_value_and_the_gradients_of_loops(family, how, padded):
    student, teacher = make_model(family, 2), make_model(family, 5, seed=1).eval()
    batch = make_batch(padded)
    expected = written_out(student, teacher, batch, (2, 4))
    wanted = gradients(WEIGHT * expected, student)
    if how in ("lean", "both"):
        lean(student)
    if how in ("checkpointing", "both"):
        student.gradient_checkpointing_enable({"use_reentrant": False})
    rule = Features(teacher, WEIGHT)
    rule.start(student, steps=1)
    with taught(student, teacher, Lesson(features=WEIGHT)):
        student(**batch)
        penalty = rule.penalty(student)
        found = gradients(penalty, student)
    assert float(penalty.detach()) == pytest.approx(WEIGHT * float(expected.detach()), rel=1e-12)
    for mine, slow in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, slow)
    assert not any(p.grad is not None for p in teacher.parameters())


def test_two_batches_may_wait_for_one_backward_pass():
    """Each with its own padding: what is made again is made of the batch it was of."""
    student, teacher = make_model(), make_model(seed=1).eval()
    batches = [make_batch(padded) for padded in (True, "packed", False)]
    wanted = gradients(sum(written_out(student, teacher, batch, (0, 1)) for batch in batches), student)
    rule = Features(teacher, 1.0)
    rule.start(student, steps=1)
    penalties = []
    for batch in batches:
        with torch.no_grad():
            teacher(**batch)
        student(**batch)
        penalties.append(rule.penalty(student))
    for mine, slow in zip(gradients(sum(penalties), student), wanted, strict=True):
        torch.testing.assert_close(mine, slow)


def test_a_token_embedded_as_zeros_is_no_infinity():
    student, teacher = make_model(), make_model(seed=1).eval()
    rule = Features(teacher, 1.0)
    rule.start(student, steps=1)
    with torch.no_grad():
        teacher.model.embed_tokens.weight.zero_()
        teacher(**make_batch())
    student(**make_batch())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(rule.penalty(student), student))


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    student, teacher = make_model(), make_model().eval()
    rule = Features(teacher, 1.0)
    rule.start(student, steps=1)
    with torch.no_grad():
        teacher(**make_batch())
    student(**make_batch())
    assert float(rule.penalty(student).detach()) == 0
    assert rule.penalty(student) is None  # once


@pytest.mark.parametrize(("mine", "theirs", "places"), [
    (4, 4, [0, 1, 2, 3]), (2, 4, [1, 3]), (4, 12, [2, 5, 8, 11]), (1, 3, [2]), (3, 5, [1, 2, 4]),
    (4, 5, [0, 2, 3, 4]),
])  # fmt: skip
def test_fewer_blocks_follow_evenly_spread_ones_and_the_last_the_last(mine, theirs, places):
    assert followed(mine, theirs) == places


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_state_outlives_its_use(checkpointed):
    student, teacher = make_model(blocks=3), make_model(blocks=6, seed=1).eval()
    if checkpointed:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    kept = []
    for block in teacher.model.layers:
        block.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    rule = Features(teacher, 1.0)
    rule.start(student, steps=2)
    with taught(student, teacher, Lesson()):
        loss = student(**make_batch()).loss + rule.penalty(student)
    gc.collect()
    assert sum(ref() is not None for ref in kept) == 3, "those of blocks that are followed, and no difference of them"
    loss.backward()
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    student.model.layers[0](torch.zeros(1, 1, 16).double(), position_embeddings=(torch.ones(1, 1, 8).double(),) * 2)
    assert not rule.mine and not rule.theirs, "a block that runs again by itself, as to be recomputed, is not kept"


def test_judging_keeps_nothing_and_a_closed_rule_leaves_no_hook():
    student, teacher = make_model(), make_model().eval()
    rule = Features(teacher, 1.0)
    rule.start(student, steps=1)
    with taught(student, teacher, Lesson()), torch.no_grad():
        student.eval()(**make_batch())
    assert not rule.mine and rule.penalty(student) is None
    rule.close()
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_followed_is_refused():
    for student, teacher, sentence in (
        (make_model(blocks=3), make_model(), "The model has 3 blocks and the teacher 2"),
        (make_model(), torch.nn.Linear(3, 3), "The model has 1 stack of blocks and the teacher 0"),
        (torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), "The model has 0 stacks of blocks and the teacher 0"),
    ):
        with pytest.raises(WeftError, match=sentence):
            Rules([Features(teacher, 1.0)]).start(student, steps=1)
