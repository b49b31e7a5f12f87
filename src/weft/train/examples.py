"""From documents to tokens: which ids a document becomes, and which of them the loss counts.

Text         tokens + end of text; every token is learned
Completion   tokens of prompt + completion + end of text; the completion's are learned
Chat         tokens of the tokenizer's chat template; the assistant's turns are learned (`weft.train.chats`)

A part of a text is found by the places of its characters, so a token across its border belongs to it: the tokens are
those of the whole text, as the model will see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.train.chats import TEMPLATE_ERRORS, Span, marked, rendered, shared
from weft.train.sources import Chat, Completion, Document, Text
from weft.train.windows import closed, opening

__all__ = ["Example", "encode"]


class Example(NamedTuple):
    """One document as tokens."""

    ids: Tensor  # (n,) int64
    learned: Tensor  # (n,) bool: the tokens that the loss counts


def encode(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int] | None = None,
    refuse: Callable[[WeftError], None] | None = None,
) -> list[Example]:
    """Each document as an `Example`, in order.

    Args:
        before: the ids in front of a text, and of a prompt; None for those that the tokenizer puts there. A chat
            begins as its template says.
        refuse: what to do with the error of a document that cannot be encoded, which is then left out; None raises it.

    Raises WeftError, naming the record, for a chat when the tokenizer has no chat template, or one that refuses this
    conversation or does not let the assistant's turns be found.
    """
    front = list(opening(tokenizer) if before is None else before)
    texts = [document.text for document in documents if isinstance(document, Text)]
    encoded = iter(_ids(tokenizer, texts) if texts else [])
    examples = []
    for document in documents:
        match document:
            case Text():
                ids = closed([*front, *next(encoded)], tokenizer.eos_token_id)
                learned = [True] * len(ids)
            case Completion(prompt, completion):
                ids, learned = _completion(tokenizer, prompt, completion, front)
            case Chat():
                try:
                    ids, learned = _chat(tokenizer, document)
                except WeftError as error:
                    if refuse is None:
                        raise
                    refuse(error)
                    continue
        examples.append(Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(learned, dtype=torch.bool)))
    return examples


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: what exceeds the context is cut later, so its length is no cause for the tokenizer's warning
    options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    ids: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return ids


def _completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, front: list[int]
) -> tuple[list[int], list[bool]]:
    text = prompt + completion
    ids, learned = _tokens(tokenizer, text, [(len(prompt), len(text))])
    whole = closed([*front, *ids], tokenizer.eos_token_id)
    return whole, ([False] * len(front) + learned + [True])[: len(whole)]


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[int], list[bool]]:
    """Tokens and what is learned of them, by the template's own marks where it has them."""
    place = f"{chat.place}: " if chat.place else ""
    try:
        found = marked(tokenizer, chat)
        if found is None:
            text, spans = rendered(tokenizer, chat)
            found = _tokens(tokenizer, text, spans)
    except WeftError as error:
        raise WeftError(f"{place}{error}") from None
    except TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise WeftError(
            f"{place}the tokenizer's chat template refuses this conversation ({reason}); change the record, or leave "
            "it out with --skip-bad."
        ) from error
    if not any(found[1]):
        raise WeftError(f"{place}the tokenizer's chat template leaves out what the assistant says.")
    return found


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and which of them reach into one of the spans [start, stop) and end there."""
    if not tokenizer.is_fast:
        return _tokens_by_prefixes(tokenizer, text, spans)
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    places = found["offset_mapping"]
    return list(found["input_ids"]), [any(a < b and start < b <= stop for start, stop in spans) for a, b in places]


def _tokens_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """The same for a tokenizer that tells no places: a part begins where the tokens part from those of the text before
    it.
    """
    cuts = [text[:place] for span in spans for place in span]
    ids, *parts = _ids(tokenizer, [text, *cuts])
    ends = [shared(ids, part) for part in parts]
    inside = list(zip(ends[::2], ends[1::2], strict=True))
    return ids, [any(start <= i < stop for start, stop in inside) for i in range(len(ids))]
