"""The registry is whole: every page is listed, every name stands on its page alone, and one list knows all kinds."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

import weft
from weft import optim
from weft.cli import app
from weft.errors import WeftError
from weft.methods import METHODS
from weft.optim import OPTIMIZERS
from weft.records import ROOMS, Record, find, tables

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "weft"

# files of the rooms that are no pages: contracts and what several pages share
SHARED = {
    "methods": {"base", "adapter", "combined"},
    "grafts": {"attention", "base", "lst_start"},
    "merging": {"base"},
    "scaling": {"base", "fit"},
    "measures": {"base"},
    "allocate": {"allocation", "base", "greedy", "integer_program", "search"},
}


def records_in(module: object) -> Iterator[Record]:
    for value in vars(module).values():
        yield from (item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Record))


def test_every_page_is_in_its_room_s_table() -> None:
    listed = {id(record) for table in tables() for record in table.values()}
    for room, shared in SHARED.items():
        for file in sorted((SOURCE / room).glob("*.py")):
            if file.stem in shared | {"__init__"}:
                continue
            found = list(records_in(importlib.import_module(f"weft.{room}.{file.stem}")))
            assert found, f"{room}/{file.name} has no record: is it a page?"
            assert all(id(record) in listed for record in found), f"{room}/{file.name} is not in the list"
    assert all((SOURCE / room / f"{name}.py").is_file() for room, names in SHARED.items() for name in names)


def test_every_published_optimizer_is_listed() -> None:
    """What weft.optim exports with a source in its docstring is what a name stands for."""
    published = {
        name
        for name in optim.__all__
        if inspect.isfunction(made := getattr(optim, name)) and re.search(r"^Source", inspect.getdoc(made) or "", re.M)
    }
    made = [value for item in OPTIMIZERS.values() for value in [item, *getattr(item, "__dict__", {}).values()]]
    assert published and {name for name in published if getattr(optim, name) not in made} == set()


def test_weft_methods_lists_everything() -> None:
    result = CliRunner().invoke(app, ["methods", "--json"])
    listed = json.loads(result.stdout)
    assert listed == json.loads(json.dumps(weft.methods()))  # type: ignore[operator]
    assert sorted((r["name"], r["kind"]) for r in listed) == sorted(
        (record.name, record.kind) for table in tables() for record in table.values()
    )
    assert all(r["name"] and r["kind"] and r["summary"] and r["paper"] for r in listed)
    kinds = [r["kind"] for r in listed]
    assert len(set(kinds)) == 1 + sum(a != b for a, b in itertools.pairwise(kinds)), "kinds are mixed up"
    words = CliRunner().invoke(app, ["methods"]).stdout
    assert all(re.search(rf"^{kind}\s*$", words, re.M) for kind in kinds) and all(r["name"] in words for r in listed)


def test_everything_is_on_the_page_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    names = [record.name for table in tables() for record in table.values()]
    missing = [name for name in set(names) if text.count(f"\n### {name}\n") != names.count(name)]
    assert not missing, f"run python docs/generate.py for {missing}"


def test_every_room_of_the_registry_has_a_table() -> None:
    assert {type(next(iter(table.values()))).__module__.rpartition(".")[0] for table in tables()} <= set(ROOMS)


# file -> names of records that stand in it as literals, and why they may
MAY_NAME: dict[str, set[str]] = {
    "io/formats/gguf_lora.py": {"lora"},  # the sort of adapter that the file holds
    "io/peft.py": {"lora", "dora"},  # PEFT's own words
    "io/peft_config.py": {"pissa", "olora", "corda", "eva"},  # PEFT's own words
    "io/cards.py": {"lora"},  # a tag of the Hub
    "kernels/normal_float.py": {"nf4"},  # a table of levels
    "methods/loldu.py": {"uniform"},  # a law of random numbers
    "methods/randlora.py": {"uniform"},  # a law of random numbers
    "methods/soka.py": {"energy"},  # a way to choose components
    "methods/svfit.py": {"energy"},  # a way to choose components
    "methods/trp.py": {"energy"},  # the share that a truncation keeps
    "rules/gradient_flow.py": {"linear"},  # a way to fade out
    "optim/inner.py": {"galore"},  # a form of Adam's correction
    "optim/presets.py": {"svd", "sign", "adamw"},  # a projection, a residual and an inner rule
    "testing_optim.py": {"full"},  # what optimizers are tried with
    "testing_splitters.py": {"nf2"},  # what compensations are tried on
    "terms/dense_sparse.py": {"atoms"},  # the dense columns of a dictionary
    "terms/random_store.py": {"uniform"},  # a law of random numbers
    "train/recipe.py": {"linear"},  # a schedule
    "verbs/demo.py": {"kfac-svd", "best", "welore", "svd", "uniform", "svd-llm"},  # what the demonstration shows
    "verbs/export.py": {"lora"},  # what PEFT's files call a product of two factors
    "verbs/plan.py": {"adamw"},  # what pre-training steps by
    "verbs/plan_jobs.py": {
        *("full", "lora", "dora", "lora-xs", "int8", "nf4", "nf3", "rtn", "adamw", "galore", "apollo", "muon"),
        *("low-rank", "sltrain", "cola", "svd", "svd-llm", "kfac-svd", "modegpt"),
    },  # what is planned where nothing is named
    "verbs/prospects.py": {"svd", "kfac-svd", "rtn"},  # whose ranks and widths are offered where nothing is named
    "verbs/pretrain.py": {"low-rank"},  # what --low-rank is
    "verbs/quantize.py": {"nf", "nf4"},  # the codes of a number of bits, and those of none given
}


WORDS = {"auto", "scale"}
"""Names that are other things too: a dtype and a device, and what a factor is called in many places."""


def test_no_name_stands_outside_its_page() -> None:
    """A string comparison on a method's name is a field that the record lacks. Defaults of verbs are exempt, and a
    page's own allocation.
    """
    names = {record.name for table in tables() for record in table.values()} - WORDS
    found: dict[str, set[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        own, exempt = _declared(tree), _exempt(tree, file.relative_to(SOURCE).parts[0] in ("verbs", "cli"))
        literals = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt
        }
        if literals & names - own:
            found[str(file.relative_to(SOURCE))] = literals & names - own
    assert found == MAY_NAME


def _declared(tree: ast.Module) -> set[str]:
    """The names that the file's own records bear, or a term's kind."""
    keywords = (k.value for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "name")
    kinds = (n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "kind")
    calls = (
        n.args[1]
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "optimizer" and len(n.args) > 1
    )
    made = (n.args[0] for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "_method")
    constants = [*keywords, *kinds, *calls, *made]
    return {node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _exempt(tree: ast.Module, verb: bool) -> set[int]:
    """Exports, allocations that a record names, and, in a verb, defaults of arguments."""
    nodes: list[ast.AST] = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allocate":
            nodes.append(node.value)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "allocate" and node.value:
            nodes.append(node.value)
        if verb and isinstance(node, ast.FunctionDef):
            nodes += [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
        if verb and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT":
            nodes.append(node.value)
    return {id(constant) for node in nodes for constant in ast.walk(node)}


def test_a_name_that_is_nothing_is_answered_with_the_nearest() -> None:
    with pytest.raises(WeftError, match="There is no method to adapt or graft called 'lsd'; the nearest are: .*lst"):
        find("lsd", "adapt", "graft")
    with pytest.raises(WeftError, match="There is no method to adapt or graft called 'svd'"):
        weft.adapt(nn.Module(), "svd")


def test_every_option_refuses_a_value_of_another_sort() -> None:
    """A word for a number, or a number below zero for one above, would be a traceback in a method's arithmetic."""
    tried = 0
    for record in (record for table in tables() for record in table.values()):
        assert record.options(record.defaults) == {**record.defaults}, "its own defaults are refused"
        for key, default in record.defaults.items():
            number = isinstance(default, int | float) and not isinstance(default, bool)
            strange = ["abc", True, float("nan"), [1]] if number else ["yes"] if isinstance(default, bool) else []
            strange += [-1] if number and default > 0 else []
            strange += [0.5] if isinstance(default, int) and number else [5] if isinstance(default, str) else []
            for value in strange:
                tried += 1
                with pytest.raises(WeftError, match=f"The option {key} of .* is .*: give "):
                    record.options({key: value})
    assert tried > 500
    assert METHODS["gptq"].options({"group": 32.0, "symmetric": 1}) == {
        **METHODS["gptq"].defaults,
        "group": 32,
        "symmetric": 1,
    }
    assert type(METHODS["gptq"].options({"group": 32.0})["group"]) is int
    assert METHODS["sltrain"].options({"alpha": 16, "density": None})["density"] is None


def test_an_option_below_its_least_is_refused_before_any_work() -> None:
    """Divisions by zero after calibration, no size at all, or another number in its place without a word."""
    wrong = [
        ("dsformer", "steps", 0), ("modegpt", "steps", 1), ("lrp-pruning", "steps", 1), ("jlcm", "groups", 0),
        ("baq", "theta", 0), ("baq", "theta", 0.01), ("acm", "hidden", 0), ("lora-sb", "warmup", 0), ("nf", "block", 0),
        ("nf4", "scale_block", 0), ("lq-lora", "bits", 0), ("lq-lora", "block", 0), ("compacter", "n", 0),
    ]  # fmt: skip
    for name, key, value in wrong:
        with pytest.raises(WeftError, match=f"The option {key} of '{name}' is {value}: give .* or more"):
            METHODS[name].options({key: value})
    for record in (record for table in tables() for record in table.values()):
        assert all(record.defaults[key] is None or record.defaults[key] >= least for key, least in record.least.items())
