"""PivotedLowRank: a matrix of rank r as r of its own rows, and every other row as a combination of them.

    T[pivots] = A (r, in),   T[others] = C A with C (out - r, r):   r (out + in - r) numbers

instead of the r (out + in) of two factors, which hold the freedom B M, M^-1 A that changes nothing: r^2 numbers fewer,
and as many multiplications. Smaller than the dense matrix at every r below min(out, in).

Source: pivoting factorization, Zhao, Zhang and Cannistraci, 2025, arXiv 2501.19090 (ICML 2025).
Deviations: pivots by Gaussian elimination with partial pivoting; the places of the rows are stored as one permutation
of 32-bit integers, and counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.linalg.pivoting import pivot_rows
from weft.terms.base import Factors, Spec, Term

__all__ = ["PivotedLowRank"]


class PivotedLowRank(Term):
    """T = [A; C A][places]: row i of T is row `places[i]` of the pivot rows A (r, in) and the rows C A (out - r, in)
    under each other. The places are fixed.
    """

    kind = "pivoted_low_rank"

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank = rank
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.C = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.register_buffer("places", torch.empty(out_features, device=device, dtype=torch.int32))
        self.places: Tensor

    @classmethod
    def from_factors(cls, B: Tensor, A: Tensor) -> PivotedLowRank:
        """The term equal to B A, of factors B (out, r) and A (r, in), r <= out; found in fp64, stored in A's dtype.

        Raises:
            ValueError: r > out, or the factors hold NaN or infinity.
        """
        order, C = pivot_rows(B)
        r = A.shape[0]
        term = cls(A.shape[1], B.shape[0], r, device="meta", dtype=A.dtype)
        rows = B.double()[order[:r]] @ A.double()
        term.A, term.C = (nn.Parameter(t.to(A.dtype).contiguous()) for t in (rows, C))
        term.places = order.argsort().to(torch.int32)
        return term

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A.to(x.dtype))
        rest = F.linear(hidden, self.C.to(hidden.dtype))
        return torch.cat([hidden, rest], dim=-1).index_select(-1, self.places)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        A, C = (t.to(dtype or self.A.dtype) for t in (self.A, self.C))
        return torch.cat([A, C @ A]).index_select(0, self.places)

    def exact_factors(self) -> Factors | None:
        A, C = self.A.detach().float(), self.C.detach().float()
        identity = torch.eye(self.rank, device=C.device)
        return torch.cat([identity, C]).index_select(0, self.places), A

    def spec(self) -> Spec:
        return super().spec() | {"rank": self.rank}
