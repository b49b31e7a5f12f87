"""The linear layers of a model: found by name, read, replaced; and the blocks they lie in.

A *linear layer* is an `nn.Linear`, a GPT-2 `Conv1D` or a `SumLinear`, inside the model's base (so not the output head),
whose weight is shared with no other module and is used by calling the layer. A mixture's experts are opened when layers
of theirs are asked for (`weft.terms.experts`).
"""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.tensors import plain_values
from weft.terms.direct import read_directly
from weft.terms.experts import open_experts
from weft.terms.hooks import carry_hooks, check_at_hand
from weft.terms.sum_linear import SumLinear

__all__ = [
    "HEAD",
    "OUTSIDE",
    "attention_layers",
    "bias_of",
    "block_stacks",
    "eligible",
    "heads_of",
    "is_conv1d",
    "is_linear",
    "judged",
    "linear_layers",
    "open_meant",
    "output_head",
    "picked",
    "replace",
    "shape_of",
    "stored_weight",
    "weight_of",
]

HEAD, OUTSIDE = "it is the output head", "it lies outside the model's base"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, weight (in, out); told by name: no import."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether weft can put a sum of terms here: an `nn.Linear`, a `SumLinear`, a `Conv1D`, or a subclass of `nn.Linear`
    that only writes its product in another way (Falcon's). Other subclasses do more, and are left alone.
    """
    if isinstance(module, SumLinear) or is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or module._parameters.get("weight") is None:  # kept in codes by another tool
        return False
    if type(module) is nn.Linear:
        return True
    return not module._buffers and _is_plain_product(type(module))  # type: ignore[arg-type]


@cache
def _is_plain_product(cls: type[nn.Linear]) -> bool:
    """Whether a subclass adds nothing to `nn.Linear` but a forward that gives the same values."""
    own = {name for name in vars(cls) if not (name.startswith("__") and name.endswith("__"))}
    if cls.__bases__ != (nn.Linear,) or own != {"forward"} or "__init__" in vars(cls):
        return False
    layer = nn.Linear(3, 4)
    probe, x = copy.copy(layer), torch.linspace(-1, 1, 6).view(2, 3)
    probe.__class__ = cls
    try:
        with torch.no_grad():
            return bool(torch.allclose(probe(x), layer(x), atol=1e-6))
    except (TypeError, AttributeError, RuntimeError):
        return False


def weight_of(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The (out, in) weight of a linear layer, detached; a view where it can be, in `dtype` (None: the stored one)."""
    if isinstance(module, SumLinear):
        return module.dense(dtype).detach()
    weight: Tensor = plain_values(module.weight.detach())  # type: ignore[operator]
    weight = weight.transpose(0, 1) if is_conv1d(module) else weight
    return weight.to(dtype or weight.dtype)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if is_conv1d(module):
        inn, out = module.weight.shape  # type: ignore[union-attr, misc]
        return int(out), int(inn)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def stored_weight(module: nn.Module) -> tuple[int, int]:
    """Numbers and bytes that a linear layer stores for its weight, without the bias."""
    if isinstance(module, SumLinear):
        tensors = [t for term in module.terms.values() for t in term.state_dict().values()]
        return sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    weight = weight_of(module)
    return weight.numel(), weight.nbytes


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias (out,) of a linear layer, detached, or None."""
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def linear_layers(model: nn.Module, layers: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The model's linear layers by name, in the model's order.

    Args:
        layers: None for all, or one or more shell patterns on the full name (`*q_proj`, `model.layers.0.*`); one that
            begins with "!" leaves out what it matches, and alone means all others. For all, a warning says what of the
            model's matrices is left and why, where anything is.

    Raises:
        WeftError: a pattern matches nothing (the nearest names are listed), there is no linear layer at all, all of
            them are less than half of the model's matrices, or the weights of one are offloaded.
    """
    from weft.terms.coverage import require_coverage

    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    open_meant(model, patterns)
    found = eligible(model)
    if layers is None:
        require_coverage(model, found)
        check_at_hand(model, found)
        return found
    for pattern in patterns:
        if not fnmatch.filter(found, pattern.removeprefix(_NOT)):
            near = ", ".join(nearest(pattern.removeprefix(_NOT), found))
            raise WeftError(
                f"The layer pattern {pattern!r} matches no linear layer; the nearest names are: {near or 'none'}."
            )
    chosen = {name: found[name] for name in picked(found, patterns)}
    check_at_hand(model, chosen)
    return chosen


_NOT = "!"

Meant = Callable[[str, str], bool]
"""(name, pattern) -> whether it matches."""


def open_meant(model: nn.Module, patterns: Sequence[str], meant: Meant = fnmatch.fnmatchcase) -> None:
    """Open the experts that any of the patterns matches, so that those to be left out have names as well."""
    plain = [pattern.removeprefix(_NOT) for pattern in patterns]
    others = bool(patterns) and all(pattern.startswith(_NOT) for pattern in patterns)
    open_experts(model, lambda name: others or any(meant(name, pattern) for pattern in plain))


def picked(names: Iterable[str], patterns: Sequence[str], meant: Meant = fnmatch.fnmatchcase) -> list[str]:
    """The names, in their order, that patterns mean: those of any (all, where each begins with "!"), less those of the
    ones that begin with "!".

    Raises:
        WeftError: none is left.
    """
    without = [pattern.removeprefix(_NOT) for pattern in patterns if pattern.startswith(_NOT)]
    wanted = [pattern for pattern in patterns if not pattern.startswith(_NOT)]
    asked = [name for name in names if (without and not wanted) or any(meant(name, p) for p in wanted)]
    chosen = [name for name in asked if not any(meant(name, p) for p in without)]
    if patterns and not chosen:
        raise WeftError(f"The patterns {', '.join(patterns)} leave no linear layer; leave out fewer.")
    return chosen


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points, keeping the mode and the hooks of what was there.

    Raises:
        WeftError: accelerate keeps the layer's weights elsewhere between forward passes.
    """
    old = model.get_submodule(name)
    check_at_hand(model, [name])
    module.train(old.training)
    carry_hooks(old, module)
    model.set_submodule(name, module)
    if isinstance(module, SumLinear):
        _say_not_plain(model, name)


def _say_not_plain(model: nn.Module, name: str) -> None:
    """Tell transformers' flash attention that there may be no nn.Linear to ask for a dtype."""
    parts = name.split(".")
    for depth in range(len(parts)):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if getattr(config, "model_type", None) is not None:
            config._is_quantized = True  # type: ignore[union-attr]


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost `nn.ModuleList`s with linear layers: a decoder's blocks, or an encoder's and a decoder's."""
    stacks: dict[str, nn.ModuleList] = {}
    names = list(eligible(model))
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(name.startswith(path + ".") for name in names):
            stacks[path] = module
    return stacks


def eligible(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that a sum of terms can stand for, by name, in the model's order; none, one or many."""
    return {name: module for name, module, reason in judged(model) if reason is None}


def judged(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Every linear layer: its name, itself, and why no sum of terms can stand for it, None where one can."""
    base = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    everywhere = model.named_modules(remove_duplicate=False)  # a module in two places shares its weight with itself
    uses = Counter(id(p) for _, m in everywhere for p in m._parameters.values() if p is not None)
    direct, head, inside_sum = read_directly(model), output_head(model), ""
    for name, module in model.named_modules():
        if not is_linear(module) or (inside_sum and name.startswith(inside_sum)):
            continue
        if isinstance(module, SumLinear):
            inside_sum = f"{name}."
        if module is head:
            reason: str | None = HEAD
        elif prefix and not name.startswith(f"{prefix}."):
            reason = OUTSIDE
        elif uses.get(id(module._parameters.get("weight")), 0) > 1:
            reason = "its weight is shared with another module"
        elif name in direct:
            reason = f"{direct[name]} reads its weight itself instead of calling it"
        else:
            reason = None
        yield name, module, reason


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, where the model says which."""
    head = getattr(model, "get_output_embeddings", lambda: None)
    try:
        found = head()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each attention layer whose function can be exchanged."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "head_dim", None), int) and isinstance(module._modules.get("q_proj"), nn.Module):
            yield name, module


def heads_of(layer: nn.Module) -> int:
    """The query heads of an attention layer, by those of the keys where it groups them: queries may hold gates too."""
    groups = getattr(layer, "num_key_value_groups", None)
    name, each = ("q_proj", 1) if groups is None or layer._modules.get("k_proj") is None else ("k_proj", groups)
    return int(layer.get_submodule(name).out_features // layer.head_dim * each)  # type: ignore[arg-type, operator]
