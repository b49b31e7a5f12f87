"""Model sizes by the names of the published pre-training tables, and a model of such a size, freshly drawn.

The names count parameters with the tables' vocabulary of 32,000 tokens and an untied head; with another tokenizer a
model is smaller or larger.
Source: the LLaMA configurations of ReLoRA (Lialin et al., 2023, arXiv 2307.05695) that GaLore, Fira, APOLLO and their
successors share.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from weft.errors import WeftError, unknown

__all__ = ["SIZES", "configuration", "fresh_model"]

SIZES: dict[str, tuple[int, int, int, int]] = {  # hidden, intermediate, layers, heads
    "9m": (128, 352, 4, 4),
    "35m": (384, 1024, 6, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}


def configuration(
    size: str, tokenizer: PreTrainedTokenizerBase, window: int, *, width: int | None = None
) -> LlamaConfig:
    """The configuration of a size for a tokenizer and a context.

    Args:
        width: another hidden size, everything else but the depth and the size of a head in proportion: a base model for
            width scaling.

    Raises:
        WeftError: an unknown size, or a width that the heads do not divide.
    """
    if size not in SIZES:
        raise unknown("model size", size, SIZES)
    hidden, intermediate, layers, heads = SIZES[size]
    if width is not None:
        head = hidden // heads
        if width < head or width % head or width > hidden:
            raise WeftError(
                f"A base width of {width} does not fit {size}: give a multiple of {head}, its head size, to {hidden}."
            )
        intermediate, heads, hidden = round(intermediate * width / hidden), width // head, width
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(1024, window),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fresh_model(config: LlamaConfig, seed: int, *, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model with weights drawn from `seed` (transformers' own initialisation, on the CPU in fp32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype)  # type: ignore[arg-type]
