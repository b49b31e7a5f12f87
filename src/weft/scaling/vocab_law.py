"""vocab-law: how large a vocabulary pays, by the size of the rest of the model (Tao et al., 2024, arXiv 2407.13623).

    N_v = 3,145,728 (N / 33e6)^0.8354,   V = N_v / d                                        (their approach 2)

N parameters without vocabulary, d the width, N_v = V d parameters of the vocabulary, counted once. The exponent comes
from the zero of dC/dV at fixed text, C = 6 (N + V d) H f(V), f(V) = 0.00639222 ln^2 V - 0.15811069 ln V + 1.20470122
tokens a character; the point that it starts from is the best of their smallest models.

Source: github.com/sail-sg/scaling-with-vocab, optimal_Nv_predict.py.
Deviations: the width is asked for where the release looks it up in a table of its own models.
"""

from __future__ import annotations

import math

from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "predict", "tokens_per_character"]


def tokens_per_character(vocabulary: float) -> float:
    """f(V), for BPE on SlimPajama; constant beyond 200,000."""
    x = math.log(min(vocabulary, 200_000))
    return 0.00639222 * x**2 - 0.15811069 * x + 1.20470122


def predict(parameters: float, width: float) -> dict[str, float]:
    """The vocabulary's parameters, its tokens (also rounded to a multiple of 128), and tokens a character of text."""
    spent = 3_145_728 * (parameters / 33e6) ** 0.8353974035228025
    vocabulary = spent / width
    return {
        "vocabulary_parameters": spent,
        "vocabulary": max(128, 128 * round(vocabulary / 128)),
        "tokens_per_character": tokens_per_character(vocabulary),
    }


LAW = Law(
    name="vocab-law",
    summary="The vocabulary of least loss for a model's size.",
    paper="Tao et al., 2024, arXiv 2407.13623",
    takes={
        "parameters": Quantity("parameters without embedding and head", 3.3e7, 2.87e9),
        "width": Quantity("width of the model (hidden size)", 512, 3200),
    },
    formula=predict,
    caution=(
        "It was fitted on BPE vocabularies of English text at as many tokens as compute asks for; with fewer tokens a "
        "smaller vocabulary is better. Compare models of two vocabularies by bits a byte, never by loss a token."
    ),
)
