"""Collector: hooks that sum each linear layer's statistics while a model runs, in fp64, one batch in memory at a time.

    input_moment        E[x x^T]            (in, in)     x: the layer's input at a token
    input_mean          E[x]                (in,)
    input_abs_mean      E|x|                (in,)
    output_mean         E[y]                (out,)       y: the layer's output, bias included
    output_moment       E[y y^T]            (out, out)
    output_grad_moment  E[g g^T]            (out, out)   g: d(sum of token losses) / d(output at a token)
    mean_grad           E[g x^T]            (out, in)    the gradient of the mean token loss with respect to W
    fisher_rows         E_d[sum_j Q_ij^2]   (out,)       Q: d(sum of token losses of sequence d) / dW
    fisher_columns      E_d[sum_i Q_ij^2]   (in,)

Expectations run over the tokens that the attention mask keeps (the Fisher sums: over sequences). A layer applied
several times in a pass adds up its uses. Layers that are fed one and the same tensor (q, k and v; gate and up) share
its input statistics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError, unknown

__all__ = ["GRADIENT_NEEDS", "INPUT_NEEDS", "NEEDS", "Collector", "check_needs", "kept_rows"]

INPUT_NEEDS = ("input_moment", "input_mean", "input_abs_mean")
OUTPUT_NEEDS = ("output_mean", "output_moment")
GRADIENT_NEEDS = ("output_grad_moment", "mean_grad", "fisher_rows", "fisher_columns")
NEEDS = INPUT_NEEDS + OUTPUT_NEEDS + GRADIENT_NEEDS
_READS_INPUT_AND_GRADIENT = {"mean_grad", "fisher_rows", "fisher_columns"}


def check_needs(needs: Iterable[str]) -> tuple[str, ...]:
    """The needs without repeats, in the order of the table. Raises WeftError for a name that is not in it."""
    asked = set(needs)
    for name in sorted(asked):
        if name not in NEEDS:
            raise unknown("statistic", name, NEEDS)
    return tuple(name for name in NEEDS if name in asked)


class Collector:
    """Sums over every forward (and backward) pass run inside its `with` block.

    Args:
        layers: name -> linear layer.
        needs: statistics from the table above.

    Set `masks` before each pass: booleans (batch, positions), one for each of the model's token streams; a stream
    without one is kept whole. `sums`, `tokens`, `sequences` and `leader` are its whole state.
    """

    def __init__(self, layers: Mapping[str, nn.Module], needs: Iterable[str]) -> None:
        self.layers, self.needs = dict(layers), check_needs(needs)
        self.masks: list[Tensor] = []
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.tokens: dict[str, int] = defaultdict(int)
        self.sequences = 0
        self.leader: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._last = [], None

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """layer -> {statistic: tensor}, as means; WeftError names a layer that saw nothing, only zeros, or NaN."""
        return {name: self._layer_moments(name) for name in self.layers}

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take now."""
        return sum(t.numel() * t.element_size() for by_need in self.sums.values() for t in by_need.values())

    def _layer_moments(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for need in self.needs:
            owner = self.leader.get(name, name) if need in INPUT_NEEDS else name
            total = self.sums.get(owner, {}).get(need)
            if total is None:
                raise WeftError(
                    f"The layer {name} was not reached by the calibration batches; leave it out with a layer pattern."
                )
            _check(name, need, total)
            found[need] = total / (self.sequences if need.startswith("fisher") else self.tokens[owner])
        return found

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            keep = _matching(self.masks, x)
            self.tokens[name] += x[..., 0].numel() if keep is None else int(keep.sum())
            if self._leads(name, args[0]):
                self._add_input(name, x, keep)
            if any(need in self.needs for need in OUTPUT_NEEDS):
                self._add_output(name, output.detach(), keep)
            if output.requires_grad and any(need in self.needs for need in GRADIENT_NEEDS):
                held = x if _READS_INPUT_AND_GRADIENT & set(self.needs) else None
                output.register_hook(lambda grad: self._add_gradient(name, held, grad, keep))

        return hook

    def _leads(self, name: str, x: Tensor) -> bool:
        """Whether this layer sums its own inputs: it does unless the layer before it was fed the very same tensor."""
        if name not in self.leader:
            same = self._last is not None and self._last[0] is x
            self.leader[name] = self._last[1] if same and self._last else name
        if self.leader[name] == name:
            self._last = (x, name)
        return self.leader[name] == name

    def _add_input(self, name: str, x: Tensor, keep: Tensor | None) -> None:
        rows = _rows(x, keep)
        for need in self.needs:
            if need == "input_moment":
                self._add(name, need, rows.mT @ rows)
            elif need == "input_mean":
                self._add(name, need, rows.double().sum(0))
            elif need == "input_abs_mean":
                self._add(name, need, rows.abs().double().sum(0))

    def _add_output(self, name: str, y: Tensor, keep: Tensor | None) -> None:
        rows = _rows(y, keep)
        if "output_mean" in self.needs:
            self._add(name, "output_mean", rows.double().sum(0))
        if "output_moment" in self.needs:
            self._add(name, "output_moment", rows.mT @ rows)

    def _add_gradient(self, name: str, x: Tensor | None, grad: Tensor, keep: Tensor | None) -> None:
        if "output_grad_moment" in self.needs:
            rows = _rows(grad, keep)
            self._add(name, "output_grad_moment", rows.mT @ rows)
        if x is None:
            return
        if "mean_grad" in self.needs:
            self._add(name, "mean_grad", _rows(grad, None).mT @ _rows(x, None))
        if "fisher_rows" in self.needs or "fisher_columns" in self.needs:
            # squares of whole-sequence gradients: the sum over tokens comes before the square
            for g, inputs in zip(grad, x, strict=True):
                squared = (_rows(g, None).mT @ _rows(inputs, None)).double().square()
                self._add(name, "fisher_rows", squared.sum(1))
                self._add(name, "fisher_columns", squared.sum(0))

    def _add(self, name: str, need: str, value: Tensor) -> None:
        if need not in self.needs:
            return
        sums = self.sums[name]
        if need in sums:
            sums[need] += value
        else:
            sums[need] = value.double()


def kept_rows(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The tokens of x (..., features) that the masks keep, as fp32 rows."""
    return _rows(x, _matching(masks, x))


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    """The kept tokens as fp32 rows (tokens, features): half precision would overflow in the products."""
    rows = x.reshape(-1, x.shape[-1]).float() if x.dtype != torch.float64 else x.reshape(-1, x.shape[-1])
    return rows if keep is None else rows[keep.flatten()]


def _matching(masks: list[Tensor], x: Tensor) -> Tensor | None:
    """The first mask that covers exactly x's tokens, flat or not; None when there is none (a pooled vector, say)."""
    for mask in masks:
        if x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel()):
            return mask
    return None


def _check(name: str, need: str, total: Tensor) -> None:
    if not torch.isfinite(total).all():
        raise WeftError(
            f"The statistic {need} of layer {name} holds NaN or infinity; "
            "run the model in float32, or leave the layer out with a layer pattern."
        )
    if not bool(total.any()):
        raise WeftError(
            f"The statistic {need} of layer {name} is zero everywhere: the layer is dead on this calibration text, "
            "or does not touch the loss; give other text, or leave the layer out with a layer pattern."
        )
