"""The tokens of long texts, a piece at a time: what a tokenizer keeps of a text is hundreds of bytes a token.

    text    |----------------------|
    piece   |----------xx|              x: read twice
                      |xx-----------|

A piece ends, and the next begins, between two tokens of the part that both have read, amid sixteen that both read
alike: what a tokenizer makes of a place depends on what is near. Where no such place is found, the rest is read whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["token_ids", "token_pieces"]

PIECE = 2**18
"""Characters that are read at once."""
TWICE = 2**11
"""Of these, how many the next piece reads again."""
_ALIKE = 8  # tokens on either side of a cut
_TRIES = 16


def token_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Iterator[Tensor]:
    """The tokens of each document, int64 (n,), without those that a tokenizer puts around a text. Short documents are
    read together.
    """
    for _, together in groupby(zip(documents, accumulate(map(len, documents)), strict=True), lambda d: d[1] // PIECE):
        texts = [text for text, _ in together]
        if len(texts) > 1:
            yield from map(_tensor, _encoded(tokenizer, texts)["input_ids"])
        else:
            yield torch.cat(list(token_pieces(tokenizer, texts[0])))


def token_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Tensor]:
    """The tokens of one text, one piece after another, int64."""
    start, first, now = 0, 0, _encoded(tokenizer, text[:PIECE])
    while start + PIECE < len(text):
        after = start + PIECE - TWICE
        following = _encoded(tokenizer, text[after : after + PIECE])
        cut = _cut(now, start, following, after) if tokenizer.is_fast else None
        if cut is None:
            now = _encoded(tokenizer, text[start:])
            break
        yield _tensor(now["input_ids"][first : cut[0]])
        start, first, now = after, cut[1], following
    yield _tensor(now["input_ids"][first:])


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: str | list[str]) -> Any:
    # verbose=False: what is encoded here is cut into windows, so its length is no cause for the tokenizer's warning
    return tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)


def _cut(one: Any, at: int, other: Any, after: int) -> tuple[int, int] | None:
    """The numbers of a token of two pieces, which begin `at` and `after`, amid tokens that are the same in both."""
    for k in range(_TRIES):
        place = after + TWICE * (k + 1) // (_TRIES + 2) + TWICE // (_TRIES + 2)
        i, j = one.char_to_token(place - at), other.char_to_token(place - after)
        if i is None or j is None or j < _ALIKE or i + _ALIKE > len(one["input_ids"]):
            continue
        if _near(one, i, at) == _near(other, j, after):
            return i, j
    return None


def _near(encoding: Any, token: int, start: int) -> list[tuple[int, int, int]]:
    """The tokens around one: what each is, and where it lies in the text."""
    spans = [(i, encoding.token_to_chars(i)) for i in range(token - _ALIKE, token + _ALIKE)]
    return [(encoding["input_ids"][i], *((start + s.start, start + s.end) if s else (-1, -1))) for i, s in spans]
