"""lq-lora: a weight as a NormalFloat code plus low-rank factors, found together (Guo et al., 2023, arXiv 2311.12023).

    repeat:  L1 L2 = rank-r SVD of (W - Q),   Q = quantise(W - L1 L2);     W' = Q + s B A,  s B A = L1 L2
    weighted:  SVD of diag(a) (W - Q) diag(b), its factors divided by a and b;
               a (out,), b (in,): roots of the row and column means of the Fisher diagonal F

until ||W - Q - L1 L2|| rises (equations 2 to 4). One iteration is QPiSSA: the code of what the principal triplets leave
(Meng et al., 2024, arXiv 2404.02948, section 4). The format of each layer under a budget of bits is chosen by an
integer program (equation 5): `weft.quantize(model, "lq-lora", rank=..., bits=...)`.

Deviations: the best iterate is returned, the official code returns the one whose error rose; the first SVD is exact and
the later ones are a round of subspace iteration from the factors before (randomised ones in the official code), so that
two runs agree and a hundred iterations cost little; the weighted error uses the rank-one F = a^2 b^2, whose minimiser
the weighted SVD is. The scale is 1 unless `alpha` is given, published are alpha 16 at r 64. `weft.quantize` takes five
iterations unless told; statistics weigh there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.allocate.integer_program import choose
from weft.kernels.normal_float import NF4, Format
from weft.linalg.subspace import rayleigh_ritz, subspace_iteration
from weft.linalg.svd import low_rank_factors
from weft.methods.adapter import lora_count, scale_of
from weft.methods.base import Method, Moments, Site, Split
from weft.terms import LowRank, NormalFloat

__all__ = ["GRID", "METHOD", "SHORT_GRID", "Decomposition", "decompose", "fisher_roots", "split"]

GRID = tuple(
    Format(*numbers)
    for numbers in product((2, 3, 4, 8), (16, 32, 64), (2, 3, 4, 8), (16, 64, 256), ("bfloat16", "float16", "float32"))
)
"""The 432 formats of the paper."""

SHORT_GRID = tuple(Format(bits, block, 8, 256, "float32") for bits in (2, 3, 4, 8) for block in (16, 32, 64))
"""The 12 of them that differ in what matters most: a cost table of 432 columns takes hours on a CPU."""


Once = Callable[[str, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]


class Decomposition(NamedTuple):
    """W = dense(code) + B A, and the (weighted) Frobenius error after each iteration."""

    code: NormalFloat
    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    errors: list[float]

    @property
    def error(self) -> float:
        """Of the iterate that is returned."""
        return min(self.errors)


def decompose(
    W: Tensor,
    rank: int,
    format: Format = NF4,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    iterations: int = 100,
    start: tuple[Tensor, Tensor] | None = None,
) -> Decomposition:
    """Alternate between the factors and the code until the error rises; the best iterate.

    Args:
        W: (out, in).
        rank: of the factors; 0 quantises W alone.
        weights: a (out,) and b (in,) of the weighted form, see `fisher_roots`.
        iterations: at most; the paper's limit is 100, of which few are used.
        start: the factors of W itself, if they are known: they do not depend on the format.
    """
    W = W.float()
    best: Decomposition | None = None
    errors: list[float] = []
    for _ in range(max(iterations, 1)):
        if best is None:
            B, A = _factors(W, rank, weights) if start is None else start
        else:
            B, A = _refactor(W - best.code.dense(), best.A, weights)
        code = NormalFloat.from_matrix(W - B @ A, format)
        errors.append(float(_weigh(W - code.dense() - B @ A, weights).norm()))
        if best is not None and not errors[-1] < min(errors[:-1]):
            break
        best = Decomposition(code, B, A, errors)
        if rank == 0:
            break
    assert best is not None
    return best


def fisher_roots(moments: Moments) -> tuple[Tensor, Tensor]:
    """a (out,) and b (in,): roots of the row and column means of the Fisher diagonal.

    Rows and columns that have none (a dead neuron) get a thousandth of the mean, for a and b are divided by.
    """
    pair = (moments["fisher_rows"].float(), moments["fisher_columns"].float())
    a, b = (torch.maximum(v / v.mean(), torch.tensor(1e-6)).sqrt() for v in pair)
    return a, b


def split(site: Site, *, alpha: float | None, rslora: bool, iterations: int, **numbers: Any) -> Split:
    """The code in the base's place, and the factors beside it; weighted where the site has Fisher moments."""
    roots = fisher_roots(site.moments) if {"fisher_rows", "fisher_columns"} <= site.moments.keys() else None
    found = decompose(site.weight(), site.rank, Format(**numbers), weights=roots, iterations=iterations)
    scale = scale_of(site.nominal, alpha=alpha, rslora=rslora)
    # the size that the scale takes away is put back, half into each factor
    B, A = (factor.div(scale**0.5).to(site.device, site.dtype) for factor in (found.B, found.A))
    code = found.code.to(next(iter(site.terms.values()))._reference().dtype)
    return Split({"base": code, "": LowRank.from_factors(B, A, scale=scale)})


def choose_formats(
    weights: Mapping[str, Tensor],
    rank: int,
    bits: float,
    formats: Sequence[Format] = SHORT_GRID,
    roots: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    once: Once = lambda name, make: make(),
) -> dict[str, Format]:
    """The format of each matrix with the least total squared error at `bits` a weight in the mean (equation 5).

    A format's error is that of the first iterate, whose factors all formats share. `once` (name, make) gives what
    `make` does, or what it gave before an interruption.
    """
    rows = []
    for layer, W in weights.items():
        make = partial(_errors, W, rank, formats, (roots or {}).get(layer))
        rows.append(once(f"formats-{layer}", make)["errors"])
    # with sizes in bits the paper's normalisation is not needed
    count = torch.tensor([W.numel() for W in weights.values()], dtype=torch.float64)
    widths = torch.tensor([format.bits_per_weight for format in formats], dtype=torch.float64)
    chosen = choose(torch.stack(rows), count.unsqueeze(1) * widths, bits * float(count.sum()))
    return {layer: formats[option] for layer, option in zip(weights, chosen, strict=True)}


def _errors(
    W: Tensor, rank: int, formats: Sequence[Format], weights: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """The squared error of each format (n,)."""
    start, row = None, []
    for format in formats:
        found = decompose(W, rank, format, weights=weights, iterations=1, start=start)
        start = found.B, found.A
        row.append(found.error**2)
    return {"errors": torch.tensor(row)}


def _factors(M: Tensor, rank: int, weights: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    B, A = low_rank_factors(_weigh(M, weights), rank)
    if weights is None:
        return B, A
    a, b = weights
    return B / a.unsqueeze(1), A / b


def _refactor(M: Tensor, A: Tensor, weights: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """`_factors` of a matrix that has changed little since it had the factor A (r, in)."""
    M, rows = _weigh(M, weights), A if weights is None else A * weights[1]
    V, s = rayleigh_ritz(M, subspace_iteration(M, rows.mT), len(A))
    root = s.sqrt()
    B, A = M @ V / root.clamp_min(torch.finfo(s.dtype).tiny), root.unsqueeze(1) * V.mT
    return (B, A) if weights is None else (B / weights[0].unsqueeze(1), A / weights[1])


def _weigh(M: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    return M if weights is None else weights[0].unsqueeze(1) * M * weights[1]


METHOD = Method(
    name="lq-lora",
    kind="adapt",
    summary="A NormalFloat code and low-rank factors found together; only the factors are trained.",
    paper="Guo et al., 2023, arXiv 2311.12023",
    split=split,
    count=lora_count,
    replaces=True,
    deviates="by the quantisation error that the factors do not take up",
    least={"bits": 2, "block": 1, "scale_bits": 2, "scale_block": 1},
    defaults={"alpha": None, "rslora": False, "iterations": 100, **NF4._asdict()},
)
