"""The contract of a rule: what a method does around each training step, beside following gradients.

For step t = 1, 2, ..., N (an optimizer step, whatever the number of micro-batches):

    loss + penalty(model)      differentiated
    before_step(model, t)      the gradients are there, clipped; W is still W_{t-1}
    optimizer                  W_t
    after_step(model, t)       W_t may be changed: a proximal step, a truncation, a projection

A gate, a regulariser, rank sampling or growth, periodic truncation, re-orthonormalisation: each is one rule. A rule has
a scope: it is started on the terms that it works on, an adapter's or the model's own, and touches nothing else. It
knows no trainer and no data, and of the optimizer only what `bind` hands over. Under several processes it runs on each
of them on equal weights, and must do the same on each: no randomness but from a generator seeded by its own arguments
and the step.

Schedules follow the run: what is not given in steps is found from its length, and a schedule that the run is too short
for is refused (`weft.rules.schedule`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.errors import WeftError
from weft.rules.scope import Terms, model_terms

__all__ = ["Rule", "Rules", "State", "make_rules"]

State = dict[str, Tensor | int | float]
"""What a rule must remember over an interruption, flat: names without dots -> tensors and numbers."""

Kind = TypeVar("Kind", bound=nn.Module)


class Rule:
    """One rule. An author writes `begin` and the hooks; every hook does nothing unless it is written.

    Attributes:
        scope: the terms that it is started on where `start` is not told of others, as those of an adapter; None for all
            the model's own.
        works_on: the kinds of terms that it can do something with; none for terms of any kind.
        ends: of a rule under which the model becomes what the method promises by the end of the run alone: what comes
            then. Such a run is not cut short, and no earlier model is taken for the best.
        uncounted: of a rule that holds more beside a step than a plan of its memory counts: what that is.
        terms, steps: what it was started on, layer name -> term name -> term, and for how long a run, None where that
            is not known.
    """

    scope: Terms | None = None
    works_on: ClassVar[tuple[type[nn.Module], ...]] = ()
    ends: str = ""
    uncounted: ClassVar[str] = ""
    terms: Terms
    steps: int | None = None
    handles: tuple[RemovableHandle, ...] = ()

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer that will take the steps, told before `start`: for a rule that changes what a parameter's slots
        stand for, since their moments must follow.
        """

    def start(self, model: nn.Module, terms: Terms | None = None, steps: int | None = None) -> None:
        """Training of `steps` steps begins on `terms` (None: its scope), or goes on (`load_state_dict` then follows).
        The model is in its place and trainable parts are marked.

        Raises:
            WeftError: a schedule that these steps are too few for, or that follows the length of a run of unknown
                length; or no term that the rule works on.
        """
        self.close()
        chosen = self.scope if terms is None else terms
        self.terms, self.steps = model_terms(model) if chosen is None else chosen, steps
        self.begin(model)

    def begin(self, model: nn.Module) -> None:
        """Get ready on `self.terms` for `self.steps` steps."""
        self.found(*self.works_on)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar to add to the loss of each step (once a step, not once a micro-batch), or None."""
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Gradients of step `step` (from 1) are in `.grad`."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has updated the weights; gradients are still in `.grad`."""

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
        """Step `step` (from 1) of a loop of one's own, from its loss on: penalty, backward pass, and the optimizer's
        step amid the rule's.
        """
        penalty = self.penalty(model)
        (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
        self.before_step(model, step)
        optimizer.step()
        self.after_step(model, step)
        optimizer.zero_grad()

    def hang(self, *handles: RemovableHandle) -> None:
        """Remember hooks on the model, for `close`."""
        self.handles += handles

    def close(self) -> None:
        """Training is over, to its end or not: take off the model what hangs on it."""
        for handle in self.handles:
            handle.remove()
        self.handles = ()

    def state_dict(self) -> State:
        """Everything that the steps to come depend on and that is not in the model's own tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Take back what `state_dict` gave, exactly."""

    def found(self, *kinds: type[Kind]) -> list[tuple[str, Kind]]:
        """(layer, part) for each trained part of the scope that is of one of these kinds, a term or within one.

        Raises WeftError where kinds are named and nothing is of them: the rule would silently do nothing.
        """
        named = [(layer, name, part) for layer, term in self.all_terms() for name, part in term.named_modules()]
        parts = [
            (layer, part)
            for layer, name, part in named
            if isinstance(part, kinds)
            and name.partition(".")[0] != "inner"
            and any(p.requires_grad for p in part.parameters())
        ]
        if kinds and not parts:
            raise WeftError(
                f"{type(self).__name__} works on trained {' or '.join(k.__name__ for k in kinds)} terms, and there "
                f"are none among the {len(self.all_terms())} that it was started on; choose a method that has them."
            )
        return parts

    def all_terms(self) -> list[tuple[str, nn.Module]]:
        """(layer, term) for each term of the scope, in the order of the layers."""
        return [(layer, term) for layer, terms in self.terms.items() for term in terms.values()]

    def trained(self) -> list[nn.Parameter]:
        """The trainable parameters of the scope, each once; no wrapped base is among them."""
        named = (pair for _, term in self.all_terms() for pair in term.named_parameters())
        return list({id(p): p for name, p in named if p.requires_grad and not name.startswith("inner.")}.values())


class Rules(Rule):
    """Several rules as one: hooks run in the order given, penalties add up, the state of rule i is under the names
    "i.name".
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        for rule in self.rules:
            rule.bind(optimizer)

    def start(self, model: nn.Module, terms: Terms | None = None, steps: int | None = None) -> None:
        for rule in self.rules:
            rule.start(model, terms, steps)

    def penalty(self, model: nn.Module) -> Tensor | None:
        penalties = [penalty for rule in self.rules if (penalty := rule.penalty(model)) is not None]
        return sum(penalties[1:], start=penalties[0]) if penalties else None

    def before_step(self, model: nn.Module, step: int) -> None:
        for rule in self.rules:
            rule.before_step(model, step)

    def after_step(self, model: nn.Module, step: int) -> None:
        for rule in self.rules:
            rule.after_step(model, step)

    def close(self) -> None:
        for rule in self.rules:
            rule.close()

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


def make_rules(
    makers: Iterable[Callable[..., Rule]], settings: Mapping[str, Any], scope: Terms | None = None
) -> list[Rule]:
    """The rules that a method's record names, for a scope: each maker is given those of the settings (the method's
    options; rank, ranks and seed of an adapter) that it names.
    """
    made = []
    for make in makers:
        names = inspect.signature(make).parameters
        made.append(make(**{key: settings[key] for key in names if key in settings}))
        made[-1].scope = scope
    return made
