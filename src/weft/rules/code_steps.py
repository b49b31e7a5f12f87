"""CodeSteps: integer codes that are trained, a few of them at a time and by enough to matter (PV-Tuning, Malinovskii et
al., 2024, arXiv 2405.14852).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rules.base import Rule, State
from weft.terms import TunedCode

__all__ = ["CodeSteps"]

_EPS = 1e-6


class CodeSteps(Rule):
    """One step of values and codes of trained `TunedCode` terms, from one gradient G = dL/dW (out, in):

        P         the gradient of a scale is sum G (code - zero) over its group; the optimizer steps it
        moment    v <- beta v + (1 - beta) G^2,   u = G / (sqrt(v) + eps)
        target    D - code_lr sqrt(1 - beta^t) |D| / |u| u
        V         the share `tau` of all weights with the largest |target - W| takes the nearest codes, no others
        unspent   D <- target + decay (W - target), from W at first

    decay 1 forgets what was not spent, the method; 0 accumulates it, which with tau = 1 is straight-through training.
    The optimizer does not step W, which follows its codes and scales.

    Args:
        trust: from the farthest target on, codes change until the norm of what has changed of W is above this share
            of |W|; None for no limit.
    """

    works_on = (TunedCode,)
    uncounted = "a second moment of each weight"

    def __init__(self, code_lr: float, tau: float, decay: float, trust: float | None, beta: float) -> None:
        if code_lr <= 0 or not 0 <= tau <= 1 or not 0 <= decay <= 1 or not 0 <= beta < 1:
            raise WeftError(
                f"code_lr is {code_lr}, tau {tau}, decay {decay} and beta {beta}: give a rate above 0, two shares "
                "from 0 to 1, and a decay of moments from 0, below 1."
            )
        if trust is not None and trust <= 0:
            raise WeftError(f"trust is {trust}: give a share of the weight's norm above 0, or null for no limit.")
        self.code_lr, self.tau, self.decay, self.trust, self.beta = code_lr, tau, decay, trust, beta

    def begin(self, model: nn.Module) -> None:
        self.codes = [term for _, term in self.found(TunedCode)]
        self.seconds = [torch.zeros_like(term.scales.new_empty(term.W.shape)) for term in self.codes]
        self.unspent = [] if self.decay == 1 else [term.value() for term in self.codes]
        self.pulls: list[Tensor | None] = []
        self.changed = 0

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        self.pulls = [term.W.grad for term in self.codes]
        for term, G in zip(self.codes, self.pulls, strict=True):
            term.W.grad = None  # so that the optimizer leaves it
            if G is not None:
                term.scales.grad = term.scale_gradient(G)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for i, (term, G) in enumerate(zip(self.codes, self.pulls, strict=True)):
            if G is None:
                continue
            D = term.W.to(term.scales.dtype) if self.decay == 1 else self.unspent[i]
            target = D - self._update(i, G.to(D.dtype), D, step)
            term.scales.clamp_(min=0)
            self._encode(term, target)
            term.decode()
            if self.decay < 1:
                self.unspent[i] = torch.lerp(target, term.value(), self.decay)
        self.pulls = []
        if step == self.steps and not self.changed and self.tau:
            warnings.warn(
                f"No code has changed in {step} steps: targets lie nearer to the old codes than to any other; raise "
                f"code_lr above {self.code_lr:g}.",
                stacklevel=2,
            )

    def _update(self, i: int, G: Tensor, D: Tensor, step: int) -> Tensor:
        v = self.seconds[i].mul_(self.beta).addcmul_(G, G, value=1 - self.beta)
        u = G / (v.sqrt() + _EPS)
        size, length = float(D.norm()), float(u.norm())
        ratio = size / length if size and length else 1.0
        return u * (self.code_lr * math.sqrt(1 - self.beta**step) * ratio)

    def _encode(self, term: TunedCode, target: Tensor) -> None:
        """Give the weights with the farthest targets their nearest codes."""
        W = term.value()
        chosen = (target - W).abs().flatten().topk(math.ceil(self.tau * target.numel())).indices
        nearest, codes = term.nearest(target).flatten(), term.codes.view(-1)
        if self.trust is not None:
            places = nearest[chosen].to(W.dtype) - codes[chosen].to(W.dtype)
            moved = (places * term.spread_scales().flatten()[chosen]).square().cumsum(0).sqrt()
            chosen = chosen[: int((moved <= self.trust * W.norm()).sum()) + 1]  # one beyond, as published
        self.changed += int((codes[chosen] != nearest[chosen]).sum())
        codes[chosen] = nearest[chosen]

    def state_dict(self) -> State:
        named = {f"second_{i}": v for i, v in enumerate(self.seconds)}
        return {**named, **{f"unspent_{i}": D for i, D in enumerate(self.unspent)}, "changed": self.changed}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        self.changed = int(state["changed"])
        for name, own in (("second", self.seconds), ("unspent", self.unspent)):
            for i, tensor in enumerate(own):
                tensor.copy_(torch.as_tensor(state[f"{name}_{i}"]))
