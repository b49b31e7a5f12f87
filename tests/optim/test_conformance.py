"""Every registered optimizer passes the shipped suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.optim import OPTIMIZERS, Optimizer
from weft.testing_optim import PROPERTIES, check_optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("property_", [p for p in PROPERTIES if p != "verbs"])
def test_it_conforms(name: str, property_: str) -> None:
    check_optimizer(name, property_)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_verbs_take_it_or_say_why_not(name: str) -> None:
    check_optimizer(name, "verbs")


class Broken(torch.optim.SGD):
    """Doubles gradients, moves what is frozen, and forgets its state."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(2)
                else:
                    p.data.add_(1)
        return super().step(closure)

    def state_dict(self) -> Any:
        return super().state_dict() | {"state": {}}


def broken(model: torch.nn.Module, lr: float = 1e-1, **options: Any) -> Broken:
    return Broken(model.parameters(), lr, momentum=0.9)


@pytest.mark.parametrize("property_", ["resumes", "gradients", "frozen"])
def test_the_suite_finds_what_is_wrong(property_: str) -> None:
    record = Optimizer(name=f"broken-{property_}", kind="optimizer", summary="", paper="", make=broken)
    check_optimizer(record, "descends")
    with pytest.raises(AssertionError, match=f"broken-{property_} fails '{property_}'"):
        check_optimizer(record, property_)
