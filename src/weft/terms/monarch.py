"""Monarch: T as a product of two block-diagonal matrices with a fixed shuffle between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.tensors import owned
from weft.terms.base import Spec, Term

__all__ = ["Monarch"]


class Monarch(Term):
    """T of k input blocks and j output blocks of rank b: two batched products (Dao et al., 2022, arXiv 2204.00595).

        h = w1 x     w1 (k, b j, in / k): each run of in / k channels of x makes b j numbers
        y = w2 h'    w2 (j, out / j, k b): h' holds, for each j, the b numbers of each k; output t of block j is row
                     t j_blocks + j of y

    Entry by entry, the rows that are j modulo `output_blocks` and the columns of run k are a block of rank b.
    b (j in + k out) numbers.
    """

    kind = "monarch"

    def __init__(
        self, in_features: int, out_features: int, input_blocks: int, output_blocks: int, rank: int, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        if in_features % input_blocks or out_features % output_blocks:
            raise WeftError(
                f"A Monarch matrix of {out_features} x {in_features} cannot have {output_blocks} x {input_blocks} "
                "blocks: they must divide it."
            )
        self.input_blocks, self.output_blocks, self.rank = input_blocks, output_blocks, rank
        self.w1 = nn.Parameter(torch.empty(input_blocks, rank * output_blocks, in_features // input_blocks, **place))
        self.w2 = nn.Parameter(torch.empty(output_blocks, out_features // output_blocks, input_blocks * rank, **place))

    @classmethod
    def from_matrix(cls, W: Tensor, input_blocks: int, output_blocks: int, rank: int) -> Monarch:
        """The nearest one in Frobenius norm: a truncated SVD of each block, its singular values shared evenly."""
        out, inn = W.shape
        term = cls(inn, out, input_blocks, output_blocks, rank, device="meta", dtype=W.dtype)
        wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        blocks = wide.view(out // output_blocks, output_blocks, input_blocks, -1).permute(2, 1, 0, 3)
        U, s, V = torch.linalg.svd(blocks, full_matrices=False)  # of (k, j, out / j, in / k)
        root = s[..., :rank].sqrt()
        w1 = (root.unsqueeze(-1) * V[..., :rank, :]).transpose(1, 2).flatten(1, 2)  # (k, (b, j), in / k)
        w2 = (U[..., :rank] * root.unsqueeze(-2)).permute(1, 2, 0, 3).flatten(2, 3)  # (j, out / j, (k, b))
        term.w1, term.w2 = (nn.Parameter(owned(w.to(W.dtype).contiguous())) for w in (w1, w2))
        return term

    @classmethod
    def example(cls, generator: torch.Generator) -> Monarch:
        """A small one of random numbers."""
        term = cls(8, 12, 2, 3, 2)
        for parameter in term.parameters():
            nn.init.normal_(parameter, generator=generator)
        return term

    def forward(self, x: Tensor) -> Tensor:
        k, j, b = self.input_blocks, self.output_blocks, self.rank
        rows = x.reshape(-1, k, self.in_features // k).transpose(0, 1)  # (k, tokens, in / k)
        h = torch.bmm(rows, self.w1.to(x.dtype).mT)  # (k, tokens, b j)
        h = h.view(k, -1, b, j).permute(3, 1, 0, 2).flatten(2)  # (j, tokens, k b)
        z = torch.bmm(h, self.w2.to(x.dtype).mT)  # (j, tokens, out / j)
        return z.permute(1, 2, 0).reshape(*x.shape[:-1], self.out_features)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        k, j, b = self.input_blocks, self.output_blocks, self.rank
        w1, w2 = (w.to(dtype or w.dtype) for w in (self.w1, self.w2))
        blocks = torch.einsum("jtkb,kbji->tjki", w2.view(j, -1, k, b), w1.view(k, b, j, -1))
        return blocks.reshape(self.out_features, self.in_features)

    def spec(self) -> Spec:
        sizes = {"input_blocks": self.input_blocks, "output_blocks": self.output_blocks, "rank": self.rank}
        return super().spec() | sizes
