"""weft's kernels against the plain formulas that they stand for: error, time and peak memory; `gpu.py` runs them.

A kernel may be no further from the formula in fp64 than twice what the formula itself is in the kernel's dtype, plus
two roundings: outputs and every gradient. Codes are compared with those that a CPU makes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.cells import bucketize, cells
from weft.kernels.coded_product import worthwhile
from weft.kernels.column_linear import column_linear
from weft.kernels.lean_linear import Factor, linear
from weft.kernels.normal_float import Format, decode, encode, levels
from weft.kernels.prefix_attention import prefix_attention
from weft.kernels.sparse_linear import scatter_dense, sparse_linear
from weft.memory.cross_entropy import cut_cross_entropy, linear_cross_entropy
from weft.terms import Int8, IntegerCode, NormalFloat

Case = Callable[[], dict[str, Any]]
Formula = Callable[..., Tensor]

SIZES = {"tiny": (16, 64, 48, 8, 512), "large": (4096, 2048, 5461, 16, 128256)}  # tokens, in, out, rank, vocabulary


def cases(size: str, device: str) -> dict[str, Case]:
    """Name -> what compares a kernel with its formula, and raises AssertionError where they differ."""
    tokens, inn, out, rank, vocabulary = SIZES[size]
    draw = functools.partial(normal, device=device)
    x, W, bias = draw(tokens, inn), draw(out, inn) / inn**0.5, draw(out)
    B, A = draw(out, rank) / rank**0.5, draw(rank, inn) / inn**0.5
    columns = torch.arange(0, inn, inn // rank, device=device)[:rank]
    positions = torch.arange(0, out * inn, 100, device=device, dtype=torch.int32)
    pairs: dict[str, tuple[Formula, Formula, list[Tensor]]] = {
        "lean linear": (lean_sum, plain_sum, [x, W, bias, B, A]),
        "column linear": (
            lambda x, values: column_linear(x, values, columns),
            lambda x, values: F.linear(x[..., columns], values),
            [x, B],
        ),
        "sparse linear": (
            lambda x, values: sparse_linear(x, values, positions, out),
            lambda x, values: F.linear(x, scatter_dense(values, positions, out, inn)),
            [x, draw(len(positions))],
        ),
        "prefix attention, no prefix": (
            without_prefix,
            F.scaled_dot_product_attention,
            [draw(2, 4, min(tokens, 1024), 64) for _ in range(3)],
        ),
    }
    found: dict[str, Case] = {
        f"{name}, {str(dtype).removeprefix('torch.')}": functools.partial(compared, fast, plain, inputs, dtype)
        for name, (fast, plain, inputs) in pairs.items()
        for dtype in (torch.bfloat16, torch.float32)
    }
    for trained in (True, False):
        name = f"linear cross-entropy, {'trained' if trained else 'frozen'} head"
        found[name] = functools.partial(cross_entropy, 2 * tokens, inn, vocabulary, trained, device)
    found["linear cross-entropy, trained head, own chunks"] = functools.partial(
        cross_entropy, 2 * tokens, inn, vocabulary, True, device, own=True
    )
    found["bucketize"] = functools.partial(buckets, draw(1024 * tokens).clamp(-1, 1))
    for bits in (2, 3, 4, 8):
        found[f"normal float {bits}"] = functools.partial(codes, W, bits)
    for name, term in {"int8": Int8.from_matrix, "int3": int3, "int4": int4, "nf4": NormalFloat.from_matrix}.items():
        found[f"coded product, {name}"] = functools.partial(few_tokens, term, W.bfloat16())
    return found


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device)


def lean_sum(x: Tensor, W: Tensor, bias: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return linear(x, W, bias, [Factor(B, A, 0.5)])


def plain_sum(x: Tensor, W: Tensor, bias: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return F.linear(x, W, bias) + 0.5 * F.linear(F.linear(x, A), B)


def without_prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, width = q.shape[1], q.shape[-1]
    none = torch.zeros(heads, width, width, device=q.device), torch.zeros(heads, width, device=q.device)
    return prefix_attention(q, k, v, *none, None, width**-0.5)


def cross_entropy(
    tokens: int, inn: int, vocabulary: int, trained: bool, device: str, own: bool = False
) -> dict[str, Any]:
    """Of `tokens` tokens in bf16, with a head that is trained or not; by weft's chunks even where another kernel is."""
    hidden, head = normal(tokens, inn, device=device), normal(vocabulary, inn, device=device) / inn**0.5
    targets = torch.arange(tokens, device=device) * 7919 % vocabulary
    frozen = [] if trained else [1]

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        z = F.linear(hidden, head)
        return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), targets)

    def fast(hidden: Tensor, head: Tensor) -> Tensor:
        with mock.patch("weft.memory.cross_entropy.cut_cross_entropy", no_kernel) if own else nullcontext():
            return linear_cross_entropy(hidden, head, targets)

    row = compared(fast, plain, [hidden, head], torch.bfloat16, frozen)
    half = [t.bfloat16().requires_grad_(i not in frozen) for i, t in enumerate((hidden, head))]
    return row | {"kernel": "chunks" if own or cut_cross_entropy(*half) is None else "cut-cross-entropy"}


def no_kernel(hidden: Tensor, weight: Tensor) -> None:
    return None


def compared(
    fast: Formula, plain: Formula, inputs: Sequence[Tensor], dtype: torch.dtype, frozen: Sequence[int] = ()
) -> dict[str, Any]:
    """The largest relative error among output and gradients, milliseconds forward and backward, and peak MB."""
    given = [t.to(dtype).requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    exact = outcome(plain, [t.detach().double().requires_grad_(t.requires_grad) for t in given])
    row: dict[str, Any] = {}
    errors = {}
    for prefix, formula in (("", fast), ("plain_", plain)):
        errors[prefix] = [distance(a, b) for a, b in zip(outcome(formula, given), exact, strict=True)]
        row[f"{prefix}relative_error"] = max(errors[prefix])
    exact.clear()
    for prefix, formula in (("", fast), ("plain_", plain)):
        row |= {f"{prefix}{key}": value for key, value in cost(functools.partial(outcome, formula, given)).items()}
    bounds = [2 * error + 2 * torch.finfo(dtype).eps for error in errors["plain_"]]
    wrong = [i for i, (e, bound) in enumerate(zip(errors[""], bounds, strict=True)) if not e <= bound]
    assert not wrong, f"results {wrong} (0 is the output) have errors {errors['']}; the formula's: {errors['plain_']}"
    return row


def outcome(formula: Formula, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients for an upstream gradient that is fixed."""
    y = formula(*inputs)
    upstream = torch.ones_like(y) if y.ndim == 0 else torch.linspace(-1, 1, y.shape[-1]).to(y).expand_as(y)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], upstream)]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def cost(work: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Median milliseconds, and on a GPU the peak beyond what was there before."""
    gpu = torch.cuda.is_initialized()
    work()
    times = []
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    row = {"ms": sorted(times)[repeats // 2]}
    return row | {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6} if gpu else row


def buckets(unit: Tensor) -> dict[str, Any]:
    """`bucketize` and torch's, which must agree exactly."""
    table = levels(4, device=unit.device)
    edges = (table[1:] + table[:-1]) / 2
    prepared = cells(edges)
    assert torch.equal(bucketize(unit, prepared), torch.bucketize(unit, edges).to(torch.uint8)), "other buckets"
    plain = cost(lambda: torch.bucketize(unit, edges))
    return cost(lambda: bucketize(unit, prepared)) | {f"plain_{key}": value for key, value in plain.items()}


def int3(W: Tensor) -> IntegerCode:
    return IntegerCode.from_matrix(W, 3, 64, symmetric=True)


def int4(W: Tensor) -> IntegerCode:
    return IntegerCode.from_matrix(W, 4, 128)


@torch.no_grad()
def few_tokens(make: Callable[[Tensor], Any], W: Tensor) -> dict[str, Any]:
    """A pass of one token through a code, and the same by its dense matrix, in W's dtype."""
    term, x = make(W), normal(1, W.shape[1], device=str(W.device)).to(W.dtype)
    exact = x.double() @ term.dense(W.dtype).double().mT
    plain = cost(lambda: F.linear(x, term.dense(W.dtype)))
    error = distance(term(x), exact)
    assert error < 2 * torch.finfo(W.dtype).eps, f"relative error {error:.1e}"
    row = {"relative_error": error, "kernel": "Triton" if worthwhile(x) else "dense"}
    return row | cost(lambda: term(x)) | {f"plain_{key}": value for key, value in plain.items()}


def codes(W: Tensor, bits: int) -> dict[str, Any]:
    """Codes of a matrix made where it lies and on a CPU, and the matrix read from them; the time of reading."""
    format = Format(bits=bits)
    here, there = encode(W, format), encode(W.cpu(), format)
    shape = (W.shape[0], W.shape[1])
    differing = float((here.codes.cpu() != there.codes).double().mean())
    error = distance(decode(here, shape, format).cpu(), decode(type(here)(*(t.cpu() for t in here)), shape, format))
    assert differing < 1e-5 and error < 1e-6, f"{differing:.1e} of the bytes differ; decoded, by {error:.1e}"
    return {
        "bytes_that_differ": differing,
        "relative_error": error,
        **cost(lambda: decode(here, shape, format, torch.bfloat16)),
    }
