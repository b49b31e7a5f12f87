"""yaqa: round so that the whole model's loss rises least; each error is taken up by later columns and by later rows
(Tseng et al., ICML 2026, arXiv 2505.22988, "model-preserving adaptive rounding").

    least tr(D^T G D X),   D = W - W' (out, in),   X = E[x x^T] (in, in),   G = E[g g^T] (out, out)

g are the gradients of the loss by the layer's outputs. `gptq` is the case of a diagonal G, where outputs know nothing
of each other. The walk is `weft.linalg.two_sided`; the grid of a group in a tile of rows is that of its numbers when
the tile is reached, with all errors so far taken up. `damping` and `output_damping` times the mean of their diagonals
are added to X and G.

With `table`, 1 to 5 bits stand for the numbers of a table of the matrix's own, times a group's scale: k-means of its
numbers relative to their group's largest, each counting by scale^2 X_jj. Such tables are in GPTQ's walk in GPTVQ (van
Baalen et al., 2024, arXiv 2402.15319) and LeanQuant (Zhang and Shrivastava, 2024, arXiv 2407.10032), and with scales in
any4 (Elhoushi and Johnson, 2025, arXiv 2507.04610). `clip` searches a group's range, or scale. Bits a weight: b + 16 /
group, and 16 2^b a matrix.
Deviations: X and G are two moments of the text (the Kronecker-factored Fisher matrix), where the paper fits two
factors to the Fisher matrix by power iterations; grids of integers, or tables, where its code has trellises after a
random rotation, and fine-tunes; x are the inputs in the model quantised so far, as in `gptq`, G of the model as it was;
the width is chosen for each matrix by predicted loss (`best`); G is damped by 1 where the code takes 0.01 for both,
since gradients are few and of heavy tails: more of what is gained on the calibration text is gained on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.codebooks import codebooks, fit_scales
from weft.kernels.integer_grid import Grid, checked, fit, grouped
from weft.linalg.column_errors import columns, feedback
from weft.linalg.grids import Grids, Levels
from weft.linalg.two_sided import settle
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter
from weft.methods.gptq import Codes, coded, integers
from weft.methods.rtn import GRID, scale_dtype
from weft.methods.rtn import sizes as grid_sizes
from weft.terms import Codebook, IntegerCode

__all__ = ["METHOD", "TABLES", "quantise", "sizes", "tables_of", "to_tables"]

TABLES = range(1, 6)
"""Widths of codes for a table; with more numbers than 32, a grid is as good."""

_NUMBERS = 2**24
"""Of which a table is found, at the most."""


def quantise(W: Tensor, A: Tensor, B: Tensor, bits: Tensor, group: int, **rule: Any) -> Codes:
    """The codes of W (out, in) with each of some widths, one below the other: (widths out, in).

    Args:
        A: (out, out), B: (in, in), the feedbacks of G and X (`weft.linalg.column_errors`).
        bits: the widths, int64 (widths,).
        rule: `symmetric`, `clip` and `scale_dtype` of `weft.kernels.integer_grid.fit`.

    Raises:
        OverflowError: a scale is beyond the largest number of `scale_dtype`.
    """

    def grids(numbers: Tensor) -> Grids:
        return Grids.of(*fit(numbers, bits.view(-1, 1, 1, 1).expand(*numbers.shape[:3], 1), **rule))

    codes, found = settle(W.expand(len(bits), -1, -1), A.to(W.dtype), B.to(W.dtype), group, grids)
    codes, scale, zero = (t.flatten(0, 1) for t in (codes, found.scale, found.zero))
    checked(Grid(scale, zero, bits), rule.get("scale_dtype"))
    return Codes(codes + zero.repeat_interleave(group, 1)[:, : W.shape[1]], scale, zero)


def tables_of(W: Tensor, weights: Tensor, bits: Sequence[int], group: int) -> Tensor:
    """The table (widths, K) of each width for the numbers of W (out, in), each relative to the largest of its group;
    shorter ones end in repetitions. A number counts by its scale squared and by `weights` (in,).
    """
    rows = grouped(W[:: -(-W.numel() // _NUMBERS)], group)
    scale, by = rows.abs().amax(2, keepdim=True), grouped(weights.to(W).clamp(min=0).unsqueeze(0), group)
    units = (rows / torch.where(scale > 0, scale, 1.0)).view(1, -1)
    found = [book[0] for book in codebooks(units, (scale.square() * by).view(1, -1), [2**b for b in bits])]
    return torch.stack([torch.cat([t, t[-1:].expand(2 ** max(bits) - len(t))]) for t in found])


def to_tables(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    tables: Tensor,
    group: int,
    *,
    clip: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes of W (out, in) in each of some `tables` (k, K), and the scales of groups: (k, out, in), (k, out,
    groups); the rest as in `quantise`.
    """
    which = torch.arange(len(tables), device=W.device, dtype=W.dtype).view(-1, 1, 1)

    def levels(numbers: Tensor) -> Levels:
        each = zip(numbers, tables, strict=True)
        scale = torch.stack([fit_scales(n, t, clip=clip, scale_dtype=scale_dtype) for n, t in each])
        return Levels.of(scale.squeeze(-1), which, tables)

    codes, found = settle(W.expand(len(tables), -1, -1), A.to(W.dtype), B.to(W.dtype), group, levels)
    checked(Grid(found.scale, found.scale, 0), scale_dtype)
    return codes, found.scale


class _YAQA(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes of each width: both moments are factorised once, and few widths are walked over together."""
        W = site.weight()
        X, G = (site.moments[need].to(W.device) for need in ("input_moment", "output_grad_moment"))
        of_input, of_output = columns(X, damping=options["damping"]), columns(G, damping=options["output_damping"])
        A, B, W = feedback(of_output.root), feedback(of_input.root), W.masked_fill(of_input.dead, 0)
        group, kept = options["group"] or W.shape[1], scale_dtype(site.dtype)
        rule = {"clip": options["clip"], "scale_dtype": kept}

        def evenly(widths: Sequence[int]) -> Iterator[IntegerCode]:
            bits = torch.tensor(widths, device=W.device)
            return integers(
                quantise(W, A, B, bits, group, symmetric=options["symmetric"], **rule), widths, site, options
            )

        def by_table(widths: Sequence[int]) -> Iterator[Codebook]:
            tables = tables_of(W, X.diagonal(), widths, group).to(kept)
            found = to_tables(W, A, B, tables.to(W.dtype), group, **rule)
            for bits, table, codes, scale in zip(widths, tables, *found, strict=True):
                yield Codebook.from_codes(codes, table[None, : 2**bits], None, site.dtype, scale.to(kept), group)

        return coded(site, sizes, by_table if options["table"] else evenly)


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes, scales and zero points, or tables): every width, or the one that is asked for.

    Raises:
        WeftError: there are no codes of that width, or a table is asked to be symmetric.
    """
    if not options["table"]:
        return grid_sizes(shape, options)
    if options["symmetric"]:
        raise WeftError("A table has no zero point to leave out: choose table or symmetric.")
    if options["bits"] not in (None, *TABLES):
        raise WeftError(f"Tables have 1 to 5 bits here, not {options['bits']}: leave table out for a grid of integers.")
    (out, inn), widths = shape, TABLES if options["bits"] is None else [options["bits"]]
    group = options["group"] or inn
    return [(bits, Codebook(inn, out, bits=bits, group=group, device="meta").nbytes) for bits in widths]


METHOD = Method(
    name="yaqa",
    kind="quantize",
    summary="Codes of 1 to 8 bits, each rounding error taken up by later columns and rows: least loss of the model.",
    paper="Tseng et al., ICML 2026, arXiv 2505.22988",
    needs=("input_moment", "output_grad_moment"),
    allocate="best",
    sequential=True,
    split=_YAQA(),
    sizes=sizes,
    defaults={**GRID, "damping": 0.01, "output_damping": 1.0, "table": False},
)
