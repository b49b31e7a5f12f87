"""A sum of low rank and sparse as one product with a matrix that nobody keeps: exact, in every mode, and lean."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.kernels.recompute import recompute
from weft.memory import lean, unlean
from weft.terms import TERMS, Dense, LowRank, Sparse, SumLinear
from weft.testing import example

OUT, IN, RANK, MANY, FEW = 48, 64, 5, 120, 20


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> SumLinear:
    draw = torch.Generator().manual_seed(0)
    B, A = (torch.randn(*shape, generator=draw) for shape in ((OUT, RANK), (RANK, IN)))
    S = Sparse.from_mask(torch.randn(OUT, IN, generator=draw), torch.rand(OUT, IN, generator=draw) < 0.1)
    terms = {"low_rank": LowRank.from_factors(B, A, scale=0.5), "sparse": S}
    return SumLinear(terms, torch.randn(OUT, generator=draw) if bias else None).to(dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(module: nn.Module, function, x: Tensor, g: Tensor) -> list[Tensor | None]:
    module.zero_grad()
    x = x.detach().requires_grad_(True)
    y = function(x)
    (y * g.to(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(MANY,), (2, MANY // 2)])
def test_it_is_the_sum_of_its_terms_with_autograd_s_gradients(shape, bias):
    module = layer(bias=bias)
    x, g = draw(*shape, IN), draw(OUT, *shape).movedim(0, -1)  # a gradient whose rows do not lie together
    assert module.fused(x) is not None
    plain = lambda x: sum(x @ term.dense().T for term in module.terms.values()) + (module.bias if bias else 0)  # noqa: E731
    for found, expected in zip(gradients(module, module, x, g), gradients(module, plain, x, g), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_few_rows_take_one_product_a_term():
    module = layer()
    x = draw(FEW, IN)
    assert module.fused(x) is None
    torch.testing.assert_close(module(x), x @ module.dense(torch.float64).T + module.bias)
    both = layer()
    both.terms["base"] = Dense.from_matrix(torch.zeros(OUT, IN).double())
    assert both.fused(draw(MANY, IN)) is None, "a matrix that is at hand needs no other one"


def kept(module: SumLinear, x: Tensor) -> list[Tensor]:
    """The tensors that autograd keeps."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        module(x.requires_grad_(True))
    return found


def test_no_matrix_is_kept():
    module, x = layer(), draw(MANY, IN)
    own = {t.data_ptr() for t in module.state_dict().values()} | {x.data_ptr()}
    assert {t.data_ptr() for t in kept(module, x)} <= own


def test_a_lean_step_keeps_not_even_x_where_it_can_be_made_again():
    module, x = layer(), draw(MANY, IN)

    def forward(inner: nn.Module, x: Tensor) -> Tensor:
        return inner(recompute(torch.tanh, (x,)))

    plain = gradients(module, lambda x: module(torch.tanh(x)), x, draw(MANY, OUT))
    lean(module)
    mine = gradients(module, lambda x: forward(module, x), x, draw(MANY, OUT))
    unlean(module)
    for found, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_checkpointing_changes_nothing():
    module, x, g = layer(), draw(MANY, IN), draw(MANY, OUT)
    again = gradients(module, lambda x: checkpoint(module, x, use_reentrant=False), x, g)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients(module, module, x, g), strict=True))


def test_compiled_whole():
    module, x, g = layer(torch.float32), draw(MANY, IN, dtype=torch.float32), draw(MANY, OUT, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(module, compiled, x, g), gradients(module, module, x, g), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_half_precision_and_what_is_frozen():
    module, x, g = layer(torch.float32), draw(MANY, IN, dtype=torch.float32), draw(MANY, OUT, dtype=torch.float32)
    whole = gradients(module, module, x, g)
    module.terms["low_rank"].B.requires_grad_(False)

    def narrow(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        return y

    found = gradients(module, narrow, x, g)
    names = [name for name, _ in module.named_parameters()]
    assert found[2 + names.index("terms.low_rank.B")] is None
    for one, other in zip(found, whole, strict=True):
        if one is not None:
            assert float((one.float() - other).norm() / other.norm()) < 0.02
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", TERMS)
def test_what_a_layer_gives_may_be_changed_in_place(kind):
    """As what a plain layer gives may be, with a bias or without: Llama 4 adds its experts to it."""
    for bias, second, shape in itertools.product((False, True), (False, True), ((5,), (2, 5))):
        terms = {"first": example(kind)} | ({"second": example("low_rank", 2)} if second else {})
        module = SumLinear(terms, torch.zeros(12) if bias else None)
        x = draw(*shape, module.in_features, dtype=torch.float32).requires_grad_()
        module(x).add_(1).sum().backward()
