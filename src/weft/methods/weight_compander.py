"""weight-compander: every matrix of a fresh model as W = a arctan(V / b), V trained (Weight Compander, Eliasen et al.,
2023, arXiv 2306.16993).

    a = kappa std(W0),   b = a / rho,   V = b tan(W0 / a) for the drawn W0

No entry can exceed a pi / 2, small ones move faster than large ones, and weights end more evenly sized: a regulariser,
not a saving: in out numbers a matrix, as dense. V alone is kept, W and its slope are made for the moment
(`weft.kernels.transient_linear`). A step near zero is rho times plain training's with Adam (rho^2 with SGD): divide the
rate by it to compare. With `learn`, log a and log b are trained too, one of each for a matrix. In the end it is a plain
matrix.
Deviations: the paper's a and b were not at hand: kappa 2.55 puts the bound at four standard deviations, so that entries
of the start beyond are cut to it: few of a drawn matrix, more of a trained one. Weight decay acts on V. In bfloat16
steps of the two logarithms are mostly below its spacing: `learn` wants --dtype float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import WeftError
from weft.methods.adapter import no_gradient
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.terms import Companded, Dense

__all__ = ["METHOD", "count", "finish", "split"]


def split(site: Site, *, kappa: float, rho: float, learn: bool) -> Split:
    """The drawn weight through the inverse map."""
    if min(kappa, rho) <= 0:
        raise WeftError(f"kappa is {kappa} and rho {rho}: give two numbers above 0.")
    W = site.weight()
    a = 1.0 if W.is_meta else kappa * float(W.std())
    term = Companded.from_matrix(W.to(site.dtype), a, a / rho)
    return Split({"companded": term if learn else no_gradient(term, "log_a", "log_b")})


def finish(site: Site) -> Split:
    """The matrix."""
    return Split({"dense": Dense.from_matrix(site.weight().to(site.dtype))})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """in out, and two with `learn`."""
    return out_features * in_features + 2 * bool(options["learn"])


METHOD = Method(
    name="weight-compander",
    kind="pretrain",
    summary="Every weight bounded by an arctangent, whose argument is trained.",
    paper="Eliasen et al., 2023, arXiv 2306.16993",
    split=split,
    count=count,
    ranked=False,
    trained=low_rank_terms,
    begins=("fresh", "given"),
    finish=finish,
    defaults={"kappa": 2.55, "rho": 1.0, "learn": False},
)
