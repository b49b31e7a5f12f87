"""Every method that makes fresh layers has every property of the conformance suite, or a sentence saying why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft.methods import METHODS
from weft.testing_pretrain import PROPERTIES, check_structure

STRUCTURES = [name for name, method in METHODS.items() if method.kind == "pretrain"]


@pytest.mark.parametrize("prop", PROPERTIES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_property(name: str, prop: str) -> None:
    if prop in METHODS[name].exempt:
        pytest.skip(METHODS[name].exempt[prop])
    check_structure(name, prop)


def test_the_suite_takes_a_record_and_says_what_does_not_hold() -> None:
    wrong = replace(METHODS["low-rank"], name="wrong", count=lambda out, inn, rank, options: 1)
    with pytest.raises(AssertionError, match=r"wrong: the property 'count' does not hold: .*, 1 are said"):
        check_structure(wrong, "count")
