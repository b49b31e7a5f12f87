"""The contract of a rule: what a method does around each training step, beside following gradients.

For step t = 1, 2, ..., N (an optimizer step, whatever the number of micro-batches):

    loss + penalty(model)      differentiated
    before_step(model, t)      the gradients are there, clipped; W is still W_{t-1}
    optimizer                  W_t
    after_step(model, t)       W_t may be changed: a proximal step, a truncation, a projection

A gate, a regulariser, rank sampling or growth, periodic truncation, re-orthonormalisation: each is one rule. A rule
is given the model and finds its terms there; it knows no trainer and no data, and of the optimizer only what `bind`
hands over. Under several processes it runs on each of them on equal weights, and must do the same on each: no
randomness but from a generator seeded by its own arguments and the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Rule", "Rules", "State"]

State = dict[str, Tensor | int | float]
"""What a rule must remember over an interruption, flat: names without dots -> tensors and numbers."""


class Rule:
    """One rule. Every hook does nothing unless it is written."""

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer that will take the steps, told before `start`: for a rule that changes what a parameter's slots
        stand for, since their moments must follow.
        """

    def start(self, model: nn.Module) -> None:
        """Training begins, or goes on (`load_state_dict` then follows). The model is in its place and trainable parts
        are marked.
        """

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar to add to the loss of each step (once a step, not once a micro-batch), or None."""
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Gradients of step `step` (from 1) are in `.grad`."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has updated the weights; gradients are still in `.grad`."""

    def state_dict(self) -> State:
        """Everything that the steps to come depend on and that is not in the model's own tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Take back what `state_dict` gave, exactly."""


class Rules(Rule):
    """Several rules as one: hooks run in the order given, penalties add up, the state of rule i is under the names
    "i.name".
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        for rule in self.rules:
            rule.bind(optimizer)

    def start(self, model: nn.Module) -> None:
        for rule in self.rules:
            rule.start(model)

    def penalty(self, model: nn.Module) -> Tensor | None:
        penalties = [penalty for rule in self.rules if (penalty := rule.penalty(model)) is not None]
        return sum(penalties[1:], start=penalties[0]) if penalties else None

    def before_step(self, model: nn.Module, step: int) -> None:
        for rule in self.rules:
            rule.before_step(model, step)

    def after_step(self, model: nn.Module, step: int) -> None:
        for rule in self.rules:
            rule.after_step(model, step)

    def state_dict(self) -> State:
        return {f"{i}.{name}": value for i, rule in enumerate(self.rules) for name, value in rule.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Raises ValueError when the state is that of another number of rules."""
        parts: list[State] = [{} for _ in self.rules]
        for name, value in state.items():
            place, _, own = name.partition(".")
            if not place.isdigit() or int(place) >= len(parts):
                raise ValueError(f"state {name!r} belongs to none of these {len(parts)} rules")
            parts[int(place)][own] = value
        for rule, part in zip(self.rules, parts, strict=True):
            rule.load_state_dict(part)
