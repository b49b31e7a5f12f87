"""What layers read and give in passes over batches, a layer at a time and as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.signals import stop_here
from weft.stats.calibrate import Batch, forward_inputs, frozen, to_device
from weft.stats.streams import Stream, Streams

__all__ = ["See", "watch"]

See = Callable[[str, Tensor, Tensor, Stream], None]
"""(layer, input, output, which of its tokens count)."""


@torch.no_grad()
def watch(model: nn.Module, batches: Sequence[Batch], layers: Mapping[str, nn.Module], see: See) -> None:
    """Run the model on every batch, and call `see` whenever one of the layers has run."""
    streams = Streams()

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            see(name, args[0], output, streams.now)

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with frozen(model), streams.following(model):
            for batch in batches:
                batch = to_device(batch, model)
                streams.begin(batch)
                model(**forward_inputs(model, batch))
                stop_here()
    finally:
        for handle in handles:
            handle.remove()
