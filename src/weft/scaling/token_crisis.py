"""token-crisis: how often tokens are repeated, and whether that is known to hurt (Xue et al., 2023, arXiv 2305.13230).

    epochs = tokens / unique,    tokens_per_parameter = unique / parameters

Beyond some four epochs a repeated token is worth less and less, the sooner the larger the model; quality of the data
does not help, dropout does, and may be switched on late. A source that is repeated by itself counts by itself.

Deviations: the limit of four epochs is of later work on causal models (Muennighoff et al., 2023, arXiv 2305.16264): the
paper's own experiments are of encoder-decoder models.
"""

from __future__ import annotations

from typing import Any

from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "predict"]

_HARMLESS = 4.0
_BALANCED = 20.0  # unique tokens a parameter at which compute is best spent (Hoffmann et al., 2022)


def predict(tokens: float, unique: float, parameters: float) -> dict[str, Any]:
    """Epochs, unique tokens a parameter, and what to do."""
    epochs, each = tokens / unique, unique / parameters
    advice = "The repetition is known to do little harm."
    if epochs > _HARMLESS:
        advice = (
            "Tokens are repeated more often than is known to be harmless: find more, train fewer parameters, or switch "
            "dropout on (0.1) once the loss on held-out text stops falling."
        )
    elif epochs <= 1:
        advice = "Nothing is repeated."
    return {"epochs": epochs, "tokens_per_parameter": each, "balanced": each >= _BALANCED, "advice": advice}


LAW = Law(
    name="token-crisis",
    summary="How often tokens are repeated, and whether that hurts.",
    paper="Xue et al., 2023, arXiv 2305.13230",
    takes={
        "tokens": Quantity("tokens that are trained on, repeats counted"),
        "unique": Quantity("different tokens that there are"),
        "parameters": Quantity("parameters that are trained"),
    },
    formula=predict,
    caution="A rule of thumb: the loss on held-out text decides, source by source.",
)
