"""Data for training, calibration and evaluation: the door to this room's reading, packing and windowing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.train.examples import encode
from weft.train.packing import Rows, collate, packing_refusal, rows
from weft.train.sources import Document, Fields, read_documents, read_texts
from weft.train.windows import (
    batches,
    calibration_batches,
    check_ids,
    evaluation_windows,
    opening,
    token_stream,
    token_windows,
)

__all__ = [
    "Document",
    "Fields",
    "Rows",
    "batches",
    "calibration_batches",
    "check_ids",
    "collate",
    "evaluation_windows",
    "opening",
    "read_documents",
    "read_texts",
    "token_stream",
    "token_windows",
    "training_rows",
]


def training_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    window: int,
    bos: bool | None = None,
    refuse: Callable[[WeftError], None] | None = None,
) -> tuple[Rows, str | None]:
    """The documents as rows of `window` tokens for this model, packed where it can be; and why not, where it cannot.

    Args:
        bos: whether texts and their pieces begin with the beginning-of-text token; None for what the tokenizer itself
            puts in front of a text.
        refuse: what to do with the error of a document that cannot be encoded; None raises it.

    Raises WeftError when the documents give nothing to learn, or hold tokens that the model has no row for.
    """
    refusal = packing_refusal(model)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    before = opening(tokenizer, bos)
    examples = encode(documents, tokenizer, before, refuse)
    for example in examples:
        check_ids(example.ids, model.config, tokenizer)
    return rows(examples, window, padding, packed=refusal is None, before=before), refusal
