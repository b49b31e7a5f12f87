"""deft: LoRA whose loss also counts the MLPs' non-zero activations, so that they become sparse (Runwal et al., 2024,
arXiv 2402.01911).

    loss + weight * mean over blocks, tokens and units of a^2 / (a^2 + eps);   r (in + out) trainable numbers

The adapter is a plain LoRA; what is gained is in the activations: `activation_density(model, batches, threshold)` of
`weft.rules.density` tells it by layer. ReLU and GELU have zeros; SiLU has none, so name a threshold. Only activations
near zero are pushed: the slope peaks at |a| = sqrt(eps / 3). Dense kernels are not faster for it. Not PEFT's method of
this name.
Deviations: padding does not count, as it does in the released code. The variant that skips blocks (ADA-DEFT) is left
out: its weights are published in outline only. The scale is 1 unless `alpha` is given, published are alpha 16 at r 8
and a dropout of 0.1.
"""

from __future__ import annotations

from weft.methods import lora
from weft.methods.adapter import SCALING, lora_count, low_rank
from weft.methods.base import Method
from weft.rules.density import DensityPenalty

__all__ = ["METHOD"]


METHOD = Method(
    name="deft",
    kind="adapt",
    summary="LoRA with a penalty on the density of the MLPs' activations.",
    paper="Runwal et al., 2024, arXiv 2402.01911",
    split=low_rank(lora.initialise),
    count=lora_count,
    rules=(DensityPenalty,),
    defaults={**SCALING, "weight": 1.0, "eps": 1e-7},
)
