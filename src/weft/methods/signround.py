"""signround: the rounding of every weight and the range of every group learned by signs of gradients, so that a layer
gives what it gave (Cheng et al., 2023, arXiv 2309.05516; its code intel/auto-round).

    W' = s (clip(round(W / s + V) + z, 0, 2^b - 1) - z),   s, z of the range [beta min, alpha max] of a group
    least  E||W x_o - W' x||^2
    each of T steps:   V, alpha, beta <- themselves - lr sign(gradient),   lr = 1 / T, falling to 0

from V = 0, alpha = beta = 1; these steps together reach half a code, so that V stays within [-0.5, 0.5], and alpha
and beta are kept within [0, 1]. Rounding counts as the identity. x are the layer's inputs in the model quantised so
far, x_o those in the dense model. The least of all steps is kept. Bits a weight: those of `rtn`.
Deviations: by layer, where the paper goes by block; the sums over tokens come from moments, so that each step sees
all of them, where the code draws 8 sequences a step. A range contains zero, as all of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.integer_grid import Grid, checked, fit, grouped, learned, ungrouped
from weft.methods import rtn
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter
from weft.terms import IntegerCode

__all__ = ["METHOD", "sizes", "tuned"]


def tuned(
    W: Tensor, target: Tensor, X: Tensor, bits: int, group: int, steps: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Grid, list[float]]:
    """The codes (out, groups, group) and grids of the least loss met, and the loss at each step.

    Args:
        W: (out, in), whose codes are found; target: (out, in), the map whose outputs are wanted; X: (in, in).
    """
    groups = grouped(W, group)
    V = torch.zeros_like(groups).requires_grad_()
    ends = torch.ones(2, *groups.shape[:2], 1, dtype=W.dtype, device=W.device).requires_grad_()
    losses, best = list[float](), (groups, Grid(groups, groups, bits))
    for step in range(steps + 1):
        with torch.enable_grad():
            codes, grid = learned(groups, ends, bits, scale_dtype, V)
            values = ungrouped(grid.values(codes), W.shape[1])
        D = values.detach() - target
        pull = D @ X
        losses.append(float((pull * D).sum()))
        if losses[-1] <= min(losses):
            best = codes.detach(), Grid(grid.scale.detach(), grid.zero.detach(), bits)
        if step < steps:
            by_V, by_ends = torch.autograd.grad(values, (V, ends), pull)
            rate = (1 - step / steps) / steps
            with torch.no_grad():
                V.sub_(rate * by_V.sign())
                ends.sub_(rate * by_ends.sign()).clamp_(0, 1)
    return *best, losses


class _SignRound(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes of each width."""
        target, group, dtype = site.weight(), options["group"], rtn.scale_dtype(site.dtype)
        W = target if site.original is None else site.original.to(target)
        X, width = site.moments["input_moment"].to(target), group or target.shape[1]
        for bits in sizes:
            try:
                checked(fit(grouped(W, width), bits, scale_dtype=dtype), dtype)
            except OverflowError as error:
                raise WeftError(f"Layer {site.name} cannot be coded: {error}; leave it out by a pattern.") from error
            codes, grid, _ = tuned(W, target, X, bits, width, options["steps"], dtype)
            scale, zero = grid.scale.squeeze(-1).to(dtype), grid.zero.squeeze(-1)
            whole = ungrouped(codes, W.shape[1])
            yield bits, Split({"base": IntegerCode.from_codes(whole, scale, zero, bits, group, site.dtype)})


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes, scales and zero points). Raises WeftError: there are no codes of that width."""
    return rtn.sizes(shape, {**options, "symmetric": False})


METHOD = Method(
    name="signround",
    kind="quantize",
    summary="Integers of 2 to 8 bits whose rounding and ranges are learned by signs of gradients.",
    paper="Cheng et al., 2023, arXiv 2309.05516",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    correction=1.0,
    split=_SignRound(),
    sizes=sizes,
    defaults={"bits": None, "group": 64, "steps": 200},
)
