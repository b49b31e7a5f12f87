"""Where the prefix was; it is `weft.grafts.ntk_attention`, and reached by the one verb."""

from __future__ import annotations

from typing import Any

from weft.errors import WeftError


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise WeftError(
        f"weft.verbs.ntk_attention.{name} is no more: weft.adapt(model, 'ntk-attention', ...) puts it on, and "
        "weft.save_adapter, weft.load_adapter and weft.remove_adapter do the rest, as with any adapter."
    )
