"""pst: fine-tuning into a sparse model, where the weights' change and what they are worth are learned of few numbers
(Li et al., 2022, arXiv 2205.11005; its code in alibaba/AliceMind, S4/PST, not seen).

    T = m * (W + U V),   m = 1 for the largest of |W + U V| + A B + R + C

|W + U V| is worth without data, A B of low rank and R, C of rows and columns are learned from it. The share of zeros
rises by a cubic law to `sparsity` (`CubicSparsity`).
`weft finetune MODEL --method pst` (with --teacher, if wished): W is frozen, trained are (change + score + 1) (in + out)
numbers a matrix, 17 (in + out) as published. In the end the kept entries are left, and a bit each for the mask; nothing
of the adapter. The saving is that of optimizer states: W stays whole until then. A and R, C are in the same unit as
|W|; the published factors beta, alpha_1, alpha_2 are 1, as here. With score = 0 and R, C untrained it is magnitude
pruning of what LoRA makes.
Deviations: |W + U V| in the score passes no gradient to U and V. The mask is the exact share of every matrix, found
anew each step. Decay reaches A, B, R, C like all that is trained: give weight_decay 0, the default. Embeddings and head
stay. Of the published 1.5 % of trained numbers, ranks of 8 make 2.6 % on BERT: give smaller ones.
"""

from __future__ import annotations

from torch import nn

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split
from weft.rules.cubic_sparsity import CubicSparsity
from weft.terms import ScoredMask

__all__ = ["METHOD", "finish", "split", "trained"]


def split(site: Site, *, change: int, score: int) -> Split:
    """The weight, whatever it is made of, all of it kept.

    Raises:
        WeftError: a rank below 0.
    """
    if min(change, score) < 0:
        raise WeftError(f"The ranks are {change} (change) and {score} (score): give 0 or more.")
    term = ScoredMask.from_matrix(site.weight().to(site.dtype), change, score, site.generator)
    return Split({"base": term})


def finish(site: Site) -> Split:
    """The kept entries."""
    return Split({key: term.finished() for key, term in site.terms.items()})


def trained(model: nn.Module) -> list[nn.Parameter]:
    """All of every masked matrix but its frozen weight."""
    terms = (module for module in model.modules() if isinstance(module, ScoredMask))
    return [p for term in terms for name, p in term.named_parameters() if name != "W"]


METHOD = Method(
    name="pst",
    kind="train",
    summary="Fine-tuning into a sparse model: change and worth of the weights are learned of few numbers.",
    paper="Li et al., 2022, arXiv 2205.11005",
    split=split,
    finish=finish,
    ranked=False,
    rules=(CubicSparsity,),
    trained=trained,
    defaults={"sparsity": 0.5, "change": 8, "score": 8, "dense": 0.1, "settle": 0.2},
)
