"""What a model makes of one text at a time: its last hidden states, or the inputs and output gradients of its layers.

A text is a row of a batch. Nothing is kept from one to the next; of a backward pass, each layer's rows are handed over
as soon as they are complete, and freed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.signals import stop_here
from weft.stats.calibrate import Batch, differentiable_inputs, frozen, to_device, token_loss
from weft.stats.collect import kept_rows
from weft.stats.streams import Streams, is_encoder_decoder

__all__ = ["gradients_by_text", "last_hidden", "texts_of"]

Visit = Callable[[str, Tensor, Tensor], None]
"""(layer, inputs (tokens, in), gradients of the outputs (tokens, out))"""


def texts_of(batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Each row of each batch, as a batch of one."""
    for batch in batches:
        rows = len(next(iter(batch.values())))
        yield from ({key: value[i : i + 1] for key, value in batch.items()} for i in range(rows))


def last_hidden(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """(tokens, d) of each text, padding left out: of an encoder-decoder model, the encoder's.

    Raises WeftError where the model gives none.
    """
    base = model.get_encoder() if is_encoder_decoder(model) else getattr(model, "base_model", model)  # type: ignore[operator]
    with frozen(model), torch.no_grad():
        for text in texts_of(batches):
            text = to_device(text, model)
            given = {key: text[key] for key in ("input_ids", "attention_mask") if key in text}
            hidden = getattr(base(**given), "last_hidden_state", None)
            if hidden is None:
                raise WeftError(f"{type(model).__name__} gives no last hidden states to measure.")
            mask = text.get("attention_mask")
            yield hidden[0] if mask is None else hidden[0][mask[0].bool()]
            stop_here()


def gradients_by_text(
    model: nn.Module, batches: Sequence[Batch], layers: Mapping[str, nn.Module], visit: Visit
) -> None:
    """Call `visit` for each text and each layer that its loss, the mean over its predictions, depends on.

    The gradient with respect to the layer's weight is g^T x. Rows of a layer that a pass applies several times follow
    each other.
    """
    pass_ = _Pass(visit)
    handles = [layer.register_forward_hook(pass_.hook(name)) for name, layer in layers.items()]
    try:
        with frozen(model), pass_.streams.following(model), differentiable_inputs(model):
            for text in texts_of(batches):
                text = to_device(text, model)
                pass_.begin(text)
                loss, _ = token_loss(model, text)
                if not loss.requires_grad:
                    raise WeftError(f"The loss of {type(model).__name__} does not depend on its embeddings.")
                loss.backward()  # type: ignore[no-untyped-call]
                stop_here()
    finally:
        for handle in handles:
            handle.remove()


class _Pass:
    """The rows of one text's pass, until each layer's are complete."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.streams = visit, Streams()
        self.uses: dict[str, int] = defaultdict(int)
        self.rows: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def begin(self, text: Batch) -> None:
        """The next text."""
        self.streams.begin(text)
        self.uses.clear()
        self.rows.clear()

    def hook(self, name: str) -> Callable[..., None]:
        """Of the forward pass of a layer."""

        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            stream, x = self.streams.now, args[0].detach()
            self.uses[name] += 1

            def backward(grad: Tensor) -> None:
                self.rows[name].append((kept_rows(x, stream), kept_rows(grad, stream)))
                self.uses[name] -= 1
                if not self.uses[name]:
                    inputs, gradients = zip(*self.rows.pop(name), strict=True)
                    self.visit(name, torch.cat(inputs), torch.cat(gradients))

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward
