"""Tied: keeps a parameter that several terms share one parameter, where sharded wrapping has made copies of it."""

from __future__ import annotations

import torch
from torch import nn

from weft.rules.base import Rule
from weft.rules.sharded import sharded_like, whole
from weft.terms.adapters import find_adapter

__all__ = ["Tied"]


class Tied(Rule):
    """Gives every copy of a shared parameter the sum of the copies' gradients before each step.

    FSDP2 wraps block by block and does not see that two blocks hold the same parameter: each keeps its own. Copies that
    start equal and get equal gradients stay equal under any element-wise optimizer. Where there is one parameter, as
    without sharding, nothing is done.

    Args:
        adapter: the name of the adapter.
        name: of the parameter within its terms.
        by: attribute in which terms of one parameter agree and others differ; None where all terms share one.
    """

    def __init__(self, adapter: str, name: str, by: str | None = None) -> None:
        self.adapter, self.name, self.by = adapter, name, by

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        for copies in self._groups(model):
            grads = [whole(copy.grad) for copy in copies if copy.grad is not None]
            if len(copies) < 2 or not grads:
                continue
            total = torch.stack(grads).sum(0)
            for copy in copies:
                copy.grad = sharded_like(total.clone(), copy)

    def _groups(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """The copies of each shared parameter."""
        found: dict[object, dict[int, nn.Parameter]] = {}
        for term in find_adapter(model, self.adapter).all_terms():
            key = getattr(term, self.by) if self.by else None
            parameter = term.get_parameter(self.name)
            found.setdefault(key, {})[id(parameter)] = parameter
        return [list(copies.values()) for copies in found.values()]
