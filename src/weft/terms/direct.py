"""Layers that are not called through their forward: their owner reads `self.<layer>.weight` itself (Mamba's fused
kernels, attention that passes weights on), so that a sum of terms in their place would not be what is computed.

Told by the owner's source, not by a run of it: which way a forward pass goes depends on the device and on what else is
installed, and a layer must be left alone if any way reads its weight.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
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
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError, SyntaxError, ValueError):  # made at run time: no source
            continue
        for method in getattr(body, "body", ()):
            name = getattr(method, "name", "")
            if isinstance(method, ast.FunctionDef) and not (name in _SETS or name.lstrip("_").startswith("init")):
                found |= set(_in(method, sliced))
    return frozenset(found)


def _in(node: ast.AST, sliced: bool) -> Iterator[str]:
    if isinstance(node, ast.If) and _SLICES in ast.unparse(node.test) and not sliced:
        for other in node.orelse:
            yield from _in(other, sliced)
        return
    if isinstance(node, ast.Attribute) and node.attr in _PEEKS:
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKS:
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        path = ast.unparse(node.value)
        if path.startswith("self."):
            yield path.removeprefix("self.")
    for child in ast.iter_child_nodes(node):
        yield from _in(child, sliced)
