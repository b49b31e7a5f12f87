"""yaqa: round so that the whole model's loss rises least; each error is taken up by later columns and by later rows
(Tseng et al., ICML 2026, arXiv 2505.22988, "model-preserving adaptive rounding").

    least tr(D^T G D X),   D = W - W' (out, in),   X = E[x x^T] (in, in),   G = E[g g^T] (out, out)

g are the gradients of the loss by the layer's outputs. `gptq` is the case of a diagonal G, where outputs know nothing
of each other. The walk is `weft.linalg.two_sided`; the grid of a group in a tile of rows is that of its numbers when
the tile is reached, with all errors so far taken up. `damping` and `output_damping` times the mean of their diagonals
are added to X and G.
Deviations: X and G are two moments of the text (the Kronecker-factored Fisher matrix), where the paper fits two
factors to the Fisher matrix by power iterations; grids of integers, where its code has trellises after a random
rotation, and fine-tunes; x are the inputs in the model quantised so far, as in `gptq`, G of the model as it was; the
width is chosen for each matrix by predicted loss (`best`); G is damped by 1 where the code takes 0.01 for both, since
gradients are few and of heavy tails: more of what is gained on the calibration text is gained on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.kernels.integer_grid import Grid, checked, fit
from weft.linalg.column_errors import columns, feedback
from weft.linalg.grids import Grids
from weft.linalg.two_sided import settle
from weft.methods.base import Method, Site, Size, Split, Splitter
from weft.methods.gptq import Codes, coded
from weft.methods.rtn import GRID, scale_dtype, sizes

__all__ = ["METHOD", "quantise"]


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


class _YAQA(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes of each width: both moments are factorised once, and few widths are walked over together."""
        W = site.weight()
        X, G = (site.moments[need].to(W.device) for need in ("input_moment", "output_grad_moment"))
        of_input, of_output = columns(X, damping=options["damping"]), columns(G, damping=options["output_damping"])
        A, B, W = feedback(of_output.root), feedback(of_input.root), W.masked_fill(of_input.dead, 0)
        grid = {key: options[key] for key in ("symmetric", "clip")} | {"scale_dtype": scale_dtype(site.dtype)}

        def rounded(widths: Sequence[int]) -> Codes:
            bits = torch.tensor(widths, device=W.device)
            return quantise(W, A, B, bits, options["group"] or W.shape[1], **grid)

        return coded(site, sizes, rounded, options)


METHOD = Method(
    name="yaqa",
    kind="quantize",
    summary="Integers of 2 to 8 bits, each rounding error taken up by later columns and rows: least loss of the model.",
    paper="Tseng et al., ICML 2026, arXiv 2505.22988",
    needs=("input_moment", "output_grad_moment"),
    allocate="best",
    sequential=True,
    split=_YAQA(),
    sizes=sizes,
    defaults={**GRID, "damping": 0.01, "output_damping": 1.0},
)
