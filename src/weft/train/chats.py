"""Which part of a formatted chat the assistant says: by the template's own marks, or by where its words come out.

A template is a program: it may trim a message, drop the thoughts of earlier turns, set an empty thought before the last
one. So a turn is found by asking the program, with a word of our own in the place of what the assistant says:

    whole  = template(all messages)             ... <user> hi <assistant> hello <end> <user> ...
    probe  = template(the same, turn := word)   ... <user> hi <assistant> WORD <end> <user> ...
    alone  = template(the same up to the turn)  ... <user> hi <assistant> WORD <end>

The turn begins in `whole` behind the header that the template sets for an answer (its generation prompt), or where
`probe` has the word; it ends before what follows the turn in `probe` and not in `alone`. What the assistant must say
itself is then learned: thoughts, words, tool calls and the mark of the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.train.sources import Chat

__all__ = ["TEMPLATE_ERRORS", "Span", "marked", "rendered", "shared"]

Span = tuple[int, int]
"""[start, stop): places of characters."""
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What the code of a chat template may raise over a conversation that it was not written for."""
WORD = "Qz7kWord0fOurs"
"""What no template looks for and no conversation holds."""


def marked(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[int], list[bool]] | None:
    """The tokens of a chat, and which of them the template marks as the assistant's ({% generation %}); None where it
    marks none. Raises WeftError where the tokenizer has no chat template.
    """
    try:
        template = tokenizer.get_chat_template(tools=chat.tools)
    except ValueError:
        raise WeftError(
            "The tokenizer has no chat template, so data with messages cannot be formatted: use the model's chat "
            "(instruct) version, set tokenizer.chat_template, or give data with text or prompt and completion."
        ) from None
    if not (re.search(r"\{%-?\s*generation\s*-?%\}", template) and tokenizer.is_fast):
        return None
    out = _template(tokenizer, chat.messages, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]


def rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, list[Span]]:
    """The chat as text, and where in it the assistant speaks. Raises WeftError where that cannot be found."""
    whole = _template(tokenizer, chat.messages, chat)
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    return whole, [_turn(tokenizer, chat, whole, i) for i in turns]


def _turn(tokenizer: PreTrainedTokenizerBase, chat: Chat, whole: str, i: int) -> Span:
    for message in _probes(chat.messages[i]):
        probe = [*chat.messages[:i], message, *chat.messages[i + 1 :]]
        before, found, behind = _template(tokenizer, probe, chat).rpartition(WORD)
        if found:
            alone = _template(tokenizer, probe[: i + 1], chat).rpartition(WORD)[2]
            start = _start(before, *_header(tokenizer, chat, i))
            rest = behind[shared(alone, behind) :]
            stop = len(whole) - len(rest)
            if whole.startswith(before[:start]) and whole.endswith(rest) and start < stop:
                return start, stop
    raise WeftError(
        "The tokenizer's chat template rewrites a turn by what comes after it and does not mark the assistant's with "
        "{% generation %}, so its tokens cannot be found: add that mark to the template, or give data with one prompt "
        "and completion a record."
    )


def _probes(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The message with our word as what is said; or, for templates that then call tools alone, as the tool's name."""
    yield {**message, "content": WORD}
    if message.get("tool_calls"):
        first, *others = message["tool_calls"]
        called = {"function": {**first["function"], "name": WORD}} if "function" in first else {"name": WORD}
        yield {**message, "tool_calls": [{**first, **called}, *others]}


def _start(before: str, prompt: str, header: str) -> int:
    """Where the turn begins: behind its header, if the header of this very turn is there; else where the word is."""
    if header and before.count(header) == prompt.count(header):
        return before.rfind(header) + len(header)
    return len(before)


def _header(tokenizer: PreTrainedTokenizerBase, chat: Chat, i: int) -> tuple[str, str]:
    """The first i messages with what the template sets in front of an answer, and that alone; nothing where it takes
    no conversation that ends there.
    """
    try:
        without = _template(tokenizer, chat.messages[:i], chat)
        prompt = _template(tokenizer, chat.messages[:i], chat, add_generation_prompt=True)
    except TEMPLATE_ERRORS:
        return "", ""
    return prompt, prompt[len(without) :] if prompt.startswith(without) else ""


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], chat: Chat, **options: Any
) -> Any:
    settings = {"tokenize": False, **options}
    return tokenizer.apply_chat_template([dict(m) for m in messages], tools=chat.tools, **settings)  # type: ignore[arg-type]


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first entries are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
