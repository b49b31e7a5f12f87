"""Layer-wise relevance propagation as one backward pass: gradient times input, where what bends is held still.

    norms, activations    y = x * s with s = y / x held still, so that relevance passes entry by entry; of a norm that
                          subtracts the mean, y = w (x - mean x) / std x + b with the std held still
    gate * up             half of the relevance to each
    attention             its probabilities held still: queries and keys get none
    linear layers         R_i = sum_j x_i w_ij R_j / y_j  (epsilon to 0), the plain gradient; biases take theirs

R = x dS/dx then keeps its sum from layer to layer, where there are no biases; S is the sum of the true tokens' logits.
The rules of transformers are those of CP-LRP for norms and attention (Ali et al., 2022), of AttnLRP for products with a
gate (Achtibat et al., 2024, arXiv 2402.05602, which sends relevance through the softmax too); those of linear layers of
Bach et al., 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.stats.streams import is_encoder_decoder
from weft.terms.joints import Joint, joints
from weft.terms.layers import eligible

__all__ = ["relevance_rules", "score", "unit_scores"]

Hook = Callable[..., Any]


@contextmanager
def relevance_rules(model: nn.Module) -> Iterator[None]:
    """Backward passes propagate relevance; what the model gives stays the same."""
    with ExitStack() as stack:
        for module, hook in _rules(model):
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def score(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The mean of the true tokens' logits, and over how many it is a mean."""
    logits, labels = model(**batch).logits, batch.get("labels", batch.get("input_ids"))
    assert labels is not None
    mask = batch.get("attention_mask")
    if "labels" not in batch and mask is not None:
        labels = labels.masked_fill(mask == 0, -100)
    if logits.dim() == 3 and not is_encoder_decoder(model) and logits.shape[:2] == labels.shape:
        logits, labels = logits[:, :-1], labels[:, 1:]
    there = labels != -100
    return logits[there].gather(-1, labels[there].unsqueeze(-1)).mean(), int(there.sum())


def unit_scores(joint: Joint, relevance: Tensor) -> Tensor:
    """Scores of a joint's units (groups, width), of sum 1, from E|R| (in,) of its reader's inputs: a group is an MLP,
    or a value head with all its queries.
    """
    found = relevance.view(joint.groups, -1, joint.width).sum(1)
    return found / found.sum()


def _rules(model: nn.Module) -> Iterator[tuple[nn.Module, Hook]]:
    gated = {}  # module of a gated MLP -> the layer that writes what is gated, and what halves its relevance
    for joint in joints(model, list(eligible(model))):
        *_, writer, _ = joint.members.values()
        if joint.kind == "mlp" and (len(joint.members) == 3 or writer.copies == 2):
            parent, _, own = writer.layer.rpartition(".")
            gated[parent] = own, _half if writer.copies == 1 else _half_of_the_last
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if "norm" in type(module).__name__.lower():
            yield module, _normed
        elif _bends(module):
            yield module, _held
            if parent in gated:
                yield module, _half
        elif parent in gated and own == gated[parent][0]:
            yield module, gated[parent][1]
        elif own in ("q_proj", "k_proj"):
            yield module, lambda module, args, output: output.detach()


def _bends(module: nn.Module) -> bool:
    return type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")


def _held(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """y, with y / x for the gradient."""
    x = args[0]
    with torch.no_grad():
        slope = torch.where(x == 0, 0, output / torch.where(x == 0, 1, x))
    return output.detach() + (x - x.detach()) * slope


def _normed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """y, with the gradient of a norm of which the scale is held, and the mean that it may subtract is not."""
    x = args[0].detach()
    with torch.no_grad():
        moved: Any = module.forward(x + x.abs().amax(-1, keepdim=True), *args[1:])
        subtracts_mean = bool((moved - output).abs().amax() <= output.abs().amax() / 100)
    if not subtracts_mean:
        return _held(module, args, output)
    bias = getattr(module, "bias", None)
    plain = output if bias is None else output - bias
    held: Tensor = _HeldScale.apply(args[0], output, plain.detach())  # type: ignore[no-untyped-call]
    return held


class _HeldScale(torch.autograd.Function):
    """The output of y = w (x - mean x) / std x + b as it is. The whole gradient of x lacks, beside that for a std that
    is held, c <y - b, dy> / <c, c> with c = x - mean x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, plain: Tensor) -> Tensor:
        ctx.save_for_backward(x - x.mean(-1, keepdim=True), plain)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        c, plain = ctx.saved_tensors
        size = c.square().sum(-1, keepdim=True)
        along = (plain * grad).sum(-1, keepdim=True) / torch.where(size == 0, 1, size)
        return c * along, grad, None


def _half(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output / 2 + (output / 2).detach()


def _half_of_the_last(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Of a gate and what it gates in one."""
    gate, up = output.chunk(2, dim=-1)
    return torch.cat([gate, _half(module, args, up)], dim=-1)
