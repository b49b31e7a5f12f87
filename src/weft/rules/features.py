"""Features: what the blocks of a model put out stays near what another's do, on the same tokens.

    weight mean_(l, t) |h_l,t - g_m(l),t|^2 / |g_m(l),t|^2

h_l,t is the student's state of token t after block l, g the teacher's; padding does not count. Minitron (Muralidharan
et al., 2024, arXiv 2407.14679) adds such a loss to that of the logits where much depth was cut. 1 stands for states
that are as wrong as zeros would be. A student of M blocks under a teacher of N follows every N/M-th, and with its last
block the last: m(l) = l N / M, rounded, from 1 (the uniform map of TinyBERT, Jiao et al., 2020, arXiv 1909.10351).

Of each pair of blocks the teacher's state alone is kept until the backward pass, which makes the difference again.
Deviations: each token counts relative to the teacher's own state of it (OneBit, Xu et al., 2024, arXiv 2402.11295,
divides each state by its own length, and so leaves the length free); in a language model the mean square over tokens
would be that of the first (of SmolLM2-135M's block 15, on 256 tokens, 99 % of the sum). The weight is fixed, where
Minitron sets it anew each step such that both losses are equal. States of another width are not projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.errors import WeftError
from weft.rules.base import Rule
from weft.terms.layers import block_stacks

__all__ = ["Features", "followed", "inner", "paired"]


class Features(Rule):
    """Adds weight times the mean error of the blocks' states to the loss of a step in which somebody runs the teacher,
    without gradients and on the same batch, before the model: `weft.memory.teaching.taught` does.

    Args:
        teacher: a model of the same width and of as many blocks or more.
        weight: 0 leaves the teacher alone.
    """

    def __init__(self, teacher: nn.Module, weight: float) -> None:
        self.teacher, self.weight = teacher, weight
        self.watching = (
            False  # from the teacher's pass to the penalty: not when judging, nor a block that is recomputed
        )
        self.mask: Tensor | None = None  # of the tokens that are no padding
        self.mine: dict[int, Tensor] = {}
        self.theirs: dict[int, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        """Raises WeftError as `paired`."""
        if not self.weight:
            return
        self.hang(inner(self.teacher).register_forward_pre_hook(self._watch, with_kwargs=True))
        for place, pair in enumerate(paired(model, self.teacher)):
            for block, states in zip(pair, (self.mine, self.theirs), strict=True):
                self.hang(block.register_forward_hook(partial(self._keep, states, place)))

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Of the forward pass just done, once."""
        errors = [
            checkpoint(
                self._error, self.mine[place], self.theirs.pop(place), self.mask,
                use_reentrant=False, preserve_rng_state=False,
            )
            for place in self.mine
            if place in self.theirs  # a model may leave out a block at random
        ]  # fmt: skip
        self._forget()
        return self.weight * torch.stack(errors).mean() if errors else None

    def error(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Of one pair of blocks, of the tokens that count: (tokens, width) in fp32 or wider, or (..., width)."""
        size = theirs.square().sum(-1)
        size = size.masked_fill(size == 0, 1.0)  # a token embedded as zeros, as padding often is, and seen by no other
        return ((mine - theirs).square().sum(-1) / size).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        if step == self.steps:
            self.close()

    def close(self) -> None:
        super().close()
        self._forget()

    def _error(self, mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        return self.error(*(_counted(states, mask) for states in (mine, theirs)))

    def _watch(self, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._forget()
        self.mask, self.watching = _tokens(named), True

    def _keep(self, states: dict[int, Tensor], place: int, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self.watching:
            states[place] = out[0] if isinstance(out, tuple) else out

    def _forget(self) -> None:
        self.watching = False
        self.mine.clear()
        self.theirs.clear()


def paired(model: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each block of the model, and the teacher's that it follows.

    Raises:
        WeftError: a model without blocks, or of other stacks of them than the teacher, or of more blocks.
    """
    mine, theirs = (list(block_stacks(m).values()) for m in (model, teacher))
    if not mine or len(mine) != len(theirs):
        raise WeftError(
            f"The model has {len(mine)} stack{'s' * (len(mine) != 1)} of blocks and the teacher {len(theirs)}, so that "
            "none can follow the other's; learn of its predictions alone."
        )
    for stack, known in zip(mine, theirs, strict=True):
        if len(stack) > len(known):
            raise WeftError(
                f"The model has {len(stack)} blocks and the teacher {len(known)}: each block follows one of the "
                "teacher's, which needs as many; learn of its predictions alone."
            )
    return [
        (block, known[place])
        for stack, known in zip(mine, theirs, strict=True)
        for block, place in zip(stack, followed(len(stack), len(known)), strict=True)
    ]


def followed(mine: int, theirs: int) -> list[int]:
    """Which of the teacher's blocks each of the student's follows, from 0."""
    return [(2 * place * theirs + mine) // (2 * mine) - 1 for place in range(1, mine + 1)]


def inner(model: nn.Module) -> nn.Module:
    """The model without its head, which is called with what both models are given."""
    found = getattr(model, "base_model", model)
    assert isinstance(found, nn.Module)
    return found


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch are no padding, where it says so: (batch, tokens)."""
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if isinstance(mask, Tensor) or not isinstance(positions, Tensor):
        return mask if isinstance(mask, Tensor) else None
    # packed rows are filled up by documents of one token (`weft.train.packing`)
    return (positions > 0) | (F.pad(positions[..., 1:], (0, 1)) > 0)


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """States (batch, tokens, width) in fp32 or wider, of the tokens that a mask of their shape keeps."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide if mask is None or mask.shape != wide.shape[:-1] else wide[mask.bool()]
