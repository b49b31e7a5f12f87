"""The tables of tokens in 8 bits: an embedding that looks rows of codes up, and a head that multiplies by them.

    row of token t = codes[t] * scale_t / 127,   codes from -127 to 127, one scale a row (`Int8`)

A head that is the embedding (tied) stays so: one table of codes serves both. One that is a matrix of its own becomes a
sum of one `Int8` term, as any linear layer may. Either is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.kernels.bits import numbers_of
from weft.terms.extras import places, tables
from weft.terms.layers import replace
from weft.terms.put import put
from weft.terms.quantized import Int8
from weft.terms.sum_linear import SumLinear

__all__ = [
    "WIDTHS",
    "CodedEmbedding",
    "CodedHead",
    "check_width",
    "code_embeddings",
    "embedding_specs",
    "plain_embeddings",
    "rebuild_embeddings",
]

WIDTHS = ("8bit",)
"""In which tables can be coded, as the command line says it."""


class CodedEmbedding(nn.Module):
    """ids (...) -> rows (..., dim) of a table in codes.

    `weight` is an empty buffer of the table's dtype and device, as that of `SumLinear`: a loader that knows nothing of
    weft refuses it.
    """

    weight: Tensor

    def __init__(self, code: Int8, padding_idx: int | None = None) -> None:
        super().__init__()
        self.code, self.padding_idx = code, padding_idx
        self.num_embeddings, self.embedding_dim = code.out_features, code.in_features
        self.register_buffer("weight", torch.empty_like(code.carrier))

    def forward(self, ids: Tensor) -> Tensor:
        scales = numbers_of(self.code.scales, torch.float32)[ids].unsqueeze(-1) / 127
        return (self.code.codes[ids] * scales).to(self.code.carrier.dtype)

    def plain(self) -> nn.Embedding:
        """The dense table."""
        weight = self.code.dense().detach()
        rows, dim = weight.shape
        return nn.Embedding(rows, dim, padding_idx=self.padding_idx, _weight=weight)


class CodedHead(nn.Module):
    """x (..., dim) -> logits (..., tokens) by the table of an embedding, which is not a part of it."""

    weight: Tensor

    def __init__(self, table: CodedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.table = (table,)  # no submodule: the codes are the embedding's
        self.in_features, self.out_features, self.bias = table.embedding_dim, table.num_embeddings, bias
        self.register_buffer("weight", torch.empty_like(table.weight))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table[0].code(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def check_width(embeddings: str | None) -> None:
    """Raises WeftError for a width of tables that there is not."""
    if embeddings is not None and embeddings not in WIDTHS:
        raise WeftError(
            f"Tables of tokens are coded in {WIDTHS[0]}, not in {embeddings!r}: give --embeddings {WIDTHS[0]}."
        )


def code_embeddings(model: Any) -> None:
    """Put codes of 8 bits in the place of a transformers model's embedding and head, in place.

    Raises:
        WeftError: the embedding does more than look rows up, is used by other modules too, or there is none.
    """
    embedding, head = tables(model)
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        kind = type(embedding).__name__ if embedding is not None else "None"
        raise WeftError(
            f"The embedding of this {type(model).__name__} is a {kind}, no plain table of rows, and cannot be coded; "
            "leave --embeddings out."
        )
    homes = [name for name, module, _ in places(model, embedding.weight) if module not in (embedding, head)]  # type: ignore[arg-type]
    if homes:
        raise WeftError(f"The embedding is the weight of {homes[0]} too, and cannot be coded; leave --embeddings out.")
    if not isinstance(head, nn.Linear | SumLinear | None):
        kind = f"{type(model).__name__} is a {type(head).__name__}"
        raise WeftError(f"The head of this {kind} and cannot be coded; leave --embeddings out.")
    coded = CodedEmbedding(Int8.from_matrix(embedding.weight.detach()), embedding.padding_idx)
    tied = head is not None and head.weight is embedding.weight
    replace(model, _name(model, embedding), coded)
    if isinstance(head, nn.Linear) and tied:
        replace(model, _name(model, head), CodedHead(coded, head.bias))
        _say_tied(model, False)
    elif isinstance(head, nn.Linear):
        put(model, _name(model, head), {"base": Int8.from_matrix(head.weight.detach())}).requires_grad_(False)


def plain_embeddings(model: nn.Module) -> bool:
    """Make the embedding and the head dense again, in place; whether the embedding was in codes."""
    made = {id(m): (name, m.plain()) for name, m in model.named_modules() if isinstance(m, CodedEmbedding)}
    heads = [(name, m) for name, m in model.named_modules() if isinstance(m, CodedHead)]
    for name, table in made.values():
        replace(model, name, table)
    for name, head in heads:
        layer = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        layer.weight, layer.bias = made[id(head.table[0])][1].weight, head.bias  # type: ignore[assignment]
        replace(model, name, layer)
        _say_tied(model, True)
    output = tables(model)[1] if made else None
    if isinstance(output, SumLinear):
        replace(model, _name(model, output), output.collapse())
    return bool(made)


def embedding_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> what rebuilds each coded embedding, JSON-able: its shape, and the name of the head that is it."""
    heads = {id(m.table[0]): name for name, m in model.named_modules() if isinstance(m, CodedHead)}
    return {
        name: {
            "rows": module.num_embeddings,
            "dim": module.embedding_dim,
            "padding_idx": module.padding_idx,
            "head": heads.get(id(module)),
        }
        for name, module in model.named_modules()
        if isinstance(module, CodedEmbedding)
    }


def rebuild_embeddings(model: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Put coded embeddings, their tensors uninitialised on the meta device, where specs say; the names of what is new.

    Raises:
        WeftError: the model has no embedding of that name and shape.
    """
    placed = []
    prefix, there = f"{getattr(model, 'base_model_prefix', '')}.", dict(model.named_modules())
    for said, spec in specs.items():
        name = next((form for form in (said, said.removeprefix(prefix), prefix + said) if form in there), said)
        old, shape = there.get(name), (spec["rows"], spec["dim"])
        if not isinstance(old, nn.Embedding) or tuple(old.weight.shape) != shape:
            raise WeftError(f"The checkpoint has a coded embedding at {said}, where the model has none of {shape}.")
        code = Int8(spec["dim"], spec["rows"], device="meta", dtype=old.weight.dtype)
        coded = CodedEmbedding(code, spec["padding_idx"])
        replace(model, name, coded)
        placed.append(name)
        head = there.get(spec["head"] or "")
        if isinstance(head, nn.Linear):  # a base model has none
            replace(model, spec["head"], CodedHead(coded, head.bias))
            placed.append(spec["head"])
    return placed


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _say_tied(model: Any, tied: bool) -> None:
    """Have the configuration say whether the head is the embedding's very parameter."""
    config = model.config
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
