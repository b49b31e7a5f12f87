"""lora-ggpo: LoRA trained under noise on the merged weight, stronger on rows that are long or have a large gradient
(Chang et al., 2025, arXiv 2502.14538).

    training:  y = W x + s B A x + E x,  E_ij = z_i N(0, 1) / sqrt(out),  z_i = sigma n_i + beta q_i^2
    n_i: norm of row i, from the mean over W and from s B A;  q_i: norm of row i of the last step's approximate gradient
    evaluation, and the saved adapter: LoRA's;   r (in + out) trainable numbers

One forward pass a step, and no noise matrix: see `weft.rules.guided_noise` for the law that is drawn. sigma = beta = 0
is LoRA, bit for bit. beta has no unit in common with sigma: tune it anew for each batch size.
Deviations: sigma and beta are those in circulation for a port, the authors' own are not published with the text; s is
in B A, which that port drops; w0 is over all rows. The renamed second version, which perturbs along the momentum, is
another method.
"""

from __future__ import annotations

from weft.methods import lora
from weft.methods.adapter import SCALING, lora_count, low_rank
from weft.methods.base import Method
from weft.rules.guided_noise import GuidedNoise

__all__ = ["METHOD"]


METHOD = Method(
    name="lora-ggpo",
    kind="adapt",
    summary="LoRA trained under noise that follows the norms of the weight's and the gradient's rows.",
    paper="Chang et al., 2025, arXiv 2502.14538",
    split=low_rank(lora.initialise),
    count=lora_count,
    rules=(GuidedNoise,),
    defaults={**SCALING, "sigma": 0.03, "beta": 0.01},
)
