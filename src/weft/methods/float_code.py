"""fp8, mxfp4, mxfp6, mxfp8: each weight the nearest floating-point number of few bits (Micikevicius et al., 2022, arXiv
2209.05433; Rouhani et al., 2023, arXiv 2310.10537).

    fp8     e4m3, a scale a row: max|w| / 448, in fp32, or in bf16, which servers of bf16 models read (`scale`)
    mx...   e2m1, e2m3 or e4m3, for 32 inputs of a row a shared exponent: 2^(floor(log2 max|w|) - that of the format)

Bits a weight: 8 + 32 / in; 4.25, 6.25, 8.25. `mx` offers the three to an allocation. No data; the inputs are not
quantised.
Deviations: fp8 has a scale a row, where the paper leaves it open; of the two 6-bit formats the one with more mantissa.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.methods.base import Method, Shape, Site, Split
from weft.terms import FloatCode

__all__ = ["METHODS", "sizes", "split"]

_SHARED = {4: "e2m1", 6: "e2m3", 8: "e4m3"}


def _format(name: str, bits: int, scale: str) -> dict[str, Any]:
    if name == "fp8":
        return {"element": "e4m3", "group": None, "scale": scale}
    return {"element": _SHARED[bits], "group": 32, "scale": "e8m0"}


def split(site: Site, *, name: str, scale: str = "float32") -> Split:
    """The code of the weight, with `site.size` bits."""
    return Split({"base": FloatCode.from_matrix(site.weight().to(site.dtype), **_format(name, site.size, scale))})


def sizes(shape: Shape, options: Mapping[str, Any], *, name: str, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bits, bytes of codes and scales)."""
    out, inn = shape
    scale = options.get("scale", "float32")
    return [(bits, FloatCode(inn, out, **_format(name, bits, scale), device="meta").nbytes) for bits in widths]


def _method(name: str, summary: str, *widths: int) -> Method:
    paper = "2022, arXiv 2209.05433" if name == "fp8" else "2023, arXiv 2310.10537"
    return Method(
        name=name,
        kind="quantize",
        summary=summary,
        paper=f"{'Micikevicius' if name == 'fp8' else 'Rouhani'} et al., {paper}",
        allocate="equal",
        split=partial(split, name=name),
        sizes=partial(sizes, name=name, widths=widths),
        defaults={"scale": "float32"} if name == "fp8" else {},
    )


METHODS = (
    _method("fp8", "8-bit floating-point numbers (e4m3), a scale a row.", 8),
    *(_method(f"mxfp{b}", f"{b}-bit floating-point numbers, 32 to a shared exponent (OCP MX).", b) for b in _SHARED),
    _method("mx", "Floating-point numbers with shared exponents, of the width that the budget allows.", *_SHARED),
)
