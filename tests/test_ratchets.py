"""Ratchets on shape: arrows between rooms, public names, sizes of files and functions, the weight of an import.

A number here only ever goes down. A failing test is a question about the change, not about the number.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

import pytest

import weft
from weft.verbs.compress import run

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "weft"

# room -> the rooms it may import, itself and `ANYWHERE` aside: the arrows of docs/design.md
ARROWS = {
    "linalg": set(),
    "merging": {"linalg"},
    "scaling": set(),
    "select": set(),
    "measures": {"linalg", "terms", "stats"},
    "kernels": set(),
    "embedded": set(),
    "terms": {"linalg", "kernels"},
    "stats": {"terms", "linalg", "memory"},
    "allocate": {"linalg"},
    "rules": {"optim", "terms", "linalg"},
    "methods": {"allocate", "stats", "rules", "optim", "terms", "linalg", "kernels"},
    "optim": {"linalg", "kernels"},
    "memory": {"terms", "kernels"},
    "io": {"terms"},
    "train": {"rules", "optim", "memory", "terms"},
    "plan": {"memory", "terms", "train"},
}
ARROWS["runs"] = {"io", "train", "embedded", "terms", "stats", "allocate", "linalg"}
ARROWS["grafts"] = {"runs", "io", "stats", "terms", "linalg", "kernels", "methods", "rules", "optim"}
ARROWS["verbs"] = set(ARROWS)
ARROWS["cli"] = {"verbs", "scaling"}  # its commands are made from the records of laws
ARROWS["testing"] = {*ARROWS["verbs"], "verbs"}

ANYWHERE = {"digests", "errors", "files", "progress", "seeds", "signals", "records", "tables", "tensors", "__version__"}

PUBLIC = [
    *("Budget", "WeftError", "__version__", "adapt", "calibrate", "combine", "compensate", "compress", "disable"),
    *("effective_rates", "evaluate", "export"),
    *("finetune", "inspect", "lean", "load_adapter", "merge", "merge_adapter", "methods", "mix", "needs", "optim"),
    *(
        "parameter_groups",
        "quantize",
        "register",
        "remove_adapter",
        "save_adapter",
        "scaling",
        "set_adapter",
        "trainable",
    ),
]

HEAVY = ("torch", "transformers", "accelerate", "datasets", "scipy", "typer", "rich", "numpy", "peft")


# calls that go back up, on a weight's way through `compress`: the lower function -> the higher one, and why
UPWARD = {
    "terms/experts.py:within_experts.<locals>.settled -> verbs/compress.py:compress",  # a decorator of verbs
    "terms/experts.py:within_experts.<locals>.settled -> stats/calibrate.py:calibrate",
    # hooks of calibration on the layers of a model whose loss is made without logits
    "memory/forwards.py:original -> stats/calibrate.py:_leaf",
    "memory/forwards.py:original -> stats/collect.py:Collector._hook.<locals>.hook",
    "stats/walk.py:walk -> verbs/placing.py:sequential.<locals>.restore",  # blocks that an interrupted run has finished
}


@cache
def trees() -> dict[Path, ast.Module]:
    return {path.relative_to(SOURCE): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def room_of(path: Path) -> str:
    """ "terms" of terms/base.py; "testing" of testing.py and of testing_adapters.py."""
    return path.parts[0] if len(path.parts) > 1 else path.stem.split("_")[0] or path.stem


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ([f"weft.{a.name}" for a in node.names] if node.module == "weft" else [str(node.module)])


def functions() -> Iterator[tuple[str, int]]:
    """(where, lines of body without its docstring) of every function."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                yield f"{path}:{node.name}", lines


def test_arrows_between_rooms_go_one_way() -> None:
    wrong = []
    for path, tree in trees().items():
        room = room_of(path)
        if room not in ARROWS:
            assert room in ANYWHERE or path.name in ("__init__.py", "__main__.py"), f"{path} lies in no room"
            continue
        for module in imports(tree):
            target = room_of(Path(*module.split(".")[1:2])) if module.startswith("weft.") else room
            if target not in ARROWS[room] | ANYWHERE | {room}:
                wrong.append(f"{path} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_few_calls_go_back_up_through_compress(tiny_directory: Path, tmp_path: Path) -> None:
    """Of the pairs of functions that call each other, whatever other code lies between: imports alone are left out."""
    found = set()

    @cache
    def place(code: CodeType) -> str:
        inside = code.co_filename.startswith(f"{SOURCE}{os.sep}")
        return f"{code.co_filename[len(str(SOURCE)) + 1 :]}:{code.co_qualname}" if inside else ""

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not (there := place(frame.f_code)):
            return
        caller = frame.f_back
        if caller is not None and caller.f_code.co_filename.startswith("<frozen importlib"):
            return
        while caller is not None and not place(caller.f_code):
            caller = caller.f_back
        if caller is None or caller.f_code.co_name == "<module>":
            return
        lower, upper = (room_of(Path(at.partition(":")[0])) for at in (place(caller.f_code), there))
        if upper not in ARROWS.get(lower, set()) | ANYWHERE | {lower}:
            found.add(f"{place(caller.f_code)} -> {there}")

    (tmp_path / "text.txt").write_text("the weight is a sum of terms\n" * 100)
    settings = {"budget": 0.7, "calibration": tmp_path / "text.txt", "windows": 2, "window": 32}
    for i, way in enumerate(({"method": "kfac-svd", "allocate": "best"}, {"method": "svd-llm", "sequential": True})):
        sys.setprofile(watch)
        try:
            run(str(tiny_directory), tmp_path / str(i), **settings, **way)
        finally:
            sys.setprofile(None)
    assert found == UPWARD


def test_the_arrows_have_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(ARROWS):
        ready = [room for room in ARROWS if room not in order and set(order) >= ARROWS[room] - {room}]
        assert ready, f"a cycle among {sorted(set(ARROWS) - set(order))}"
        order += ready


def test_public_names() -> None:
    assert sorted(weft.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(weft, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'compres'; its public names are"):
        _ = weft.compres  # type: ignore[attr-defined]


def test_the_typed_names_are_the_lazy_ones() -> None:
    """What a type checker sees (the TYPE_CHECKING block) is what importing gives."""
    block = next(n for n in trees()[Path("__init__.py")].body if isinstance(n, ast.If))
    typed = {a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed - {"run"} | {"methods"} == set(PUBLIC) - {"WeftError", "__version__"}


def test_methods_is_both_a_room_and_a_function() -> None:
    listed = weft.methods()  # type: ignore[operator]
    assert all(m.record() in listed for m in weft.methods.METHODS.values())  # type: ignore[attr-defined]


def test_no_file_is_too_long() -> None:
    lengths = {str(path): len((SOURCE / path).read_text().splitlines()) for path in trees()}
    assert not {path: n for path, n in lengths.items() if n > 400}


def test_functions_fit_a_screen() -> None:
    lengths = dict(functions())
    ordered = sorted(lengths.values())
    assert not {name: n for name, n in lengths.items() if n > 45}
    assert median(ordered) <= 10 and ordered[int(0.95 * len(ordered))] <= 45


def test_methods_and_optimizers_are_not_copies_of_each_other() -> None:
    """Lines that lie in a window of six found in another file of the same room: at most so many in a hundred."""
    for room, most in {"methods": 1, "optim": 2, "terms": 3, "verbs": 2, "rules": 1, "allocate": 1, "cli": 3}.items():
        files = {path: _code_lines(path) for path in trees() if path.parts[0] == room}
        windows = Counter(
            w for lines in files.values() for w in {tuple(lines[i : i + 6]) for i in range(len(lines) - 5)}
        )
        shared = sum(
            len({j for i in range(len(lines) - 5) if windows[tuple(lines[i : i + 6])] > 1 for j in range(i, i + 6)})
            for lines in files.values()
        )
        assert shared <= most / 100 * sum(map(len, files.values())), f"{shared} lines of {room}"


def _code_lines(path: Path) -> list[str]:
    """The lines of code: no imports, docstrings, comments or blanks."""
    text, drop = (SOURCE / path).read_text().splitlines(), set()
    for node in ast.walk(trees()[path]):
        words = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if words or isinstance(node, ast.Import | ast.ImportFrom):
            drop |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
    return [s for i, line in enumerate(text) if i not in drop and (s := line.strip()) and not s.startswith("#")]


def test_house_rules_that_a_parser_can_see() -> None:
    wrong = []
    for path, tree in trees().items():
        text = (SOURCE / path).read_text()
        if re.search(r"\b(TODO|FIXME|XXX)\b", text):
            wrong.append(f"{path}: unfinished words")
        if path.name != "__init__.py" and tree.body and "from __future__ import annotations" not in text:
            wrong.append(f"{path}: no future annotations")
        if ast.get_docstring(tree) is None:
            wrong.append(f"{path}: no docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{path}:{node.lineno}: bare except")
            if isinstance(node, ast.Call):
                wrong += _refused_call(path, node)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in _exports(tree)
            if public and ast.get_docstring(node) is None:
                wrong.append(f"{path}: {node.name} has no docstring")
    assert not wrong, "\n".join(wrong)


def _refused_call(path: Path, call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    unpickles = name in ("pickle.load", "pickle.loads") and room_of(path) != "testing"  # which pickles terms itself
    if name in ("eval", "exec", "os.system") or unpickles:
        yield f"{path}:{call.lineno}: {name}"
    if name == "hasattr" and path.parts[0] not in ("io", "train"):
        yield f"{path}:{call.lineno}: hasattr"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield f"{path}:{call.lineno}: torch.load without weights_only=True"
    if name.startswith("torch.") and "out" in keywords and name not in ("torch.mul", "torch.mm"):
        yield f"{path}:{call.lineno}: {name} into an `out`, in whose dtype a GPU computes, not in the operands'"
    if keywords.get("shell") == "True":
        yield f"{path}:{call.lineno}: a shell"


def _exports(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
            and isinstance(node.value, ast.List)
        ):
            return {e.value for e in node.value.elts if isinstance(e, ast.Constant)}
    return set()


def test_a_fresh_python_imports_weft_without_anything_heavy_and_finds_the_methods() -> None:
    code = f"""
import sys, weft
assert not [module for module in {HEAVY!r} if module in sys.modules]
import weft.methods.svd
assert weft.methods()[0]["name"] and weft.methods.svd.METHOD
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_import_weft_is_quick_beyond_torch() -> None:
    """Three processes that have torch and not yet weft."""
    code = """
import os, torch, time
for _ in range(3):
    if not os.fork():
        began = time.process_time()
        import weft
        print(time.process_time() - began, flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = [float(line) for line in done.stdout.splitlines()]
    assert len(seconds) == 3 and min(seconds) < 0.3


# file outside terms -> the kinds it tells apart, and why it may: everything else asks the term
TELLS_APART: dict[str, set[str]] = {
    "methods/base.py": {"Dense"},  # what is not the base is what a recovery trains
    "verbs/quantize.py": {"Dense"},  # what codes take the place of
}


def test_a_term_answers_for_itself() -> None:
    """Outside of terms/ no list of kinds: a page of a method or a rule knows the one structure that it is about."""
    from weft.terms import TERMS

    kinds = {term.__name__ for term in TERMS.values()}
    told: dict[str, set[str]] = {}
    for path, tree in trees().items():
        assert "singledispatch" not in (SOURCE / path).read_text(), f"{path} dispatches on kinds"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & kinds
                told.setdefault(str(path), set()).update(named)
    pages = ("methods", "rules")
    ladders = {
        path: found
        for path, found in told.items()
        if not path.startswith("terms/")
        and len(found) > (Path(path).parts[0] in pages)
        and not found <= TELLS_APART.get(path, set())
    }
    assert not ladders
    assert all(told.get(path, set()) & kinds == allowed for path, allowed in TELLS_APART.items())
