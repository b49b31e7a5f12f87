"""The orthogonal part of one change against another: the paper's invariants, dense and factored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.merging import Pair
from weft.merging.signatures import block_of, decode, encode, factored_orthogonal_part, orthogonal_part


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


C, S = draw(7, 5, seed=1), draw(7, 5, seed=2)


def test_it_is_orthogonal_and_of_the_right_length() -> None:
    found = orthogonal_part(C, S).double()
    assert abs((found * S).sum()) <= 1e-6 * found.norm() * S.norm()
    along = (C * S).sum() / S.norm()
    torch.testing.assert_close(found.square().sum(), C.square().sum() - along**2, rtol=1e-5, atol=0.0)
    projector = torch.eye(35, dtype=torch.float64) - S.flatten().outer(S.flatten()) / S.square().sum()
    torch.testing.assert_close(found, (projector @ C.flatten()).view(7, 5), rtol=1e-5, atol=1e-6)


def test_the_extremes() -> None:
    assert orthogonal_part(3 * S, S).abs().max() < 1e-6
    apart = orthogonal_part(C, S)
    torch.testing.assert_close(orthogonal_part(apart, S), apart, rtol=0.0, atol=1e-6)  # once and twice are the same
    assert torch.equal(orthogonal_part(C, torch.zeros_like(S)), C.float())


def test_it_is_linear() -> None:
    D = draw(7, 5, seed=3)
    whole = orthogonal_part(2 * C - D, S)
    torch.testing.assert_close(whole, 2 * orthogonal_part(C, S) - orthogonal_part(D, S), rtol=0.0, atol=1e-5)


def test_factors_give_the_same_without_the_matrix() -> None:
    c: Pair = (draw(7, 2, seed=4), draw(2, 5, seed=5))
    s: Pair = (draw(7, 3, seed=6), draw(3, 5, seed=7))
    B, A = factored_orthogonal_part(c, s)
    assert A.shape == (5, 5)
    torch.testing.assert_close((B @ A).float(), orthogonal_part(c[0] @ c[1], s[0] @ s[1]))
    B, A = factored_orthogonal_part(c, (0 * s[0], s[1]))
    torch.testing.assert_close(B @ A, c[0] @ c[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_off_by_half_a_step_at_most(bits: int) -> None:
    T = draw(50, 20, dtype=torch.float32)
    code = encode(T, bits)
    assert code.codes.dtype == torch.int8 and int(code.codes.abs().max()) == 2 ** (bits - 1) - 1
    assert (decode(code) - T).abs().max() <= code.step / 2 * (1 + 1e-5)
    assert torch.equal(decode(encode(T, None)), T)
    assert torch.equal(decode(encode(torch.zeros(3))), torch.zeros(3))


def test_blocks() -> None:
    assert block_of("model.layers.3.mlp.up_proj.weight") == 3 and block_of("h.11.attn") == 11
    assert block_of("model.embed_tokens.weight") is None and block_of("lm_head.weight") is None
