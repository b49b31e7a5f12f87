"""Forward hooks of rules: one of a kind for each term on a module, however often training starts anew."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from weft.terms import Term

__all__ = ["Hook", "watch"]


class Hook(Protocol):
    """hook(module, args, output) -> None, or what takes the output's place."""

    @property
    def term(self) -> Term:
        """Whose rule it serves."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any: ...


def watch(module: nn.Module, hook: Hook) -> None:
    """Register a hook, in the place of one of its class and term that an earlier training left there."""
    for key, other in list(module._forward_hooks.items()):
        if type(other) is type(hook) and other.term is hook.term:  # type: ignore[attr-defined]
            del module._forward_hooks[key]
    module.register_forward_hook(hook)
