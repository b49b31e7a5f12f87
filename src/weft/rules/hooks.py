"""Forward hooks of rules: one of a kind for each term on a module, however often training starts anew."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from weft.terms import Term

__all__ = ["Hook", "watch", "watch_before"]


class Hook(Protocol):
    """What torch calls around a module's forward pass, and of which term's rule it is a part."""

    @property
    def term(self) -> Term:
        """Whose rule it serves."""

    def __call__(self, *args: Any, **named: Any) -> Any: ...


def watch(module: nn.Module, hook: Hook) -> RemovableHandle:
    """Register hook(module, args, output) in the place of one of its class and term that an earlier training left."""
    _forget(hook, module._forward_hooks)
    return module.register_forward_hook(hook)


def watch_before(module: nn.Module, hook: Hook) -> RemovableHandle:
    """The same of one that is called before the pass: hook(module, args, named)."""
    _forget(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _forget(hook: Hook, hooks: Any, flags: Any = None) -> None:
    for key, other in list(hooks.items()):
        if type(other) is type(hook) and other.term is hook.term:
            del hooks[key]
            if flags is not None:
                del flags[key]
