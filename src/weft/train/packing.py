"""Packing: many short documents in one row of `window` tokens, none of which sees another.

A row's position_ids restart at 0 with every document. transformers reads the restarts as borders (in its sdpa, eager,
flex and flash masks alike, provided no attention_mask and no cache is given), so that attention is block-diagonal.
`packing_refusal` runs a model to see whether that holds for it; where it does not, a row holds one document and
padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from weft.digests import tensors_digest
from weft.errors import WeftError
from weft.train.examples import Example
from weft.train.order import Order

__all__ = ["IGNORED", "Rows", "best_fit", "collate", "packing_refusal", "rows"]

IGNORED = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Tensor]]):
    """Training rows of equal length; row i is a dict of (window,) int64 tensors.

    Packed: input_ids, labels, position_ids. Padded: input_ids, labels, attention_mask.
    """

    input_ids: Tensor  # (rows, window) int32
    labels: Tensor  # (rows, window) int32, IGNORED at prompts, padding and each document's first token
    positions: Tensor  # (rows, window) int32, restarting with every document; -1 at padding
    packed: bool
    examples: int  # documents in these rows
    dropped: int  # documents left out, because nothing in their first `window` tokens is learned
    shortened: int  # prompt + completion or chat documents cut at `window` tokens

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.input_ids[index].long(), "labels": self.labels[index].long()}
        positions = self.positions[index].long()
        if self.packed:
            # padding as documents of one token each: it sees only itself, and no position exceeds the window
            return row | {"position_ids": positions.clamp(min=0)}
        return row | {"attention_mask": (positions >= 0).long()}

    def order(self, count: int, seed: int) -> Order:
        """The sampler of `count` rows: every epoch in an order of its own."""
        return Order(len(self), count, seed)

    def digest(self) -> str:
        """A digest of everything in the rows."""
        return tensors_digest([self.input_ids, self.labels, self.positions])

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.positions >= 0).sum())


def rows(
    examples: Sequence[Example], window: int, padding: int = 0, packed: bool = True, before: Sequence[int] = ()
) -> Rows:
    """Examples as rows of `window` tokens.

    Text longer than the window is cut into several pieces; a prompt and completion, or a chat, is cut at its end.
    Pieces are placed longest first into the row with the least room that holds them (best fit decreasing).

    Args:
        padding: the token id that fills the ends of rows.
        packed: several documents a row, or one.
        before: the ids that the tokenizer puts in front of a text, which each further piece begins with too
            (`weft.train.windows.opening`).

    Raises WeftError when nothing is left to learn.
    """
    kept, dropped, shortened = [], 0, 0
    for example in examples:
        pieces = _pieces(example, window, torch.tensor(before, dtype=torch.int64))
        shortened += len(example.ids) > window and not example.learned.all()
        dropped += not pieces
        kept += pieces
    if not kept:
        raise WeftError(
            f"The data is too short: none of its {len(examples)} documents has anything to learn in its first {window} "
            f"tokens; give longer text or a larger --window."
        )
    lengths = [len(piece.ids) for piece in kept]
    bins = best_fit(lengths, window) if packed else [[i] for i in range(len(kept))]
    tensors = _fill([[kept[i] for i in chosen] for chosen in bins], window, padding)
    return Rows(*tensors, packed=packed, examples=len(examples) - dropped, dropped=dropped, shortened=shortened)


def _pieces(example: Example, window: int, before: Tensor) -> list[Example]:
    """What of a document goes into rows: pieces of at most `window` tokens with something to learn after their first
    token, which in a further piece has nothing but `before` to be predicted from.
    """
    pieces = [Example(example.ids[:window], example.learned[:window])]
    if example.learned.all():  # a text, of which every token is learned
        further = [
            torch.cat([before, body]) for body in torch.split(example.ids[window:], window - len(before)) if len(body)
        ]
        pieces += [Example(ids, torch.arange(len(ids)) > len(before)) for ids in further]
    return [piece for piece in pieces if piece.learned[1:].any()]


def best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `window`: best fit decreasing, O(n log n), the same bins for the same lengths."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, chosen = room.pop(at)
            bins[chosen].append(index)
        else:
            left, chosen = window, len(bins)
            bins.append([index])
        if left > length:
            insort(room, (left - length, chosen))
    return bins


def _fill(bins: Sequence[Sequence[Example]], window: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    input_ids = torch.full((len(bins), window), padding, dtype=torch.int32)
    labels = torch.full((len(bins), window), IGNORED, dtype=torch.int32)
    positions = torch.full((len(bins), window), -1, dtype=torch.int32)
    for row, examples in enumerate(bins):
        start = 0
        for ids, learned in examples:
            end = start + len(ids)
            input_ids[row, start:end] = ids.int()
            # a document's first token would be predicted from the document before it
            labels[row, start + 1 : end] = torch.where(learned, ids, IGNORED)[1:].int()
            positions[row, start:end] = torch.arange(len(ids), dtype=torch.int32)
            start = end
    return input_ids, labels, positions


def collate(batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows stacked into a batch, cut after the last token that is not padding when there is an attention mask."""
    stacked = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    if "attention_mask" in stacked:
        length = int(stacked["attention_mask"].sum(1).max())
        stacked = {key: value[:, :length] for key, value in stacked.items()}
    return stacked


@torch.no_grad()
def packing_refusal(model: PreTrainedModel) -> str | None:
    """Why `model` cannot be trained on packed rows, or None when it can: its answer on a probe.

    A document b is run alone, behind a document a and behind another a' of equal length: its logits must be the same
    three times.
    """
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    a, other, b = (torch.arange(start, start + 4) * 7919 % vocabulary for start in (1, 101, 201))
    ids = torch.stack([torch.cat(pair) for pair in ((a, b), (other, b), (b, a))]).to(device)
    positions = torch.arange(4, device=device).repeat(3, 2)
    was_training = model.training
    model.train(False)
    try:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    except (TypeError, ValueError) as error:
        return f"{type(model).__name__} does not take position_ids ({error})"
    finally:
        model.train(was_training)
    behind, behind_other, alone = logits[0, 4:], logits[1, 4:], logits[2, :4]
    rounding = torch.finfo(model.dtype).eps * logits.abs().max()
    # the first two differ in nothing but what b must not see; the third also in the place of b, hence in rounding
    if (behind - behind_other).abs().max() > rounding / 16 or (behind - alone).abs().max() > 32 * rounding:
        return f"{type(model).__name__} lets a document in a packed row see the one before it"
    return None
