"""Several rules behave as one, and their state comes back exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weft.rules import Rule, Rules


class Noted(Rule):
    """Writes down its calls."""

    def __init__(self, name, calls, penalty=None):
        self.name, self.calls, self.value, self.memory = name, calls, penalty, {}

    def begin(self, model):
        self.calls.append((self.name, "start", self.steps))

    def penalty(self, model):
        return self.value

    def before_step(self, model, step):
        self.calls.append((self.name, "before", step))

    def after_step(self, model, step):
        self.calls.append((self.name, "after", step))

    def state_dict(self):
        return self.memory

    def load_state_dict(self, state):
        self.memory = dict(state)


def test_hooks_run_in_order_and_penalties_add_up():
    calls, model = [], nn.Linear(1, 1)
    rules = Rules([Noted("a", calls, torch.tensor(2.0)), Noted("b", calls), Noted("c", calls, torch.tensor(3.0))])
    rules.start(model, steps=9)
    rules.before_step(model, 1)
    rules.after_step(model, 1)
    names = ["a", "b", "c"]
    assert calls == [(n, "start", 9) for n in names] + [(n, "before", 1) for n in names] + [
        (n, "after", 1) for n in names
    ]
    assert rules.penalty(model) == 5
    assert Rules([]).penalty(model) is None and Rules([Noted("b", calls)]).penalty(model) is None


def test_state_goes_back_to_the_rule_it_came_from():
    first = Rules([Noted("a", []), Rule(), Noted("c", [])])
    first.rules[0].memory = {"x": torch.arange(3), "n": 4}
    first.rules[2].memory = {"x": 0.1}
    second = Rules([Noted("a", []), Rule(), Noted("c", [])])
    second.load_state_dict(first.state_dict())
    assert second.rules[0].memory["n"] == 4 and torch.equal(second.rules[0].memory["x"], torch.arange(3))
    assert second.rules[2].memory == {"x": 0.1}


def test_state_of_other_rules_is_refused():
    with pytest.raises(ValueError, match="belongs to none of these 1 rules"):
        Rules([Rule()]).load_state_dict({"1.x": 3})
