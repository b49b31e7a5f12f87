"""baq: GPTQ whose columns have the widths that make their losses equal (Zhang et al., 2025, arXiv 2506.05664).

    pass 1   GPTQ at the mean width R, one range a row:   l_j = sum_i e_ij^2 / 2,   e_j the column's error over U_jj
    widths   least sum_j l_j 2^(-theta (b_j - R)) with mean_j b_j = R;   b_j = R + log2(l_j / GM(l)) / theta
    pass 2   GPTQ again, column j with 2^b_j levels

GM is the geometric mean. b_j are whole numbers of bits, 0 or 2 to 8 (a range that holds zero makes no use of 1): the
sum is the least that these allow, found by the steepest gain a bit, and the mean is R exactly. A column of 0 bits is
zero, and its error is taken up by those after it. What is stored are the codes as one stream of bits, 4 bits a column
for its width, and two 16-bit numbers a row for its range.
theta is that of errors that fall as 2^(-theta b), 2 for grids; smaller ones spread the widths, and below 0.5 none is
taken. x are the inputs in the model quantised so far, as in `gptq`.
Deviations: whole numbers of bits, where the released code counts log2 of any number of levels, which no format stores;
in pass 1 a mean between two whole numbers takes the lower one, by which all l_j change alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.bit_packing import packed_size
from weft.kernels.integer_grid import of_range, to_codes
from weft.linalg.column_errors import Columns, columns, settle
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter
from weft.methods.rtn import scale_dtype
from weft.terms import ColumnCode

__all__ = ["METHOD", "Range", "closed_form", "quantise", "sizes", "widths"]

MEANS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
_LEAST, _MOST, _BLOCK = 2, 8, 128

Range = tuple[Tensor, Tensor]
"""The least and the largest number of each row, (out,), zero between them."""


def closed_form(l: Tensor, mean: float, theta: float = 1.95) -> Tensor:
    """The widths (in,) of equal loss that the paper gives, any real numbers, for column losses l (in,) at `mean`."""
    logs = l.log2()
    return mean + (logs - logs.mean()) / theta


def widths(l: Tensor, total: int, theta: float = 1.95) -> Tensor:
    """Whole bits (in,), 0 or 2 to 8 each, `total` together, of least sum l_j 2^(-theta b_j)."""
    bits = torch.arange(_LEAST, _MOST + 1, device=l.device).double().unsqueeze(1)
    losses = l.double() * 2.0 ** (-theta * bits)  # (bits, in)
    first = (l.double() - losses[0]) / _LEAST  # a bit, of the step from 0 to 2
    gains = torch.cat([first.unsqueeze(0), losses[:-1] - losses[1:]])  # (steps, in), falling
    costs = torch.ones_like(gains, dtype=torch.long)
    costs[0] = _LEAST
    order = torch.sort(gains.flatten(), descending=True, stable=True).indices
    taken = order[costs.flatten()[order].cumsum(0) <= total]
    found = torch.zeros(len(l), dtype=torch.long, device=l.device)
    found.index_add_(0, taken % len(l), costs.flatten()[taken])
    if int(found.sum()) < total:  # a bit is left that cannot begin a column
        step = gains.gather(0, (found - 1).clamp(0, _MOST - _LEAST).unsqueeze(0)).squeeze(0)
        begun = (found >= _LEAST) & (found < _MOST)
        found[step.masked_fill(~begun, -torch.inf).argmax() if bool(begun.any()) else found.argmin()] += 1
    return found


def quantise(W: Tensor, how: Columns, b: Tensor, range: Range) -> tuple[Tensor, Tensor]:
    """The codes (out, in) of W with b (in,) bits a column, and the columns' losses (in,)."""
    rest, U = how.begin(W), how.root.to(W.dtype)
    codes, losses, of = torch.zeros_like(rest), torch.zeros(len(rest), dtype=torch.float64, device=W.device), b.tolist()
    grids = {bits: of_range(*range, bits) for bits in set(of) if bits}

    def settled(j: int) -> Tensor:
        bits = of[how.order[j]]
        value = torch.zeros_like(rest[j])
        if bits:
            codes[j] = to_codes(rest[j], grids[bits])
            value = grids[bits].values(codes[j])
        losses[how.order[j]] = ((rest[j] - value) / U[j, j]).double().square().sum() / 2
        return value

    starts = torch.arange(0, len(rest), _BLOCK).tolist()
    settle(rest, U, [(start, min(start + _BLOCK, len(rest))) for start in starts], settled)
    return how.back(codes), losses


class _BAQ(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes at each mean width: H is factorised, and the losses found at each whole width, once."""
        W, dtype = site.weight(), scale_dtype(site.dtype)
        ends = [t.to(dtype) for t in (W.amin(1).clamp(max=0), W.amax(1).clamp(min=0))]
        if not all(bool(torch.isfinite(end).all()) for end in ends):
            raise WeftError(
                f"Layer {site.name} cannot be coded: a number is beyond {dtype}; leave it out by a pattern."
            )
        low, high = (end.float() for end in ends)
        how = columns(site.moments["input_moment"].to(W.device), damping=options["damping"])
        lost: dict[int, Tensor] = {}
        for mean in sizes:
            at = int(mean)
            if at not in lost:
                lost[at] = quantise(W, how, torch.full((W.shape[1],), at), (low, high))[1]
            b = widths(lost[at], round(mean * W.shape[1]), options["theta"])
            codes, _ = quantise(W, how, b, (low, high))
            yield mean, Split({"base": ColumnCode.from_codes(codes, b, ends[0], ends[1], site.dtype)})


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[float, int]]:
    """(mean bits a column, bytes of codes, widths and ranges)."""
    out, inn = shape
    beside = packed_size(inn, 4) + 4 * out
    return [(mean, packed_size(out * round(mean * inn), 1) + beside) for mean in MEANS]


METHOD = Method(
    name="baq",
    kind="quantize",
    summary="GPTQ with a width of its own for each column, so that all columns lose the same.",
    paper="Zhang et al., 2025, arXiv 2506.05664",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    split=_BAQ(),
    sizes=sizes,
    least={"theta": 0.5},
    defaults={"theta": 1.95, "damping": 0.01},
)
