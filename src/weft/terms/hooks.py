"""Hooks on a layer that is replaced: what others have hung on it goes over to what takes its place."""

from __future__ import annotations

from torch import nn

__all__ = ["carry_hooks", "is_offloaded"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`: torch's, whose handles still remove them, and accelerate's."""
    for name in _HOOKS:
        # the very dictionaries: a handle refers to them
        new.__dict__[name] = old.__dict__[name]
    hook = old.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's tensors elsewhere between its forward passes."""
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(part, "offload", False) is True for part in (hook, *getattr(hook, "hooks", ())))
