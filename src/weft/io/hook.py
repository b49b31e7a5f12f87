"""Teaching transformers to load and save weft models, and PEFT to adapt them, without importing either.

`weft.io.quantizer` registers itself in transformers' tables of quantisation methods. Whoever looks into them, be it a
`from_pretrained` or `AutoQuantizationConfig.from_dict` alone, has imported `transformers.quantizers.auto`, where they
lie. So weft's quantizer is imported right after that module; it imports no models of transformers. `weft.io.saving`
comes likewise after `transformers.modeling_utils`, which every model imports first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

_AFTER = {
    "transformers.quantizers.auto": "weft.io.quantizer",
    "transformers.modeling_utils": "weft.io.saving",
    "peft.tuners.lora.model": "weft.io.peft_layers",
}
"""A module of transformers or PEFT -> the one of weft that is imported right after it."""


def install() -> None:
    """Teach them now what is loaded of them, the rest when it is. Safe to repeat."""
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _Finder)}
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        elif theirs not in waiting:
            sys.meta_path.insert(0, _Finder(theirs))


class _Finder(MetaPathFinder):
    """Lets the usual finders find one module of theirs, and has weft's imported after it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_follow(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_AFTER[name])

        spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec
