"""pifa: the factors of kfac-svd, stored as pivot rows and combinations of them (Zhao, Zhang and Cannistraci, 2025,
arXiv 2501.19090).

    W' of rank r:  r of its rows (r, in), and the other rows as combinations of these (out - r, r)

The same matrix as two factors in r^2 numbers fewer (see `weft.terms.PivotedLowRank`), so that every rank below
min(out, in) saves, and a budget buys more of them: r (out + in - r) numbers and the places of the rows. Where r is so
small that two factors take no more, they are kept.

Deviations: the paper stores the factors of SVD-LLM's whitening, uniform ranks, after a reconstruction of its own; here
they are those of least loss in the Fisher norm, at the ranks of `best`. `--sequential` recalibrates, without the
paper's reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.methods import kfac_svd
from weft.methods.base import LowRankSplit, Method, Shape, factor_bytes, low_rank_terms

__all__ = ["METHOD", "pivoted", "sizes", "stored"]


def pivoted(B: Tensor, A: Tensor) -> Any:
    """The term of B (out, r), A (r, in) by pivot rows, or by the two factors where these take no more."""
    from weft.terms import LowRank, PivotedLowRank

    return (PivotedLowRank if _pivots_save(len(B), len(A)) else LowRank).from_factors(B, A)


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rank, bytes) for the ranks below min(out, in), less those that a higher one undercuts: the numbers, and four
    bytes for the place of each row.
    """
    sizes = [(r, stored(shape, r)) for r in range(1, min(shape))]
    return [(r, n) for i, (r, n) in enumerate(sizes) if all(n < more for _, more in sizes[i + 1 : i + 3])]


def stored(shape: Shape, rank: int) -> int:
    """Bytes of the term of a rank: r (out + in - r) numbers and the rows' places, or the two factors."""
    saved = rank * rank * shape.itemsize - 4 * shape[0] if _pivots_save(shape[0], rank) else 0
    return factor_bytes(shape, rank) - saved


def _pivots_save(out: int, rank: int) -> bool:
    """Whether r^2 numbers of two bytes or more outweigh the places of the rows."""
    return rank * rank > 2 * out


METHOD = Method(
    name="pifa",
    kind="compress",
    summary="The factors of kfac-svd in fewer numbers: pivot rows, and the other rows as combinations of them.",
    paper="Zhao, Zhang and Cannistraci, 2025, arXiv 2501.19090",
    needs=kfac_svd.METHOD.needs,
    allocate="best",
    split=LowRankSplit(kfac_svd.factorise, form=pivoted, nbytes=stored),
    sizes=sizes,
    trained=low_rank_terms,
    defaults=kfac_svd.METHOD.defaults,
)
