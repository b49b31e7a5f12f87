"""awq: input channels with large inputs are scaled up before rounding, so that their weights lose less (Lin et al.,
2023, arXiv 2306.00978).

    W' = Q(W diag(s)) diag(1 / s),   s = m^a / sqrt(max m^a min m^a),   m = E|x| (in,),   a of 0, 0.05, ..., 0.95
    least E||(W - W') x||^2;   then each group's range clipped to 1, 0.95, ..., 0.55 of max|w|, by the same loss

Q rounds to nearest on integers by group (`rtn`). The error comes from E[x x^T], which gives what running the tokens
through both layers would.
Deviations: the scales stay with each matrix, 16 bits an input, where the released code divides the norm or the layer
before it by them, so that any architecture is covered and no neighbour changes; each matrix has its own, found by its
own error, where q, k and v (gate and up) share one found at the module's output; q and k are clipped as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.integer_grid import Grid, checked, fit, grouped, to_codes, ungrouped
from weft.methods.base import Method, Shape, Site, Split
from weft.methods.rtn import GRID, scale_dtype
from weft.methods.rtn import sizes as integer_sizes
from weft.terms import IntegerCode, ScaledCode

__all__ = ["METHOD", "clipped", "scaled", "sizes", "split"]

_POWERS = [i / 20 for i in range(20)]
_SHRINKS = [1 - i / 20 for i in range(10)]


def scaled(W: Tensor, H: Tensor, m: Tensor, bits: int, group: int, **rule: Any) -> Tensor:
    """The r = 1 / s (in,), in fp16, under which rounding W (out, in) loses least: inputs have moment H, mean size m."""
    best, least = torch.ones_like(m).half(), m.new_tensor(torch.inf)
    for power in _POWERS:
        s = m.clamp(min=1e-8).pow(power).clamp(min=1e-4)
        r = ((s.max() * s.min()).sqrt() / s).half()
        groups = grouped(W / r.to(W.dtype), group)
        grid = fit(groups, bits, **rule)
        D = ungrouped(grid.values(to_codes(groups, grid)), W.shape[1]) * r.to(W.dtype) - W
        loss = ((D @ H) * D).sum()
        best, least = torch.where(loss < least, r, best), torch.where(loss < least, loss, least)
    return best


def clipped(W: Tensor, H: Tensor, bits: int, group: int, shrinks: Sequence[float], **rule: Any) -> tuple[Tensor, Grid]:
    """The codes (out, groups, group) of W, and the grids, each group's range shrunk to where its outputs lose least."""
    groups, width = grouped(W, group), W.shape[1]
    count = groups.shape[1]
    padded = torch.zeros(count * group, count * group, dtype=H.dtype, device=H.device)
    padded[:width, :width] = H
    own = padded.view(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, group, group)
    grid, least = fit(groups, bits, **rule), torch.full_like(groups[..., :1], torch.inf)
    scale, zero = grid.scale.clone(), grid.zero.clone()
    largest = groups.abs().amax(-1, keepdim=True)
    for shrink in shrinks:
        tried = fit(groups.clamp(-shrink * largest, shrink * largest), bits, **rule)
        D = tried.values(to_codes(groups, tried)) - groups
        loss = (torch.einsum("ogi,gij->ogj", D, own) * D).sum(-1, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        scale, zero = torch.where(better, tried.scale, scale), torch.where(better, tried.zero, zero)
    grid = checked(Grid(scale, zero, bits), rule.get("scale_dtype"))
    return to_codes(groups, grid), grid


def split(site: Site, *, bits: int | None, group: int | None, symmetric: bool, clip: bool) -> Split:
    """The scaled code of the weight, with `site.size` bits."""
    W, H, m = (t.float() for t in (site.weight(), site.moments["input_moment"], site.moments["input_abs_mean"]))
    H, m, width, dtype = H.to(W.device), m.to(W.device), group or W.shape[1], scale_dtype(site.dtype)
    rule = {"symmetric": symmetric, "scale_dtype": dtype}
    try:
        r = scaled(W, H, m, site.size, width, **rule)
        s = 1 / r.float()
        codes, grid = clipped(W * s, H / s.outer(s), site.size, width, _SHRINKS if clip else [1.0], **rule)
    except OverflowError as error:
        raise WeftError(f"Layer {site.name} cannot be coded: {error}; leave it out by a pattern.") from error
    scale, zero = grid.scale.squeeze(-1).to(dtype), None if symmetric else grid.zero.squeeze(-1)
    inner = IntegerCode.from_codes(ungrouped(codes, W.shape[1]), scale, zero, site.size, group, site.dtype)
    return Split({"base": ScaledCode.from_code(inner, r)})


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes, scales, zero points and channels)."""
    return [(bits, nbytes + 2 * shape[1]) for bits, nbytes in integer_sizes(shape, options)]


METHOD = Method(
    name="awq",
    kind="quantize",
    summary="Integers of 2 to 8 bits, input channels scaled so that those with large inputs lose less.",
    paper="Lin et al., 2023, arXiv 2306.00978",
    needs=("input_moment", "input_abs_mean"),
    allocate="equal",
    split=split,
    sizes=sizes,
    defaults={**GRID, "group": 128, "clip": True},
)
