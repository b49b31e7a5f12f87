"""chinchilla: the loss of a model by its size and tokens, and how a budget of compute is best split (Hoffmann et al.,
2022, arXiv 2203.15556).

    L(N, D) = E + A / N^a + B / D^b
    C = 6 N D,   N_opt = G (C / 6)^(b / (a + b)),   D_opt = (C / 6)^(a / (a + b)) / G,   G = (a A / (b B))^(1 / (a + b))

N parameters, D tokens, C floating-point operations. E = 1.8172, A = 482.01, B = 2085.43, a = 0.3478, b = 0.3658 are
those of Besiroglu et al. (2024, arXiv 2404.10102), who fitted the published runs again: the constants printed first do
not agree with them.

Deviations: the constants, as said.
"""

from __future__ import annotations

from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "loss", "predict"]

E, A, B, a, b = 1.8172, 482.01, 2085.43, 0.3478, 0.3658


def loss(parameters: float, tokens: float) -> float:
    """L(N, D) in nats a token of the authors' text and tokenizer."""
    return E + A / parameters**a + B / tokens**b


def predict(compute: float) -> dict[str, float]:
    """The parameters and tokens of least loss within `compute` operations, and that loss."""
    G = (a * A / (b * B)) ** (1 / (a + b))
    parameters = G * (compute / 6) ** (b / (a + b))
    tokens = compute / 6 / parameters
    return {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "loss": loss(parameters, tokens),
    }


LAW = Law(
    name="chinchilla",
    summary="The model size and the tokens of least loss for a budget of compute.",
    paper="Hoffmann et al., 2022, arXiv 2203.15556; constants of Besiroglu et al., 2024, arXiv 2404.10102",
    takes={"compute": Quantity("floating-point operations of the training, 6 N D", 1e18, 1e24)},
    formula=predict,
    caution=(
        "The loss is that of the authors' text and tokenizer. A model that will serve many requests is better made "
        "smaller and trained longer."
    ),
)
