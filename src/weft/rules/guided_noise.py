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
from weft.rules.sharded import whole
from weft.terms import LowRank, SumLinear
from weft.terms.adapters import base_terms, find_adapter, unwrapped

__all__ = ["GuidedNoise", "RowNoise", "product_row_norms"]


class RowNoise:
    """A forward hook of an adapted layer: y_i <- y_i + z_i ||x|| / sqrt(out) N(0, 1) in training mode, with a draw for
    each token and row.

    It is the law of (E x)_i for E_ij = z_i N(0, 1) / sqrt(out), for each token alone: no out x in matrix is drawn, and
    tokens are independent, where one E for all of them would correlate tokens by x_s . x_t. The noise is a constant for
    backward. It is drawn from torch's generator of the device, as dropout is, which activation checkpointing puts back
    before it computes again.

    Args:
        adapter: the noise is silent where the adapter of this name is not in use.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.scale: Tensor | None = None  # z (out,)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        assert isinstance(module, SumLinear)
        if not module.training or self.scale is None or self.adapter not in module.terms:
            return None
        with torch.no_grad():
            size = torch.linalg.vector_norm(args[0], dim=-1, keepdim=True, dtype=torch.float32)
            spread = size * (self.scale / self.scale.numel() ** 0.5)
            noise = (torch.randn_like(spread) * spread).to(output.dtype)
        return output + noise


class GuidedNoise(Rule):
    """z_i = sigma n_i + beta q_i^2 for each row i of an adapted weight (Chang et al., 2025, arXiv 2502.14538).

        n_i = sqrt(w0^2 + ||(s B A)_i||^2),  w0: mean row norm of the frozen weight
        q_i = ||(s (B dA + dB A))_i||, of the gradients of the step before

    Row norms come from r x r products; nothing of size out x in is made.

    Args:
        adapter: its name; its terms are LowRank.
        sigma, beta: the weights of both.
    """

    def __init__(self, adapter: str, *, sigma: float, beta: float) -> None:
        self.adapter, self.sigma, self.beta = adapter, sigma, beta

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        found = find_adapter(model, self.adapter)
        self.terms = [term for term in found.all_terms() if isinstance(term, LowRank)]
        self.hooks = [RowNoise(self.adapter) for _ in self.terms]
        for layer, hook in zip(found.terms, self.hooks, strict=True):
            watch(unwrapped(model).get_submodule(layer), hook)
        self.size = [_mean_row_norm(model, layer) for layer in found.terms]
        self.slope = [torch.zeros(term.out_features, device=term.A.device) for term in self.terms]
        self._scale()

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for i, term in enumerate(self.terms):
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
        for term, hook, size, slope in zip(self.terms, self.hooks, self.size, self.slope, strict=True):
            added = term.scale * product_row_norms(whole(term.B).float(), whole(term.A).float())
            hook.scale = self.sigma * (size.square() + added.square()).sqrt() + self.beta * slope.square()


def product_row_norms(B: Tensor, A: Tensor) -> Tensor:
    """||(B A)_i|| (out,) for B (out, r), A (r, in), by the r x r Gram matrix of A."""
    return ((B @ (A @ A.mT)) * B).sum(1).clamp(min=0).sqrt()


def _mean_row_norm(model: nn.Module, layer: str) -> Tensor:
    """w0 of the frozen terms of a layer, a scalar in fp32."""
    first, *rest = (whole(term.dense()).float() for term in base_terms(model, layer).values())
    return torch.linalg.vector_norm(sum(rest, start=first), dim=1).mean()
