"""Experts: those of a mixture as plain linear layers, where transformers holds all of them in one tensor a matrix.

    experts.gate_up_proj (E, 2 I, H)        ->   experts.0.gate_up (2 I, H), experts.1.gate_up, ...
    experts.down_proj    (E, H, I)          ->   experts.0.down    (H, I),   experts.1.down, ...

Every verb then sees an expert's matrix as it sees any linear layer: it is calibrated by the tokens that were routed to
it, compressed, quantised, adapted and saved by itself. A model's experts are opened when a layer of theirs is asked
for, and fused again, to the class and the parameters that they were, as soon as none of them is a sum of terms.

It serves the classes that transformers decorates with `use_experts_implementation`, whose fields say how the tensors
lie (transposed, with biases, gated, normalised after); others are left as they are. In the place of each tensor stays
one of its own rank and of ones in size, so that a loader that knows nothing of weft finds the wrong shape and refuses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from weft.terms.hooks import carry_hooks, check_at_hand
from weft.terms.sum_linear import SumLinear

__all__ = ["Experts", "Routed", "expert_layers", "fuse", "names_an_expert", "open_experts", "routed", "within_experts"]

_ROUTED = "_weft_routed"
_FIELDS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts", "_apply_gate")
"""What the decorator gives a class of experts."""

P = ParamSpec("P")
R = TypeVar("R")


class Routed(NamedTuple):
    """Which tokens an expert was given."""

    rows: Tensor  # indices among all tokens of the batch, rising
    total: int  # of them


def routed(x: Tensor) -> Routed | None:
    """The tokens that the rows of x stand for, where x is what an expert's layer was called with."""
    return getattr(x, _ROUTED, None)


class Experts(nn.Module):
    """The experts of one mixture, `<number>.gate_up` and `<number>.down` (`<number>.up` where nothing gates), computing
    what the class of transformers does.

    Args:
        fused: the module of transformers; it is emptied, and kept to be filled again by `fuse`.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = int(fused.num_experts)  # type: ignore[arg-type]
        self._fused = [fused]  # in a list: no submodule
        for name, child in fused.named_children():
            setattr(self, name, child)
        layers = {leaf: _unstacked(fused, leaf) for leaf in _leaves(fused)}
        for index in range(self.num_experts):
            self.add_module(str(index), nn.ModuleDict({_short(leaf): rows[index] for leaf, rows in layers.items()}))
        for leaf in layers:
            stack = fused._parameters.pop(leaf)
            assert stack is not None
            fused._parameters.pop(f"{leaf}_bias", None)
            ones = torch.zeros(1, *((1, 2) if fused.is_transposed else (2, 1)), dtype=stack.dtype, device=stack.device)
            self.register_buffer(leaf, ones if leaf == "gate_up_proj" else ones[:, :1, :1].contiguous())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, H), the chosen experts and their weights (tokens, k) -> (tokens, H)."""
        total = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:  # stands for an expert that another process holds
                continue
            rows, places = (top_k_index == index).nonzero(as_tuple=True)
            y = self._expert(index, hidden_states[rows], Routed(rows, len(hidden_states)))
            total.index_add_(0, rows, (y * top_k_weights[rows, places, None]).to(total.dtype))
        return total

    def _expert(self, index: int, x: Tensor, tokens: Routed) -> Tensor:
        fused: Any = self._fused[0]
        layers: Any = self.get_submodule(str(index))
        setattr(x, _ROUTED, tokens)
        h: Tensor = fused._apply_gate(layers["gate_up"](x)) if fused.has_gate else fused.act_fn(layers["up"](x))
        setattr(h, _ROUTED, tokens)
        y: Tensor = layers["down"](h)
        return fused.post_expert_norm(y) if fused.has_post_expert_norm else y

    def fused(self) -> nn.Module:
        """The module of transformers again, of these numbers.

        Raises:
            ValueError: an expert is a sum of terms.
        """
        fused: Any = self._fused[0]
        if self.has_sums():
            raise ValueError("an expert is a sum of terms")
        for leaf in _leaves(fused):
            layers: list[Any] = [self.get_submodule(f"{i}.{_short(leaf)}") for i in range(self.num_experts)]
            weight = torch.stack([layer.weight.detach() for layer in layers])
            weight = weight.mT.contiguous() if fused.is_transposed else weight
            trained = layers[0].weight.requires_grad
            fused.register_parameter(leaf, nn.Parameter(weight, requires_grad=trained))
            if fused.has_bias:
                bias = torch.stack([layer.bias.detach() for layer in layers])
                fused.register_parameter(f"{leaf}_bias", nn.Parameter(bias, requires_grad=trained))
        return fused  # type: ignore[no-any-return]

    def has_sums(self) -> bool:
        """Whether a layer of an expert is a sum of terms."""
        return any(isinstance(module, SumLinear) for module in self.modules())


def open_experts(model: nn.Module, wanted: Callable[[str], bool] = lambda layer: True) -> None:
    """Set `Experts` in the place of every fused module of which a layer is wanted, by the name that it then has.

    Raises:
        WeftError: accelerate keeps the weights elsewhere between forward passes.
    """
    for path, module in list(model.named_modules()):
        if path and _is_fused(module) and any(map(wanted, _names(path, module))):
            check_at_hand(model, [path])
            _swap(model, path, module, Experts(module))


def fuse(model: nn.Module) -> None:
    """Give back transformers' own modules of experts wherever no layer of theirs is a sum of terms."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts) and not module.has_sums():
            _swap(model, path, module, module.fused())


def expert_layers(model: nn.Module, layers: Iterable[str]) -> set[str]:
    """Those of the layers that belong to an expert, which sees the tokens that are routed to it alone."""
    paths = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Experts))
    return {layer for layer in layers if paths and layer.startswith(paths)}


def names_an_expert(layer: str) -> bool:
    """Whether a layer's name is one that `open_experts` gives."""
    return bool(re.search(r"\bexperts\.\d+\.(gate_up|up|down)$", layer))


def within_experts(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb that may open a model's experts, and leaves open those alone that then hold sums of terms; what it calls
    of the same sort leaves them as they are. The model is its first argument, or `model`.
    """

    @functools.wraps(verb)
    def settled(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs["model"]
        outermost = model not in _OPEN
        _OPEN.append(model)
        try:
            return verb(*args, **kwargs)
        finally:
            _OPEN.remove(model)
            if outermost:
                fuse(model)

    return settled


_OPEN: list[nn.Module] = []
"""The models on which such verbs are at work."""


def _is_fused(module: nn.Module) -> bool:
    """Whether this is a module of experts as transformers decorates them, and holds nothing else."""
    if isinstance(module, Experts) or any(getattr(module, field, None) is None for field in _FIELDS):
        return False
    leaves = _leaves(module)
    wanted = {*leaves, *(f"{leaf}_bias" for leaf in leaves if module.has_bias)}
    stacks = [module._parameters.get(leaf) for leaf in leaves]
    return (
        module._parameters.keys() == wanted
        and not module._buffers
        and not getattr(module, "_is_expert_parallel", False)
        and all(type(p) is nn.Parameter and p.dim() == 3 and p.is_floating_point() for p in stacks)
    )


def _leaves(fused: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


def _short(leaf: str) -> str:
    """The name of an expert's layer, which transformers' loader does not take for a part of a checkpoint to be fused:
    that is what `experts.3.down_proj.weight` is to it.
    """
    return leaf.removesuffix("_proj")


def _names(path: str, fused: nn.Module) -> Iterator[str]:
    for index in range(int(fused.num_experts)):  # type: ignore[arg-type]
        yield from (f"{path}.{index}.{_short(leaf)}" for leaf in _leaves(fused))


def _unstacked(fused: nn.Module, leaf: str) -> list[nn.Linear]:
    """A linear layer for each matrix of a stack, of memory of its own."""
    stack, biases = fused._parameters[leaf], fused._parameters.get(f"{leaf}_bias")
    assert stack is not None
    made = []
    for index, matrix in enumerate(stack.detach()):
        matrix = matrix.mT if fused.is_transposed else matrix
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=biases is not None, device="meta")
        layer.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format), stack.requires_grad)
        if biases is not None:
            layer.bias = nn.Parameter(biases.detach()[index].clone(), biases.requires_grad)
        made.append(layer)
    return made


def _swap(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    carry_hooks(old, new)
    model.set_submodule(path, new)
