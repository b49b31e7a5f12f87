"""Quantised terms: the published levels, the bounds of their error, exact rebuilding, and training over them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from weft.kernels.bit_packing import pack, packed_size, unpack
from weft.kernels.normal_float import NF4, Format, decode, decode_bitsandbytes, encode, levels
from weft.terms import TERMS, Dense, FloatCode, Int8, IntegerCode, LowRank, NormalFloat, SumLinear, build, build_sum
from weft.terms.quantized import Quantized
from weft.testing import example

PLAIN = Format(scale_bits=None)
FORMATS = [
    NF4,
    PLAIN,
    Format(bits=3, block=32, scale_bits=8, scale_block=64),
    Format(bits=2, block=16, scale_bits=4, scale_block=16, scale_dtype="bfloat16"),
    Format(bits=8, block=64, scale_bits=3, scale_block=16, scale_dtype="float16"),
]


def normal(*shape, seed=0, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def terms(matrix):
    return [Int8.from_matrix(matrix), *(NormalFloat.from_matrix(matrix, f) for f in FORMATS)]


class Sum(torch.nn.Module):
    def __init__(self, terms):
        super().__init__()
        self.terms = torch.nn.ModuleList(terms)

    def forward(self, x):
        return sum(term(x) for term in self.terms)


def test_codes_are_exported_by_arithmetic_that_formats_of_graphs_have():
    """No other view of the same bits, and no shift: ONNX has neither for most types."""
    kinds = [kind for kind, term in TERMS.items() if issubclass(term, Quantized)]
    assert {"integer_code", "float_code", "scaled_code", "column_code"} <= set(kinds)
    coded = [example(kind) for kind in kinds]
    coded += [IntegerCode.from_matrix(normal(12, 8), bits, 4, symmetric=bits == 8) for bits in (4, 8)]
    coded += [FloatCode.from_matrix(normal(12, 8), "e4m3", None, scale) for scale in ("float16", "float32")]
    model, x = Sum([term for term in coded if (term.in_features, term.out_features) == (8, 12)]), normal(3, 8)
    assert len(model.terms) > len(kinds) - 2
    graph = torch.export.export(model, (x,), strict=False)
    used = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in used if "view.dtype" in name or "shift" in name]
    torch.testing.assert_close(graph.module()(x), model(x))


def test_nf4_levels_are_the_published_ones():
    offset = 0.9677083
    above = norm.ppf(torch.linspace(0.5, offset, 9, dtype=torch.float64)[1:].numpy())
    below = -norm.ppf(torch.linspace(0.5, offset, 8, dtype=torch.float64)[1:].numpy())
    expected = sorted([*(below / above.max()), 0.0, *(above / above.max())])
    table = levels(4)
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)
    assert len(set(table.tolist())) == 16 and not torch.equal(table, -table.flip(0))
    assert {-1.0, 0.0, 1.0} <= set(table.tolist())


def test_levels_of_other_widths():
    torch.testing.assert_close(levels(2), torch.tensor([-1.0, 0.0, 0.338, 1.0]), rtol=0, atol=1e-3)
    for bits in (2, 3, 4, 8):
        table = levels(bits)
        assert len(table) == 2**bits and (table.diff() > 0).all() and table[0] == -1 and table[-1] == 1 and 0 in table


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 50), seed=st.integers(0, 9))
def test_packing_is_lossless_and_dense(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count), codes)
    assert packed.numel() == packed_size(count, bits) and 8 * packed.numel() - bits * count < 8 * bits
    stream = "".join(f"{code:0{bits}b}" for code in codes.tolist())  # one code after another, as text
    assert "".join(f"{byte:08b}" for byte in packed.tolist()).startswith(stream)


def test_first_of_two_codes_is_in_the_high_nibble():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x12, 0x30]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 99), power=st.integers(-6, 6))
def test_error_is_within_half_the_widest_gap_and_coding_again_changes_nothing(rows, columns, seed, power):
    W = normal(rows, columns, seed=seed, scale=10.0**power)
    code = encode(W, PLAIN)
    decoded = decode(code, W.shape, PLAIN)
    scale = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64).abs().amax(1)
    bound = (scale * 0.152).repeat_interleave(64)[: W.numel()].view_as(W)
    assert ((W - decoded).abs() <= bound * (1 + 1e-5)).all()
    assert all(torch.equal(a, b) for a, b in zip(encode(decoded, PLAIN), code, strict=True))


def test_block_maximum_and_zeros_are_exact():
    W = normal(4, 64)
    W[0, :5] = 0
    W[1] = 0
    decoded = decode(encode(W, PLAIN), W.shape, PLAIN)
    index = W.abs().argmax(1, keepdim=True)
    assert torch.equal(decoded.gather(1, index), W.gather(1, index))
    assert (decoded[0, :5] == 0).all() and (decoded[1] == 0).all()
    assert (decode(encode(W), W.shape)[1] == 0).all()


def test_codes_do_not_depend_on_the_scale_of_the_matrix():
    W = normal(16, 64)
    assert torch.equal(encode(W, PLAIN).codes, encode(W * 8, PLAIN).codes)


@pytest.mark.parametrize("format", [NF4, FORMATS[2]])
def test_doubly_quantised_normal_matrices_are_stable_too(format):
    W = normal(96, 128)
    code = encode(W, format)
    again = encode(decode(code, W.shape, format), format)
    assert torch.equal(again.codes, code.codes) and torch.equal(again.scales, code.scales)


def test_double_quantisation_costs_little():
    W = normal(128, 256)
    errors = [(decode(encode(W, f), W.shape, f) - W).norm() / W.norm() for f in (PLAIN, NF4)]
    assert errors[1] < 1.005 * errors[0]
    # half a step of the scales, times the largest level, in the worst entry
    plain, double = (decode(encode(W, f), W.shape, f) for f in (PLAIN, NF4))
    scales = W.view(-1, 64).abs().amax(1)
    step = (scales.max() - scales.min()) / 255
    same = (unpack(encode(W, PLAIN).codes, 4, W.numel()) == unpack(encode(W).codes, 4, W.numel())).view_as(W)
    assert ((plain - double).abs()[same] <= step / 2 + 1e-7).all() and same.float().mean() > 0.99


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bits_a_weight(format):
    term = NormalFloat.from_matrix(normal(256, 256), format)
    assert term.nbytes * 8 / 256**2 == pytest.approx(format.bits_per_weight, abs=1e-3)  # the offset is one number
    assert NF4.bits_per_weight == pytest.approx(4.127, abs=5e-4) and PLAIN.bits_per_weight == 4.5


def test_nf4_beats_even_steps_on_normal_weights():
    W = normal(512, 256, scale=1.0)
    scale = W.view(-1, 64).abs().amax(1, keepdim=True)
    even = ((W.view(-1, 64) / scale * 7).round() / 7 * scale).view_as(W)
    nf4 = decode(encode(W, PLAIN), W.shape, PLAIN)
    error = (W - nf4).square().mean().item()
    assert error == pytest.approx(0.0085, rel=0.05) and error < 0.8 * (W - even).square().mean().item()


def test_more_bits_less_error():
    W = normal(64, 64)
    errors = [(decode(encode(W, Format(bits=b)), W.shape, Format(bits=b)) - W).norm() for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_agrees_with_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(32, 96)
    theirs, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=False)
    code = encode(W, PLAIN)
    assert torch.equal(theirs.flatten(), code.codes)
    torch.testing.assert_close(state.absmax, code.scales.view(torch.float32))
    kernel = decode_bitsandbytes(code.codes, code.scales.view(torch.float32), (32, 96), 64, torch.float32)
    torch.testing.assert_close(kernel, decode(code, W.shape, PLAIN), rtol=1e-6, atol=1e-8)


def test_int8_error_is_half_a_step_of_the_row():
    W = normal(5, 33)
    W[3] = 0
    term = Int8.from_matrix(W)
    assert ((term.dense() - W).abs() <= W.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4)).all()
    assert torch.equal(Int8.from_matrix(term.dense()).codes, term.codes)
    assert term.nbytes == 5 * 33 + 5 * 4


@pytest.mark.parametrize("shape", [(6, 10), (7, 13), (1, 1), (33, 65)])
def test_every_size_rebuilds_exactly(shape):
    for term in terms(normal(*shape)):
        again = build(term.spec(), dtype=torch.float32)
        again.load_state_dict(term.state_dict())  # strict in names and sizes
        assert {n: t.dtype for n, t in again.state_dict().items()} == {n: t.dtype for n, t in term.state_dict().items()}
        assert torch.equal(again.dense(), term.dense()) and again.dense().shape == shape
        assert term.num_params == shape[0] * shape[1] and not list(term.parameters())
        assert torch.equal(copy.deepcopy(term).dense(), term.dense())


def test_a_cast_of_the_model_does_not_round_the_scales():
    for term in terms(normal(9, 40)):
        before = term.dense(torch.float32)
        term.bfloat16()
        assert torch.equal(term.dense(torch.float32), before) and term.dense().dtype == torch.bfloat16


def test_forward_is_the_decoded_product_and_keeps_nothing():
    x = normal(3, 5, 40, scale=1.0).requires_grad_()
    for term in terms(normal(9, 40)):
        y = term(x)
        torch.testing.assert_close(y, x @ term.dense().T)
        assert not any(isinstance(t, torch.Tensor) for t in y.grad_fn.saved_tensors)
        upstream = normal(3, 5, 9, seed=1, scale=1.0)
        (grad,) = torch.autograd.grad(y, x, upstream)
        torch.testing.assert_close(grad, upstream @ term.dense())


def test_forward_takes_the_dtype_of_its_input_and_of_autocast():
    for term in terms(normal(9, 40)):
        assert term(normal(2, 40).bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert term(normal(2, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("index", [0, 1])
def test_a_compiled_layer_trains_its_adapter(index):
    base = terms(normal(9, 40))[index]
    layer = SumLinear({"base": base, "lora": LowRank.from_factors(normal(9, 2), normal(2, 40))})
    x = normal(4, 40, scale=1.0).requires_grad_()
    gradients = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_sum_over_a_code_saves_and_loads_by_its_spec():
    layer = SumLinear({"base": NormalFloat.from_matrix(normal(9, 40)), "x": Dense.from_matrix(normal(9, 40, seed=1))})
    again = build_sum(layer.spec(), dtype=torch.float32)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense(), layer.dense()) and again.nbytes == layer.nbytes
