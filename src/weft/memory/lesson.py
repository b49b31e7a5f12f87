"""What a student learns of a teacher's predictions, token by token, in fp32 or wider.

    KL(p || q) = sum_v p_v (log p_v - log q_v)                   p the teacher's probabilities, q the student's
    top K:  KL((P, 1 - P) || (Q, 1 - Q)) + P KL(p|top || q|top) + (1 - P) KL(q|rest || p|rest)
    P = p(top), Q = q(top),   top: the teacher's K most likely tokens,   |S: renormalised on S

The first is what Minitron (Muralidharan et al., 2024, arXiv 2407.14679) and PV-tuning (Malinovskii et al., 2024, arXiv
2405.14852) train by. By the chain rule the second would be the same if its last divergence were turned round; as it
is, the top is covered as a whole and the student is kept from putting mass where the teacher has none: the two kinds of
knowledge that TopKLD (Ding et al., 2025, arXiv 2501.06218) weighs apart. With `labels` above 0, that many times the
cross-entropy of the labels is added (INT2.1, Chai et al., 2023, arXiv 2306.08162). What is learned of the teacher's
hidden states beside this is `weft.rules.features`.
Deviations: the form with K is ours, after TopKLD's description, whose formula we have not seen; INT2.1 sums its
divergence over tokens, where all losses here are means a token: its weight of 200 beside 2048 tokens is labels = 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import WeftError

__all__ = ["Lesson"]


@dataclass(frozen=True)
class Lesson:
    """What is learned of a teacher. Raises WeftError, when made, for what makes no sense.

    Args:
        top: how many of the teacher's most likely tokens are looked at by themselves; None for all tokens alike.
        labels: weight of the labels' own cross-entropy beside the divergence.
        features: weight of the error of the states after each block, which whoever takes the steps adds; None for none.
    """

    top: int | None = None
    labels: float = 0.0
    features: float | None = None

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise WeftError(f"The teacher's most likely {self.top} tokens are none: give 1 or more, such as 50.")
        if not 0 <= self.labels < float("inf"):
            raise WeftError(f"The labels cannot count {self.labels} times: give a weight from 0 on, such as 0.1.")
        if self.features is not None and not 0 < self.features < float("inf"):
            raise WeftError(f"The features cannot count {self.features} times: give a weight above 0, such as 1.")

    def losses(self, teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
        """(tokens,) of logits (tokens, vocabulary) and the right classes (tokens,)."""
        p, q = (torch.log_softmax(t.to(torch.promote_types(t.dtype, torch.float32)), -1) for t in (teacher, student))
        top = self.top
        found = _divergence(p, q) if top is None or top >= p.shape[-1] else _top(p, q, top)
        return found + self.labels * F.nll_loss(q, targets, reduction="none") if self.labels else found


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of logarithms of probabilities over the last dimension; what has none counts nothing."""
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0).sum(-1)


def _top(p: Tensor, q: Tensor, top: int) -> Tensor:
    """The form with K, of logarithms (tokens, vocabulary)."""
    chosen = p.topk(top, dim=-1).indices
    inside = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, chosen, True)
    mass = [
        [t.masked_fill(~part, -torch.inf).logsumexp(-1, keepdim=True) for t in (p, q)] for part in (inside, ~inside)
    ]
    (P, Q), (P_rest, Q_rest) = mass
    between = _divergence(torch.cat([P, P_rest], -1), torch.cat([Q, Q_rest], -1))
    p_top, q_top = p.gather(-1, chosen) - P, q.gather(-1, chosen) - Q
    p_rest, q_rest = ((t - m).masked_fill(inside, -torch.inf) for t, m in ((p, P_rest), (q, Q_rest)))
    covered, kept_out = _divergence(p_top, q_top), _kept_out(q_rest, p_rest)
    return between + P.squeeze(-1).exp() * covered + P_rest.squeeze(-1).exp() * kept_out


def _kept_out(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) outside of the top, whose tokens have probability 0 in both; what p rules out has its smallest."""
    there, least = q != -torch.inf, math.log(torch.finfo(p.dtype).tiny)
    p = p.masked_fill(~there, 0).clamp(min=least)
    return torch.where(there, q.exp() * (q.masked_fill(~there, 0) - p), 0.0).sum(-1)
