"""Attention with a prefix in two sums, against softmax attention and against the prefix written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.prefix_attention import feature_map, prefix_attention, prefix_state

D, SCALE = 16, 16**-0.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = draw(2, 3, 5, D, seed=1), draw(2, 3, 7, D, seed=2), draw(2, 3, 7, D, seed=3)
NONE = torch.zeros(3, D, D), torch.zeros(3, D)


def causal(dtype: torch.dtype = torch.float32) -> Tensor:
    hidden = torch.ones(5, 7, dtype=torch.bool).triu(3)
    return torch.zeros(5, 7, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


@pytest.mark.parametrize("mask", [None, causal()])
def test_without_a_prefix_it_is_softmax_attention(mask: Tensor | None) -> None:
    expected = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    torch.testing.assert_close(prefix_attention(Q, K, V, *NONE, mask, SCALE), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 9, 200])
def test_a_prefix_is_explicit_attention_with_the_kernel_as_weight(length: int) -> None:
    P, U = draw(3, length, D, seed=4), draw(3, length, D, seed=5)
    inside = torch.exp((Q.double() @ K.double().mT) * SCALE + causal().double())
    across = feature_map(Q).double() @ feature_map(P).double().mT
    weights = torch.cat([inside, across], -1)
    values = torch.cat([V, U.expand(2, 3, length, D)], -2).double()
    expected = (weights / weights.sum(-1, keepdim=True)) @ values
    got = prefix_attention(Q, K, V, *prefix_state(P, U), causal(), SCALE)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    softmax = F.scaled_dot_product_attention(Q, torch.cat([K, P.expand(2, 3, length, D)], -2), values.float())
    assert (got - softmax).norm() > 0.1 * softmax.norm(), "it only approximates softmax attention on the prefix"


def test_prefixes_add_up() -> None:
    P, U = draw(3, 8, D, seed=4), draw(3, 8, D, seed=5)
    parts = [prefix_state(P[:, :3], U[:, :3]), prefix_state(P[:, 3:], U[:, 3:])]
    for whole, (one, two) in zip(prefix_state(P, U), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(one + two, whole)


def test_the_stable_form_neither_overflows_nor_changes() -> None:
    Z, z = 0.1 * draw(3, D, D, seed=6), draw(3, D, seed=7)
    naive = torch.exp(Q @ K.mT * SCALE)
    phi = feature_map(Q)
    expected = (naive @ V + phi @ Z) / (naive.sum(-1, keepdim=True) + phi @ z.abs().unsqueeze(-1))
    torch.testing.assert_close(prefix_attention(Q, K, V, Z, z, None, SCALE), expected, atol=1e-5, rtol=1e-5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        sharp = [t.to(dtype) for t in (20 * Q, 20 * K, V)]  # logits of hundreds
        out = prefix_attention(*sharp, Z, z, causal(dtype), SCALE)
        assert out.dtype == dtype and torch.isfinite(out).all()


def test_a_large_hidden_logit_has_no_say() -> None:
    K2 = K.clone()
    K2[:, :, -1] *= 1e6  # seen by the last query alone; beyond what a mask in fp16 can outweigh
    Z, z = 0.1 * draw(3, D, D, seed=6), draw(3, D, seed=7)
    one, two = (prefix_attention(Q, k, V, Z, z, causal(torch.float16), SCALE) for k in (K, K2))
    torch.testing.assert_close(one[:, :, :4], two[:, :, :4])


def test_any_trained_pair_keeps_the_denominator_positive() -> None:
    z = -100 * draw(3, D, seed=7).abs()
    out = prefix_attention(Q, K, V, torch.zeros(3, D, D), z, None, SCALE)
    assert torch.isfinite(out).all() and out.abs().max() <= V.abs().max()
    hidden = torch.full((5, 7), torch.finfo(torch.float32).min)
    assert torch.isfinite(prefix_attention(Q, K, V, *NONE, hidden, SCALE)).all(), "a row of padding sees nothing"
