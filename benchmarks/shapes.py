"""Parameter shapes of the LLaMA models of the GaLore recipe and of LLaMA-2 7B, and a plain model that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["SIZES", "Shape", "build"]


@dataclass(frozen=True)
class Shape:
    """hidden, ffn, layers, heads, and the rank published for it."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    rank: int
    vocabulary: int = 32000

    def parameters(self) -> int:
        """Number of parameters, embedding and head untied."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


SIZES = {
    "tiny": Shape(64, 176, 2, 2, 16, 512),
    "60m": Shape(512, 1376, 8, 8, 128),
    "130m": Shape(768, 2048, 12, 12, 256),
    "350m": Shape(1024, 2736, 24, 16, 256),
    "1b": Shape(2048, 5461, 24, 32, 512),
    "7b": Shape(4096, 11008, 32, 32, 1024),
}


def build(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """Parameters of the shape in the usual places, with no forward pass: what an optimizer sees."""

    def linear(out: int, inner: int) -> nn.Linear:
        return nn.Linear(inner, out, bias=False, dtype=dtype, device=device)

    h, f = shape.hidden, shape.ffn
    model = nn.Module()
    model.embed_tokens = nn.Embedding(shape.vocabulary, h, dtype=dtype, device=device)
    model.layers = nn.ModuleList(
        nn.ModuleDict(
            {f"attn_{n}": linear(h, h) for n in "qkvo"}
            | {"mlp_gate": linear(f, h), "mlp_up": linear(f, h), "mlp_down": linear(h, f)}
            | {f"norm_{i}": nn.RMSNorm(h, dtype=dtype, device=device) for i in range(2)}
        )
        for _ in range(shape.layers)
    )
    model.norm = nn.RMSNorm(h, dtype=dtype, device=device)
    model.lm_head = linear(shape.vocabulary, h)
    return model
