"""lora-limits: how large the entries are that decide whether attention, and LoRA's gradient through it, could be
approximated in almost linear time (Hu et al., 2024, arXiv 2406.03136).

    query_max = max |q_ij|,  key_max = max |k_ij|       after rotary embeddings, over the tokens of a text
    logit_bound = max |q_i . k_j| scale                 over the keys j that query i sees, and the heads of a layer
    degree = least n with |exp(x) - sum_{m <= n} x^m / m!| <= 5 % of exp(x) on [-b, b], b of the layer's mildest head

A softmax of small logits is a polynomial of low degree, hence a product of few features; below entries of the order of
sqrt(ln L), L tokens, almost linear algorithms exist, and above it none does. That is a limit without constants: exact
attention is faster at any length met in practice. The figures tell which heads are mild enough for kernel attention,
and their growth in fine-tuning tells of too large a rate.

Deviations: the paper gives no code; the criterion is read off its abstract. Maxima alone, streamed by blocks of
queries, with those of a text's first token, which often are far larger, apart; what an adapter adds is not told from
its base.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures.base import Measure
from weft.signals import stop_here
from weft.stats.calibrate import Batch, forward_inputs, frozen, to_device
from weft.terms.layers import is_linear

__all__ = ["MEASURE", "Seen", "degree", "value"]

_NAME = "weft_lora_limits"
_BLOCK = 256  # queries whose logits are in memory at once
_MILD = 1.0  # a bound on logits below which a polynomial of a few degrees serves


class Seen:
    """The largest numbers of one attention layer so far; logits by head."""

    def __init__(self) -> None:
        self.query = self.key = 0.0
        self.all: Tensor | None = None  # (heads,)
        self.rest: Tensor | None = None  # without the first token as a key

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> None:
        """Queries (batch, heads, L, d), keys (batch, groups, T, d), and what is added to their logits (..., L, T)."""
        self.query, self.key = max(self.query, float(q.abs().amax())), max(self.key, float(k.abs().amax()))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
        for start in range(0, q.shape[2], _BLOCK):
            logits = (q[:, :, start : start + _BLOCK].float() @ k.mT).abs() * scale
            if mask is not None:
                part = mask[..., start : start + _BLOCK, : k.shape[2]]
                logits = logits.masked_fill(part <= torch.finfo(part.dtype).min / 2, 0)
            self.all = _larger(self.all, logits.amax((0, 2, 3)))
            if k.shape[2] > 1:
                self.rest = _larger(self.rest, logits[..., 1:].amax((0, 2, 3)))

    def figures(self) -> dict[str, float]:
        """Those of the layer."""
        assert self.all is not None
        rest = self.all if self.rest is None else self.rest
        return {
            "query_max": self.query,
            "key_max": self.key,
            "logit_bound": float(self.all.max()),
            "logit_bound_rest": float(rest.max()),
            "mild_heads": float((self.all <= _MILD).double().mean()),
            "degree": degree(float(self.all.min())),
        }


def _larger(so_far: Tensor | None, now: Tensor) -> Tensor:
    return now if so_far is None else torch.maximum(so_far, now)


def degree(bound: float, error: float = 0.05) -> int:
    """The degree of Taylor's polynomial of exp at 0 that is within a relative error on [-bound, bound]."""
    total = term = 1.0
    n, exact = 0, math.exp(-min(bound, 700.0))
    while abs(total - exact) > error * exact and n < 10_000:  # the left end is the worst
        n += 1
        term *= -bound / n
        total += term
    return n


@torch.no_grad()
def value(model: Any, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """{first layer of each attention: figures, "": {"logits_largest", "mild_heads_share", "logits_limit"}}.

    Raises WeftError where the model's attention cannot be watched.
    """
    seen: dict[nn.Module, Seen] = defaultdict(Seen)
    longest = 1
    with frozen(model), _watched(model, seen):
        for batch in batches:
            batch = to_device(batch, model)
            longest = max(longest, batch["input_ids"].shape[1])
            model(**forward_inputs(model, batch))
            stop_here()
    names = {module: name for name, module in model.named_modules()}
    found = {_first_layer(names[module], module): one.figures() for module, one in seen.items()}
    if not found:
        raise WeftError(f"The attention of {type(model).__name__} cannot be watched: leave this measure out.")
    return {**found, "": _summary(found, seen, longest)}


def _summary(
    found: Mapping[str, Mapping[str, float]], seen: Mapping[nn.Module, Seen], longest: int
) -> dict[str, float]:
    heads = torch.cat([one.all for one in seen.values() if one.all is not None])
    return {
        "logits_largest": max(row["logit_bound"] for row in found.values()),
        "mild_heads_share": float((heads <= _MILD).double().mean()),
        "logits_limit": math.sqrt(math.log(longest)),
    }


def _first_layer(name: str, module: nn.Module) -> str:
    """The name of an attention's first linear layer, in whose row its figures stand."""
    inner = next((child for child, layer in module.named_modules() if is_linear(layer)), "")
    return f"{name}.{inner}" if inner else name


@contextmanager
def _watched(model: Any, seen: dict[nn.Module, Seen]) -> Iterator[None]:
    """Let the model's attention tell what it multiplies."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> Any:
        scale = given.get("scaling") or query.shape[-1] ** -0.5
        seen[module].add(query, key, attention_mask, float(scale))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)

    exchanges = getattr(model, "_can_set_attn_implementation", None)
    if exchanges is None or not exchanges():
        raise WeftError(f"The attention of {type(model).__name__} cannot be watched: leave this measure out.")
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


MEASURE = Measure(
    name="lora-limits",
    summary="Largest entries of queries, keys and logits: which heads polynomial attention could serve.",
    paper="Hu et al., 2024, arXiv 2406.03136",
    value=value,
    of="model",
    reads={
        "query_max": "largest entry of a query; its growth in training tells of too large a rate",
        "key_max": "largest entry of a key",
        "logit_bound": "largest logit; above some 4 only exact attention serves",
        "logit_bound_rest": "the same without the first token, to which many heads attend for want of another",
        "mild_heads": "share of the heads with logits up to 1",
        "degree": "of the polynomial that the mildest head needs; 2 is cheap, 4 is not",
    },
    reads_model={
        "logits_largest": "largest logit of all heads",
        "mild_heads_share": "share of all heads with logits up to 1: candidates for kernel attention",
        "logits_limit": "sqrt(ln L), the order beyond which no almost linear algorithm exists",
    },
    cost="a forward pass over the data, and the logits of every head by blocks",
)
