"""ifairy: every matrix as complex numbers 1, i, -1 and -i times a scale an axis, trained so from the first step
(Fairy+-i, Wang et al., 2025, arXiv 2508.05571).

    y = Q conj(x),   Q = s_r (1 or -1) where |V_r| >= |V_i|, else s_i (i or -i);   V = V_r + i V_i the latents
    s_r = mean |V_r| of the real ones, s_i = mean |V_i| of the others
    x_r and x_i of each token in 8 bits, each by its own scale;   backward: both roundings count as the identity

The halves of a layer's inputs and outputs are the real and the imaginary parts, so that a matrix (out, in) has a
quarter as many complex weights of 2 bits: half a bit a number of it. Dot products and norms over both halves are
those of complex features. Latents begin as the nearest to what was drawn, each part of its size over sqrt(2), as
published. `activations=null` leaves matrices, which `weft merge` makes dense. A matrix of odd sides is refused.
Deviations: the matrices alone. Published are complex embeddings, rotary angles a dimension (no half rotated), norms
with a gain a part, a squared ReLU of both parts for SiLU and a further norm before `down`; here what lies between
matrices stays the model's own and real, so that a layer's halves are no phases to it, and heads take them as they
lie. Its rates (1.5e-3, two stages) are the user's. Compare at equal bits: the published 700M are complex weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.methods.bitnet import finish
from weft.terms import ComplexLatent, RoundedInputs

__all__ = ["METHOD", "count", "split"]


def split(site: Site, *, activations: int | None) -> Split:
    """The weight as complex latents, and what is done to its inputs."""
    try:
        latent = ComplexLatent.from_matrix(site.weight().to(site.dtype))
    except WeftError as error:
        raise WeftError(f"{site.name}: {error}") from None
    rounds = activations is not None
    return Split({"complex": RoundedInputs.of(latent, activations, normalise=False, parts=2) if rounds else latent})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """in out / 2: a quarter as many weights of two parts each."""
    return out_features * in_features // 2


METHOD = Method(
    name="ifairy",
    kind="pretrain",
    summary="Every matrix as complex weights 1, i, -1 and -i, inputs in 8 bits, trained through the rounding.",
    paper="Wang et al., 2025, arXiv 2508.05571",
    split=split,
    count=count,
    ranked=False,
    trained=low_rank_terms,
    finish=finish,
    defaults={"activations": 8},
    exempt={
        "gradients": "the gradient of a rounding is the identity by definition, not that of differences",
    },
)  # fmt: skip
