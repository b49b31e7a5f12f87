"""Texts as vectors: the mean of a model's last hidden states, later tokens weighing more (RDS+).

e = sum_t t h_t / sum_t t, of unit length          t = 1 ... tokens of the text, at most `window`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

__all__ = ["embedded", "weighted_mean"]


def weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(batch, d) of hidden states (batch, tokens, d), padding (mask 0) left out, of unit length, in fp32."""
    weights = mask.cumsum(1) * mask
    mean = (weights.unsqueeze(-1) / weights.sum(1).view(-1, 1, 1) * hidden.float()).sum(1)
    return F.normalize(mean, dim=1)


@torch.no_grad()
def embedded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int, batch: int
) -> Iterator[Tensor]:
    """(batch, d) of so many texts after another, on the CPU; an empty text counts as its first token."""
    device = next(model.parameters()).device
    base = getattr(model, "base_model", model)
    for start in range(0, len(texts), batch):
        ids = [tokenizer(text)["input_ids"][:window] or [0] for text in texts[start : start + batch]]
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        rows = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in ids], device=device)
        hidden = base(input_ids=rows, attention_mask=mask).last_hidden_state
        yield weighted_mean(hidden, mask).cpu()
