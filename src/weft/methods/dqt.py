"""dqt: every matrix in numbers of 8 bits from the first step on, which take each step by being rounded at random; no
wider copy is anywhere (Direct Quantized Training, Zhao et al., 2024, arXiv 2412.04787).

    W = 2^e C,   C of e4m3 or e5m2,   2^e fixed so that numbers may grow 2^headroom times
    W <- round(W - lr AdamW(dL/dW)),   up with the probability that makes the mean exact

A weight takes 1 byte and its moments 2, where AdamW on fp32 holds 12. A rounding to the nearest would keep no step that
is smaller than half of the distance to the next number, which of e4m3 is a sixteenth to an eighth of the weight: the
small rates of a run's end move weights by chance and little.
The gradient of a matrix is there as a whole until the step. What comes out is an fp8 model, as of `fp8`.
`weft.optim.adamw_fp8` keeps the moments of everything else in 8 bits too.
Deviations: floating-point numbers, where the paper has integers of 1.58 to 8 bits with a scale of mean |W|; moments in
float8, as torchao's AdamWFp8; embeddings, norms and head as they are. Only its abstract and descriptions were at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.rules.rounded_steps import RoundedSteps
from weft.terms import TrainedFloat

__all__ = ["METHOD", "count", "finish", "split"]


def split(site: Site, *, element: str, headroom: int) -> Split:
    """The weight in the nearest numbers."""
    if not 0 <= headroom <= 8:
        raise WeftError(f"headroom is {headroom}: numbers may grow to 2^headroom times the largest; give 0 to 8.")
    return Split({"code": TrainedFloat.of(site.weight().to(site.dtype), element, headroom)})


def finish(site: Site) -> Split:
    """The same numbers, at rest."""
    return Split({role: term.finished() for role, term in site.terms.items()})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """in out."""
    return out_features * in_features


METHOD = Method(
    name="dqt",
    kind="pretrain",
    summary="Every weight one byte in float8 while it is trained, its steps rounded at random.",
    paper="Zhao et al., 2024, arXiv 2412.04787",
    split=split,
    count=count,
    ranked=False,
    rules=(RoundedSteps,),
    trained=low_rank_terms,
    begins=("fresh", "given"),
    finish=finish,
    defaults={"element": "e4m3", "headroom": 4},
    exempt={
        "count": "its numbers are codes, which no optimizer knows as parameters",
    },
)  # fmt: skip
