"""GatePhases: gates learn which learners a token needs, then learners and gates together keep a budget (ACM, Wojcik et
al., 2023, arXiv 2312.10193).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.each_step import EachStep
from weft.rules.hooks import watch, watch_before
from weft.rules.schedule import in_time, length
from weft.terms.gated_learners import GatedLearners, at_least

__all__ = ["GatePhases", "share_run"]

_NEAR = 0.1
"""How far from its target the share of the learners that run may end without a word."""


class GatePhases(EachStep):
    """Two phases of a run for trained `GatedLearners`:

        first     all learners run; the gate alone is taught the smallest k with  |h_N - h_k|^2 <= tolerance |h_N|^2
        then      k is drawn (Gumbel), and added to the loss is  weight |c - target| - entropy H - diversity D

    c is the mean share of the learners that run, by their numbers; H the entropy of a layer's mean gate over log(N +
    1); D = 2 mean |e_i - e_j| over the sequences of the batch, e the mean of k / (N + 1) over tokens and layers. Tokens
    that the attention mask leaves out do not count.

    Args:
        target: c, above 0 and at most 1.
        gates: share of the run that the first phase takes.
    """

    works_on = (GatedLearners,)
    ends = "a model that keeps to its budget"

    def __init__(
        self, target: float, gates: float, tolerance: float, weight: float, entropy: float, diversity: float
    ) -> None:
        if not 0 < target <= 1 or not 0 <= gates < 1:
            raise WeftError(
                f"target is {target} and gates {gates}: give shares, the first above 0, the second below 1."
            )
        self.target, self.gates, self.tolerance = target, gates, tolerance
        self.weight, self.entropy, self.diversity = weight, entropy, diversity

    def begin(self, model: nn.Module) -> None:
        self.terms_ = [term for _, term in self.found(GatedLearners)]
        first = self.gates * length(self.steps, "The training of the gates")
        self.until = in_time(max(round(first), 1), self.steps, "The training of the gates", given=False) if first else 0
        self.seen: dict[GatedLearners, Tensor] = {}
        self.share = self.target  # of the learners that ran last
        self.sequences: dict[GatedLearners, Tensor] = {}  # which of the batch each of these tokens is of
        self.mask: Any = None
        for term in self.terms_:
            self.hang(watch(term, _Inputs(term, self)))
        self.hang(watch_before(model, _Mask(self.terms_[0], self)))
        self.open(1)

    def prepare(self, step: int) -> None:
        for term in self.terms_:
            term.runs = "drawn" if step > self.until else "all"
        self._forget()

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        if step <= self.until:  # what gates are taught must not move
            for term in self.terms_:
                term.A.grad = term.B.grad = None

    def after_step(self, model: nn.Module, step: int) -> None:
        super().after_step(model, step)
        if step == self.steps and abs(self.share - self.target) > _NEAR:
            warnings.warn(
                f"The last batch ran {self.share:.2f} of the learners and the target is {self.target:g}: train longer, "
                f"or raise weight above {self.weight:g}.",
                stacklevel=2,
            )

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.seen:
            return None
        found = self._taught() if self.step <= self.until else self._kept_to_budget()
        self._forget()
        return found

    def _forget(self) -> None:
        self.seen.clear()
        self.sequences.clear()

    def _taught(self) -> Tensor:
        losses = []
        for term, x in self.seen.items():
            x = x.detach()
            with torch.no_grad():
                needed = (term.lacking(x.float()) <= self.tolerance).int().argmax(-1)  # the first that does
            losses.append(F.cross_entropy(term.gate(x).float(), needed))
        return torch.stack(losses).mean()

    def _kept_to_budget(self) -> Tensor:
        gates = {term: term.gate(x).float().softmax(-1) for term, x in self.seen.items()}
        spread = [_entropy(p.mean(0)) for p in gates.values()]
        share = share_run(gates)
        self.share, cost = float(share.detach()), self.weight * (share - self.target).abs()
        return cost - self.entropy * torch.stack(spread).mean() - self.diversity * self._apart(gates)

    def _apart(self, gates: dict[GatedLearners, Tensor]) -> Tensor:
        """How far the sequences of the batch are from running equally many learners."""
        means = []
        for term, which in self.sequences.items():
            p = gates[term]
            effort = at_least(p).sum(-1) / p.shape[-1]
            counts = which.bincount()
            means.append(effort.new_zeros(len(counts)).index_add(0, which, effort) / counts.clamp(min=1))
        if not means:
            return torch.zeros(())
        mean = torch.stack(means).mean(0)
        return 2 * (mean.unsqueeze(0) - mean.unsqueeze(1)).abs().mean()


class _Mask:
    """A pre-hook of the model: which tokens count in the pass to come."""

    def __init__(self, term: GatedLearners, rule: GatePhases) -> None:
        self.term, self.rule = term, rule

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rule.mask = kwargs.get("attention_mask")


class _Inputs:
    """A hook of a term: the tokens that it saw in training."""

    def __init__(self, term: GatedLearners, rule: GatePhases) -> None:
        self.term, self.rule = term, rule

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        x, mask = args[0], self.rule.mask
        fits = isinstance(mask, Tensor) and mask.shape == x.shape[:-1]
        kept = mask.bool() if fits else torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        self.rule.seen[self.term] = x[kept]
        if kept.dim() > 1:  # what is routed to an expert is no sequence
            self.rule.sequences[self.term] = kept.nonzero()[:, 0]


def share_run(gates: dict[GatedLearners, Tensor]) -> Tensor:
    """The mean share of the learners that run, of gates (tokens, N + 1), each layer by the numbers of its factors."""
    sizes = [term.A.numel() + term.B.numel() for term in gates]
    shares = [at_least(p).mean() * size for p, size in zip(gates.values(), sizes, strict=True)]
    return torch.stack(shares).sum() / sum(sizes)


def _entropy(p: Tensor) -> Tensor:
    """Of p (n,), over log n."""
    return -(p * p.clamp(min=1e-12).log()).sum() / torch.log(torch.tensor(float(len(p)), device=p.device))
