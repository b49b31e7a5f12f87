"""Experts: those of a mixture as plain linear layers, where transformers holds all of them in one tensor a matrix.

    experts.gate_up_proj (E, 2 I, H)        ->   experts.0.gate_up (2 I, H), experts.1.gate_up, ...
    experts.down_proj    (E, H, I)          ->   experts.0.down    (H, I),   experts.1.down, ...

Every verb then sees an expert's matrix as it sees any linear layer: it is calibrated by the tokens that were routed to
it, compressed, quantised, adapted and saved by itself. A model's experts are opened when a layer of theirs is asked
for, and fused again, to the class and the parameters that they were, as soon as none of them is a sum of terms.

`weft.terms.expert_stacks` says how the tensors lie in which class; other classes are left as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from weft.terms.expert_stacks import is_sorted, stacks_of
from weft.terms.hooks import carry_hooks, check_at_hand
from weft.terms.sum_linear import SumLinear

__all__ = [
    "Experts",
    "Routed",
    "biased_experts",
    "expert_layers",
    "fuse",
    "names_an_expert",
    "open_experts",
    "routed",
    "within_experts",
]

_ROUTED = "_weft_routed"

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
    """The experts of one mixture, `<number>.gate_up` and `<number>.down` (`<number>.up` where nothing gates,
    `<number>.gate` and `<number>.up` where they lie apart), computing what the class of transformers does.

    Args:
        fused: the module of transformers; it is emptied, and kept to be filled again by `fused`.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = int(fused.num_experts)  # type: ignore[arg-type]
        self._fused, self._stacks = [fused], stacks_of(fused)  # in a list: no submodule
        for name, child in fused.named_children():
            setattr(self, name, child)
        layers = {stack.short: stack.unstacked() for stack in self._stacks}
        for index in range(self.num_experts):
            self.add_module(str(index), nn.ModuleDict({short: rows[index] for short, rows in layers.items()}))
        for stack in self._stacks:
            (self if stack.owner is fused else stack.owner).register_buffer(stack.leaf, stack.empty())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (..., H) of all tokens, the chosen experts and their weights (tokens, k) -> (..., H)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(tokens)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:  # stands for an expert that another process holds
                continue
            rows, places = (top_k_index == index).nonzero(as_tuple=True)
            y = self._expert(index, tokens[rows], Routed(rows, len(tokens)))
            total.index_add_(0, rows, (y * top_k_weights[rows, places, None]).to(total.dtype))
        return total.view_as(hidden_states)

    def _expert(self, index: int, x: Tensor, tokens: Routed) -> Tensor:
        fused: Any = self._fused[0]
        layers: Any = self.get_submodule(str(index))
        setattr(x, _ROUTED, tokens)
        h: Tensor = self._gated(layers, x)
        setattr(h, _ROUTED, tokens)
        y: Tensor = layers["down"](h)
        return fused.post_expert_norm(y) if getattr(fused, "has_post_expert_norm", False) else y

    def _gated(self, layers: Any, x: Tensor) -> Tensor:
        """What goes into `down`."""
        fused: Any = self._fused[0]
        if "gate" in layers:
            return cast(Tensor, fused.mlp.activation_fn(layers["gate"](x)) * layers["up"](x))
        return cast(
            Tensor, fused._apply_gate(layers["gate_up"](x)) if fused.has_gate else fused.act_fn(layers["up"](x))
        )

    def fused(self) -> nn.Module:
        """The module of transformers again, of these numbers.

        Raises:
            ValueError: an expert is a sum of terms.
        """
        if self.has_sums():
            raise ValueError("an expert is a sum of terms")
        for stack in self._stacks:
            stack.fill([self.get_submodule(f"{index}.{stack.short}") for index in range(self.num_experts)])
        return self._fused[0]

    def has_sums(self) -> bool:
        """Whether a layer of an expert is a sum of terms."""
        return any(isinstance(module, SumLinear) for module in self.modules())


class SortedExperts(Experts):
    """Experts that are called with all tokens once for each of them, scaled, and zeros where they are not routed."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (experts * tokens, H) -> the same."""
        shares = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        results = torch.zeros_like(shares)
        for index, x in enumerate(shares):
            (rows,) = x.any(-1).nonzero(as_tuple=True)
            if len(rows):
                y = self._expert(index, x[rows], Routed(rows, len(x)))
                results[index].index_add_(0, rows, y.to(results.dtype))
        return results.view_as(hidden_states)

    def _gated(self, layers: Any, x: Tensor) -> Tensor:
        gate, up = layers["gate_up"](x).chunk(2, dim=-1)
        return cast(Tensor, up * cast(Any, self._fused[0]).act_fn(gate))


def open_experts(model: nn.Module, wanted: Callable[[str], bool] = lambda layer: True) -> None:
    """Set `Experts` in the place of every fused module of which a layer is wanted, by the name that it then has.

    Raises:
        WeftError: accelerate keeps the weights elsewhere between forward passes.
    """
    for path, module in list(model.named_modules()):
        if path and any(map(wanted, _names(path, module))):
            check_at_hand(model, [path])
            _swap(model, path, module, (SortedExperts if is_sorted(module) else Experts)(module))


def fuse(model: nn.Module) -> None:
    """Give back transformers' own modules of experts wherever no layer of theirs is a sum of terms."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts) and not module.has_sums():
            _swap(model, path, module, module.fused())


def expert_layers(model: nn.Module, layers: Iterable[str]) -> set[str]:
    """Those of the layers that belong to an expert, which sees the tokens that are routed to it alone."""
    paths = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Experts))
    return {layer for layer in layers if paths and layer.startswith(paths)}


def biased_experts(model: nn.Module) -> set[str]:
    """The layers of opened experts that have a bias in transformers' tensors too."""
    return {
        f"{path}.{index}.{stack.short}"
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for stack in module._stacks
        if stack.bias
        for index in range(module.num_experts)
    }


def names_an_expert(layer: str) -> bool:
    """Whether a layer's name is one that `open_experts` gives."""
    return bool(re.search(r"\bexperts\.\d+\.(gate_up|gate|up|down)$", layer))


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


def _names(path: str, module: nn.Module) -> Iterator[str]:
    """The names of an expert's layers that a module has once it is opened."""
    for stack in () if isinstance(module, Experts) else stacks_of(module):
        yield from (f"{path}.{index}.{stack.short}" for index in range(stack.number))


def _swap(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    carry_hooks(old, new)
    model.set_submodule(path, new)
