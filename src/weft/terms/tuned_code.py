"""TunedCode: integer codes, their scales and the matrix that they stand for, while all of it is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from weft.kernels.integer_grid import Grid, grouped, to_codes, ungrouped
from weft.terms.base import Spec, Term
from weft.terms.integer_code import IntegerCode

__all__ = ["TunedCode"]


class TunedCode(Term):
    """T = W, W[i, j] = (code - zero) * scale of its group of inputs, as `IntegerCode` has it.

    W (out, in) is held, so that its gradient arrives; whoever trains sets `codes` and `scales` and calls `decode`.
    Scales are trained in fp32 and rounded to the dtype that they will be stored in on their way into W.

    Args:
        bits, group, symmetric, scale_dtype: those of the code that it becomes, see `IntegerCode`.
    """

    kind = "tuned_code"
    lean_alone = True
    codes: Tensor  # uint8 (out, in)
    zeros: Tensor  # uint8 (out, groups)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int | None,
        symmetric: bool,
        scale_dtype: str,
        **place: Any,
    ) -> None:
        super().__init__(in_features, out_features)
        self.bits, self.group, self.symmetric, self.scale_dtype = bits, group, symmetric, scale_dtype
        self.width = group or in_features
        groups = -(-in_features // self.width)
        self.W = nn.Parameter(torch.empty(out_features, in_features, **place))
        self.scales = nn.Parameter(torch.empty(out_features, groups, **place))
        for name, shape in (("codes", self.W.shape), ("zeros", (out_features, groups))):
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=place.get("device")))

    @classmethod
    def from_code(cls, code: IntegerCode) -> TunedCode:
        """Of a code, the same matrix."""
        own = {key: value for key, value in code.spec().items() if key != "kind"}
        dense = code.dense()
        term = cls(**own, device=dense.device, dtype=dense.dtype)
        with torch.no_grad():
            term.W.copy_(dense)
            term.scales = nn.Parameter(code.scale_matrix().float())
            term.codes.copy_(code.integer_codes())
            term.zeros.copy_(code.zero_points())
        return term

    @classmethod
    def example(cls, generator: Generator) -> TunedCode:
        """One with 3 bits and a short last group."""
        return cls.from_code(IntegerCode.example(generator))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.to(x.dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.W.to(dtype or self.W.dtype)

    def stored_scales(self) -> Tensor:
        """The scales as they will be stored, (out, groups) in their own dtype here."""
        return self.scales.detach().to(getattr(torch, self.scale_dtype)).to(self.scales.dtype)

    def nearest(self, target: Tensor) -> Tensor:
        """The codes (out, in) uint8 nearest to a matrix (out, in)."""
        grid = Grid(self.stored_scales().unsqueeze(-1), self.zeros.unsqueeze(-1).to(target.dtype), self.bits)
        return ungrouped(to_codes(grouped(target, self.width), grid), self.in_features).to(torch.uint8)

    def steps(self) -> Tensor:
        """code - zero (out, in), in the dtype of the scales: what W's slope in its scale is."""
        numbers = grouped(self.codes.to(self.scales.dtype), self.width) - self.zeros.unsqueeze(-1)
        return ungrouped(numbers, self.in_features)

    def scale_gradient(self, G: Tensor) -> Tensor:
        """That of the scales (out, groups), of the gradient of the matrix G (out, in)."""
        return grouped(G.to(self.scales.dtype) * self.steps(), self.width).sum(-1)

    def value(self) -> Tensor:
        """The matrix of codes and scales (out, in), in the dtype of the scales."""
        return self.steps() * self.spread_scales()

    def spread_scales(self) -> Tensor:
        """The scale of each weight as it will be stored (out, in)."""
        return self.stored_scales().repeat_interleave(self.width, 1)[:, : self.in_features]

    @torch.no_grad()
    def decode(self) -> None:
        """W anew from codes and scales."""
        self.W.copy_(self.value())

    def finished(self) -> IntegerCode:
        scales, zeros = (
            self.stored_scales().to(getattr(torch, self.scale_dtype)),
            None if self.symmetric else self.zeros,
        )
        return IntegerCode.from_codes(self.codes, scales, zeros, self.bits, self.group, self.W.dtype)

    def spec(self) -> Spec:
        own = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric, "scale_dtype": self.scale_dtype}
        return super().spec() | own
