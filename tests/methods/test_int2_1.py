"""int2.1: what is learned, beside what, and that codes stay packed while it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.methods.one_layer import close
from weft.errors import WeftError
from weft.memory.measure import saved_bytes
from weft.methods import METHODS
from weft.terms import IntegerCode, LowRank, SumLinear
from weft.terms.adapters import find_adapter
from weft.terms.layers import linear_layers
from weft.terms.put import put
from weft.testing_adapters import task, tiny_llama
from weft.verbs.adapt import adapt
from weft.verbs.compress import compress
from weft.verbs.finetune import run
from weft.verbs.preparing import check_teacher

OUT, IN = 64, 48


def coded(model: nn.Module, bits: int = 2) -> nn.Module:
    """Every linear layer in codes."""
    for name, layer in linear_layers(model).items():
        put(model, name, {"base": IntegerCode.from_matrix(layer.weight.detach(), bits, 8)})
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=task()[0]["input_ids"]).logits
    return found


def divergence(teacher: nn.Module, model: nn.Module) -> float:
    """The mean KL a token, in its own words."""
    p, q = logits(teacher).double().softmax(-1), logits(model).double().softmax(-1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


def test_it_begins_as_the_coded_model_with_the_published_scale():
    model = coded(tiny_llama())
    before = logits(model)
    adapt(model, "int2.1", 8)
    assert torch.equal(logits(model), before)
    terms = [term for layer in find_adapter(model).terms.values() for term in layer.values()]
    assert all(isinstance(t, LowRank) and (t.scale, t.dropout, t.rank) == (4.0, 0.05, 8) for t in terms)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradients_are_those_of_the_decoded_weight_and_no_matrix_is_kept(bits):
    draw = torch.Generator().manual_seed(0)
    code = IntegerCode.from_matrix(torch.randn(OUT, IN, generator=draw), bits, 16).double()
    x = torch.randn(3, IN, generator=draw).double()
    B, A = torch.randn(OUT, 2, generator=draw).double(), torch.randn(2, IN, generator=draw).double()
    layer = SumLinear({"base": code, "low_rank": LowRank.from_factors(B, A, scale=4.0)})
    g = torch.randn(3, OUT, generator=draw).double()
    x.requires_grad_()
    (layer(x) * g).sum().backward()
    close(x.grad, g @ (code.dense(torch.float64) + 4 * B @ A), 1e-12)
    term = layer.terms["low_rank"]
    close(term.A.grad, 4 * B.T @ g.T @ x, 1e-12)
    assert saved_bytes(lambda: layer(x).sum(), layer.state_dict().values()) < OUT * IN * 8


def test_a_step_follows_the_divergence_summed_over_tokens_beside_two_hundred_times_the_labels():
    """Of 2048 tokens a sequence, as published; ours is that divided by 2048."""
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2048, 5, generator=draw).double() for _ in range(2))
    student.requires_grad_()
    targets = torch.randint(5, (2048,), generator=draw)
    log_q = student.log_softmax(-1)
    kl = nn.functional.kl_div(log_q, teacher.log_softmax(-1), reduction="sum", log_target=True)
    (published,) = torch.autograd.grad(kl + 200 * nn.functional.nll_loss(log_q, targets), student)
    lesson = check_teacher(METHODS["int2.1"], "a model", None, None)
    (ours,) = torch.autograd.grad(lesson.losses(teacher, student, targets).mean(), student)
    direction = nn.functional.cosine_similarity(ours.flatten(), published.flatten(), dim=0)
    assert float(direction) > 0.99999 and float(published.norm() / ours.norm()) == pytest.approx(2048, rel=0.01)
    assert check_teacher(METHODS["int2.1"], "a model", None, 0.5).labels == 0.5
    assert check_teacher(METHODS["lora"], "a model", None, None).labels == 0.0


def test_trained_it_is_nearer_to_the_teacher_than_before_and_than_factors_of_that_rank_without_data():
    teacher, model, other = tiny_llama(), coded(tiny_llama()), tiny_llama()
    before = divergence(teacher, model)
    adapt(model, "int2.1", 2)
    lesson = check_teacher(METHODS["int2.1"], teacher, None, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    torch.manual_seed(0)
    model.train()
    for step in range(80):
        ids = task()[step % len(task())]["input_ids"]
        known, found = (m(input_ids=ids).logits[:, :-1].flatten(0, 1) for m in (teacher, model))
        lesson.losses(known.detach(), found, ids[:, 1:].flatten()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    compress(other, ["rtn", "lorc"], bits=2, group=8, rank=2, budget="31 bits", batches=task())
    assert divergence(teacher, model) < 0.7 * min(before, divergence(teacher, other))


def test_without_a_teacher_it_says_what_it_needs_before_anything_is_read(tmp_path: Path):
    with pytest.raises(
        WeftError, match=r"int2\.1 learns the predictions of the model before it was quantised: give --te"
    ):
        run("no such model", tmp_path / "out", method="int2.1", steps=1)
