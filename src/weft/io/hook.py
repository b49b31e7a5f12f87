"""Teaching transformers to load weft models, without importing transformers.

`weft.io.quantizer` registers itself in transformers' tables of quantisation methods. Whoever looks into them, be it a
`from_pretrained` or `AutoQuantizationConfig.from_dict` alone, has imported `transformers.quantizers.auto`, where they
lie. So weft's quantizer is imported right after that module; it imports no models of transformers.
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

_TABLES = "transformers.quantizers.auto"
_QUANTIZER = "weft.io.quantizer"


def install() -> None:
    """Register weft's quantizer: now if transformers' tables are loaded, else when they are. Safe to repeat."""
    if _TABLES in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _TablesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TablesFinder())


class _TablesFinder(MetaPathFinder):
    """Lets the usual finders find `transformers.quantizers.auto`, and has weft's quantizer imported after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
