"""weft, the WEight Factorization Toolkit: a weight is a sum of terms, and a published method is five decisions about
them.

The names below are imported when they are first used, so that `import weft` itself loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.io import hook

if TYPE_CHECKING:
    from weft.verbs.evaluate import evaluate as evaluate
    from weft.verbs.finetune import finetune as finetune
    from weft.verbs.inspect import inspect as inspect
    from weft.verbs.merge import merge as merge
    from weft.verbs.methods import run

    methods = run

__version__ = "0.1.0"

_EXPORTS = {
    "inspect": "weft.verbs.inspect",
    "finetune": "weft.verbs.finetune",
    "evaluate": "weft.verbs.evaluate",
    "merge": "weft.verbs.merge",
    "adapt": "weft.verbs.adapt",
    "disable": "weft.verbs.adapt",
    "effective_rates": "weft.verbs.adapt",
    "parameter_groups": "weft.verbs.adapt",
    "remove_adapter": "weft.verbs.adapt",
    "set_adapter": "weft.verbs.adapt",
    "trainable": "weft.verbs.adapt",
    "merge_adapter": "weft.verbs.adapt",
    "save_adapter": "weft.io.adapters",
    "load_adapter": "weft.io.adapters",
    "methods": "weft",  # the room itself: calling it lists what lies in it
}

__all__ = ["WeftError", "__version__", *sorted(_EXPORTS)]

hook.install()  # so that transformers opens weft directories; costs nothing until transformers is imported


def __getattr__(name: str) -> Any:
    """Import the room that a public name lives in (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'weft' has no attribute {name!r}; its public names are: {', '.join(__all__)}")
    home = _EXPORTS[name]
    found = importlib.import_module(f"weft.{name}") if home == "weft" else getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
