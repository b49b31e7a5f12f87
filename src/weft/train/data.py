"""Data for training, calibration and evaluation: the door to this room's reading, packing and windowing."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.train.examples import encode
from weft.train.packing import Rows, collate, packing_refusal, rows
from weft.train.sources import Document, Fields, read_documents, read_texts
from weft.train.windows import batches, calibration_batches, evaluation_windows, token_stream, token_windows

__all__ = [
    "Document",
    "Fields",
    "Rows",
    "batches",
    "calibration_batches",
    "collate",
    "evaluation_windows",
    "read_documents",
    "read_texts",
    "token_stream",
    "token_windows",
    "training_rows",
]


def training_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], window: int
) -> tuple[Rows, str | None]:
    """The documents as rows of `window` tokens for this model, packed where it can be; and why not, where it cannot.

    Raises WeftError when the documents give nothing to learn.
    """
    refusal = packing_refusal(model)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return rows(encode(documents, tokenizer), window, padding, packed=refusal is None), refusal
