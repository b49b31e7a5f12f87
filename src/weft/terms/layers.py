"""The linear layers of a model: found by name, read, replaced; and the blocks they lie in.

A *linear layer* is an `nn.Linear`, a GPT-2 `Conv1D` or a `SumLinear`, inside the model's base (so not the output head),
whose weight is shared with no other module.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.tensors import plain_values
from weft.terms.hooks import carry_hooks, is_offloaded
from weft.terms.low_rank import LowRank
from weft.terms.sum_linear import SumLinear

__all__ = [
    "bias_of",
    "block_stacks",
    "is_conv1d",
    "is_linear",
    "linear_layers",
    "replace",
    "set_low_rank",
    "shape_of",
    "stored_weight",
    "weight_of",
]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, weight (in, out); told by name: no import."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether weft can put a sum of terms here. Subclasses of `nn.Linear` are left alone: they may do more."""
    plain = type(module) is nn.Linear and module._parameters.get("weight") is not None  # others keep it in codes
    return plain or isinstance(module, SumLinear) or is_conv1d(module)


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
        layers: None for all, or one or more shell patterns on the full name (`*q_proj`, `model.layers.0.*`).

    Raises:
        WeftError: a pattern matches nothing (the nearest names are listed), there is no linear layer at all, or the
            model holds mixture-of-experts weights as 3-D tensors, which no term represents, and no pattern says which
            other layers are meant.
    """
    found = dict(_eligible(model))
    if layers is None:
        _refuse_experts(model)
        if not found:
            raise WeftError(f"{type(model).__name__} has no linear layer that weft could replace{_foreign(model)}.")
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            near = ", ".join(nearest(pattern, found))
            raise WeftError(
                f"The layer pattern {pattern!r} matches no linear layer; the nearest names are: {near or 'none'}."
            )
    return {name: module for name, module in found.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _foreign(model: nn.Module) -> str:
    """What stands in the place of linear layers where another tool has quantised the model."""
    theirs = {
        f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_linear(module) and module is not _output_head(model)
    }
    if not theirs:
        return ""
    return (
        f": its layers are {' and '.join(sorted(theirs))}, whose weights another tool keeps in codes of its own; load "
        "the model without them and quantise it with weft.quantize, whose layers take adapters"
    )


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points, keeping the mode and the hooks of what was there.

    Raises:
        WeftError: accelerate keeps the layer's weights elsewhere between forward passes.
    """
    old = model.get_submodule(name)
    if is_offloaded(old):
        raise WeftError(
            f"The weights of {name} are offloaded to the disk or another device, where weft cannot replace them; load "
            "the model without offloading, for example with device_map='cpu'."
        )
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


def set_low_rank(model: nn.Module, name: str, B: Tensor, A: Tensor, bias: Tensor | None) -> SumLinear:
    """Replace a linear layer by one LowRank term of factors B (out, r), A (r, in), in its dtype and device."""
    old = model.get_submodule(name)
    reference = old.weight
    assert isinstance(reference, Tensor)
    B, A = (t.to(reference.device, reference.dtype) for t in (B, A))
    bias = None if bias is None else bias.to(reference.device, reference.dtype)
    transposed = old.transposed if isinstance(old, SumLinear) else is_conv1d(old)
    layer = SumLinear({"low_rank": LowRank.from_factors(B, A)}, bias, transposed=transposed)
    replace(model, name, layer)
    return layer


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost `nn.ModuleList`s with linear layers: a decoder's blocks, or an encoder's and a decoder's."""
    stacks: dict[str, nn.ModuleList] = {}
    names = list(dict(_eligible(model)))
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(name.startswith(path + ".") for name in names):
            stacks[path] = module
    return stacks


def _eligible(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    base = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    everywhere = model.named_modules(remove_duplicate=False)  # a module in two places shares its weight with itself
    uses = Counter(id(p) for _, m in everywhere for p in m._parameters.values() if p is not None)
    inside_sum: list[str] = []
    for path, module in base.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if not is_linear(module) or any(name.startswith(outer + ".") for outer in inside_sum):
            continue
        if isinstance(module, SumLinear):
            inside_sum.append(name)
        if uses.get(id(module._parameters.get("weight")), 0) <= 1 and module is not _output_head(model):
            yield name, module


def _output_head(model: nn.Module) -> nn.Module | None:
    head = getattr(model, "get_output_embeddings", lambda: None)
    try:
        found = head()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _refuse_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            shape = tuple(parameter.shape)
            raise WeftError(
                f"{type(model).__name__} is a mixture of experts that holds them as one tensor ({name}, {shape}), "
                "which no sum of terms represents; name the layers you mean, for example layers='*self_attn*'."
            )
