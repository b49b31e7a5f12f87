"""corda: start the factors on components oriented by the layer's inputs (Yang et al., 2024, arXiv 2406.05223, section
3).

    C = E[x x^T] + damp * mean(diag E[x x^T]) * I;   W C = U S V;   V' = V C^-1
    B0 = U_sel sqrt(S_sel / s),  A0 = sqrt(S_sel / s) V'_sel;   W + s (B A - B0 A0);   r (in + out) trainable numbers

`mode="ipm"` (instruction-previewed) trains the first r components of the data to be learned, `"kpm"`
(knowledge-preserved) the last r of the data to be kept: calibrate on the one or the other.
Deviations: in fp64, where the official doubling of the damping until the inverse is exact never happens; no
per-sequence division by the largest input (each token counts the same, padding not at all); the residual is kept as
an exact sum.
"""

from __future__ import annotations

import torch

from weft.errors import WeftError, unknown
from weft.linalg.svd import minor_svd, truncated_svd
from weft.methods.adapter import SCALING, Pair, lora_count, low_rank
from weft.methods.base import Method, Site

__all__ = ["METHOD", "initialise"]


def initialise(site: Site, scale: float, *, mode: str = "ipm", damp: float = 0.01) -> Pair:
    """The components of W C that are kept for training, with C undone."""
    if mode not in ("ipm", "kpm"):
        raise unknown("mode of corda", mode, ("ipm", "kpm"))
    if damp <= 0:
        raise WeftError(f"corda inverts the inputs' second moment, which needs damp above 0; it is {damp}.")
    C = site.moments["input_moment"].to(site.device, torch.float64)
    C = C + torch.eye(len(C), dtype=C.dtype, device=C.device) * (damp * C.diagonal().mean())
    U, s, V = (truncated_svd if mode == "ipm" else minor_svd)(site.weight(torch.float64) @ C, site.rank)
    root = (s / scale).sqrt()
    # V C^-1 with a symmetric C
    return U * root, root.unsqueeze(1) * torch.linalg.solve(C, V.mT).mT


METHOD = Method(
    name="corda",
    kind="adapt",
    summary="LoRA started on the components of the weight that the inputs use most (ipm), or least (kpm).",
    paper="Yang et al., 2024, arXiv 2406.05223",
    needs=("input_moment",),
    split=low_rank(initialise, shifted=True),
    count=lora_count,
    defaults={**SCALING, "mode": "ipm", "damp": 0.01},
)
