"""Small integers without waste in bytes, most significant bit first: 8 / gcd(8, b) codes of b bits fill b / gcd(8, b)
bytes, a word, so that 3 bits are 8 codes in 3 bytes and 4 bits are 2 codes in one, bitsandbytes' order.

Packing is in uint8: a code lies in one byte or in two neighbours. Unpacking looks two to eight codes up at once, by the
4 to 14 bits that they are; what is found is moved as one number of as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.tables import table

__all__ = ["looked_up", "pack", "packed_size", "unpack", "unpack_exported"]


class _Place(NamedTuple):
    """Where a code lies among the bytes of its word."""

    first: int  # the byte of its highest bit
    last: int  # the byte of its lowest bit
    shift: int  # of its lowest bit within `last`


def _places(bits: int) -> Iterator[_Place]:
    for end in range(bits, 8 * _width(bits) + 1, bits):
        yield _Place((end - bits) // 8, (end - 1) // 8, -end % 8)


_WORDS = {1: torch.uint8, 3: torch.int32, 5: torch.int64, 7: torch.int64}
"""What holds a word of so many bytes."""
_TOGETHER = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2}
"""bits -> how many codes are looked up at once."""
_MOVED = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""What is as many bytes."""


@table
def _together(bits: int) -> list[list[int]]:
    """The codes that lie in so many bits: (2^(bits k), k)."""
    shifts = range(bits * (_TOGETHER[bits] - 1), -1, -bits)
    return [[number >> shift & 2**bits - 1 for shift in shifts] for number in range(2 ** (bits * _TOGETHER[bits]))]


@table
def _shifts(bits: int) -> list[int]:
    """Of what is looked up at once in a word."""
    return list(range(8 * _width(bits) - bits * _TOGETHER[bits], -1, -bits * _TOGETHER[bits]))


def _width(bits: int) -> int:
    """Bytes a word."""
    return bits // gcd(8, bits)


def _count(bits: int) -> int:
    """Codes a word."""
    return 8 // gcd(8, bits)


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return -(-count // _count(bits)) * _width(bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (n,) uint8 of 1 to 8 bits -> bytes (packed_size(n, bits),), the last word zero-padded."""
    words = F.pad(codes, (0, -codes.numel() % _count(bits))).view(-1, _count(bits))
    packed = torch.zeros(len(words), _width(bits), dtype=torch.uint8, device=codes.device)
    for k, place in enumerate(_places(bits)):
        packed[:, place.last] |= words[:, k] << place.shift
        if place.first != place.last:
            packed[:, place.first] |= words[:, k] >> 8 - place.shift
    return packed.flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (count,) uint8 of packed bytes."""
    if bits == 8:
        return packed[:count]
    if torch.compiler.is_exporting():
        return unpack_exported(packed, bits, count)
    return _found(_together(bits, device=packed.device, dtype=torch.uint8), packed, bits)[:count]


def looked_up(packed: Tensor, bits: int, count: int, levels: Tensor) -> Tensor:
    """levels[code] (count,) of the first `count` codes, `levels` (2^bits,) in any dtype."""
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if bits == 8 or traced or packed.device.type == "mps":  # which has no numbers of 16 bytes
        return levels[unpack(packed, bits, count).int()]
    rows = _together(bits, device=packed.device, dtype=torch.int32)
    return _found(levels.index_select(0, rows.flatten()).view_as(rows), packed, bits)[:count]


def _found(rows: Tensor, packed: Tensor, bits: int) -> Tensor:
    """The rows (2^(bits k), k) that packed bytes name, one behind the other."""
    numbers: Tensor = packed
    if bits * _TOGETHER[bits] != 8:
        bytes = packed.view(-1, _width(bits)).to(_WORDS[_width(bits)])
        words = bytes[:, :1]
        for i in range(1, _width(bits)):
            words = (words << 8) | bytes[:, i : i + 1]
        shifts = _shifts(bits, device=packed.device, dtype=words.dtype)
        numbers = (words >> shifts).bitwise_and_(len(rows) - 1).flatten()
    size = min(rows.shape[1] * rows.element_size(), 16)
    moved = rows.view(_MOVED[size])
    moved = moved.squeeze(1) if moved.shape[1] == 1 else moved
    return moved.index_select(0, numbers.int()).view(rows.dtype).flatten()


def unpack_exported(packed: Tensor, bits: int, count: int) -> Tensor:
    """The same in whole numbers without shifts, which formats of graphs have for few types."""
    words = packed.view(-1, _width(bits)).int()
    codes = []
    for place in _places(bits):
        value = words[:, place.last]
        if place.first != place.last:
            value = value + 256 * words[:, place.first]
        codes.append(value.div(2**place.shift, rounding_mode="floor").remainder(2**bits))
    return torch.stack(codes, 1).flatten()[:count].to(torch.uint8)
