"""Hooks on a layer: torch's and accelerate's go over to what takes its place; weights that accelerate keeps elsewhere
between forward passes are fetched to be read, and are not replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from weft.errors import WeftError

__all__ = ["at_hand", "carry_hooks", "check_at_hand"]

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


def check_at_hand(model: nn.Module, layers: Iterable[str]) -> None:
    """Raises WeftError for the first of these layers whose weights accelerate keeps elsewhere between forward passes:
    what is read of them is not what they are, and what is put in their place would be taken for them.
    """
    modules = dict(model.named_modules())
    for layer in layers:
        parts = layer.split(".")
        outer = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
        if _offloads(modules[layer]) or any(_offloads(module, within=True) for module in outer):
            raise WeftError(
                f"The weights of {layer} are offloaded to the disk or the CPU, where weft neither reads nor replaces "
                "them; load the model without offloading (device_map='cpu', for example), or name other layers."
            )


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Within it, the tensors of the module and of what is in it are where they compute."""
    with ExitStack() as stack:
        # a compiled graph has no hooks in it
        for part in () if torch.compiler.is_compiling() else module.modules():
            if _offloads(part):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def _offloads(module: nn.Module, *, within: bool = False) -> bool:
    """Whether a hook of accelerate offloads the module's own tensors, or those of all that is within it."""
    hook = module.__dict__.get("_hf_hook")
    return any(
        getattr(part, "offload", False) is True and (not within or getattr(part, "place_submodules", False))
        for part in (hook, *getattr(hook, "hooks", ()))
    )
