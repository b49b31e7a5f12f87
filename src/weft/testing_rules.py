"""The conformance suite of rules: what a rule owes to training, on an adapter's terms and on a model's own.

    from weft.testing_rules import check_method_rules, check_rule
    check_method_rules(METHOD)                        # the rules that a method's record names, in both scopes
    check_rule(MyRule, lambda: (model(), terms))      # one rule, on any terms of fresh models

acts        with all defaults, a run of 40 or 200 steps is another than without the rule
resumes     a run that is interrupted and goes on has the tensors of one that was not
half        on terms in bf16, dtypes stay and everything is finite
foreign     nothing outside the scope changes, nor its gradient
closes      a run that ends early leaves no hook of the rule on the model
refuses     started where there is nothing that it works on, it says so
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.methods import METHODS, Method
from weft.rules import Rule, Rules, make_rules
from weft.rules.replicated import Replicated
from weft.rules.scope import Terms
from weft.terms import LowRank, SumLinear, Term
from weft.terms.adapters import find_adapter
from weft.terms.layers import bias_of, linear_layers, replace
from weft.testing_adapters import RANK, adapted, task, tiny_llama

__all__ = ["PROPERTIES", "check_method_rules", "check_rule", "hooks_of", "on_adapter", "own_model"]

Start = Callable[[], tuple[nn.Module, Terms]]
"""A fresh model and the terms of it that a rule is started on."""

SILENT = (Replicated,)
"""What acts between processes alone, and on one does nothing by design."""


def check_method_rules(method: Method | str, *properties: str) -> None:
    """Run the suite on the rules of a method, on an adapter of it and on a model whose own terms are of its kind.

    Raises AssertionError naming the scope and the first property that fails.
    """
    found = METHODS[method] if isinstance(method, str) else method
    settings = {"rank": RANK, "seed": 0, **found.defaults}
    scopes: dict[str, Callable[[Method], tuple[nn.Module, Terms]]] = {"adapter": on_adapter, "own": own_model}
    for scope, begin in scopes.items():
        ranks = dict.fromkeys(begin(found)[1], RANK)

        def make(ranks: Mapping[str, int] = ranks) -> Rule:
            return Rules(make_rules(found.rules, settings | {"ranks": ranks}))

        def start(begin: Callable[[Method], tuple[nn.Module, Terms]] = begin) -> tuple[nn.Module, Terms]:
            return begin(found)

        check_rule(make, start, *properties, name=f"{found.name} ({scope})")


def check_rule(make: Callable[[], Rule], start: Start, *properties: str, name: str = "the rule") -> None:
    """Run the suite on a rule, freshly made and started on fresh terms each time."""
    for property_ in properties or PROPERTIES:
        try:
            PROPERTIES[property_](make, start)
        except AssertionError as error:
            raise AssertionError(f"{name} fails {property_!r}: {error}") from error


def on_adapter(method: Method) -> tuple[nn.Module, Terms]:
    """A tiny model with an adapter, and the adapter's terms."""
    model = adapted(method)
    return model, find_adapter(model).terms


def own_model(method: Method) -> tuple[nn.Module, Terms]:
    """The same terms as a part of the model itself, beside its frozen weights: no adapter is on it."""
    model, terms = on_adapter(method)
    plain = tiny_llama()
    plain.requires_grad_(False)
    mine = copy.deepcopy({layer: dict(named) for layer, named in terms.items()})
    for layer, module in linear_layers(model).items():
        if layer in mine and isinstance(module, SumLinear):
            others = {key: copy.deepcopy(term) for key, term in module.terms.items() if key not in mine[layer]}
            whole = SumLinear({**others, **mine[layer]}, bias_of(module))  # type: ignore[dict-item]
            replace(plain, layer, whole)
    return plain, mine


def _trained(terms: Terms) -> list[nn.Parameter]:
    found = (p for named in terms.values() for term in named.values() for p in term.parameters() if p.requires_grad)
    return list({id(p): p for p in found}.values())


def _run(
    rule: Rule | None, model: nn.Module, terms: Terms, steps: range, of: int, state: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Steps of a run of `of`, by AdamW; the states of both."""
    *_, states = _stepping(rule, model, terms, steps, of, state)
    return states


def _stepping(
    rule: Rule | None, model: nn.Module, terms: Terms, steps: range, of: int, state: Any = None
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The states of both after each step."""
    optimizer, rule = torch.optim.AdamW(_trained(terms), lr=5e-3, weight_decay=0.0), rule or Rules([])
    rule.bind(optimizer)
    rule.start(model, terms, steps=of)
    if state is not None:
        optimizer.load_state_dict(state[0])
        rule.load_state_dict(state[1])
    model.train()
    for step in steps:
        torch.manual_seed(step)
        rule.update(model, optimizer, model(**task()[step % len(task())]).loss, step)
        yield optimizer.state_dict(), rule.state_dict()


def _own(terms: Terms) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}.{key}": tensor.detach().clone()
        for layer, named in terms.items()
        for name, term in named.items()
        for key, tensor in term.state_dict().items()
    }


def _acts(make: Callable[[], Rule], start: Start) -> None:
    rule = make()
    parts = rule.rules if isinstance(rule, Rules) else (rule,)
    if all(isinstance(part, SILENT) for part in parts):
        return
    for steps in (40, 200):
        model, terms = start()
        other, same = start()
        runs = (range(1, steps + 1), steps)
        both = zip(_stepping(make(), model, terms, *runs), _stepping(None, other, same, *runs), strict=True)
        acted = any(_differ(_own(terms), _own(same)) for _ in both)
        assert acted, f"a run of {steps} steps is the same with and without it"


def _differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """By more than products of other bits, which operands at other places in memory may have."""
    pairs = ((tensor, second[key]) for key, tensor in first.items())
    return any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


def _resumes(make: Callable[[], Rule], start: Start) -> None:
    model, terms = start()
    _run(make(), model, terms, range(1, 9), 40)
    half, its = start()
    state = copy.deepcopy(_run(make(), half, its, range(1, 5), 40))
    _run(make(), half, its, range(5, 9), 40, state)
    whole, resumed = _own(terms), _own(its)
    for key, tensor in whole.items():
        close = tensor.shape == resumed[key].shape and torch.allclose(tensor, resumed[key], rtol=1e-4, atol=1e-5)
        assert close, f"{key} differs after an interruption"


def _half(make: Callable[[], Rule], start: Start) -> None:
    model, terms = start()
    model.bfloat16()
    _run(make(), model, terms, range(1, 4), 40)
    for key, tensor in _own(terms).items():
        assert tensor.isfinite().all() if tensor.is_floating_point() else True, f"{key} is not finite"
        assert not tensor.is_floating_point() or tensor.dtype == torch.bfloat16, f"{key} has become {tensor.dtype}"


def _foreign(make: Callable[[], Rule], start: Start) -> None:
    model, terms = start()
    rule, mine = make(), {id(p) for p in _trained(terms)}
    optimizer = torch.optim.SGD(_trained(terms), lr=0.1)
    rule.bind(optimizer)
    rule.start(model, terms, steps=40)
    others = {name: p for name, p in model.named_parameters() if id(p) not in mine and ".terms." not in name}
    assert others, "the model has nothing beside the scope"
    before = {name: p.detach().clone() for name, p in others.items()}
    for step in range(1, 9):
        for parameter in others.values():
            parameter.grad = torch.ones_like(parameter)
        for parameter in _trained(terms):
            parameter.grad = torch.full_like(parameter, 1e-3)
        rule.before_step(model, step)
        rule.after_step(model, step)
    for name, parameter in others.items():
        assert torch.equal(parameter, before[name]), f"{name}, outside of its scope, has moved"
        assert parameter.grad is not None and bool((parameter.grad == 1).all()), f"the gradient of {name} has changed"


def hooks_of(model: nn.Module) -> dict[str, int]:
    """How many hooks each module and parameter has."""
    kinds = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    kinds += ["_post_accumulate_grad_hooks"]
    parts = [*model.named_modules(), *model.named_parameters()]
    counts = {name: sum(len(getattr(part, kind, None) or ()) for kind in kinds) for name, part in parts}
    return {name: count for name, count in counts.items() if count}


def _closes(make: Callable[[], Rule], start: Start) -> None:
    model, terms = start()
    rule, before = make(), hooks_of(model)
    _run(rule, model, terms, range(1, 3), 40)
    rule.close()
    assert hooks_of(model) == before, f"hooks are left: {hooks_of(model)} instead of {before}"


def _refuses(make: Callable[[], Rule], start: Start) -> None:
    rule = make()
    parts = rule.rules if isinstance(rule, Rules) else (rule,)
    for part in parts:
        if not part.works_on:
            continue
        none: dict[str, dict[str, Term]] = {"layer": {"dense": LowRank(4, 4, 1)}}
        none["layer"]["dense"].requires_grad_(False)
        try:
            part.bind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
            part.start(nn.Identity(), none, steps=40)
        except WeftError as error:
            assert "works on trained" in str(error), f"it is refused by another sentence: {error}"
        else:
            raise AssertionError(f"{type(part).__name__} starts where there is nothing that it works on")


PROPERTIES: dict[str, Callable[[Callable[[], Rule], Start], None]] = {
    "acts": _acts,
    "resumes": _resumes,
    "half": _half,
    "foreign": _foreign,
    "closes": _closes,
    "refuses": _refuses,
}
"""Property -> check."""
