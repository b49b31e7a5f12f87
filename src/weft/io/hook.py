"""Teaching transformers to load weft models, without importing transformers.

`weft.io.quantizer` registers itself with transformers' quantizer registry. It must be imported before the first
`from_pretrained`, and importing it costs seconds; so it is imported right after `transformers.modeling_utils`, which
every model of transformers imports first.
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

_MODELS = "transformers.modeling_utils"
_QUANTIZER = "weft.io.quantizer"


def install() -> None:
    """Register weft's quantizer: now if transformers' models are loaded, else when they are. Safe to repeat."""
    if _MODELS in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _ModelsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ModelsFinder())


class _ModelsFinder(MetaPathFinder):
    """Lets the usual finders find `transformers.modeling_utils`, and has weft's quantizer imported after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODELS:
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
