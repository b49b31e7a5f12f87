"""NTK-Attention: train what an endless prefix would do to each attention head, d^2 + d numbers a head (2024, arXiv
2406.14036).

Every attention layer gets Z (heads, d, d) and z (heads, d); the formula is in `weft.kernels.prefix_attention`. One pair
for each query head, on the queries as the attention sees them (after rotary embedding); Z and z are constants, so
decoding with a key-value cache is exact. It cannot be merged into weights and no other library reads it. The attention
is the plain one, which builds its L x T matrix.
Deviations: none in the function; the start is the published normal / 10^4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.grafts.attention import exchangeable
from weft.grafts.base import Graft
from weft.kernels.prefix_attention import prefix_attention
from weft.seeds import generator
from weft.terms.layers import attention_layers, heads_of

__all__ = ["GRAFT", "Prefix"]

_NAME = "weft_ntk"


class Prefix(nn.Module):
    """The trainable pair of one attention layer."""

    def __init__(self, heads: int, size: int, device: Any = None) -> None:
        super().__init__()
        self.Z = nn.Parameter(torch.zeros(heads, size, size, device=device))
        self.z = nn.Parameter(torch.zeros(heads, size, device=device))


@torch.no_grad()
def build(model: Any, seed: int, *, std: float) -> dict[str, nn.Module]:
    """A pair for every attention layer, drawn by its name.

    Args:
        std: of the normal start, so that the function is near the model's own; 0 starts on it.

    Raises:
        WeftError: the model's attention cannot be exchanged.
    """
    layers = exchangeable(model, "it can have no prefix")
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        prefix = Prefix(heads_of(layer), layer.head_dim, next(layer.parameters()).device)  # type: ignore[arg-type]
        draw = generator(seed, GRAFT.name, name)
        for parameter in prefix.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw))
        made[f"{name}.weft_prefix"] = prefix
    return made


def connect(model: Any, modules: Mapping[str, nn.Module]) -> str:
    """The attention function that reads the pairs, in place of the model's; returns the name of that one."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before: str = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    return before


def disconnect(model: Any, remembered: str) -> None:
    """The attention function of before."""
    model.set_attn_implementation(remembered)


def count(model: Any, options: Mapping[str, Any]) -> int:
    """d^2 + d for each query head of each layer."""
    sizes = ((heads_of(layer), int(layer.head_dim)) for _, layer in attention_layers(model))  # type: ignore[arg-type]
    return sum(heads * (d * d + d) for heads, d in sizes)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (batch, heads, tokens, d) -> (batch, tokens, heads, d)."""
    prefix = module._modules.get("weft_prefix")
    if not isinstance(prefix, Prefix):  # another model of the same config object
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)  # type: ignore[return-value]
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    out = prefix_attention(query, key, value, prefix.Z, prefix.z, mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


GRAFT = Graft(
    name="ntk-attention",
    summary="what an endless prefix would do to each attention head: d^2 + d numbers a head",
    paper="2024, arXiv 2406.14036",
    defaults={"std": 1e-4},
    build=build,
    connect=connect,
    disconnect=disconnect,
    count=count,
    deviates="a random pair of standard deviation std",
)
