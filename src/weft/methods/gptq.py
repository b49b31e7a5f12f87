"""gptq: round one column after another, and let the columns to come take up each one's error (Frantar et al., 2022,
arXiv 2210.17323).

    least tr(D H D^T),   D = W - W' (out, in),   H = E[x x^T] (in, in)

is what the walk of `weft.linalg.column_errors` does, with w'_j the nearest numbers on the grids of their groups.
A group's scale and zero point are those of its weights when it is reached, with all errors so far taken up; columns
are done in blocks of about 128, which changes nothing but the time. `act_order` begins with the columns of the largest
inputs, and takes the grids from the weights as they were (the code's static groups), so that columns lie in storage as
they are. A column with no input becomes zero. x are the inputs in the model quantised so far, within a block too.
Deviations: the width is chosen for each matrix by predicted loss (`best`); one for all, as published, is `--allocate
equal`. The code fits a group that begins amid a block of columns before the block's errors are taken up. H is
factorised in fp64, the rounding is in fp32. Inputs are measured anew for each group of layers within a block, which is
the code's --true-sequential, off by default there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.integer_grid import Grid, checked, fit
from weft.linalg.column_errors import Columns, columns, settle
from weft.linalg.grids import Grids
from weft.methods.base import Method, Site, Size, Split, Splitter
from weft.methods.rtn import GRID, scale_dtype, sizes
from weft.terms import IntegerCode, Term

__all__ = ["METHOD", "Codes", "coded", "integers", "quantise"]

_BLOCK = 128
_NUMBERS = 2**24
"""Of how many the widths of a matrix are done together."""


class Codes(NamedTuple):
    """What a matrix is rounded to, whole numbers in its own dtype."""

    codes: Tensor  # (out, in)
    scale: Tensor  # (out, groups)
    zero: Tensor  # (out, groups)


def quantise(
    W: Tensor,
    how: Columns,
    bits: int | Tensor,
    group: int,
    *,
    symmetric: bool = False,
    clip: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Codes:
    """The codes of W (out, in), computed in its dtype; the scales are numbers of `scale_dtype` (None: any).

    Args:
        bits: the width, or int64 (out,), one a row: rows know nothing of each other.

    Raises:
        OverflowError: a scale is beyond the largest number of `scale_dtype`.
    """
    rest, widths = how.begin(W), bits.unsqueeze(1) if isinstance(bits, Tensor) else bits
    rule: dict[str, Any] = {"symmetric": symmetric, "clip": clip, "scale_dtype": scale_dtype}
    # the grids of the weights as they are, where groups are not reached in their order
    members = torch.split(how.back(rest), group, 1) if how.by_input else ()
    grids, codes = [Grids.of(*fit(numbers, widths, **rule)) for numbers in members], list[Tensor]()

    def settled(j: int) -> Tensor:
        if not how.by_input and j % group == 0:
            grids.append(Grids.of(*fit(rest[j : j + group].mT, widths, **rule)))
        rows = grids[how.order[j] // group]
        codes.append(rows.nearest(rest[j]))
        return codes[-1] * rows.scale

    settle(rest, how.root.to(rest.dtype), _blocks(len(rest), group), settled)
    scale, zero = (torch.stack(each, 1) for each in zip(*((rows.scale, rows.zero) for rows in grids), strict=True))
    checked(Grid(scale, zero, bits), scale_dtype)
    return Codes(how.back(torch.stack(codes)) + zero.repeat_interleave(group, 1)[:, : W.shape[1]], scale, zero)


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns that are done together: whole groups, or parts of one."""
    whole = max(_BLOCK // group, 1) * group
    step = min(whole, _BLOCK)
    for first in range(0, width, whole):
        end = min(first + whole, width)
        for start in range(first, end, step):
            yield start, min(start + step, end)


def coded(
    site: Site, sizes: Sequence[Size], terms: Callable[[Sequence[int]], Iterable[Term]]
) -> Iterator[tuple[Size, Split]]:
    """The terms of each width, of which `terms` makes a few together.

    Raises:
        WeftError: a scale is beyond what is stored of it.
    """
    count = max(1, _NUMBERS // (site.shape[0] * site.shape[1]))
    for some in (sizes[i : i + count] for i in range(0, len(sizes), count)):
        try:
            yield from ((width, Split({"base": term})) for width, term in zip(some, terms(some), strict=True))
        except OverflowError as error:
            raise WeftError(f"Layer {site.name} cannot be coded: {error}; leave it out by a pattern.") from error


def integers(found: Codes, widths: Sequence[int], site: Site, options: Mapping[str, Any]) -> Iterator[IntegerCode]:
    """The term of each width, of codes that lie one below the other."""
    dtype = scale_dtype(site.dtype)
    for width, codes, scale, zero in zip(widths, *(torch.split(t, site.shape[0]) for t in found), strict=True):
        zero = None if options["symmetric"] else zero
        yield IntegerCode.from_codes(codes, scale.to(dtype), zero, width, options["group"], site.dtype)


class _GPTQ(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes of each width: H is factorised once, and few widths' rows are walked over together."""
        W, group = site.weight(), options["group"]
        H, grid = site.moments["input_moment"].to(W.device), {key: options[key] for key in ("symmetric", "clip")}
        how = columns(H, damping=options["damping"], by_input=options["act_order"])

        def terms(widths: Sequence[int]) -> Iterator[IntegerCode]:
            bits = torch.tensor(widths, device=W.device).repeat_interleave(len(W))
            rows, stored = W.repeat(len(widths), 1), scale_dtype(site.dtype)
            found = quantise(rows, how, bits, group or W.shape[1], scale_dtype=stored, **grid)
            return integers(found, widths, site, options)

        return coded(site, sizes, terms)


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
