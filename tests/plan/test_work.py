"""What a step computes is counted as it is, and takes the time that the rates of the machine say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from weft.plan.work import Rates, Work, Working, rates_of

TOKENS, INN, OUT = 10, 6, 4


class Known(Rates):
    """Of a machine that does round numbers of things a second."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._products = {torch.float32: 100.0, torch.bfloat16: 10.0}
        self.bandwidth, self.call, self.factor = 50.0, 0.5, 2.0


def test_products_and_bytes_of_a_layer_s_step_are_counted():
    layer, x = nn.Linear(INN, OUT, bias=False), torch.randn(TOKENS, INN, requires_grad=True)
    with Working() as live:
        y = layer(x)
        forward = live.work
        y.backward(torch.ones_like(y))
    one = 2 * TOKENS * INN * OUT
    assert forward.products == {torch.float32: one} and live.work.products == {torch.float32: 3 * one}
    assert forward.moved == 4 * (TOKENS * INN + INN * OUT + TOKENS * OUT)


def test_attention_is_counted_on_every_device():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with Working() as live:
        scaled_dot_product_attention(q, q, q).sum().backward()
    forward = 2 * (2 * 8 * 8 * 4) * 2  # two products, two heads
    assert live.work.products == {torch.float32: forward + 5 * forward // 2}


def test_of_a_table_only_what_is_taken_is_read_and_views_are_free():
    table, ids = torch.randn(1000, 8), torch.tensor([[1, 2, 3]])
    with Working() as live:
        torch.nn.functional.embedding(ids, table).mT.unsqueeze(0)
    assert live.work.moved == 2 * 4 * 3 * 8


def test_work_adds_up_and_takes_the_time_of_its_parts():
    work = Work({torch.float32: 300}, 25, 2).plus(Work({torch.bfloat16: 10}, 25, 1), 2)
    assert work == Work({torch.float32: 300, torch.bfloat16: 20}, 75, 4)
    assert work.seconds(Known()) == pytest.approx(2 * (3 + 2 + 1.5 + 2))
    assert work.plus(work, -1).seconds(Known()) == 0


def test_the_machine_is_measured_once():
    rates = rates_of(torch.device("cpu"), torch.get_num_threads())
    found = rates.product(torch.float32), rates.bandwidth, rates.call, rates.factor
    assert all(value > 0 for value in found)
    assert (rates.product(torch.float32), rates.bandwidth, rates.call, rates.factor) == found
    assert rates_of(torch.device("cpu"), torch.get_num_threads()) is rates
