"""Learning of a teacher: the chunked lesson against the formula written out on whole logits, for every family."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from weft.errors import WeftError
from weft.memory import lean, logits
from weft.memory.lesson import Lesson
from weft.memory.teaching import taught

LESSONS = [Lesson(), Lesson(top=3), Lesson(top=1), Lesson(top=60), Lesson(labels=0.5), Lesson(top=5, labels=0.1)]


def written_out(p, q, top):
    """One token, by loops over probabilities."""
    if top is None:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    order = sorted(range(len(p)), key=lambda v: -p[v])
    chosen, rest = order[:top], order[top:]
    P, Q = sum(p[v] for v in chosen), sum(q[v] for v in chosen)
    both = P * math.log(P / Q) + (1 - P) * math.log((1 - P) / (1 - Q))
    inside = sum(p[v] / P * math.log(p[v] / P * Q / q[v]) for v in chosen)
    outside = sum(q[v] / (1 - Q) * math.log(q[v] / (1 - Q) * (1 - P) / p[v]) for v in rest)
    return both + P * inside + (1 - P) * outside


@pytest.mark.parametrize("lesson", LESSONS)
def test_losses_are_the_formula(lesson):
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(7, 61, generator=draw, dtype=torch.float64) * 2 for _ in range(2))
    targets = torch.randint(0, 61, (7,), generator=draw)
    found = lesson.losses(teacher, student.requires_grad_(), targets)
    p, q = teacher.softmax(-1).tolist(), student.softmax(-1)
    expected = [written_out(a, b, lesson.top) for a, b in zip(p, q.tolist(), strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64) + lesson.labels * F.cross_entropy(
        student, targets, reduction="none"
    )
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert float(grad.sum(-1).abs().max()) < 1e-12  # a shift of all logits changes nothing
    if not lesson.labels:
        assert bool((found > 0).all())
        assert float(lesson.losses(teacher, teacher, targets).abs().max()) < 1e-12


def test_a_top_of_everything_is_the_whole_divergence_and_underflow_is_no_nan():
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 20, generator=draw) * 60 for _ in range(2))
    targets = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(Lesson(20).losses(teacher, student, targets), Lesson().losses(teacher, student, targets))
    teacher[:, 3] = -torch.inf  # a token that it rules out, such as one beyond its vocabulary
    for lesson in (Lesson(), Lesson(2)):
        z = student.clone().requires_grad_()
        losses = lesson.losses(teacher, z, targets)
        losses.sum().backward()
        assert bool(torch.isfinite(losses).all()) and bool(torch.isfinite(z.grad).all())


def losses(student, teacher, batch, lesson):
    """The mean lesson of whole logits, by the models' plain forward passes."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    q = student(**inputs).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        p = teacher(**inputs).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    counted = labels != -100
    return lesson.losses(p[counted], q[counted], labels[counted]).mean()


@pytest.mark.parametrize("lesson", [Lesson(), Lesson(top=4, labels=0.2)])
@pytest.mark.parametrize("leaned", [False, True])
def test_the_step_has_the_gradients_of_whole_logits(models, family, lesson, leaned, monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_LOGITS", 61 * 5)  # several chunks
    student, teacher = models.put_on(models.make_model(family)).double(), models.make_model(family).double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    batch = models.make_batch()
    if leaned:
        lean(student)
    before = dict(student.__dict__)
    teacher.eval()
    plain = losses(student, teacher, batch, lesson)
    expected = torch.autograd.grad(plain, [p for p in student.parameters() if p.requires_grad])
    teacher.train()
    with taught(student, teacher, lesson):
        output = student(**batch)
        found = torch.autograd.grad(output.loss, [p for p in student.parameters() if p.requires_grad])
        assert output.logits is None and not teacher.training
    torch.testing.assert_close(output.loss, plain, check_dtype=False)
    for mine, theirs in zip(found, expected, strict=True):
        # transformers casts logits to fp32 on their way into a loss
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    assert student.__dict__.keys() == before.keys()
    assert student.eval()(**batch).logits is not None


def test_judging_is_by_the_labels(models):
    student, teacher = models.make_model(), models.make_model(num_hidden_layers=1)
    batch = models.make_batch()
    plain = student.eval()(**batch).loss
    with taught(student, teacher, Lesson()), torch.no_grad():
        torch.testing.assert_close(student(**batch).loss, plain)


def test_what_cannot_teach_is_refused(models):
    small, other = models.make_model(), models.make_model(vocab_size=64)
    with pytest.raises(WeftError, match="vocabulary has 64 tokens and the model's 61"), taught(small, other, Lesson()):
        pass
    with pytest.raises(WeftError, match="no linear output head"), taught(small, small.model, Lesson()):
        pass
    for wrong in ({"top": 0}, {"labels": -1.0}):
        with pytest.raises(WeftError, match="give"):
            Lesson(**wrong)
