"""rds-plus: the examples nearest to those of the task, each of which chooses in turn (Ivison et al., 2025, arXiv
2503.01807).

    e = sum_t t h_t / sum_t t over the last hidden states h_t of a text, of unit length
    round after round, each query takes its nearest example by e . q that none has taken

`weft.verbs.embedding` makes e.

Source: github.com/hamishivi/automated-instruction-selection.
Deviations: padding has no part in the weights, which the released code lets it have. One task at a time, where the
paper takes several in turn by the largest score of each; 512 tokens of a text unless asked, 2048 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.select.base import Chosen, Selection

__all__ = ["SELECTION", "choose"]


def choose(E: Tensor, count: int, query: Tensor, seed: int = 0) -> Chosen:
    """Of E (n, d), those that the queries (q, d) take in turn; a score is the largest likeness to a query."""
    likeness = [E @ q for q in query]
    wanted = [iter(x.argsort(descending=True, stable=True).tolist()) for x in likeness]
    taken: dict[int, None] = {}
    while len(taken) < count:
        for choices in wanted:
            if len(taken) < count:
                taken[next(i for i in choices if i not in taken)] = None
    return Chosen(torch.tensor(list(taken), dtype=torch.long), torch.stack(likeness).amax(0))


SELECTION = Selection(
    name="rds-plus",
    summary="The examples nearest to a task's own in the model's last states, each query in turn.",
    paper="Ivison et al., 2025, arXiv 2503.01807",
    choose=choose,
    reads="cosine to the nearest query",
    query=True,
)
