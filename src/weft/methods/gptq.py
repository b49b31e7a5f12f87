"""gptq: round one column after another, and let the columns to come take up each one's error (Frantar et al., 2022,
arXiv 2210.17323).

    least tr(D H D^T),   D = W - W' (out, in),   H = E[x x^T] (in, in)

is what the walk of `weft.linalg.column_errors` does, with w'_j the nearest numbers on the grids of their groups.
A group's scale and zero point are those of its weights when it is reached, with all errors so far taken up; columns
are done in blocks of about 128, which changes nothing but the time. `act_order` begins with the columns of the largest
inputs, and takes the grids from the weights as they were (the code's static groups), so that columns lie in storage as
they are. A column with no input becomes zero. x are the inputs in the model quantised so far, block by block.
Deviations: the width is chosen for each matrix by predicted loss (`best`); one for all, as published, is `--allocate
equal`. The code fits a group that begins amid a block of columns before the block's errors are taken up. H is
factorised in fp64, the rounding is in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.integer_grid import Grid, fit, grouped, to_codes
from weft.linalg.column_errors import Columns, columns, settle
from weft.methods.base import Method, Site, Size, Split, Splitter
from weft.methods.rtn import GRID, scale_dtype, sizes
from weft.terms import IntegerCode

__all__ = ["METHOD", "Codes", "quantise"]

_BLOCK = 128


class Codes(NamedTuple):
    """What a matrix is rounded to, whole numbers in its own dtype."""

    codes: Tensor  # (out, in)
    scale: Tensor  # (out, groups)
    zero: Tensor  # (out, groups)


def quantise(
    W: Tensor,
    how: Columns,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    clip: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Codes:
    """The codes of W (out, in), computed in its dtype; the scales are numbers of `scale_dtype` (None: any).

    Raises:
        OverflowError: a scale is beyond the largest number of `scale_dtype`.
    """
    rest, rule = how.begin(W), {"symmetric": symmetric, "clip": clip, "scale_dtype": scale_dtype}
    codes = torch.empty_like(rest)
    # the grids of the weights as they are; kept where groups are not reached in their order
    grids = fit(grouped(how.back(rest), group), bits, **rule)  # type: ignore[arg-type]
    scales, zeros = (t.squeeze(-1).mT.contiguous() for t in grids[:2])

    def settled(j: int) -> Tensor:
        g = how.order[j] // group
        if not how.by_input and j % group == 0:
            scales[g], zeros[g] = (t.squeeze(-1) for t in fit(rest[j : j + group].mT, bits, **rule)[:2])  # type: ignore[arg-type]
        grid = Grid(scales[g], zeros[g], bits)
        codes[j] = to_codes(rest[j], grid)
        return grid.values(codes[j])

    settle(rest, how.root.to(rest.dtype), _blocks(len(rest), group), settled)
    return Codes(how.back(codes), scales.mT, zeros.mT)


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns that are done together: whole groups, or parts of one."""
    whole = max(_BLOCK // group, 1) * group
    step = min(whole, _BLOCK)
    for first in range(0, width, whole):
        end = min(first + whole, width)
        for start in range(first, end, step):
            yield start, min(start + step, end)


class _GPTQ(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes of each width: H is factorised once."""
        W, dtype, group = site.weight(), scale_dtype(site.dtype), options["group"]
        H, grid = site.moments["input_moment"].to(W.device), {key: options[key] for key in ("symmetric", "clip")}
        how = columns(H, damping=options["damping"], by_input=options["act_order"])
        for bits in sizes:
            try:
                found = quantise(W, how, bits, group or W.shape[1], scale_dtype=dtype, **grid)
            except OverflowError as error:
                raise WeftError(f"Layer {site.name} cannot be coded: {error}; leave it out by a pattern.") from error
            zero = None if grid["symmetric"] else found.zero
            term = IntegerCode.from_codes(found.codes, found.scale.to(dtype), zero, bits, group, site.dtype)
            yield bits, Split({"base": term})


METHOD = Method(
    name="gptq",
    kind="quantize",
    summary="Integers of 2 to 8 bits, each column's rounding error taken up by the columns after it.",
    paper="Frantar et al., 2022, arXiv 2210.17323",
    needs=("input_moment",),
    allocate="best",
    sequential=True,
    split=_GPTQ(),
    sizes=sizes,
    defaults={**GRID, "damping": 0.01, "act_order": False},
)
