"""Schedules: their anchor points, and that a scheduler with one resumes from numbers alone."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from weft.errors import WeftError
from weft.optim.schedules import constant, cosine, restarted, wsd


def test_anchor_points() -> None:
    c = cosine(100, warmup=10)
    assert [c(0), c(9), c(10), c(55), c(100), c(150)] == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    w = wsd(100, warmup=10, decay=20, floor=0.1)
    assert [w(4), w(50), w(80), w(85), w(100)] == pytest.approx([0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1])
    assert [constant()(7), constant(4)(0), constant(4)(3)] == [1.0, 0.25, 1.0]
    assert all(c(t + 1) <= c(t) for t in range(10, 120))


def test_restarts_ramp_after_every_refresh_but_the_first() -> None:
    plain = cosine(1000, warmup=20)
    r = restarted(plain, every=200, warmup=10)
    assert all(r(t) == plain(t) for t in range(200))
    assert [r(200) / plain(200), r(204) / plain(204), r(209) / plain(209), r(399) / plain(399)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0]
    )


def test_a_scheduler_resumes_from_numbers() -> None:
    def make() -> LambdaLR:
        return LambdaLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0), restarted(cosine(40), 10, 3))

    whole, stopped = make(), make()
    for scheduler, steps in ((whole, 25), (stopped, 12)):
        for _ in range(steps):
            scheduler.optimizer.step()
            scheduler.step()
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    again = make()
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(13):
        again.optimizer.step()
        again.step()
    assert again.get_last_lr() == whole.get_last_lr()


def test_mistakes_are_answered_in_a_sentence() -> None:
    with pytest.raises(WeftError, match="do not fit"):
        cosine(10, warmup=11)
    with pytest.raises(WeftError, match="do not fit"):
        wsd(10, warmup=5, decay=6)
    with pytest.raises(WeftError, match="floor"):
        cosine(10, floor=2.0)
    with pytest.raises(WeftError, match="impossible"):
        restarted(constant(), every=5, warmup=6)
