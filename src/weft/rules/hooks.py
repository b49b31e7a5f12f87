"""Forward hooks of rules: one of a kind for each adapter on a module, however often training starts anew."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

__all__ = ["Hook", "watch"]


class Hook(Protocol):
    """hook(module, args, output) -> None, or what takes the output's place."""

    adapter: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any: ...


def watch(module: nn.Module, hook: Hook) -> None:
    """Register a hook, in the place of one of its class and adapter that an earlier training left there."""
    for key, other in list(module._forward_hooks.items()):
        if type(other) is type(hook) and other.adapter == hook.adapter:  # type: ignore[attr-defined]
            del module._forward_hooks[key]
    module.register_forward_hook(hook)
