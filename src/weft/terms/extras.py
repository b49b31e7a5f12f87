"""Parameters of the model itself that an adapter brings along (biases, a new head, a table of tokens): exchanged
between the adapter's values and the base's.

Most are exchanged in place, so that the parameter stays the one that an optimizer or FSDP2 holds. Two kinds cannot be,
and another parameter takes the base's place: one that is *apart* (a tied table of which the adapter changes the
embedding alone, or the head alone), and a table with another number of rows. What the configuration says of the tables
follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.errors import WeftError

__all__ = ["Frame", "exchange", "frame_of", "new_head", "places", "tables"]


@dataclass(frozen=True)
class Frame:
    """What a model's configuration says of its tables of tokens while no adapter changes them.

    Args:
        tied: whether the configuration says that the head is an embedding.
        one: whether it is the input embedding; the head of an encoder and decoder may be the decoder's.
        vocabulary: tokens; None where the model has no such number.
        rows: of the embedding, which may be padded.
    """

    tied: bool = False
    one: bool = False
    vocabulary: int | None = None
    rows: int | None = None

    def agree(self, model: nn.Module) -> None:
        """Have the configuration say what the model's tables are now."""
        embedding, head = tables(model)
        config = getattr(model, "config", None)
        if embedding is None or config is None or self.vocabulary is None:
            return
        rows, text = int(embedding.weight.shape[0]), config.get_text_config()  # type: ignore[union-attr, index, operator]
        text.vocab_size = self.vocabulary if rows == self.rows else rows
        tied = self.tied and (head is None or not self.one or head.weight is embedding.weight)
        if config.tie_word_embeddings is not tied:
            config.tie_word_embeddings = text.tie_word_embeddings = tied
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)  # type: ignore[operator]


def frame_of(model: nn.Module) -> Frame:
    """The frame of a model as it is now; an empty one for a module that is not transformers'."""
    embedding, head = tables(model)
    config = getattr(model, "config", None)
    if embedding is None or config is None:
        return Frame()
    one = head is not None and head.weight is embedding.weight
    text = config.get_text_config()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Frame(tied, one, getattr(text, "vocab_size", None), int(embedding.weight.shape[0]))  # type: ignore[union-attr, index, arg-type]


def tables(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The modules of the input embedding and of the output head, None where the model has none."""
    return _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")


def new_head(model: nn.Module) -> list[str]:
    """The parameters of a head for a task of its own, a classifier say, which a base model does not bring: what lies
    outside the base of a model that is no language model.
    """
    base = getattr(model, "base_model", model)
    if base is model or tables(model)[1] is not None:
        return []
    inside = {id(parameter) for parameter in base.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]


def places(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[str, nn.Module, str]]:
    """Every place of a parameter: the module's name, the module, and the parameter's name in it."""
    for path, module in model.named_modules():
        for leaf, found in module._parameters.items():
            if found is parameter:
                yield path, module, leaf


@torch.no_grad()
def exchange(model: nn.Module, key: str, aside: Tensor, *, apart: bool) -> Tensor:
    """Put `aside` where the model's parameter `key` is, and return what was there.

    Args:
        apart: whether it takes this one place alone, where the parameter has several.

    Raises:
        WeftError: another parameter must take the place of a sharded one.
    """
    parameter = model.get_parameter(key)
    if not apart and not isinstance(aside, nn.Parameter) and aside.shape == parameter.shape:
        there = parameter.detach().clone()
        parameter.copy_(aside)
        return there
    if isinstance(parameter, DTensor):
        raise WeftError(f"The adapter brings a {key} of its own, which a sharded model cannot take; load it before.")
    module, _, leaf = key.rpartition(".")
    homes: Iterable[tuple[str, nn.Module, str]] = [(module, model.get_submodule(module), leaf)]
    new = aside if isinstance(aside, nn.Parameter) else nn.Parameter(aside, requires_grad=False)
    new.data = new.data.to(parameter.device, parameter.dtype)  # it may have been moved in the meantime
    for _, home, name in homes if apart else list(places(model, parameter)):
        home._parameters[name] = new
        _count_rows(home, new)
    return parameter


def _count_rows(module: nn.Module, table: Tensor) -> None:
    if isinstance(module, nn.Embedding):
        module.num_embeddings = table.shape[0]
    elif isinstance(module, nn.Linear) and table.dim() == 2:
        module.out_features = table.shape[0]


def _asked(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter, lambda: None)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), Tensor) else None
