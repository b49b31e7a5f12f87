"""adadim: groups along the inputs of a row or along the outputs of an input, whichever loses less (Heo et al., 2023,
arXiv 2309.15531).

    per row      code of W, `group` inputs of a row to a scale (`rtn`)
    per input    code of W^T, `group` outputs of an input to a scale: an input whose weights stand out keeps to itself
    the lesser   E||(W - W') x||^2

Both store the same bytes.
Deviations: rounding is to nearest (the paper's RTN-ada; it has a GPTQ-ada too). A matrix is judged by its own outputs,
where q, k and v are judged by those of the attention, and up and gate by those of the MLP; a range contains zero, which
the released code does not ask for; where `group` does not divide both sides, groups run along the inputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.methods.base import Method, Site, Split
from weft.methods.rtn import GRID, scale_dtype, sizes
from weft.terms import IntegerCode, TransposedCode

__all__ = ["METHOD", "split"]


def split(site: Site, *, bits: int | None, **grid: Any) -> Split:
    """The nearer of the two codes, with `site.size` bits."""
    W, group = site.weight().to(site.dtype), grid["group"]
    rule = {**grid, "scale_dtype": scale_dtype(site.dtype)}
    per_row = IntegerCode.from_matrix(W, site.size, **rule)
    if group is None or any(side % group for side in W.shape):
        return Split({"base": per_row})
    per_input = TransposedCode.from_code(IntegerCode.from_matrix(W.mT.contiguous(), site.size, **rule))

    return Split({"base": min((per_row, per_input), key=lambda term: _loss(term.dense() - W, site))})


def _loss(D: Tensor, site: Site) -> float:
    D = D.double()
    return float(((D @ site.moments["input_moment"].to(D.device, D.dtype)) * D).sum())


METHOD = Method(
    name="adadim",
    kind="quantize",
    summary="Integers of 2 to 8 bits, in groups along inputs or along outputs, whichever loses less.",
    paper="Heo et al., 2023, arXiv 2309.15531",
    needs=("input_moment",),
    allocate="equal",
    split=split,
    sizes=sizes,
    defaults={**GRID, "group": 128},
)
