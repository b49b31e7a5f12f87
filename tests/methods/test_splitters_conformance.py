"""Every method that splits weights has every property of the conformance suite, or a sentence saying why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weft.methods import METHODS
from weft.testing_splitters import PROPERTIES, check_splitter

SPLITTERS = [name for name, method in METHODS.items() if method.kind in ("compress", "quantize", "compensate")]

BRIEF = {"saliency-apiq": {"steps": 5}, "jlcm": {"steps": 5}, "signround": {"steps": 5}}
"""Defaults that would take long, and that no property depends on."""


@pytest.mark.parametrize("prop", PROPERTIES)
@pytest.mark.parametrize("name", SPLITTERS)
def test_property(name: str, prop: str) -> None:
    method = METHODS[name]
    if name in BRIEF:
        method = replace(method, name=f"brief-{name}", defaults={**method.defaults, **BRIEF[name]})
    if prop in method.exempt:
        pytest.skip(method.exempt[prop])
    PROPERTIES[prop](method)


def test_the_suite_takes_a_record_and_says_what_does_not_hold() -> None:
    dear = replace(METHODS["int8"], name="dear", sizes=lambda shape, options: [(8, 1)])
    with pytest.raises(AssertionError, match=r"dear: the property 'sizes' does not hold: size 8 says 1 bytes"):
        check_splitter(dear)
