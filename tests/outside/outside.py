"""A package of somebody else's, as the test of plug-ins installs it: a term, a quantiser, a splitter and a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weft.methods import Method, Site, Split
from weft.methods.base import Shape
from weft.methods.lora import METHOD as LORA
from weft.rules import Rule
from weft.terms import LowRank, Sparse
from weft.terms.quantized import Quantized


class Ternary(Quantized):
    """T[i, j] = scale_i code_ij with codes -1, 0, 1: scale_i the mean absolute value of row i."""

    kind = "signs"
    codes: Tensor
    scales: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.register_buffer("codes", torch.empty(out_features, in_features, device=device, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, device=device, dtype=torch.int32))  # bits of fp32

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Ternary:
        """The nearest codes."""
        term = cls(matrix.shape[1], matrix.shape[0], device=matrix.device, dtype=matrix.dtype)
        scales = matrix.detach().float().abs().mean(1)
        term.codes = (matrix.detach() / scales.unsqueeze(1)).round().clamp(-1, 1).to(torch.int8)
        term.scales = scales.view(torch.int32)
        return term

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        wide = self.codes.float() * self.scales.view(torch.float32).unsqueeze(1)
        return wide.to(dtype or self.carrier.dtype)


def ternary(site: Site) -> Split:
    """The code of the weight."""
    return Split({"code": Ternary.from_matrix(site.weight().to(site.dtype))})


def ternary_sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[float, int]]:
    """The one size."""
    return [("signs", shape.numel + 4 * shape[0])]


def sparse_low_rank(site: Site) -> Split:
    """The leading components, and the largest entries of what they leave."""
    rank, nonzeros = site.size
    W = site.weight()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    B, A = U[:, :rank] * s[:rank], Vh[:rank]
    left = W - B @ A
    mask = torch.zeros(left.numel(), dtype=torch.bool)
    mask[left.abs().flatten().topk(nonzeros).indices] = True
    return Split({
        "low_rank": LowRank.from_factors(B.to(site.dtype), A.to(site.dtype)),
        "sparse": Sparse.from_mask(left.to(site.dtype), mask.view_as(left)),
    })  # fmt: skip


def sparse_low_rank_sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[list[int], int]]:
    """[rank, nonzeros]: as many of these as the factors have numbers."""
    numbers = {rank: rank * sum(shape) for rank in range(1, min(shape))}
    found = [([rank, n], n * shape.itemsize + n * (shape.itemsize + 4)) for rank, n in numbers.items()]
    return [(size, nbytes) for size, nbytes in found if nbytes < shape.nbytes and size[1] <= shape.numel]


class Cap(Rule):
    """Trained numbers stay within [-cap, cap]."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for parameter in self.trained():
            parameter.clamp_(-self.cap, self.cap)


TERNARY = Method(
    name="signs",
    kind="quantize",
    summary="Codes -1, 0 and 1, a scale a row.",
    paper="none",
    allocate="equal",
    split=ternary,
    sizes=ternary_sizes,
)
SPARSE_LOW_RANK = Method(
    name="sparse-low-rank",
    kind="compress",
    summary="Leading components and the largest entries of what they leave.",
    paper="none",
    allocate="equal",
    split=sparse_low_rank,
    sizes=sparse_low_rank_sizes,
)
CAPPED = replace(
    LORA, name="capped", summary="LoRA whose numbers are capped.", rules=(Cap,), defaults={**LORA.defaults, "cap": 0.5}
)
BROKEN = None
