"""step-law: the peak learning rate and the batch of least loss, by the size of a model and its tokens (Li et al., 2025,
arXiv 2503.04715).

    lr    = exp(0.5863) N^-0.7129 D^0.3075
    batch = exp(-0.5435) D^0.5709                                                  tokens a step

N parameters without embedding and head, D tokens of training, repeated ones included. The constants are the means of
the 1000 bootstrap fits that the authors released. Setting: dense decoders, AdamW, cosine to a rate of 1e-5, sequences
of 2048.

Source: github.com/step-law/steplaw, data/1004_fitted_lr_bs_scaling_model_parameters.csv.
Deviations: none.
"""

from __future__ import annotations

import math

from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "predict"]


def predict(parameters: float, tokens: float, window: float) -> dict[str, float]:
    """The peak learning rate, and the batch in tokens and in sequences of `window` tokens."""
    lr = math.exp(0.5863077907399264) * parameters**-0.7129222911869909 * tokens**0.30749095041206964
    batch = math.exp(-0.543542173610334) * tokens**0.5709443646895052
    return {"lr": lr, "batch_tokens": batch, "batch": max(1, round(batch / window))}


LAW = Law(
    name="step-law",
    summary="Peak learning rate and batch of least loss for pre-training.",
    paper="Li et al., 2025, arXiv 2503.04715",
    takes={
        "parameters": Quantity("parameters without embedding and head", 2.1e8, 1.08e9),
        "tokens": Quantity("tokens of training, repeated ones included", 4e9, 1e11),
        "window": Quantity("tokens a sequence", 2048, 2048, 2048),
    },
    formula=predict,
    caution=(
        "It holds for dense models trained with AdamW down to a rate of 1e-5; under another optimizer or schedule, or "
        "with factorised weights, it is where a search begins. The optimum is broad: the authors' search found 0.09 % "
        "less loss."
    ),
)
