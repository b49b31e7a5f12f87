"""The rules of every registered method pass the shipped suite, on an adapter and on a model's own terms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weft.errors import WeftError
from weft.methods import METHODS
from weft.rules import Rule
from weft.testing_rules import PROPERTIES, check_method_rules, check_rule, on_adapter

# the suite starts a rule on an adapter; those of structures to pre-train in are held by the tests of these methods
RULED = [name for name, method in METHODS.items() if method.rules and method.kind == "adapt"]


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("property_", [p for p in PROPERTIES if p != "acts"])
def test_it_conforms(name: str, property_: str) -> None:
    check_method_rules(name, property_)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RULED if name != "effort"])  # whose losses are off by default
def test_with_all_defaults_it_acts_in_short_runs(name: str) -> None:
    check_method_rules(name, "acts")


class Inert(Rule):
    """Does nothing."""


class Rude(Rule):
    """Moves what is outside its scope, and starts on anything."""

    works_on = (nn.Bilinear,)

    def begin(self, model: nn.Module) -> None:
        return None

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for parameter in model.parameters():
            parameter.mul_(0.99)


@pytest.mark.parametrize(("rule", "property_"), [(Inert, "acts"), (Rude, "foreign"), (Rude, "refuses")])
def test_the_suite_finds_what_is_wrong(rule: type[Rule], property_: str) -> None:
    with pytest.raises(AssertionError, match=f"the rule fails '{property_}'"):
        check_rule(rule, lambda: on_adapter(METHODS["lora"]), property_)


def test_a_rule_without_its_terms_says_so() -> None:
    (make,) = METHODS["kasa"].rules
    with pytest.raises(WeftError, match="SpectralPenalty works on trained Spectral terms"):
        make(beta=1.0, gamma=1.0).start(nn.Linear(2, 2), steps=4)
