"""A small term of every kind, for the conformance suite (`weft.testing`) and for whoever needs a term to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.terms import (
    TERMS,
    BlockAffine,
    Bottleneck,
    CodedFactors,
    Columns,
    CoreLowRank,
    Dense,
    GatedLowRank,
    Int8,
    Kronecker,
    LowRank,
    Magnitude,
    MovingSparse,
    NormalFloat,
    PackedFactors,
    PivotedLowRank,
    PooledLowRank,
    Projected,
    RandomCombination,
    RandomProducts,
    RandomStore,
    Removed,
    Replacement,
    ShardSum,
    Shifted,
    SingularBasis,
    Sparse,
    Spectral,
    Term,
)

__all__ = ["EXAMPLES", "IN", "OUT", "RANK", "example"]

OUT, IN, RANK = 12, 8, 3


def example(kind: str, seed: int = 0) -> Term:
    """A small term (12 x 8) of one of weft's kinds, the same for the same seed, nothing in it zero or symmetric."""
    return EXAMPLES[kind](torch.Generator().manual_seed(seed))


def _spectral(generator: Generator) -> Term:
    s = torch.rand(RANK, generator=generator) + 0.5
    return Spectral.from_factors(_side(OUT, RANK, generator), s, _side(RANK, IN, generator), scale=0.5)


def _sparse(generator: Generator) -> Term:
    return Sparse.from_mask(_side(OUT, IN, generator), torch.rand(OUT, IN, generator=generator) < 0.3)


def _columns(generator: Generator) -> Term:
    return Columns.from_columns(_side(OUT, RANK, generator), torch.tensor([6, 1, 4]), IN, scale=0.5)


def _moving_sparse(generator: Generator) -> Term:
    chosen = torch.randperm(OUT * IN, generator=generator)[:30]
    term = MovingSparse(IN, OUT, 20, settled=10)
    for values, places, own in (
        (term.values, term.positions, chosen[:20]),
        (term.settled, term.settled_positions, chosen[20:]),
    ):
        values.data.copy_(torch.randn(len(own), generator=generator))
        places.copy_(own.sort().values)
    return term


def _low_rank(generator: Generator) -> LowRank:
    return LowRank.from_factors(_side(OUT, RANK, generator), _side(RANK, IN, generator), scale=0.5)


def _pivoted_low_rank(generator: Generator) -> Term:
    return PivotedLowRank.from_factors(_side(OUT, RANK, generator), _side(RANK, IN, generator))


def _core_low_rank(generator: Generator) -> Term:
    B, R, A = _side(OUT, RANK, generator), _side(RANK, RANK, generator), _side(RANK, IN, generator)
    return CoreLowRank.from_factors(B, R, A, scale=0.5)


def _gated_low_rank(generator: Generator) -> Term:
    gate = torch.rand(RANK, generator=generator) + 0.5
    return GatedLowRank.from_factors(_side(OUT, RANK, generator), _side(RANK, IN, generator), gate, scale=0.5)


def _shifted(generator: Generator) -> Term:
    term = Shifted.from_term(_low_rank(generator))
    with torch.no_grad():
        for parameter in term.now.parameters():
            parameter.add_(_side(*parameter.shape, generator))
    return term


def _singular_basis(generator: Generator) -> Term:
    size, head = min(OUT, IN), 3
    U, V = (_side(n, size, generator) / 3 for n in (OUT, IN))
    X, Y = (_side(size - head, RANK, generator) / 2 for _ in "XY")
    term = SingularBasis.from_factors(U, torch.rand(size, generator=generator) + 0.5, V.mT, X, Y.mT)
    term.scale, term.shift = (nn.Parameter(_side(head, generator)) for _ in range(2))
    return term


def _shard_sum(generator: Generator) -> Term:
    term = ShardSum(IN, OUT, RANK, OUT // 2)
    term.D = nn.Parameter(_side(RANK, OUT // 2, generator))
    return term


def _block_affine(generator: Generator) -> Term:
    term = BlockAffine(IN, OUT, 4, {"base": Dense.from_matrix(_side(OUT, IN, generator)).requires_grad_(False)})
    term.D = nn.Parameter(_side(OUT // 4, 4, 4, generator) / 2)
    return term


def _kronecker(generator: Generator) -> Term:
    return Kronecker.from_factors(_side(2, 3, 2, generator), _side(2, OUT // 3, IN // 2, generator))


def _bottleneck(generator: Generator) -> Term:
    base = {"base": Dense.from_matrix(_side(OUT, IN, generator)).requires_grad_(False)}
    term = Bottleneck(IN, OUT, 4, 2, 3, True, base)
    for parameter in (term.A, *term.down.parameters(), *term.up.parameters(), term.offset):
        parameter.data = _side(*parameter.shape, generator) / 2  # type: ignore[union-attr]
    return term


def _magnitude(generator: Generator) -> Term:
    base = {"base": Dense.from_matrix(_side(OUT, IN, generator)).requires_grad_(False)}
    term = Magnitude.from_update(_low_rank(generator), base)
    with torch.no_grad():
        term.magnitude.mul_(torch.rand(OUT, generator=generator) + 0.5)
    term.wrap(base)
    return term


def _replacement(generator: Generator) -> Term:
    return Replacement(IN, OUT, NormalFloat.from_matrix(_side(OUT, IN, generator)), _low_rank(generator))


def _random_combination(generator: Generator) -> Term:
    term = RandomCombination(IN, OUT, RANK, 5, 7, scale=0.5)
    term.c, term.d = (nn.Parameter(_side(5, generator)) for _ in "cd")
    return term


def _random_products(generator: Generator) -> Term:
    term = RandomProducts(IN, OUT, RandomStore(7, RANK, 3, OUT + 1, IN + 2), scale=0.5)
    term.Lambda, term.Gamma = (nn.Parameter(_side(*p.shape, generator)) for p in (term.Lambda, term.Gamma))
    return term


def _pooled_low_rank(generator: Generator) -> Term:
    term = PooledLowRank(IN, OUT, RANK, 9, 2, scale=0.5)
    term.pool_A, term.pool_B = (nn.Parameter(_side(*p.shape, generator)) for p in (term.pool_A, term.pool_B))
    term.index_A, term.index_B = (torch.randperm(9, generator=generator)[: RANK * 2] for _ in "AB")
    return term


def _projected(generator: Generator) -> Term:
    term = Projected(IN, OUT, 5, 7)
    term.theta, term.gain = nn.Parameter(_side(5, generator)), nn.Parameter(_side(1, generator))
    return term


def _coded_factors(generator: Generator) -> CodedFactors:
    term = CodedFactors(IN, OUT, RANK, 2, scale=0.5)
    term.A, term.B = (nn.Parameter(_side(*p.shape, generator)) for p in (term.A, term.B))
    return term


EXAMPLES: Mapping[str, Callable[[Generator], Term]] = {
    Dense.kind: lambda generator: Dense.from_matrix(_side(OUT, IN, generator)),
    LowRank.kind: _low_rank,
    PivotedLowRank.kind: _pivoted_low_rank,
    Spectral.kind: _spectral,
    SingularBasis.kind: _singular_basis,
    ShardSum.kind: _shard_sum,
    BlockAffine.kind: _block_affine,
    Bottleneck.kind: _bottleneck,
    Removed.kind: lambda generator: Removed.of(_side(OUT, RANK, generator), _side(RANK, IN, generator)),
    Kronecker.kind: _kronecker,
    Sparse.kind: _sparse,
    MovingSparse.kind: _moving_sparse,
    Columns.kind: _columns,
    CoreLowRank.kind: _core_low_rank,
    GatedLowRank.kind: _gated_low_rank,
    Shifted.kind: _shifted,
    Magnitude.kind: _magnitude,
    Replacement.kind: _replacement,
    PooledLowRank.kind: _pooled_low_rank,
    Projected.kind: _projected,
    CodedFactors.kind: _coded_factors,
    PackedFactors.kind: lambda generator: _coded_factors(generator).packed(),
    RandomCombination.kind: _random_combination,
    RandomProducts.kind: _random_products,
    NormalFloat.kind: lambda generator: NormalFloat.from_matrix(_side(OUT, IN, generator)),
    Int8.kind: lambda generator: Int8.from_matrix(_side(OUT, IN, generator)),
} | {kind: vars(term)["example"].__get__(None, term) for kind, term in TERMS.items() if "example" in vars(term)}
"""A maker of one term for every kind in `weft.terms.TERMS`: here, or its own class method `example`."""


def _side(*shape_and_generator: Any) -> Tensor:
    *shape, generator = shape_and_generator
    return torch.randn(*shape, generator=generator)
