"""qid-law: the loss that low bits add, by the size of a model and the tokens that it has seen (Ouyang et al., 2024,
arXiv 2411.17691).

    q(N, D, P) = 0.017 D^0.5251 / (N^0.2261 P^5.4967)                                         nats a token
    P(q) = (0.017 D^0.5251 / (N^0.2261 q))^(1 / 5.4967)

N parameters without embeddings, D training tokens, P bits a weight, scales of the groups included. Fitted on more than
1500 checkpoints of Pythia under GPTQ of 2, 3 and 4 bits.

Deviations: none. The constants are quoted from a summary of the paper.
"""

from __future__ import annotations

import math

from weft.errors import WeftError
from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "bits", "predict"]

K, BETA, ALPHA, GAMMA = 0.017, 0.5251, 0.2261, 5.4967


def predict(parameters: float, tokens: float, bits: float) -> dict[str, float]:
    """The loss added in nats, and the factor that this is of the perplexity.

    Raises WeftError for tokens that look like billions of them.
    """
    if tokens < 1e6:
        raise WeftError(
            f"tokens counts single tokens, not billions of them: {tokens:g} are fewer than a model is trained on."
        )
    added = K * tokens**BETA / (parameters**ALPHA * bits**GAMMA)
    return {"loss_added": added, "perplexity_factor": math.exp(min(added, 700.0))}


def bits(parameters: float, tokens: float, loss_added: float) -> float:
    """The bits a weight at which the law predicts that loss."""
    return float((K * tokens**BETA / (parameters**ALPHA * loss_added)) ** (1 / GAMMA))


LAW = Law(
    name="qid-law",
    summary="The loss that quantisation adds, by size, training tokens and bits.",
    paper="Ouyang et al., 2024, arXiv 2411.17691",
    takes={
        "parameters": Quantity("parameters without embedding and head", 1.6e8, 1.2e10),
        "tokens": Quantity("tokens that the model was trained on", 1e9, 2.06e11),
        "bits": Quantity("bits a weight, scales of the groups included", 2, 4),
    },
    formula=predict,
    caution=(
        "It holds for codes on a grid (GPTQ) of dense models pre-trained in one stage; not for mixtures of experts, "
        "tuned models, or training on the codes. Models of today have seen far more tokens: take a range."
    ),
)
