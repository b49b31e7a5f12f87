"""The product of a few tokens with a coded matrix in one pass over the code, as a Triton kernel.

A program takes ROWS outputs and a share of the inputs, DEPTH at a time: it reads packed codes, makes numbers of them in
the dtype of x, rounded as the dense matrix would be, and accumulates their products with x in fp32: as sums for one
token, in tensor cores for more. The shares are added last, always in one order.

Codes of 2, 4 and 8 bits whose rows begin with a byte are read as vectors of whole bytes; scales and zero points are
read once for a group where groups are powers of two, or lie across whole tiles, and end with the rows. Other widths and
groups are looked up code by code.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.coded_product import Coded

__all__ = ["product"]


class _Tile(NamedTuple):
    """Of a program: outputs, inputs at a time, inputs in all; and as how many its tokens count."""

    rows: int
    depth: int
    share: int
    tokens: int


_ONE, _FEW = _Tile(16, 256, 1024, 1), _Tile(64, 128, 1024, 16)  # 16: the least that a tensor core multiplies


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
def _number(code, levels, LEVELS: tl.constexpr):
    """What a code stands for, fp32, before zero point and scale."""
    return tl.load(levels + code) if LEVELS else code.to(tl.float32)


@triton.jit
def _numbers_of_bytes(
    packed, levels, row, first, inn, inside,
    BITS: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What the codes (ROWS, DEPTH) from input `first` on stand for, of rows (ROWS, 1) that begin with a byte."""
    COUNT: tl.constexpr = 8 // BITS
    place = first // COUNT + tl.arange(0, DEPTH // COUNT)[None, :]
    width = inn // COUNT
    word = tl.load(packed + row.to(tl.int64) * width + place, mask=inside & (place < width), other=0).to(tl.int32)
    # looked up before they are joined, so that a GPU moves bytes between its threads, not numbers
    if COUNT == 1:
        number = _number(word, levels, LEVELS)
    elif COUNT == 2:
        number = tl.join(_number(word >> 4, levels, LEVELS), _number(word & 15, levels, LEVELS))
    else:
        begin, third = _number(word >> 6, levels, LEVELS), _number((word >> 2) & 3, levels, LEVELS)
        second, fourth = _number((word >> 4) & 3, levels, LEVELS), _number(word & 3, levels, LEVELS)
        number = tl.join(tl.join(begin, third), tl.join(second, fourth))
    return tl.reshape(number, (ROWS, DEPTH))


@triton.jit
def _kernel(
    x, codes, scales, zeros, levels, y, tokens, inn, out, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr, BYTES: tl.constexpr, PER: tl.constexpr,
    WIDEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    rows, t = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    row = (rows.to(tl.int64) if WIDE else rows)[:, None]
    total = tl.zeros((ROWS,) if TOKENS == 1 else (ROWS, TOKENS), dtype=tl.float32)
    for step in range(SHARE // DEPTH):
        first = tl.program_id(1) * SHARE + step * DEPTH
        k = first + tl.arange(0, DEPTH)
        inside = (rows[:, None] < out) & (k[None, :] < inn)
        if BYTES:
            number = _numbers_of_bytes(codes, levels, row, first, inn, rows[:, None] < out, BITS, LEVELS, ROWS, DEPTH)
        else:
            number = _number(_codes_at(codes, row * inn + k[None, :], inside, BITS), levels, LEVELS)
        if PER > 0:  # groups a tile
            g = first // GROUP + tl.arange(0, PER)[None, :]
            of, there = row * groups + g, (rows[:, None] < out) & (g < groups)
            number = tl.reshape(number, (ROWS, PER, DEPTH // PER))
        else:
            of, there = (row * inn + k[None, :]) // GROUP if FLAT else row * groups + k[None, :] // GROUP, inside
        scale = tl.load(scales + of, mask=there, other=0.0).to(tl.float32)
        zero = _codes_at(zeros, of, there, BITS).to(tl.float32) if ZEROS else tl.full(scale.shape, ZERO, tl.float32)
        if PER > 0:
            number = tl.reshape((number - zero[:, :, None]) * scale[:, :, None], (ROWS, DEPTH))
        else:
            number = (number - zero) * scale
        number = number.to(x.dtype.element_ty)
        if TOKENS == 1:
            given = tl.load(x + k, mask=k < inn, other=0.0)
            total += tl.sum(number.to(tl.float32) * given.to(tl.float32)[None, :], 1)
        else:
            here = (t[None, :] < tokens) & (k[:, None] < inn)
            given = tl.load(x + t[None, :] * inn + k[:, None], mask=here, other=0.0)
            if WIDEN:
                number, given = number.to(tl.float32), given.to(tl.float32)
            total = tl.dot(number, given, total, input_precision="ieee")
    last = tl.program_id(1).to(tl.int64) * tokens
    if TOKENS == 1:
        tl.store(y + last * out + rows, total, mask=rows < out)
    else:
        place = (last + t[None, :]) * out + rows[:, None]
        tl.store(y + place, total, mask=(t[None, :] < tokens) & (rows[:, None] < out))


def _groups_a_tile(group: int, inn: int, depth: int) -> int:
    """How many scales a row has in `depth` inputs; 0 where they do not divide them."""
    if group >= inn or group % depth == 0:
        return 1
    return depth // group if depth % group == 0 else 0


def product(x: Tensor, coded: Coded, out_features: int) -> Tensor:
    """x (tokens, in), at most 16 of them, -> (tokens, out) in its dtype."""
    tokens, inn = x.shape
    tile = _ONE if tokens == 1 else _FEW
    shares = -(-inn // tile.share)
    partial = torch.empty(shares, tokens, out_features, dtype=torch.float32, device=x.device)
    zeros, levels = coded.zeros, coded.levels
    flat = coded.flat and inn % coded.group != 0  # else groups end with rows
    with torch.cuda.device_of(x):
        _kernel[(-(-out_features // tile.rows), shares)](
            x.contiguous(), coded.codes, coded.scales, coded.codes if zeros is None else zeros,
            coded.scales if levels is None else levels, partial,
            tokens, inn, out_features, -(-inn // coded.group),
            BITS=coded.bits, GROUP=coded.group, FLAT=flat, WIDE=out_features * inn * coded.bits >= 2**31,
            ZERO=coded.zero, ZEROS=zeros is not None, LEVELS=levels is not None,
            BYTES=coded.bits in (2, 4, 8) and inn * coded.bits % 8 == 0,
            PER=0 if flat else _groups_a_tile(coded.group, inn, tile.depth),
            WIDEN=x.dtype == torch.bfloat16 and not isinstance(_kernel, triton.JITFunction),  # which interpreters lack
            TOKENS=tile.tokens, ROWS=tile.rows, DEPTH=tile.depth, SHARE=tile.share,
            num_stages=3 if levels is None else 1,  # what is looked up by code is not fetched ahead
        )  # fmt: skip
    return partial.sum(0).to(x.dtype)
