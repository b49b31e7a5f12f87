"""Product with a matrix of sparse support, keeping x (or what it is recomputed from), the values and the support alone.

On a CPU, up to a density of `DENSITY`, products touch the entries alone, some hundred tokens at a time, transposed, so
that every entry is one multiplication of a vector of tokens (`entries_alone`): y^T[i] = sum_k v_k x^T[j_k] is a bag of
rows, and the gradient of v_k the product g^T[i_k] . x^T[j_k]. Elsewhere the matrix is scattered into a transient
(out, in) buffer for one matrix product, which is faster than compressed-row products on a GPU, and the gradient of the
values is the dense gradient g^T x read at the support (SLTrain, Han et al., 2024, arXiv 2406.02214, section 3.3).
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.autocast import compute_dtype, without_autocast
from weft.kernels.recompute import Source, changes, fetch, source_of
from weft.kernels.shapes import beside

__all__ = ["DENSITY", "add_entries", "entries_alone", "pull_entries", "scatter_dense", "sparse_linear"]

DENSITY = 0.1
"""Above it a CPU multiplies a whole matrix faster than its entries."""

TOKENS = 256  # at a time: x^T and g^T of so many stay in a core's cache

_SUPPORT = "_weft_support"


def scatter_dense(values: Tensor, positions: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out, in) matrix with values (k,) at flat row-major positions (k,); differentiable in the values."""
    flat = torch.zeros(out_features * in_features, dtype=values.dtype, device=values.device)
    return flat.scatter(0, positions.long(), values).view(out_features, in_features)


def entries_alone(values: Tensor, out_features: int, in_features: int, dtype: torch.dtype | None = None) -> bool:
    """Whether a product in `dtype` (None: that of the values) is better made of the entries than of the matrix."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    wide = (dtype or values.dtype) in (torch.float32, torch.float64)
    return wide and values.numel() <= DENSITY * out_features * in_features


def sparse_linear(
    x: Tensor, values: Tensor, positions: Tensor, out_features: int, probe: Tensor | None = None
) -> Tensor:
    """x (..., in) times the transpose of the sparse matrix of values (k,) at positions (k,), ascending: (..., out).

    Computed in autocast's dtype if it is on, else in that of x. A `probe` (out, in) stands for a zero matrix added to
    the sparse one: it is not read, and its gradient is the dense one.
    """
    # compiled code keeps or makes x again as its own partitioner sees fit
    recipe, kept, _ = Source(None, (x,), 0) if torch.compiler.is_compiling() else source_of(x)
    return _SparseLinear.apply(x, recipe, kept, values, positions, out_features, probe)  # type: ignore[no-untyped-call]


class _Support:
    """Positions as compressed rows, and as those of the transpose, which are sorted when they are first asked for."""

    def __init__(self, positions: Tensor, out_features: int, in_features: int) -> None:
        self.version, self.shape = changes(positions), (out_features, in_features)
        flat = positions.long()
        self.columns = (flat % in_features).int()
        self.ends = _ends(flat // in_features, out_features)
        self.flat = positions.detach()

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order of the entries by column, their rows in this order, and where each column ends."""
        flat, (out, inn) = self.flat.long(), self.shape
        columns, order = (flat % inn * out + flat // inn).sort()
        return order.int(), (columns % out).int(), _ends(columns // out, inn)


def _ends(places: Tensor, count: int) -> Tensor:
    """Where each of `count` runs of equal numbers ends among ascending places, and the first begins: (count + 1,)."""
    return torch.searchsorted(places, torch.arange(count + 1, device=places.device), out_int32=True)


def _transposed(rows: Tensor) -> Tensor:
    """A matrix's transpose, in memory of its own."""
    n, wide = rows.numel(), rows.shape[0]  # in channels_last a shuffle is vectorised, a copy is not
    return torch.channel_shuffle(rows.contiguous().as_strided((1, n, 1, 1), (n, 1, n, n)), wide).view(-1, wide)


def _bags(values: Tensor, places: Tensor, ends: Tensor, rows: Tensor) -> Tensor:
    """(bags, tokens): in every bag the sum of values times the rows (n, tokens) at its places."""
    return F.embedding_bag(places, rows, ends, mode="sum", per_sample_weights=values, include_last_offset=True)


@torch.library.custom_op("weft::product_at", mutates_args=())
def _product_at(gt: Tensor, xt: Tensor, columns: Tensor, ends: Tensor) -> Tensor:
    """The entries of g^T x at the places of a support, for g^T (out, tokens) and x^T (in, tokens)."""
    shape, zeros = (len(gt), len(xt)), gt.new_zeros(len(columns))
    with warnings.catch_warnings(action="ignore"):  # torch calls compressed rows a beta once a process
        support = torch.sparse_csr_tensor(ends, columns, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(support, gt, xt.mT).values().clone()


@_product_at.register_fake
def _(gt: Tensor, xt: Tensor, columns: Tensor, ends: Tensor) -> Tensor:
    return gt.new_empty(len(columns))


def _support_of(positions: Tensor, out_features: int, in_features: int) -> _Support:
    """The support of positions, made once while they do not change."""
    found: _Support | None = getattr(positions, _SUPPORT, None)
    if found is None or found.version != changes(positions) or found.shape != (out_features, in_features):
        found = _Support(positions, out_features, in_features)
        setattr(positions, _SUPPORT, found)
    return found


def add_entries(y: Tensor, rows: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """y (n, out) += rows (n, in) times the transpose of the sparse matrix, in place; y."""
    out, inn = y.shape[1], rows.shape[1]
    if not entries_alone(values, out, inn):
        return y.addmm_(rows, scatter_dense(values, positions, out, inn).mT)
    support = _support_of(positions, out, inn)
    for start in range(0, len(rows), TOKENS):
        part = slice(start, start + TOKENS)
        y[part] += _transposed(_bags(values, support.columns, support.ends, _transposed(rows[part])))
    return y


def pull_entries(
    grad_x: Tensor | None, grad: Tensor, rows: Tensor | None, values: Tensor, positions: Tensor
) -> Tensor | None:
    """grad_x (n, in) += grad (n, out) times the sparse matrix, in place, where it is given; and the gradient of the
    values (k,), where the rows (n, in) of the product are.
    """
    inn = next(t.shape[1] for t in (rows, grad_x) if t is not None)
    if not entries_alone(values, grad.shape[1], inn):
        if grad_x is not None:
            grad_x.addmm_(grad, scatter_dense(values, positions, grad.shape[1], inn))
        return None if rows is None else (grad.mT @ rows).flatten()[positions.long()]
    support = _support_of(positions, grad.shape[1], inn)
    found = None if rows is None else torch.zeros_like(values)
    order, places, ends = support.transposed
    by_column = values[order]
    for start in range(0, len(grad), TOKENS):
        part = slice(start, start + TOKENS)
        gt = _transposed(grad[part])
        if grad_x is not None:
            grad_x[part] += _transposed(_bags(by_column, places, ends, gt))
        if rows is not None and found is not None:
            found += _product_at(gt, _transposed(rows[part]), support.columns, support.ends)
    return found


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        recipe: Any,
        kept: tuple[Tensor, ...],
        values: Tensor,
        positions: Tensor,
        out_features: int,
        probe: Any,
    ) -> Tensor:
        dtype = compute_dtype(x)
        with without_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            return beside(add_entries(rows.new_zeros(len(rows), out_features), rows, values.to(dtype), positions), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.recipe, kept, values, positions, _, _ = inputs
        ctx.dtype, ctx.shape, ctx.kept = x.dtype, x.shape, len(kept)
        ctx.save_for_backward(*kept, values, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *kept, values, positions = ctx.saved_tensors
        needs, whole = ctx.needs_input_grad, None
        with without_autocast(grad):
            rows = fetch(ctx.recipe, kept).reshape(-1, ctx.shape[-1]).to(grad.dtype)
            g = grad.reshape(-1, grad.shape[-1])
            grad_x = torch.zeros_like(rows) if needs[0] else None
            if needs[6]:
                whole = g.mT @ rows
            wanted = rows if needs[3] and whole is None else None
            found = None
            if grad_x is not None or wanted is not None:
                found = pull_entries(grad_x, g, wanted, values.to(grad.dtype), positions)
        found = whole.flatten()[positions.long()] if whole is not None and needs[3] else found
        grad_x = None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, None if found is None else found.to(values.dtype), None, None, whole
