"""Which tokens count: those that the attention mask of a layer's own token stream keeps.

Most models have one stream. An encoder-decoder model has two, often of one shape: the encoder's layers read the first
and the decoder's the second, save the keys and values of cross-attention, whose input is the encoder's very output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.terms.experts import routed

__all__ = ["Stream", "Streams", "is_encoder_decoder"]


class Stream(NamedTuple):
    """What the layers that run now may be fed. Masks are boolean (batch, positions); None keeps every token."""

    mask: Tensor | None = None
    encoded: Tensor | None = None  # the encoder's output, inside a decoder
    encoder_mask: Tensor | None = None

    def keep(self, x: Tensor) -> Tensor | None:
        """The mask of the tokens of x (..., features); None keeps all, as for a vector a sequence (a pooler's)."""
        mask, tokens = self.encoder_mask if _same(x, self.encoded) else self.mask, routed(x)
        if mask is not None and tokens is not None:
            return mask.flatten()[tokens.rows] if mask.numel() == tokens.total else None
        covers = mask is not None and (x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel()))
        return mask if covers else None


class Streams:
    """The stream of a pass under way: call `begin` before each batch, inside `following`."""

    def __init__(self) -> None:
        self.now = Stream()
        self._decoder_mask: Tensor | None = None

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Take the masks of a batch."""
        self.now = Stream(_boolean(batch.get("attention_mask")))
        self._decoder_mask = _boolean(_decoder_mask(batch))

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Notice when an encoder has finished, and its decoder begins."""
        if not is_encoder_decoder(model):
            yield
            return
        handle = model.get_encoder().register_forward_hook(self._encoded)  # type: ignore[operator]
        try:
            yield
        finally:
            handle.remove()

    def _encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self.now = Stream(self._decoder_mask, output[0], self.now.mask)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's configuration says so."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _same(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.shape == other.shape and x.data_ptr() == other.data_ptr()


def _boolean(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _decoder_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The decoder's mask, given or derived: its inputs are the labels shifted right by one."""
    labels = batch.get("labels")
    if "decoder_attention_mask" in batch or labels is None or labels.dim() != 2:
        return batch.get("decoder_attention_mask")
    return torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], 1)
