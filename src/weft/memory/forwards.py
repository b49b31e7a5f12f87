"""The lean forward of each kind of module: the same values, fewer tensors kept for backward.

A forward is a function (module, *args, **kwargs), put on an instance by `LeanForward`. Each falls back to the class's
own forward for calls it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.lean_linear import linear
from weft.kernels.recompute import recompute, source_of
from weft.memory.logits import Logits, Taught
from weft.terms import SumLinear

__all__ = [
    "LeanForward",
    "causal_lm",
    "elementwise",
    "fused_gated_mlp",
    "gated_mlp",
    "has_open_head",
    "loss_alone",
    "original",
    "plain_linear",
    "promising",
    "sum_linear",
]


class LeanForward:
    """The `forward` attribute of one module instance, in the way of its class's own: deep-copied and pickled with the
    module.

    Outside of training, and under torch.compile, whose partitioner recomputes what is cheap by itself, it is the
    class's own forward.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return original(self.module, *args, **kwargs)
        return self.run(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # trainers read the model's argument names from it
        return inspect.signature(type(self.module).forward.__get__(self.module))


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class."""
    return type(module).forward(module, *args, **kwargs)


def elementwise(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A norm or an activation: keeps its input."""
    if args or kwargs:
        return original(module, x, *args, **kwargs)
    return recompute(partial(original, module), (x,), tuple(module.parameters()))


def gated_mlp(module: Any, x: Tensor) -> Any:
    """down(act(gate(x)) * up(x)): keeps gate and up."""
    act = module.act_fn
    if act._forward_hooks:  # whoever watches the activation wants it in the graph
        return original(module, x)
    return module.down_proj(
        recompute(partial(_gate, act), (module.gate_proj(x), module.up_proj(x)), tuple(act.parameters()))
    )


def fused_gated_mlp(module: Any, x: Tensor) -> Any:
    """down(up * act(gate)) with gate, up = gate_up(x): keeps gate_up."""
    act = module.activation_fn
    if act._forward_hooks:
        return original(module, x)
    return module.down_proj(recompute(partial(_gate_halves, act), (module.gate_up_proj(x),), tuple(act.parameters())))


def plain_linear(module: Any, x: Tensor) -> Any:
    """A trained nn.Linear or Conv1D: keeps what its input is made from."""
    weight = module.weight
    if not weight.requires_grad or source_of(x).recipe is None:
        return original(module, x)
    return linear(x, weight if isinstance(module, nn.Linear) else weight.mT, module.bias)


def sum_linear(module: SumLinear, x: Tensor) -> Any:
    """A sum of terms: keeps x once for the base and all low-rank and sparse terms; further ones keep what they keep."""
    fused = module.fused(x)  # keeps x, or what it is made from, once for all terms already
    if fused is not None:
        return fused
    first, *rest = module._terms()
    weight, found = first.lean_weight(), [term.lean_parts() for term in rest]
    own = (first.lean_parts() or []) if weight is None else []
    if weight is None and not own:
        return original(module, x)
    parts = [*own, *(part for of_term in found for part in of_term or ())]
    y = linear(x, weight, module.bias, parts)
    for term, of_term in zip(rest, found, strict=True):
        y = y if of_term is not None else y + term(x)
    return y


def causal_lm(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A language model in training: `loss_alone`."""
    return loss_alone(module, *args, **kwargs) if module.training else original(module, *args, **kwargs)


def loss_alone(module: Any, *args: Any, taught: Taught | None = None, **kwargs: Any) -> Any:
    """A language model given labels: the loss without the logits, `logits` None in the output."""
    if kwargs.get("labels") is None or not has_open_head(module):
        return original(module, *args, **kwargs)
    with promising(module, taught):
        output = original(module, *args, **kwargs)
    if isinstance(output, tuple):
        return tuple(item.tensor() if isinstance(item, Logits) else item for item in output)
    return type(output)(**{key: value for key, value in output.items() if not isinstance(value, Logits)})


def has_open_head(module: Any) -> bool:
    """Whether the output head is a linear layer of known width that nobody watches, its weight at hand outside of its
    own forward.
    """
    head = module.get_output_embeddings()
    watched = head is not None and bool(head._forward_hooks or head._forward_pre_hooks)
    return getattr(head, "out_features", None) is not None and "FSDP" not in type(head).__name__ and not watched


@contextmanager
def promising(module: Any, taught: Taught | None = None) -> Iterator[None]:
    """The output head of a language model gives `Logits` within the block, with what is learned of a teacher's."""
    head = module.get_output_embeddings()
    before = head.__dict__.get("forward")
    head.forward = partial(_promise, head, before or partial(original, head), taught)
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _gate(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = original(act, gate) * up
    return product


def _gate_halves(act: nn.Module, gate_up: Tensor) -> Tensor:
    return _gate(act, *gate_up.chunk(2, dim=-1))


def _promise(head: Any, forward: Callable[[Tensor], Tensor], taught: Taught | None, hidden: Tensor) -> Logits:
    trained = [p for p in head.parameters() if p.requires_grad]
    weight = head.weight if isinstance(head, nn.Linear) and head.bias is None else None
    return Logits(hidden, forward, trained, head.out_features, weight, taught=taught)
