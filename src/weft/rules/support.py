"""Moving the trained entries of a sparse adapter to other places, with their optimizer state (LIFT, arXiv 2506.00772;
SpIEL, arXiv 2401.16405).

An entry that stays keeps its value and its moments bit for bit. One that comes starts from what was settled there, or
from zero, with empty moments of age 0. One that goes either stays in the weight as it is (`settle`), or is back at the
base's value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weft.rules.sharded import sharded_like, whole
from weft.terms import MovingSparse

__all__ = ["agreed", "lookup", "move"]

_PER_ENTRY = ("age", "frozen", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "master")


@torch.no_grad()
def move(term: MovingSparse, positions: Tensor, state: dict[str, Any], *, settle: bool) -> Tensor:
    """Train the entries at flat `positions` (k,) from now on, in any order, as many as before.

    Args:
        state: the optimizer's for `term.values`; its tensors per entry move along. Empty where there is none.
        settle: whether entries that go keep what they learned.

    Returns:
        Which of the term's entries, in their new order, were not trained before: (k,) bool.
    """
    positions = positions.sort().values.to(term.positions.dtype)
    old, values = term.positions.clone(), whole(term.values.detach())
    known, settled = torch.cat([old, term.settled_positions]), torch.cat([values, term.settled])
    order = known.argsort()
    known, everything = known[order], settled[order]
    if settle:
        gone = ~torch.isin(known, positions) & (everything != 0)
        term.settled, term.settled_positions = everything[gone], known[gone]
    for name, held in state.items():
        if name in _PER_ENTRY and isinstance(held, Tensor) and held.shape == term.values.shape:
            held.copy_(sharded_like(lookup(old, whole(held), positions), held))
    term.values.copy_(sharded_like(lookup(known, everything, positions), term.values))
    term.positions = positions
    return ~torch.isin(positions, old)


def lookup(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """values[i] where keys[i] is wanted, 0 where no key is; `keys` rising."""
    place = torch.searchsorted(keys, wanted).clamp(max=max(keys.numel() - 1, 0))
    return torch.where(keys[place] == wanted, values[place], torch.zeros_like(values[place]))


def agreed(choice: Tensor) -> Tensor:
    """The choice of the first process, on all of them: rounding may differ between two machines."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(choice, src=0)
    return choice
