"""nf2, nf3, nf4, nf8: each weight the nearest of 2^b levels at the quantiles of a normal law (Dettmers et al., 2023,
arXiv 2305.14314, section 3).

    T[i, j] = level[code] * scale of its block,   scale = the block's absolute maximum

The scales are themselves in 8 bits (double quantisation): b + 8 / block + small bits a weight; frozen. Adapters on such
a base are QLoRA. `nf` offers all four widths to an allocation.
Deviations: levels for 2, 3 and 8 bits by the same construction as NF4's; blocks run over the flattened matrix, as in
the released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.kernels.normal_float import NF4, Format
from weft.methods.base import Method, Shape, Site, Split
from weft.terms import NormalFloat

__all__ = ["METHODS", "sizes", "split"]

WIDTHS = (2, 3, 4, 8)


def split(site: Site, **numbers: Any) -> Split:
    """The code of the weight, with `site.size` bits."""
    format = Format(bits=site.size, **numbers)
    return Split({"base": NormalFloat.from_matrix(site.weight().to(site.dtype), format)})


def sizes(shape: Shape, options: Mapping[str, Any], *, widths: tuple[int, ...] = WIDTHS) -> list[tuple[int, int]]:
    """(bits, bytes of codes, scales and steps)."""
    out_features, in_features = shape
    formats = [Format(bits=bits, **options) for bits in widths]
    terms = [NormalFloat(in_features, out_features, **format._asdict(), device="meta") for format in formats]
    return [(format.bits, term.nbytes) for format, term in zip(formats, terms, strict=True)]


DEFAULTS = {name: value for name, value in NF4._asdict().items() if name != "bits"}


def _method(name: str, summary: str, widths: tuple[int, ...]) -> Method:
    return Method(
        name=name,
        kind="quantize",
        summary=summary,
        paper="Dettmers et al., 2023, arXiv 2305.14314",
        allocate="equal",
        split=split,
        sizes=partial(sizes, widths=widths),
        least={"block": 1, "scale_bits": 2, "scale_block": 1},
        defaults=DEFAULTS,
    )


METHODS = (
    *(_method(f"nf{b}", f"NormalFloat codes of {b} bits, 64 weights a scale, doubly quantised.", (b,)) for b in WIDTHS),
    _method("nf", "NormalFloat codes of the width that the budget allows each matrix.", WIDTHS),
)
