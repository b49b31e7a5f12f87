"""int8: one scale a row, its absolute maximum, and integers from -127 to 127 (the vector-wise form of Dettmers et al.,
2022, arXiv 2208.07339, without the outlier columns).

    T[i, j] = code[i, j] * scale[i] / 127;   8 + 32 / in bits a weight; frozen

Deviations: no columns are kept in half precision, and the input is not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.methods.base import Method, Shape, Site, Split
from weft.terms import Int8

__all__ = ["METHOD", "sizes", "split"]


def split(site: Site) -> Split:
    """The code of the weight."""
    return Split({"base": Int8.from_matrix(site.weight().to(site.dtype))})


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(8, bytes of codes and scales)."""
    out_features, in_features = shape
    return [(8, out_features * in_features + 4 * out_features)]


METHOD = Method(
    name="int8",
    kind="quantize",
    summary="8-bit integers, a scale a row.",
    paper="Dettmers et al., 2022, arXiv 2208.07339",
    allocate="equal",
    split=split,
    sizes=sizes,
)
