"""How transformers' classes of experts hold their matrices: one tensor a matrix, for all experts of a mixture.

    experts.gate_up_proj (E, 2 I, H), experts.down_proj (E, H, I)

in the classes that `use_experts_implementation` decorates, whose fields say whether they are transposed, biased, gated;
the same transposed in Llama 4, which calls them with all tokens for each expert; and in DBRX

    experts.mlp.w1, experts.mlp.v1, experts.mlp.w2 (E I, H)

the gate, up, and down transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Stack", "is_sorted", "stacks_of"]

_FIELDS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts", "_apply_gate")
"""What the decorator gives a class of experts."""
_SORTED = "Llama4TextExperts"
_GLUED, _GLUED_OWNER = "DbrxExperts", "DbrxExpertGLU"


class Stack(NamedTuple):
    """One tensor of all experts.

    Args:
        owner: the module whose parameter it is.
        leaf: the parameter's name.
        short: the name of an expert's layer. transformers' loader would take the parameter's own for a part of a
            checkpoint to be fused: that is what `experts.3.down_proj.weight` is to it.
        transposed: whether a matrix of it is (in, out).
        bias: whether there are biases, as the parameter `<leaf>_bias`.
        number: of experts.
    """

    owner: nn.Module
    leaf: str
    short: str
    transposed: bool
    bias: bool
    number: int

    @property
    def tensor(self) -> nn.Parameter | None:
        """The parameter, while it is there."""
        return self.owner._parameters.get(self.leaf)

    def unstacked(self) -> list[nn.Linear]:
        """A linear layer for each expert, of memory of its own."""
        stack, biases = self.tensor, self.owner._parameters.get(f"{self.leaf}_bias")
        assert stack is not None
        made = []
        for index, matrix in enumerate(stack.detach().view(self.number, -1, stack.shape[-1])):
            matrix = matrix.mT if self.transposed else matrix
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=biases is not None, device="meta")
            layer.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format), stack.requires_grad)
            if biases is not None:
                layer.bias = nn.Parameter(biases.detach()[index].clone(), biases.requires_grad)
            made.append(layer)
        return made

    def empty(self) -> Tensor:
        """Let go of the tensor; what stays in its place: one of its own rank and of ones in size, so that a loader that
        knows nothing of weft finds the wrong shape and refuses.
        """
        stack = self.owner._parameters.pop(self.leaf)
        assert stack is not None
        self.owner._parameters.pop(f"{self.leaf}_bias", None)
        fused = (1, 2) if self.transposed else (2, 1)  # of gate_up, as mixtures lie on disk since they are supported
        sizes = {2: (1, 1), 3: (1, *(fused if self.short == "gate_up" else (1, 1)))}[stack.dim()]
        return torch.zeros(sizes, dtype=stack.dtype, device=stack.device)

    def fill(self, layers: list[Any]) -> None:
        """The parameter again, of the layers' numbers."""
        weight = torch.stack([layer.weight.detach() for layer in layers])
        weight = weight.mT.contiguous() if self.transposed else weight
        weight = weight.flatten(0, 1) if _glued(self.owner) else weight
        trained = layers[0].weight.requires_grad
        self.owner._buffers.pop(self.leaf, None)
        self.owner.register_parameter(self.leaf, nn.Parameter(weight, requires_grad=trained))
        if self.bias:
            bias = torch.stack([layer.bias.detach() for layer in layers])
            self.owner.register_parameter(f"{self.leaf}_bias", nn.Parameter(bias, requires_grad=trained))


def stacks_of(module: nn.Module) -> list[Stack]:
    """The tensors of a module of experts as transformers made it, where it holds nothing else; else none."""
    found = _named(module)
    if not found or getattr(module, "_is_expert_parallel", False):
        return []
    owner = found[0].owner
    wanted = {stack.leaf for stack in found} | {f"{stack.leaf}_bias" for stack in found if stack.bias}
    whole = all(
        type(stack.tensor) is nn.Parameter
        and stack.tensor.dim() == (2 if _glued(owner) else 3)
        and stack.tensor.is_floating_point()
        for stack in found
    )
    return found if owner._parameters.keys() == wanted and not owner._buffers and whole else []


def is_sorted(module: nn.Module) -> bool:
    """Whether the module is called with all tokens for each expert in turn, zeros where they are not routed there."""
    return type(module).__name__ == _SORTED


def _glued(owner: nn.Module) -> bool:
    return type(owner).__name__ == _GLUED_OWNER


def _named(module: Any) -> list[Stack]:
    name, count = type(module).__name__, int(getattr(module, "num_experts", 0))
    if name == _GLUED:
        places = {"w1": ("gate", False), "v1": ("up", False), "w2": ("down", True)}
        return [Stack(module.mlp, leaf, short, turned, False, count) for leaf, (short, turned) in places.items()]
    if is_sorted(module):
        return [Stack(module, f"{short}_proj", short, True, False, count) for short in ("gate_up", "down")]
    if any(getattr(module, field, None) is None for field in _FIELDS):
        return []
    shorts = ("gate_up" if module.has_gate else "up"), "down"
    return [Stack(module, f"{s}_proj", s, module.is_transposed, module.has_bias, count) for s in shorts]
