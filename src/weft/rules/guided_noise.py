"""GuidedNoise: noise on the adapted weight while training, stronger on rows that are long or have a large gradient
(LoRA-GGPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.rules.base import Rule, State
from weft.rules.hooks import watch
from weft.rules.scope import Terms, beside, in_use
from weft.rules.sharded import whole
from weft.terms import LowRank
from weft.terms.adapters import unwrapped

__all__ = ["GuidedNoise", "RowNoise", "product_row_norms"]


class RowNoise:
    """A forward hook of an adapted layer: y_i <- y_i + z_i ||x|| / sqrt(out) N(0, 1) in training mode, with a draw for
    each token and row.

    It is the law of (E x)_i for E_ij = z_i N(0, 1) / sqrt(out), for each token alone: no out x in matrix is drawn, and
    tokens are independent, where one E for all of them would correlate tokens by x_s . x_t. The noise is a constant for
    backward. It is drawn from torch's generator of the device, as dropout is, which activation checkpointing puts back
    before it computes again.

    Args:
        term: the noise is silent where the layer does not hold this term now.
    """

    def __init__(self, term: LowRank) -> None:
        self.term = term
        self.scale: Tensor | None = None  # z (out,)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not module.training or self.scale is None or not in_use(module, self.term):
            return None
        with torch.no_grad():
            size = torch.linalg.vector_norm(args[0], dim=-1, keepdim=True, dtype=torch.float32)
            spread = size * (self.scale / self.scale.numel() ** 0.5)
            noise = (torch.randn_like(spread) * spread).to(output.dtype)
        return output + noise


class GuidedNoise(Rule):
    """z_i = sigma n_i + beta q_i^2 for each row i of an adapted weight (Chang et al., 2025, arXiv 2502.14538).

        n_i = sqrt(w0^2 + ||(s B A)_i||^2),  w0: mean row norm of the frozen weight beside it, 0 without
        q_i = ||(s (B dA + dB A))_i||, of the gradients of the step before

    Row norms come from r x r products; nothing of size out x in is made.

    Args:
        sigma, beta: the weights of both.
    """

    works_on = (LowRank,)

    def __init__(self, sigma: float, beta: float) -> None:
        self.sigma, self.beta = sigma, beta

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        found = self.found(LowRank)
        self.factors = [term for _, term in found]
        self.hooks = [RowNoise(term) for term in self.factors]
        for (layer, _), hook in zip(found, self.hooks, strict=True):
            self.hang(watch(unwrapped(model).get_submodule(layer), hook))
        self.size = [_mean_row_norm(model, layer, self.terms).to(term.A.device) for layer, term in found]
        self.slope = [torch.zeros(term.out_features, device=term.A.device) for term in self.factors]
        self._scale()

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for i, term in enumerate(self.factors):
            if term.A.grad is not None and term.B.grad is not None:
                B, A, dB, dA = (whole(t).float() for t in (term.B, term.A, term.B.grad, term.A.grad))
                self.slope[i] = term.scale * product_row_norms(torch.cat([B, dB], 1), torch.cat([dA, A]))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        self._scale()

    def state_dict(self) -> State:
        return {f"slope{i}": slope for i, slope in enumerate(self.slope)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        for i, slope in enumerate(self.slope):
            slope.copy_(torch.as_tensor(state[f"slope{i}"]))
        self._scale()

    def _scale(self) -> None:
        for term, hook, size, slope in zip(self.factors, self.hooks, self.size, self.slope, strict=True):
            added = term.scale * product_row_norms(whole(term.B).float(), whole(term.A).float())
            hook.scale = self.sigma * (size.square() + added.square()).sqrt() + self.beta * slope.square()


def product_row_norms(B: Tensor, A: Tensor) -> Tensor:
    """||(B A)_i|| (out,) for B (out, r), A (r, in), by the r x r Gram matrix of A."""
    return ((B @ (A @ A.mT)) * B).sum(1).clamp(min=0).sqrt()


def _mean_row_norm(model: nn.Module, layer: str, terms: Terms) -> Tensor:
    """w0 of what stands beside the terms in a layer, a scalar in fp32."""
    dense = [whole(term.dense()).float() for term in beside(model, layer, terms)]
    return torch.linalg.vector_norm(sum(dense[1:], start=dense[0]), dim=1).mean() if dense else torch.zeros(())
