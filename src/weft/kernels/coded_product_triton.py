"""The product of a few tokens with a coded matrix in one pass over the code, as a Triton kernel.

A program takes ROWS outputs and a share of the inputs, DEPTH at a time: it reads packed codes, makes numbers of them in
the dtype of x, rounded as the dense matrix would be, and accumulates their products with x in fp32. The shares are
added last, always in one order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.coded_product import Coded

__all__ = ["product"]

_TOKENS, _ROWS, _DEPTH, _SHARE = 16, 16, 128, 512  # the first is the least that a tensor core multiplies


@triton.jit
def _codes_at(packed, place, inside, BITS: tl.constexpr):
    """The codes number `place` of packed bytes (`weft.kernels.bit_packing`), int32."""
    first = place * BITS
    word = tl.load(packed + first // 8, mask=inside, other=0).to(tl.int32)
    if BITS == 8:
        return word
    start = (first % 8).to(tl.int32)
    if 8 % BITS == 0:
        return (word >> (8 - BITS - start)) & ((1 << BITS) - 1)
    beyond = tl.load(packed + first // 8 + 1, mask=inside & (start + BITS > 8), other=0).to(tl.int32)
    return (((word << 8) | beyond) >> (16 - BITS - start)) & ((1 << BITS) - 1)


@triton.jit
def _kernel(
    x, codes, scales, zeros, levels, y, tokens, inn, out, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, TOKENS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (rows.to(tl.int64) if WIDE else rows)[:, None]
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for step in range(SHARE // DEPTH):
        k = tl.program_id(1) * SHARE + step * DEPTH + tl.arange(0, DEPTH)
        inside = (rows[:, None] < out) & (k[None, :] < inn)
        place = row * inn + k[None, :]
        code = _codes_at(codes, place, inside, BITS)
        of = place // GROUP if FLAT else row * groups + k[None, :] // GROUP
        if LEVELS:
            number = tl.load(levels + code)
        else:
            zero = _codes_at(zeros, of, inside, BITS) if ZEROS else ZERO
            number = (code - zero).to(tl.float32)
        number = number * tl.load(scales + of, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(x + t[:, None] * inn + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < inn), other=0.0)
        rounded = tl.trans(number.to(given.dtype)).to(tl.float32)
        total = tl.dot(given.to(tl.float32), rounded, total, input_precision=PRECISION)
    place_y = (tl.program_id(1) * tokens + t[:, None]).to(tl.int64) * out + rows[None, :]
    tl.store(y + place_y, total, mask=(t[:, None] < tokens) & (rows[None, :] < out))


def product(x: Tensor, coded: Coded, out_features: int) -> Tensor:
    """x (tokens, in), at most 16 of them, -> (tokens, out) in its dtype."""
    tokens, inn = x.shape
    shares = -(-inn // _SHARE)
    partial = torch.empty(shares, tokens, out_features, dtype=torch.float32, device=x.device)
    zeros, levels = coded.zeros, coded.levels
    with torch.cuda.device_of(x):
        _kernel[(-(-out_features // _ROWS), shares)](
            x.contiguous(), coded.codes, coded.scales, coded.codes if zeros is None else zeros,
            coded.scales if levels is None else levels, partial,
            tokens, inn, out_features, -(-inn // coded.group),
            BITS=coded.bits, GROUP=coded.group, FLAT=coded.flat, WIDE=out_features * inn * coded.bits >= 2**31,
            ZERO=coded.zero, ZEROS=zeros is not None, LEVELS=levels is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # which holds numbers of 16 bits exactly
            TOKENS=_TOKENS, ROWS=_ROWS, DEPTH=_DEPTH, SHARE=_SHARE,
        )  # fmt: skip
    return partial.sum(0).to(x.dtype)
