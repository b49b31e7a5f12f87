"""Windows of contiguous tokens: what calibration and perplexity are measured on.

Texts become one stream of n tokens, documents joined by the end-of-text token. A window is `window` tokens: what the
tokenizer itself puts in front of a text (`opening`: Gemma's <bos>, nothing for GPT-2), then consecutive tokens of the
stream:

    evaluation:   starts 0, stride, 2 stride, ...; a token is scored once, in the first window that gives it any context
    calibration:  one window out of each of `windows` equal parts of the stream, at a place drawn by `seed`

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.train.encoding import token_ids

__all__ = [
    "Window",
    "batches",
    "calibration_batches",
    "check_ids",
    "closed",
    "cut",
    "evaluation_windows",
    "opening",
    "token_stream",
    "token_windows",
]


class Window(NamedTuple):
    """The tokens [start, start + window) of a stream, of which those from `start + context` on are scored."""

    start: int
    context: int


def opening(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> tuple[int, ...]:
    """The ids that stand in front of every window: those that the tokenizer puts in front of a text.

    Args:
        bos: False for none; True for the beginning-of-text token even where the tokenizer does not put it there.

    Raises WeftError for True when the tokenizer has no such token.
    """
    if bos is False:
        return ()
    whole: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), 0)
    if start or bos is None:
        return tuple(whole[:start])
    if tokenizer.bos_token_id is None:
        raise WeftError("The tokenizer has no beginning-of-text token: leave --bos away.")
    return (int(tokenizer.bos_token_id),)  # type: ignore[arg-type]


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str]) -> Tensor:
    """All texts as one int64 stream (n,), each followed by the end-of-text token where the tokenizer has one, without
    the tokens in front of a text: these belong to windows.

    Raises WeftError when there is nothing but white space.
    """
    documents = [text for text in ([texts] if isinstance(texts, str) else texts) if text.strip()]
    if not documents:
        raise WeftError("The text is empty: give a file that holds some text.")
    end, parts = tokenizer.eos_token_id, list[Tensor]()
    for ids in token_ids(tokenizer, documents):
        parts += [ids] if closed(ids[-1:].tolist(), end) == ids[-1:].tolist() else [ids, torch.tensor([end])]
    return torch.cat(parts)


def check_ids(ids: Tensor, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises WeftError for a token that the model of this configuration has no row for."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    most = int(ids.max()) if len(ids) else 0
    if rows is not None and most >= rows:
        raise WeftError(
            f"The text holds the token {tokenizer.convert_ids_to_tokens(most)!r}, number {most} of the tokenizer, and "
            f"the model has rows for {rows} tokens: take the tokenizer that belongs to the model, or resize its "
            "embeddings to the tokenizer."
        )


def closed(ids: list[int], end: int | None) -> list[int]:
    """`ids` ending with the end-of-text token, once."""
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def evaluation_windows(tokens: int, window: int, stride: int | None = None, count: int | None = None) -> list[Window]:
    """The windows of a stream of `tokens` tokens that score every token once, or the first `count` of them.

    The first token of the stream has no context and is never scored; with stride = window neither is the first token of
    any other window, the convention of published tables. The last window is moved back to end with the stream.

    Raises WeftError when the window or the stride make no sense or the stream is too short for them.
    """
    stride = window if stride is None else stride
    check_window(tokens, window)
    if not 1 <= stride <= window:
        raise WeftError(f"The stride is {stride} tokens: give one between 1 and the window, {window}.")
    starts = range(0, tokens - window + 1, stride)
    regular = [Window(start, max(1, window - stride) if start else 1) for start in starts]
    if count is not None:
        return first(regular, count, window)
    scored_to = starts[-1] + window
    tail = [Window(tokens - window, scored_to - (tokens - window))] if scored_to < tokens else []
    return regular + tail


def check_window(tokens: int, window: int) -> None:
    """Raises WeftError for a window of no use, or one longer than the text."""
    if window < 2:
        raise WeftError(f"The window is {window} tokens: give at least 2, since the first only serves as context.")
    if tokens < window:
        raise WeftError(
            f"The text is too short: {tokens} tokens, fewer than one window of {window}; "
            f"give a longer text or a smaller --window."
        )


def first(windows: list[Window], count: int, window: int) -> list[Window]:
    """The first `count` windows. Raises WeftError when there are fewer."""
    if count < 1:
        raise WeftError(f"--windows is {count}: give at least 1.")
    if count > len(windows):
        raise WeftError(
            f"The text is too short: it holds {len(windows)} windows of {window} tokens, not {count}; "
            f"give a longer text, fewer --windows or a smaller --window."
        )
    return windows[:count]


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    window: int,
    count: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
) -> Tensor:
    """The token windows (k, window), int64, of `texts` by the plan of `evaluation_windows`; `bos` as in `opening`."""
    stream, before = token_stream(tokenizer, texts), opening(tokenizer, bos)
    room = window - len(before)
    return cut(stream, [w.start for w in evaluation_windows(len(stream), room, stride, count)], window, before)


def cut(stream: Tensor, starts: Sequence[int], window: int, before: Sequence[int] = ()) -> Tensor:
    """The windows (k, window) of a stream (n,) whose text begins at `starts`, each with the ids `before` in front."""
    front, room = torch.tensor(before, dtype=stream.dtype), window - len(before)
    return torch.stack([torch.cat([front, stream[start : start + room]]) for start in starts])


def batches(windows: Tensor, batch: int) -> Iterator[dict[str, Tensor]]:
    """The windows (k, window) as model inputs, `batch` rows at a time: input_ids, attention_mask (all ones), labels."""
    for ids in torch.split(windows, batch):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    windows: int = 32,
    window: int = 512,
    batch: int = 4,
    seed: int = 0,
    bos: bool | None = None,
) -> list[dict[str, Tensor]]:
    """`windows` windows of `window` tokens spread evenly over the texts, as model inputs in batches of `batch`.

    The stream is cut into `windows` equal parts and one window is drawn uniformly inside each: no two overlap, every
    part of the text is seen, and the same arguments give the same tokens.

    Args:
        bos: as in `opening`.

    Raises WeftError when the text holds too few tokens.
    """
    if windows < 1 or batch < 1:
        raise WeftError(f"--windows is {windows} and the batch {batch}: give at least 1 of each.")
    stream, before = token_stream(tokenizer, texts), opening(tokenizer, bos)
    room = window - len(before)
    check_window(len(stream), room)
    part = len(stream) // windows
    if part < room:
        raise WeftError(
            f"The text is too short: {windows} windows of {window} tokens need {windows * room} tokens and it has "
            f"{len(stream)}; give a longer text, fewer --windows or a smaller --window."
        )
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, part - room + 1, (windows,), generator=generator).tolist()
    starts = [i * part + offset for i, offset in enumerate(offsets)]
    return list(batches(cut(stream, starts, window, before), batch))
