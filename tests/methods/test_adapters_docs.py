"""The table of formats in docs/adapters.md tells what the code does, for every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from weft.io.peft import why_not_peft
from weft.methods import METHODS
from weft.terms.adapters import find_adapter
from weft.testing_adapters import adapted, tiny_gpt2

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
TABLE = PAGE[PAGE.index("| method | PEFT's files |") :].split("\n\n")[0]
ROWS = {
    name: cells[1]
    for line in TABLE.splitlines()[2:]
    for cells in [line.strip("| ").split(" | ")]
    for name in re.findall(r"`([\w.-]+)`", cells[0])
}
ADAPTERS = [name for name, method in METHODS.items() if method.kind == "adapt"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_table_is_true(name: str) -> None:
    assert name in ROWS, f"docs/adapters.md has no row that says in which format {name} is written"
    options = {"biases": False} if name == "soma" else {}
    reason = why_not_peft(find_adapter(adapted(METHODS[name], tiny_gpt2, **options)))
    assert ROWS[name].startswith("yes" if reason is None else "no"), reason


def test_the_table_has_no_strangers() -> None:
    assert set(ROWS) == set(ADAPTERS)
