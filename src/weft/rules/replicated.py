"""Replicated: parameters that several layers share, trained whole on every process (Compacter, MoS, SAID)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from weft.rules.base import Rule
from weft.terms.adapters import find_adapter

__all__ = ["Replicated", "shared_parameters"]


class Replicated(Rule):
    """Gives a shared parameter the mean gradient of all processes before each step.

    FSDP2 refuses a parameter that lies in two blocks wrapped one by one. Wrapped with
    `fully_shard(block, ignored_params=set(shared_parameters(model)))` it stays whole, and nobody reduces its gradient:
    this rule does. On one process, and where the parameter is sharded, it does nothing; under DDP, which has averaged
    the gradient already, the mean of equal numbers changes nothing.
    """

    def begin(self, model: nn.Module) -> None:
        self.shared = _shared(term for _, term in self.all_terms())

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        if not dist.is_initialized():
            return
        for parameter in self.shared:
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def shared_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """The parameters of an adapter (None: the only one) that more than one of its terms holds, each once."""
    return _shared(find_adapter(model, adapter).all_terms())


def _shared(terms: Iterable[nn.Module]) -> list[nn.Parameter]:
    held = [p for term in terms for p in set(term.parameters()) if p.requires_grad]
    counts = Counter(map(id, held))
    return list({id(p): p for p in held if counts[id(p)] > 1}.values())
