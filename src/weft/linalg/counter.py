"""Random numbers that are computed, not kept: each is a pure function of (seed, row, column).

    z(seed, i, j) = h(h(i + high) ^ low) ^ h(j + (low ^ golden));   number = top 24 bits of finish(z), in [-1, 1)

`h` and `finish` are 32-bit hashes of xor-shifts and multiplications modulo 2^32 (a counter-based generator: Salmon et
al., 2011). Integers are the same everywhere: any machine, device and version of torch computes the same bits, and any
part of a store can be computed alone, on the device where it is used. torch's own generators give other numbers on a
GPU than on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError

__all__ = ["check_numbers", "levels", "normal", "permutation", "signs", "subseed", "symmetric", "uniform", "verify"]

_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def symmetric(seed: int, columns: int, rows: tuple[int, int] = (0, 1), device: Any = None) -> Tensor:
    """Rows start .. stop of an endless table of uniform numbers in [-1, 1): (stop - start, columns) fp32."""
    words = _words(*_hashes(seed, columns, rows, device))
    return words.bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-23)


def levels(seed: int, columns: int, rows: int, chunk: int, device: Any = None) -> Iterator[tuple[int, int, Tensor]]:
    """The first `rows` rows of a table of 256 equally likely numbers, -255/256 .. 255/256, about `chunk` at a time.

    Yields (first, last + 1, (last + 1 - first, columns) fp32). Four numbers are the bytes of one finish(z), lowest
    first (on a little-endian machine), and so cost less than those of `symmetric`.
    """
    down, across = _hashes(seed, -(-columns // 4), (0, rows), device)
    step = max(1, chunk // columns)
    for first in range(0, rows, step):
        words = _words(down[first : first + step], across)
        words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF))  # the last product has mixed the upper bits only
        numbers = words.view(torch.int8)[:, :columns].to(torch.float32)
        yield first, first + len(numbers), numbers.mul_(2.0**-7).add_(2.0**-8)


def _hashes(seed: int, columns: int, rows: tuple[int, int], device: Any) -> tuple[Tensor, Tensor]:
    """Of the rows (stop - start, 1) and of the columns (columns,)."""
    low, high = seed & _MASK, seed >> 32 & _MASK
    down = _hash(_hash(_count(*rows, high, device)) ^ _signed(low))
    return down.unsqueeze(1), _hash(_count(0, columns, low ^ _GOLDEN, device))


def _words(down: Tensor, across: Tensor) -> Tensor:
    """(rows, columns) int32 whose upper bits are random."""
    words = (down ^ across).mul_(0x2C1B3C6D)
    return words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF)).mul_(0x297A2D39)


def uniform(seed: int, columns: int, rows: tuple[int, int] = (0, 1), device: Any = None) -> Tensor:
    """The same in [0, 1)."""
    return symmetric(seed, columns, rows, device).add_(1).mul_(0.5)  # exact: 24 bits


def normal(seed: int, columns: int, device: Any = None) -> Tensor:
    """(columns,) fp32 standard normal numbers: the inverse distribution function of uniform ones, taken in fp64."""
    centred = symmetric(seed, columns, device=device)[0].double().add_(2.0**-24)  # never -1 or 1
    return centred.erfinv_().mul_(2**0.5).to(torch.float32)


def signs(seed: int, columns: int, device: Any = None) -> Tensor:
    """(columns,) fp32 numbers, -1 or 1 with equal probability."""
    return symmetric(seed, columns, device=device)[0].add_(2.0**-24).sign_()  # never 0


def permutation(seed: int, bits: int, device: Any = None) -> Tensor:
    """A random-looking permutation of 0 .. 2^bits - 1, int64: four rounds of an odd multiplication, an addition and a
    shift, each a bijection modulo 2^bits; nothing is sorted.
    """
    mask, shift = (1 << bits) - 1, max(1, bits // 2)
    # int32 products wrap modulo 2^32, which is as good as any modulus of at least 2^bits
    places = torch.arange(1 << bits, dtype=torch.int32 if bits < 32 else torch.int64, device=device)
    for turn in range(4):
        key = subseed(seed, turn)
        places = places.mul_((key & 0x3FFFFFFF) | 1).add_(key >> 32).bitwise_and_(mask)
        places ^= places >> shift
    return places.long()


def subseed(seed: int, *path: int) -> int:
    """A seed of its own for a part of what `seed` stands for: a round of splitmix64 each (Steele et al., 2014)."""
    for step in path:
        seed = (seed ^ (step * 0xD1342543DE82EF95)) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
        seed ^= seed >> 31
    return seed >> 1


def check_numbers(seed: int) -> list[float]:
    """The first two numbers of either law: saved beside a seed, they tell whether a reader computes the same."""
    _, _, block = next(levels(seed, 2, 1, 2, device="cpu"))
    found: list[float] = [*symmetric(seed, 2, device="cpu")[0].tolist(), *block[0].tolist()]
    return found


def verify(seed: int, saved: list[float]) -> None:
    """Raises WeftError where this machine computes other numbers for the seed than those that were saved."""
    found = check_numbers(seed)
    if found != saved:
        raise WeftError(
            f"its random numbers are not those of this weft (seed {seed}: {saved} saved, {found} computed), so its "
            "coefficients mean nothing here; load it with the version of weft that wrote it"
        )


def _count(first: int, last: int, offset: int, device: Any) -> Tensor:
    """offset + first .. offset + last - 1 modulo 2^32, int32."""
    return torch.arange(first, last, dtype=torch.int32, device=device) + _signed(offset)


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32-bit words; int32 products wrap, and a masked shift is a logical one."""
    x = x.bitwise_xor((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x2C1B3C6D)
    x = x.bitwise_xor_((x >> 12).bitwise_and_(0xFFFFF)).mul_(0x297A2D39)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def _signed(word: int) -> int:
    """A 32-bit word as an int32 has it."""
    return word - (1 << 32) if word >> 31 else word
