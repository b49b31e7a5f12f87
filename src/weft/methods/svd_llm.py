"""svd-llm: the truncation that loses least at the layer's output, min ||(W - W') X||_F (Wang et al., 2024, arXiv
2403.07378).

    U_r = leading eigenvectors of W C W^T,  C = E[x x^T];   W' = U_r (U_r^T W)

equals truncating the SVD of W L, C = L L^T (the paper's Cholesky whitening, and V2's eigen form, arXiv 2503.12340,
section 3.3), without inverting anything. `sequential` takes C from the inputs that a layer gets in the model compressed
so far; it truncates each weight itself, without a step towards the dense model's outputs (`correction` is that step,
see `weft.verbs.placing.sequential`).
Deviations: no parameter update (in the published paper, LoRA fine-tuning of the left factor and then of the right one;
in the first version and the released code, a least-squares left factor for the dense layer's outputs): fine-tune the
factors with `welore` instead; no allocation of V2, which gives each matrix a ratio by the logarithm of its truncation
loss within its type: ranks are uniform, or those of any allocation of weft; the inverse-free form (V1's Cholesky fails
on singular moments); a mean, not a sum, over tokens (no effect on W'); a ridge of 1 % of the moment's mean diagonal,
which on 16k calibration tokens lowers the held-out perplexity a little and never raises it
(`benchmarks/compression_table.py`).
"""

from __future__ import annotations

from torch import Tensor

from weft.linalg.principal import principal_factors
from weft.methods.base import Factors, Method, Moments, low_rank_split, low_rank_terms

__all__ = ["METHOD", "factorise"]


def factorise(W: Tensor, moments: Moments, *, ridge: float = 1e-2) -> Factors:
    """Factors of W in the metric of the inputs' second moment; `ridge` is relative to the moment's mean diagonal."""
    return Factors(*principal_factors(W, C=moments["input_moment"], ridge=ridge))


METHOD = Method(
    name="svd-llm",
    kind="compress",
    summary="SVD whitened by the inputs' second moment: each dropped value is the output error it causes.",
    paper="Wang et al., 2024, arXiv 2403.07378; V2, 2025, arXiv 2503.12340",
    needs=("input_moment",),
    split=low_rank_split(factorise),
    trained=low_rank_terms,
    defaults={"ridge": 1e-2},
)
