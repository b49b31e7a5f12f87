"""PooledLowRank: T = scale * B A, the rows of A and the columns of B put together from pieces of shared pools (MoS)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.terms.base import Spec
from weft.terms.factored import Factored

__all__ = ["PooledLowRank"]


class PooledLowRank(Factored):
    """Row j of A is the concatenation of `pool_A[index_A[j l]], ..., pool_A[index_A[j l + l - 1]]`, column j of B
    likewise.

    Wang et al., 2024, arXiv 2410.00938, section 3. The pools are parameters that the terms of one kind of layer share;
    the indices (r l,) are this layer's own and never change.

    Args:
        rows: pieces in each pool.
        shards: l, pieces a vector is cut into: pool_A is (rows, in / l), pool_B (rows, out / l).
        pool: the name that terms of one pool have in common.
    """

    kind = "pooled_low_rank"
    # transformers writes what is shared once
    _tied_weights_keys: ClassVar[dict[str, str]] = {"pool_A": "pool_A", "pool_B": "pool_B"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        rows: int,
        shards: int,
        *,
        pool: str = "",
        scale: float = 1.0,
        dropout: float = 0.0,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, scale=scale, dropout=dropout)
        self.rows, self.shards, self.pool = rows, shards, pool
        self.pool_A = nn.Parameter(torch.empty(rows, in_features // shards, **place))
        self.pool_B = nn.Parameter(torch.empty(rows, out_features // shards, **place))
        for name in ("index_A", "index_B"):
            self.register_buffer(name, torch.zeros(rank * shards, dtype=torch.int64, device=place.get("device")))
        self.index_A: Tensor
        self.index_B: Tensor

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        dtype = dtype or self.pool_A.dtype
        A = self.pool_A[self.index_A].reshape(self.rank, self.in_features)
        B = self.pool_B[self.index_B].reshape(self.rank, self.out_features).mT
        return B.to(dtype), A.to(dtype)

    def spec(self) -> Spec:
        return super().spec() | {"rows": self.rows, "shards": self.shards, "pool": self.pool}
