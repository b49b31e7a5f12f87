"""rtn: each weight rounded to the nearest of 2^b evenly spaced numbers, a scale and a zero point a group: what every
quantiser is compared with (as in Frantar et al., 2022, arXiv 2210.17323, section 4).

    scale = (max - min) / (2^b - 1),   zero = round(-min / scale),   code = round(w / scale) + zero

No data. `bits` is the only width (null: 2 to 8, what a budget allows), `group` inputs of a row share a scale (null:
the whole row), `symmetric` leaves the zero points out, and `clip` searches each group's range for the least sum
|w - w'|^2.4 (that paper's code, option "mse"). Bits a weight: b + (16 + b) / group, or b + 16 / group: codes, 16-bit
scales and zero points all count in a budget.
Deviations: scales are rounded to 16 bits before the codes are chosen; a symmetric grid reaches below zero even where
all weights are above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weft.methods.base import Method, Shape, Site, Split
from weft.terms import IntegerCode

__all__ = ["GRID", "METHOD", "WIDTHS", "scale_dtype", "sizes", "split"]

WIDTHS = range(2, 9)
GRID = {"bits": None, "group": 64, "symmetric": False, "clip": False}
"""The options of a grid of integers, for all who round to one."""


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the scales of a model in `dtype`: 16 bits, in bf16 where the model is."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def split(site: Site, *, bits: int | None, **grid: Any) -> Split:
    """The code of the weight, with `site.size` bits."""
    W = site.weight().to(site.dtype)
    return Split({"base": IntegerCode.from_matrix(W, site.size, scale_dtype=scale_dtype(site.dtype), **grid)})


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes, scales and zero points): every width, or the one that is asked for.

    Raises:
        WeftError: there are no codes of that width.
    """
    out, inn = shape
    format = {"group": options["group"], "symmetric": options["symmetric"], "device": "meta"}
    widths = WIDTHS if options["bits"] is None else [options["bits"]]
    return [(bits, IntegerCode(inn, out, bits=bits, **format).nbytes) for bits in widths]


METHOD = Method(
    name="rtn",
    kind="quantize",
    summary="Integers of 2 to 8 bits, each weight rounded to the nearest, a scale a group.",
    paper="the baseline of Frantar et al., 2022, arXiv 2210.17323",
    allocate="equal",
    split=split,
    sizes=sizes,
    defaults=GRID,
)
