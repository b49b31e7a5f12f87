"""NormalFloat codes: b-bit block-wise quantisation at the quantiles of a normal distribution, with quantised scales.

    w = level[code] * c,   c = absmax of the block of B0 entries of the flattened matrix;
    c = offset + code_c * step,   offset = the smallest c of the matrix, step one number for B1 blocks

Bits a weight: b + b0 / B0 + b1 / (B0 B1) (Dettmers et al., 2023, arXiv 2305.14314; Guo et al., 2023, arXiv 2311.12023).
Codes are packed as bitsandbytes does (`weft.kernels.bit_packing`); its kernel dequantises 4-bit codes on a GPU where it
is installed, and the plain PyTorch below everywhere else.

Deviations: QLoRA subtracts the mean of the scales and codes them as 8-bit floats (bitsandbytes: a dynamic map). Here
they count from the smallest in equal steps, LQ-LoRA's way, so that the extreme scales are exact, and coding a decoded
matrix changes nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.bit_packing import looked_up, pack, packed_size, unpack
from weft.kernels.bits import numbers_of, product
from weft.kernels.cells import Cells, bucketize, cells, once
from weft.tables import table

__all__ = ["NF4", "Code", "Format", "blank", "block_scales", "decode", "encode", "levels"]

_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Dettmers et al., 2023, appendix E

_OFFSET = 0.9677083  # the probability of the outermost quantile
_WIDTHS = (2, 3, 4, 8)


class Format(NamedTuple):
    """The numbers of a NormalFloat code; the defaults are NF4 with double quantisation, 4.127 bits a weight."""

    bits: int = 4  # b, of a code: 2, 3, 4 or 8
    block: int = 64  # B0, weights a scale
    scale_bits: int | None = 8  # b0, of a scale's code; None: scales are kept in fp32 as they are
    scale_block: int = 256  # B1, scales a step
    scale_dtype: str = "float32"  # of the steps: b1

    @property
    def bits_per_weight(self) -> float:
        """b + b0 / B0 + b1 / (B0 B1)."""
        if self.scale_bits is None:
            return self.bits + 32 / self.block
        b1: int = getattr(torch, self.scale_dtype).itemsize * 8
        return self.bits + self.scale_bits / self.block + b1 / (self.block * self.scale_block)


NF4 = Format()


class Code(NamedTuple):
    """A matrix as it is stored. Floating-point numbers are kept as their bits, which no cast of a model can round."""

    codes: Tensor  # uint8, packed
    scales: Tensor  # uint8, packed codes; or int32, the bits of fp32 scales
    offset: Tensor  # (1,) int32: the bits of an fp32 number
    steps: Tensor  # (ceil(blocks / B1),) int16 or int32: bits of `scale_dtype`


def _quantiles(bits: int) -> tuple[float, ...]:
    """Normal quantiles at evenly spaced probabilities, below and above zero, over the largest."""
    half = 2 ** (bits - 1)
    below = [1 - _OFFSET + i * (_OFFSET - 0.5) / (half - 1) for i in range(half - 1)]
    above = [0.5 + i * (_OFFSET - 0.5) / half for i in range(1, half + 1)]
    value = NormalDist().inv_cdf
    largest = value(_OFFSET)  # sigma is chosen so that it becomes 1
    return (-1.0, *(value(p) / largest for p in below[1:]), 0.0, *(value(p) / largest for p in above[:-1]), 1.0)


_LEVELS = {bits: _NF4_LEVELS if bits == 4 else _quantiles(bits) for bits in _WIDTHS}


@table
def levels(bits: int) -> tuple[float, ...]:
    """The 2^b values of a code, rising, fp32: -1 and 1 at the ends, an exact zero, one more above it than below."""
    return _LEVELS[bits]


@once
def _edges(bits: int, device: torch.device) -> Cells:
    values = levels(bits, device=device)
    return cells((values[1:] + values[:-1]) / 2)


def encode(matrix: Tensor, format: Format = NF4) -> Code:
    """The code of a matrix, of any shape and size, in fp32."""
    blocks = _blocks(matrix.detach().float().flatten(), format.block)
    scales = blocks.abs().amax(1)
    code_of_scales = _encode_scales(scales, format)
    if format.scale_bits is not None:
        # values are coded with the scales that decoding will see
        scales = block_scales(Code(codes=scales, **code_of_scales), format, len(scales))
    # a block of zeros has scale 0 and must not divide by it
    normal = blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    codes = bucketize(normal.clamp_(-1, 1), _edges(format.bits, matrix.device))
    return Code(codes=pack(codes.flatten(), format.bits), **code_of_scales)


def blank(size: int, format: Format = NF4, device: torch.device | str | None = None) -> Code:
    """The uninitialised code of a matrix of `size` numbers."""
    blocks = -(-size // format.block)
    step_type = torch.int32 if format.scale_dtype == "float32" else torch.int16
    if format.scale_bits is None:
        scales, steps = torch.empty(blocks, dtype=torch.int32, device=device), 0
    else:
        scales = torch.empty(packed_size(blocks, format.scale_bits), dtype=torch.uint8, device=device)
        steps = -(-blocks // format.scale_block)
    return Code(
        torch.empty(packed_size(blocks * format.block, format.bits), dtype=torch.uint8, device=device),
        scales,
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(steps, dtype=torch.int32 if format.scale_bits is None else step_type, device=device),
    )


def decode(code: Code, shape: tuple[int, int], format: Format = NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix of a code, computed in fp32 and cast last."""
    size = shape[0] * shape[1]
    scales = block_scales(code, format, -(-size // format.block))
    if format.bits == 4 and code.codes.is_cuda and _bitsandbytes_is_here():
        return decode_bitsandbytes(code.codes, scales, shape, format.block, dtype)
    values = looked_up(code.codes, format.bits, size, levels(format.bits, device=code.codes.device))
    return product(_blocks(values, format.block), scales.unsqueeze(1), dtype).flatten()[:size].view(shape)


@functools.cache
def _bitsandbytes_is_here() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def decode_bitsandbytes(
    codes: Tensor, scales: Tensor, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> Tensor:
    """The same of 4-bit codes and fp32 scales (blocks,), by bitsandbytes' kernel."""
    functional = importlib.import_module("bitsandbytes.functional")
    state = functional.QuantState(
        absmax=scales,
        shape=torch.Size((1, shape[0] * shape[1])),  # some of its kernels start a block with each row; ours run on
        code=levels(4, device=codes.device),
        blocksize=block,
        quant_type="nf4",
        dtype=dtype,
    )
    flat: Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
    return flat.view(shape)


def _blocks(flat: Tensor, block: int) -> Tensor:
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _encode_scales(scales: Tensor, format: Format) -> dict[str, Tensor]:
    """The fields of a Code that hold the scales (blocks,)."""
    none = torch.zeros(1, dtype=torch.float32, device=scales.device)
    if format.scale_bits is None:
        return {
            "scales": scales.view(torch.int32),
            "offset": none.view(torch.int32),
            "steps": none[:0].view(torch.int32),
        }
    offset = scales.amin().view(1) if scales.numel() else none
    above = _blocks(scales - offset, format.scale_block)
    if scales.numel() % format.scale_block:
        above[-1, scales.numel() % format.scale_block :] = 0
    last = 2**format.scale_bits - 1
    steps = (above.amax(1) / last).to(getattr(torch, format.scale_dtype))
    wide = steps.float().unsqueeze(1)
    codes = (above / torch.where(wide > 0, wide, 1.0)).round().clamp(0, last).to(torch.uint8)
    packed = pack(codes.flatten()[: scales.numel()], format.scale_bits)
    bits = torch.int32 if steps.dtype == torch.float32 else torch.int16
    return {"scales": packed, "offset": offset.float().view(torch.int32), "steps": steps.view(bits)}


def block_scales(code: Code, format: Format, count: int) -> Tensor:
    """The scales (count,) in fp32."""
    if format.scale_bits is None:
        return numbers_of(code.scales, torch.float32)
    codes = unpack(code.scales, format.scale_bits, count)
    steps = numbers_of(code.steps, getattr(torch, format.scale_dtype)).float()
    above = _blocks(codes.float(), format.scale_block) * steps.unsqueeze(1)
    return numbers_of(code.offset, torch.float32) + above.flatten()[:count]
