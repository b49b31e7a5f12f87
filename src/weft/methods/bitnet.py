"""bitnet-1.58: every matrix as numbers -1, 0 and 1 times one scale, trained so from the first step (BitNet b1.58, Ma et
al., 2024, arXiv 2402.17764; the median as the scale: b1.58 Reloaded, Nielsen and Schneider-Kamp, 2024, arXiv
2407.09527).

    W' = g clip(round(W / g), -1, 1),   g = median |W|, or mean |W| (the base paper), of the latent W, at least 1e-5
    u = x / rms(x);   per token q = clip(round(s u), -128, 127), s = 127 / max|u|;   y = W' q / s
    backward: both roundings count as the identity

The matrices of the blocks alone; embeddings, head and norms stay. Optimizer and latents hold as much as dense training;
what is left is five weights a byte, g, and the rounding of inputs. A share `blend` of the run brings rounding in,
W + b (W' - W) and likewise for inputs. A given model (`--from`) begins with a share of 0.5 and without u = x / rms(x),
which its layers do not expect: it would be another function at b = 0. Without rounded inputs (`activations=null,
normalise=false`) layers are matrices, which `weft merge` makes dense and integer formats of 2 bits express exactly.
With weight decay latents shrink and codes flip faster: codes do not depend on size.
Deviations: published inputs are normalised in the block's own norms' place, here after them, which an RMS norm hides
but for its gain. No second stage of rates without weight decay. The Reloaded code normalises across tokens, which tells
of the future, and multiplies the bias by g / s; neither is followed. Its default measure is the median, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.rules.blend import Blend
from weft.terms import RoundedInputs, TernaryLatent

__all__ = ["METHOD", "count", "finish", "split"]


def split(site: Site, *, scale: str, activations: int | None, normalise: bool) -> Split:
    """The weight as latents, and what is done to its inputs."""
    latent = TernaryLatent.from_matrix(site.weight().to(site.dtype), scale)
    rounds = activations is not None or normalise
    return Split({"ternary": RoundedInputs.of(latent, activations, normalise) if rounds else latent})


def finish(site: Site) -> Split:
    """The packed numbers."""
    return Split({role: term.finished() for role, term in site.terms.items()})


def count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """in out."""
    return out_features * in_features


METHOD = Method(
    name="bitnet-1.58",
    kind="pretrain",
    summary="Every weight -1, 0 or 1 times one scale, inputs in 8 bits, trained through the rounding.",
    paper="Ma et al., 2024, arXiv 2402.17764",
    split=split,
    count=count,
    ranked=False,
    rules=(Blend,),
    trained=low_rank_terms,
    begins=("fresh", "given"),
    finish=finish,
    defaults={"scale": "median", "activations": 8, "normalise": True, "blend": 0.0},
    given={"normalise": False, "blend": 0.5},
    exempt={
        "gradients": "the gradient of a rounding is the identity by definition, not that of differences",
    },
)  # fmt: skip
