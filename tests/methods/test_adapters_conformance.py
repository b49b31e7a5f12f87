"""Every registered adapter method has every property of the conformance suite, or a sentence saying why not."""

from __future__ import annotations

import pytest

from weft.methods import METHODS
from weft.testing_adapters import PROPERTIES

ADAPTERS = [name for name, method in METHODS.items() if method.kind == "adapt"]


@pytest.mark.parametrize("prop", PROPERTIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_property(name: str, prop: str) -> None:
    method = METHODS[name]
    if prop in method.exempt:
        pytest.skip(method.exempt[prop])
    PROPERTIES[prop](method)


@pytest.mark.parametrize("name", ADAPTERS)
def test_exemptions_say_why(name: str) -> None:
    exempt = METHODS[name].exempt
    assert exempt.keys() <= {*PROPERTIES, "fsdp2"}
    assert all(len(reason.split()) > 3 and reason.endswith(".") for reason in exempt.values())
