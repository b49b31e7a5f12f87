"""The kernel that multiplies few tokens with a code against the dense matrix of the same code.

On a GPU it is compiled; elsewhere Triton's interpreter runs it, where Triton is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weft.kernels import coded_product
from weft.kernels.coded_product import Coded
from weft.kernels.float_format import FORMATS
from weft.kernels.normal_float import Format
from weft.terms import Codebook, FloatCode, Int8, IntegerCode, NormalFloat
from weft.terms.quantized import Quantized

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weft.kernels.coded_product_triton import _FEW, _ONE, _kernel

for tile, bits, given, scale, levels in (
    (_FEW, 3, "bf16", "fp16", False), (_FEW, 4, "fp16", "fp32", True), (_FEW, 4, "fp32", "bf16", False),
    (_ONE, 4, "bf16", "fp16", False), (_ONE, 8, "bf16", "fp32", False),
):
    constants = dict(BITS=bits, GROUP=64, FLAT=levels, WIDE=levels, ZERO=4, ZEROS=bits < 8, LEVELS=levels)
    constants |= dict(BYTES=bits != 3, PER=0 if levels else tile.depth // 64, WIDEN=False)
    constants |= dict(TOKENS=tile.tokens, ROWS=tile.rows, DEPTH=tile.depth, SHARE=tile.share)
    names = _kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    kinds |= {"x": f"*{given}", "y": "*fp32", "codes": "*u8", "zeros": "*u8", "scales": f"*{scale}", "levels": "*fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*constants, "tokens")}
    source = ASTSource(_kernel, kinds, constants, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ("mma" in ptx) == (given != "fp32" and tile is _FEW), "tensor cores are for several tokens of 16 bits"
    codes = tile.rows * tile.depth // 128  # a thread's
    assert tile is _FEW or ptx.count("ld.global") <= codes / 2, "bytes and scales are read together"
"""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU, set TRITON_INTERPRET=1")


def check(term: Quantized, tokens: int, dtype: torch.dtype) -> None:
    """One token and several; in fp32, which sees a single code that is off by one, and in `dtype`."""
    for kind, count in product((torch.float32, dtype), (1, tokens)):
        moved, x = term.to(DEVICE), drawn(count, term.in_features).to(DEVICE, kind)
        coded = moved.coded()
        assert coded is not None
        y = coded_product.coded_product(x.view(1, count, -1), coded, moved.out_features)
        assert y.dtype == kind and y.shape == (1, count, moved.out_features)
        W = moved.dense(kind).double()
        bound = 8 * torch.finfo(kind).eps * (x.double().abs() @ W.abs().mT)
        assert ((y[0].double() - x.double() @ W.mT).abs() <= bound).all()


def test_it_compiles_for_a_gpu_where_there_is_none(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 32, 40])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_in_groups(bits: int, group: int | None, symmetric: bool) -> None:
    dtype = DTYPES[bits % 3]
    scales = [torch.float16, torch.bfloat16, torch.float32][(bits + symmetric) % 3]
    code = IntegerCode.from_matrix(drawn(20, 600), bits, group, symmetric=symmetric, scale_dtype=scales)
    check(code, 1 + bits, dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("bits", "inputs"), [(4, 1100), (4, 1101), (2, 1100), (2, 1102)])
@pytest.mark.parametrize("group", [8, 24, 256, 512])
def test_groups_smaller_and_larger_than_what_is_read_at_a_time(bits: int, inputs: int, group: int) -> None:
    check(IntegerCode.from_matrix(drawn(17, inputs), bits, group), 2, DTYPES[1])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_a_row(dtype: torch.dtype) -> None:
    check(Int8.from_matrix(drawn(33, 150)), 16, dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("double", [False, True])
def test_normal_floats_whose_blocks_cross_rows(bits: int, double: bool) -> None:
    format = Format(bits=bits, scale_bits=8 if double else None)
    check(NormalFloat.from_matrix(drawn(21, 77), format), 3, DTYPES[bits % 3])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("double", [False, True])
def test_normal_floats_whose_blocks_end_with_rows(double: bool) -> None:
    check(NormalFloat.from_matrix(drawn(21, 192), Format(scale_bits=8 if double else None)), 3, DTYPES[1])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("group", [96, 32, 20])
@pytest.mark.parametrize("bits", range(1, 6))
def test_tables_with_scales(bits: int, group: int) -> None:
    draw, groups = torch.Generator().manual_seed(bits), -(-96 // group)
    codes, scale = torch.randint(0, 2**bits, (18, 96), generator=draw), torch.rand(18, groups, generator=draw) + 0.5
    term = Codebook.from_codes(codes, drawn(1, 2**bits).half(), None, torch.float32, scale.half(), group)
    check(term, 3, DTYPES[bits % 3])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("element", FORMATS)
def test_floats_of_few_bits(element: str) -> None:
    check(FloatCode.from_matrix(drawn(18, 70), element, 32, "e8m0" if element == "e2m1" else "float16"), 2, DTYPES[1])


@pytest.mark.usefixtures("interpreted")
def test_a_forward_pass_of_few_tokens_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    term, seen = Int8.from_matrix(drawn(16, 32)).to(DEVICE), []
    inner = coded_product.coded_product

    def noted(x: Tensor, coded: Coded, out: int) -> Tensor:
        seen.append(len(x))
        return inner(x, coded, out)

    monkeypatch.setattr("weft.terms.quantized.coded_product", noted)
    if DEVICE == "cpu":
        monkeypatch.setattr("weft.terms.quantized.worthwhile", lambda x: len(x) <= coded_product.FEW)
    for tokens in (2, 17):
        x = drawn(tokens, 32).to(DEVICE)
        torch.testing.assert_close(term(x), x @ term.dense().mT, atol=1e-4, rtol=1e-4)
    assert seen == [2]
