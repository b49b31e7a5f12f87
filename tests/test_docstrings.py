"""Docstrings keep their form: a formula's line is whole, and what deviates from a paper is a paragraph of its own."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "weft"
FILES = sorted(SOURCE.rglob("*.py"))
WIDTH = 120  # of a source line, at which a formatter wraps
HEADING = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example):")
OPEN_END = re.compile(r"([,+*/=<>~-]|\b(and|or|of|the|with|by|to|for|a|an))$")
STATEMENT = re.compile(r"[=~:;<>]|\S {3,}\S")  # an equation, or a row of a table


def docstrings(source: str) -> Iterator[tuple[str, int, str]]:
    """(name, how far it is indented in the file, docstring) of a module and all that is in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                indent = 0 if isinstance(node, ast.Module) else node.col_offset + 4
                yield getattr(node, "name", "module"), indent, text.replace("\n" + " " * indent, "\n").rstrip()


def prose(text: str) -> Iterator[list[str]]:
    """Paragraphs outside sections such as "Args:"."""
    section = False
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if lines and not lines[0].startswith(" "):
            section = False
        if not section:
            heading = next((i for i, line in enumerate(lines) if HEADING.fullmatch(line)), len(lines))
            section = heading < len(lines)
            yield lines[:heading]


def faults(text: str, indent: int = 0) -> list[str]:
    """What is wrong with the form of a docstring, a sentence each."""
    found = []
    for lines in prose(text):
        formula = bool(lines) and lines[0].startswith("    ")
        for i, line in enumerate(lines):
            if re.search(r"\S.*\bDeviations?:", line) or line.lstrip().startswith("Deviation:"):
                found.append(f"does not begin its line with 'Deviations:': {line}")
            if formula:
                found += _formula_faults(line, lines[i + 1] if i + 1 < len(lines) else None, indent)
            elif line.startswith("    "):
                found.append(f"half a paragraph is indented: {line}")
    return found


def _formula_faults(line: str, following: str | None, indent: int) -> Iterator[str]:
    if not line.startswith("    "):
        yield f"a formula ends without an empty line: {line}"
    if len(re.findall(r"[(\[{]", line)) != len(re.findall(r"[)\]}]", line)):  # [0, 1) is an interval
        yield f"brackets do not match: {line}"
    if following is None:
        return
    if OPEN_END.search(line.rstrip()):
        yield f"ends in the middle: {line}"
    full = indent + len(line) + 1 + len(following.split()[0]) > WIDTH
    fragment = not STATEMENT.search(following) or re.match(r"[=+*/-]", following.lstrip())
    if full and fragment:
        yield f"was wrapped: {line} | {following.strip()}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_formula_is_wrapped(file: Path) -> None:
    wrong = [f"{name}: {f}" for name, indent, text in docstrings(file.read_text()) for f in faults(text, indent)]
    assert not wrong, "\n".join(wrong)


WRAPPED = [
    f"Say.\n\n    {'W = W + s B A;   '.ljust(105, 'x')} trainable\n    numbers\n",
    "Say.\n\n    W' = (W + B A\n    + C)\n",
    "Say.\n\n    W' = W +\n    B A = C\n",
    "Say.\n\n    W' = W\nwhere W is.\n",
    "Say.\n\nDeviations: none in the\n    function.\n",
    "Say.\n\nAs published. Deviations: none.\n",
    "Say.\n\nDeviation: one.\n",
]


@pytest.mark.parametrize("text", WRAPPED)
def test_a_broken_docstring_is_seen(text: str) -> None:
    assert faults(text.rstrip())


def test_a_whole_docstring_is_not_blamed() -> None:
    text = """Say.

    x in [0, 1),   y = x
    z = 2 x

    Deviations: none.

    Args:
        x: in
            two lines (of
            words).
    """
    assert faults(inspect.cleandoc(text)) == []


ROOMS = ("methods", "optim", "rules", "merging", "allocate")
MACHINERY = {
    *("methods/adapter.py", "methods/combined.py", "methods/full.py", "rules/hooks.py"),
    *("rules/each_step.py", "rules/replicated.py", "rules/sharded.py", "rules/schedule.py", "rules/scope.py"),
    *("optim/batch.py", "optim/closure.py", "optim/published.py", "optim/record.py"),
    *("optim/distributed.py", "optim/lowrank.py", "optim/parameters.py", "optim/seeds.py", "optim/state.py"),
    "optim/several.py",
    *("allocate/allocation.py", "allocate/equal.py", "allocate/uniform.py"),
    *("allocate/base.py", "allocate/search.py", "allocate/allocation.py", "allocate/equal.py", "allocate/uniform.py"),
}
"""Files that hold no idea of a paper."""
PAGES = [file for file in FILES if file.parent.name in ROOMS and file.name not in ("__init__.py", "base.py")]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_page_names_its_source(file: Path) -> None:
    """A paper, by identifier or year, somewhere in its docstrings, unless the file is machinery."""
    words = " ".join(text for _, _, text in docstrings(file.read_text()))
    cited = re.search(r"arXiv|doi:|openreview|\b(19|20)\d\d\b", words)
    assert cited or file.relative_to(SOURCE).as_posix() in MACHINERY
    assert "weft's own" not in words
