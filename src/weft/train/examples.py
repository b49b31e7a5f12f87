"""From documents to tokens: which ids a document becomes, and which of them the loss counts.

Text         tokens + end of text; every token is learned
Completion   tokens of prompt + completion + end of text; learned from where they part from the prompt's own tokens on
Chat         tokens of the tokenizer's chat template; the assistant's turns are learned
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.train.sources import Chat, Completion, Document, Text
from weft.train.windows import closed

__all__ = ["Example", "encode"]


class Example(NamedTuple):
    """One document as tokens."""

    ids: Tensor  # (n,) int64
    learned: Tensor  # (n,) bool: the tokens that the loss counts


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Each document as an `Example`, in order.

    Raises WeftError for a chat when the tokenizer has no chat template, or one that does not let the assistant's
    turns be found.
    """
    texts = [document.text for document in documents if isinstance(document, Text)]
    encoded = iter(_ids(tokenizer, texts) if texts else [])
    examples = []
    for document in documents:
        match document:
            case Text():
                ids = closed(next(encoded), tokenizer.eos_token_id)
                learned = [True] * len(ids)
            case Completion(prompt, completion):
                ids, learned = _completion(tokenizer, prompt, completion)
            case Chat(messages):
                ids, learned = _chat(tokenizer, messages)
        examples.append(Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(learned, dtype=torch.bool)))
    return examples


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: what exceeds the context is cut later, so its length is no cause for the tokenizer's warning
    ids: list[list[int]] = tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
    return ids


def _completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Tokenised as one text, so that the completion's first token is the one that training on the whole text would
    see.
    """
    alone, whole = _ids(tokenizer, [prompt, prompt + completion])
    ids = closed(whole, tokenizer.eos_token_id)
    start = shared_prefix(alone, ids)
    return ids, [position >= start for position in range(len(ids))]


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first entries are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise WeftError(
            "The tokenizer has no chat template, so data with messages cannot be formatted: use the model's chat "
            "(instruct) "
            "version, set tokenizer.chat_template, or give data with text or prompt and completion."
        ) from None
    if re.search(r"\{%-?\s*generation\s*-?%\}", template) and tokenizer.is_fast:
        out = _format(tokenizer, messages, return_assistant_tokens_mask=True)
        return out["input_ids"], [bool(flag) for flag in out["assistant_masks"]]
    return _chat_by_prefixes(tokenizer, messages)


def _chat_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[bool]]:
    """A template that marks no turns: an assistant's turn is what its message adds to the conversation before it."""
    ids = _format(tokenizer, messages)["input_ids"]
    learned = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _format(tokenizer, messages[:i], add_generation_prompt=True)["input_ids"] if i else []
            after = _format(tokenizer, messages[: i + 1])["input_ids"]
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise WeftError(
                    "The tokenizer's chat template rewrites earlier turns and does not mark the assistant's with "
                    "{% generation %}, so its tokens cannot be found: add that mark to the template, or give data "
                    "with one prompt and completion a record."
                )
            learned[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, learned


def _format(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    return tokenizer.apply_chat_template([dict(m) for m in messages], return_dict=True, **options)
