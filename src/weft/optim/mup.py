"""Width scaling: learning rates, weight decay and initial sizes that carry from a narrow model to a wide one.

Every weight gets its own factors from how its shape differs from the same weight in a narrow *base* model
(m_in = fan_in / base fan_in, m_out = fan_out / base fan_out):

    kind                                        initial size    Adam lr    SGD lr          weight decay ("sqrt")
    vector: embedding, bias, norm gain          1               1          m_out           0
    hidden: every other matrix                  1/sqrt(m_in)    1/m_in     m_out / m_in    d^(2p - 1)
    output: the head                            1/m_in          1/m_in     1/m_in          0

with d the ratio of the models' widths. At base width every factor is 1 and training is the standard one, bit for bit.

Sources: muP, Yang and Hu, 2020, arXiv 2011.14522, in the form of Tensor Programs V's table 3 (arXiv 2203.03466), which
needs no multiplier in the forward pass, so the model stays an ordinary one; weight decay after Fan et al., 2025, arXiv
2510.15262.
Deviations: tied embeddings are refused (that form cannot express them). The head counts as vector-like for weight
decay, where the paper's summary is silent. Keep the size of an attention head the same in both models: with a growing
one, muP divides the logits by its size and not its root, which no weight's factor can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.errors import WeftError

__all__ = ["Width", "mup_groups", "scale_init_", "widths"]


@dataclass(frozen=True)
class Width:
    """How much wider a weight is than in the base model."""

    kind: Literal["vector", "hidden", "output"]
    m_in: float
    m_out: float

    @property
    def init(self) -> float:
        """Factor of the initial standard deviation."""
        if self.kind == "vector":
            return 1.0
        return self.m_in**-0.5 if self.kind == "hidden" else 1.0 / self.m_in

    def lr(self, rule: Literal["adam", "sgd"]) -> float:
        """Factor of the learning rate, for steps of fixed size an entry (Adam, Lion, sign) or proportional (SGD)."""
        narrow = 1.0 if self.kind == "vector" else 1.0 / self.m_in
        wide = self.m_out if rule == "sgd" and self.kind != "output" else 1.0
        return narrow * wide


def widths(model: nn.Module, base: nn.Module) -> dict[str, Width]:
    """Each parameter's `Width`, by name. `base` is the narrow model; it may live on the meta device.

    Raises WeftError for models of other layers, tied weights, and matrices that grow only on their input side without
    being the head (their output would grow with width and no rule mends it).
    """
    shapes = {name: shape for name, _, shape in _oriented(base)}
    own = {name: shape for name, _, shape in _oriented(model)}
    if set(shapes) != set(own) or any(len(shapes[name]) != len(own[name]) for name in own):
        strange = sorted(set(shapes) ^ set(own)) or ["the number of dimensions"]
        raise WeftError(
            f"The base model differs in more than width ({strange[0]}); give the same architecture, narrower."
        )
    _refuse_tied(model)
    head = _head_weight(model)
    embeddings = {name for name, is_embedding, _ in _oriented(model) if is_embedding}
    kinds = {name: "output" if name == head else "vector" if name in embeddings else "hidden" for name in own}
    return {name: _width(name, kinds[name], shapes[name], own[name]) for name in own}


def mup_groups(
    model: nn.Module,
    base: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    rule: Literal["adam", "sgd"] = "adam",
    decay: Literal["sqrt", "independent", "fixed"] = "sqrt",
    exponent: float = 0.75,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, one for each pair of rates; frozen parameters are left out.

    Args:
        base: the narrow model that `lr` and `weight_decay` were tuned on.
        weight_decay: of hidden matrices, decoupled and multiplied by lr as in `torch.optim.AdamW`. For an optimizer
            whose decay ignores lr, the factor of "sqrt" would be d^-1/2.
        rule: "adam" for steps of fixed size an entry (Adam, Lion, sign), "sgd" for steps proportional to the gradient.
        decay: "sqrt": times d^(2 * exponent - 1), which keeps the largest singular value equal at all widths, and none
            for vectors and the head. "independent": times m_in, so that lr * weight_decay is fixed. "fixed": as is.
        exponent: p, of the growth of the largest singular value with width at fixed lr / weight_decay (0.5 without
            signal, 0.75 observed in trained transformers).
    """
    found = widths(model, base)
    ratio = _global_ratio(found)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            width = found[name]
            rates = lr * width.lr(rule), weight_decay * _decay(width, decay, ratio, exponent)
            groups.setdefault(rates, []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": wd} for (rate, wd), params in groups.items()]


@torch.no_grad()
def scale_init_(model: nn.Module, base: nn.Module) -> None:
    """Scale freshly drawn weights of one standard deviation at every width (transformers' `initializer_range`)."""
    found = widths(model, base)
    for name, parameter in model.named_parameters():
        parameter.mul_(found[name].init)


def _decay(width: Width, decay: str, ratio: float, exponent: float) -> float:
    if decay == "sqrt":
        return ratio ** (2.0 * exponent - 1.0) if width.kind == "hidden" else 0.0
    return width.m_in if decay == "independent" and width.kind != "vector" else 1.0


def _global_ratio(found: Mapping[str, Width]) -> float:
    """d: the ratio of the residual stream, which is the fan-out of the embedding or else of the first vector."""
    return next((width.m_out for width in found.values() if width.kind == "vector"), 1.0)


def _width(name: str, kind: str, base: tuple[int, ...], own: tuple[int, ...]) -> Width:
    """Of an (out, in, ...) weight, or a vector (out,)."""
    ratios = [ours / theirs for ours, theirs in zip(own, base, strict=True)]
    if any(ratio < 1.0 for ratio in ratios):
        raise WeftError(f"{name} is {own} here and {base} in the base model; the base must be the narrower one.")
    if len(ratios) < 2 or kind == "vector":
        return Width("vector", 1.0, math.prod(ratios[:1]))
    m_out, m_in = ratios[0], math.prod(ratios[1:])
    if kind == "output":
        return Width("output", m_in, m_out)
    if m_in > 1.0 and m_out == 1.0:
        raise WeftError(
            f"{name} grows from {base} to {own} only on its input side and is not the head; muP has no rule for it: "
            "let its output grow too, or keep it out of the model."
        )
    return Width("hidden", m_in, m_out)


def _oriented(model: nn.Module) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """(name, whether it is an embedding, shape as (out, in)): embeddings and `Conv1D` store weights (in, out)."""
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        owner = owners[id(parameter)]
        is_embedding = isinstance(owner, nn.Embedding)
        turned = parameter.dim() == 2 and (is_embedding or type(owner).__name__ == "Conv1D")
        yield name, is_embedding, tuple(parameter.shape[::-1] if turned else parameter.shape)


def _refuse_tied(model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    unique = {name for name, _ in model.named_parameters()}
    tied = [name for name in names if name not in unique]
    if tied:
        raise WeftError(f"{tied[0]} is tied to another weight; width scaling needs tie_word_embeddings=False.")


def _head_weight(model: nn.Module) -> str | None:
    """The name of the output head's weight: of transformers' output embeddings, or the last linear layer."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = head if isinstance(head, nn.Module) else (linears[-1] if linears else None)
    weight = None if head is None else head._parameters.get("weight")
    return next((name for name, p in model.named_parameters() if p is weight), None)
