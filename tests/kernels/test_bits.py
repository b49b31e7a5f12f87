"""What a graph is exported with is what is computed otherwise, bit for bit."""

from __future__ import annotations

import pytest
import torch

from weft.kernels.bit_packing import looked_up, pack, unpack, unpack_exported
from weft.kernels.bits import numbers_of, numbers_of_exported


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_out_of_their_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(200, generator=generator) * 10.0**k for k in (-7, -5, -2, 0, 4)]
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, info.tiny, info.smallest_normal / 4, info.max, info.min])
    numbers = torch.cat([*random, special]).to(dtype).clamp(info.min, info.max).view(4, -1)
    for stored in (numbers.view(torch.int16 if dtype.itemsize == 2 else torch.int32), numbers.view(torch.uint8)):
        assert torch.equal(numbers_of(stored, dtype), numbers)
        assert torch.equal(numbers_of_exported(stored, dtype), numbers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_out_of_their_bytes(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (101,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, 101), codes) and torch.equal(unpack_exported(packed, bits, 101), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_of_codes_out_of_their_bytes(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randn(2**bits, generator=generator).to(dtype)
    levels[:2] = torch.tensor([-0.0, torch.inf])
    for count in (1, 7, 101, 4096):
        codes = torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.uint8)
        found = looked_up(pack(codes, bits), bits, count, levels)
        bytes = torch.int16 if dtype.itemsize == 2 else torch.int32 if dtype.itemsize == 4 else torch.int64
        assert found.dtype == dtype and torch.equal(found.view(bytes), levels[codes.int()].view(bytes))
