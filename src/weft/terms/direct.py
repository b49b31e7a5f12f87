"""Layers that are not called through their forward: their owner reads `self.<layer>.weight` itself (Mamba's fused
kernels, attention that passes weights on), so that a sum of terms in their place would not be what is computed.

Told by the owner's source, not by a run of it: which way a forward pass goes depends on the device and on what else is
installed, and a layer must be left alone if any way reads its weight.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache

from torch import nn

__all__ = ["read_directly"]

_PEEKS = ("dtype", "device", "requires_grad", "is_cuda", "is_meta")
"""What a `SumLinear` answers truly for its `weight`."""
_ASKS = ("isinstance", "hasattr", "getattr", "type")
_SETS = ("__init__", "extra_repr", "reset_parameters", "tie_weights")
"""Methods that are no part of a forward pass, beside those called `init...`."""
_SLICES = "pretraining_tp"
"""Of a config: weights are sliced where it is above 1."""


def read_directly(model: nn.Module) -> dict[str, str]:
    """Names of modules whose weight their owner reads without calling them -> the owner's class."""
    found = {}
    for path, module in model.named_modules():
        sliced = getattr(getattr(module, "config", None), _SLICES, 1) != 1
        for part in _reads(type(module), sliced):  # type: ignore[arg-type]
            name = f"{path}.{part}" if path else part
            found[name] = type(module).__name__
    return found


@cache
def _reads(owner: type, sliced: bool) -> frozenset[str]:
    """The paths p for which the class reads `self.p.weight`."""
    found: set[str] = set()
    for cls in owner.__mro__:
        if cls is nn.Module:
            break
        try:
            file = inspect.getsourcefile(cls)
        except TypeError:  # made at run time: no source
            continue
        found |= _by_class(file or "", sliced).get(cls.__qualname__, set())
    return frozenset(found)


@cache
def _by_class(file: str, sliced: bool) -> dict[str, set[str]]:
    """Qualified name of a class in the file -> the paths that it reads so. A file is parsed as a whole and once:
    `inspect.getsource` does that for each class of it, which takes most of a second for a model.
    """
    lines = linecache.getlines(file)
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, set[str]] = defaultdict(set)
    for name, cls in _classes(tree):
        if any(".weight" in line for line in lines[cls.lineno - 1 : cls.end_lineno]):
            for method in cls.body:
                if isinstance(method, ast.FunctionDef) and not _sets(method.name):
                    found[name] |= set(_in(method, sliced, _names(method)))
    return found


def _classes(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.ClassDef]]:
    """The classes within, by qualified name."""
    for child in ast.iter_child_nodes(node):
        within = prefix
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", child
            within = f"{prefix}{child.name}."
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            within = f"{prefix}{child.name}.<locals>."
        elif isinstance(child, ast.expr):
            continue
        yield from _classes(child, within)


def _sets(method: str) -> bool:
    return method in _SETS or method.lstrip("_").startswith("init")


def _names(method: ast.FunctionDef) -> dict[str, str]:
    """What the method calls its parts: `gate = self.mlp.gate` -> {"gate": "self.mlp.gate"}."""
    given = (node for node in ast.walk(method) if isinstance(node, ast.Assign) and len(node.targets) == 1)
    pairs = ((node.targets[0], ast.unparse(node.value)) for node in given if isinstance(node.value, ast.Attribute))
    return {target.id: path for target, path in pairs if isinstance(target, ast.Name) and path.startswith("self.")}


def _in(node: ast.AST, sliced: bool, names: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.If) and _SLICES in ast.unparse(node.test) and not sliced:
        for other in node.orelse:
            yield from _in(other, sliced, names)
        return
    if isinstance(node, ast.Attribute) and node.attr in _PEEKS:
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKS:
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        first, dot, rest = ast.unparse(node.value).partition(".")
        path = names.get(first, first) + dot + rest
        if path.startswith("self."):
            yield path.removeprefix("self.")
    for child in ast.iter_child_nodes(node):
        yield from _in(child, sliced, names)
