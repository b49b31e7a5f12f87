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
    from weft import optim as optim
    from weft import scaling as scaling
    from weft.allocate import Budget as Budget
    from weft.memory import lean as lean
    from weft.records import register as register
    from weft.verbs.adapt import adapt as adapt
    from weft.verbs.adapt import effective_rates as effective_rates
    from weft.verbs.adapt import parameter_groups as parameter_groups
    from weft.verbs.adapt import trainable as trainable
    from weft.verbs.adapters import disable as disable
    from weft.verbs.adapters import load_adapter as load_adapter
    from weft.verbs.adapters import merge_adapter as merge_adapter
    from weft.verbs.adapters import remove_adapter as remove_adapter
    from weft.verbs.adapters import save_adapter as save_adapter
    from weft.verbs.adapters import set_adapter as set_adapter
    from weft.verbs.combine import combine as combine
    from weft.verbs.compensate import compensate as compensate
    from weft.verbs.compress import calibrate as calibrate
    from weft.verbs.compress import compress as compress
    from weft.verbs.compress import needs as needs
    from weft.verbs.evaluate import evaluate as evaluate
    from weft.verbs.export import export as export
    from weft.verbs.finetune import finetune as finetune
    from weft.verbs.inspect import inspect as inspect
    from weft.verbs.merge import merge as merge
    from weft.verbs.methods import run
    from weft.verbs.mix import mix as mix
    from weft.verbs.quantize import quantize as quantize

    methods = run

__version__ = "0.1.0"

_EXPORTS = {
    "Budget": "weft.allocate",
    "adapt": "weft.verbs.adapt",
    "calibrate": "weft.verbs.compress",
    "combine": "weft.verbs.combine",
    "compensate": "weft.verbs.compensate",
    "compress": "weft.verbs.compress",
    "disable": "weft.verbs.adapters",
    "effective_rates": "weft.verbs.adapt",
    "evaluate": "weft.verbs.evaluate",
    "export": "weft.verbs.export",
    "finetune": "weft.verbs.finetune",
    "inspect": "weft.verbs.inspect",
    "lean": "weft.memory",
    "load_adapter": "weft.verbs.adapters",
    "merge": "weft.verbs.merge",
    "merge_adapter": "weft.verbs.adapters",
    "methods": "weft",  # the room itself: calling it lists what lies in it
    "mix": "weft.verbs.mix",
    "needs": "weft.verbs.compress",
    "optim": "weft",
    "parameter_groups": "weft.verbs.adapt",
    "quantize": "weft.verbs.quantize",
    "register": "weft.records",
    "remove_adapter": "weft.verbs.adapters",
    "save_adapter": "weft.verbs.adapters",
    "scaling": "weft",
    "set_adapter": "weft.verbs.adapters",
    "trainable": "weft.verbs.adapt",
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
