"""Collector: hooks that sum each linear layer's statistics while a model runs, one batch in memory at a time.

    input_moment        E[x x^T]            (in, in)     x: the layer's input at a token
    input_mean          E[x]                (in,)
    input_abs_mean      E|x|                (in,)
    output_mean         E[y]                (out,)       y: the layer's output, bias included
    output_moment       E[y y^T]            (out, out)
    output_grad_moment  E[g g^T]            (out, out)   g: d(sum of token losses) / d(output at a token)
    mean_grad           sum(g x^T) / tokens (out, in)    g x^T summed over all tokens: d(sum of token losses) / dW
    fisher_rows         E_d[sum_j Q_ij^2]   (out,)       Q: d(sum of token losses of sequence d) / dW
    fisher_columns      E_d[sum_i Q_ij^2]   (in,)
    input_relevance     E|R|                (in,)        R: the relevance of an input number, see `weft.stats.relevance`

Sums are in fp64, but for mean_grad, which is as large as the model: in fp32 (fp64 for an fp64 model), where the few
dozen summands of a calibration lose a digit at most. Expectations run over the tokens that the attention mask keeps
(the Fisher sums: over sequences). A layer applied several times in a pass adds up its uses, before any square. Layers
that are fed one and the same tensor (q, k and v; gate and up) share its input statistics: one tensor under several
names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError, unknown
from weft.stats.streams import Stream, Streams
from weft.terms.experts import Routed, routed

__all__ = ["GRADIENT_NEEDS", "INPUT_NEEDS", "NEEDS", "Collector", "check_needs", "kept_rows"]

INPUT_NEEDS = ("input_moment", "input_mean", "input_abs_mean")
OUTPUT_NEEDS = ("output_mean", "output_moment")
GRADIENT_NEEDS = ("output_grad_moment", "mean_grad", "fisher_rows", "fisher_columns", "input_relevance")
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
        optional: names of layers that may see nothing, and are then left out: an expert gets what is routed to it.

    Call `begin` before each pass. `sums`, `tokens`, `sequences` and `leader` are its whole state.
    """

    def __init__(self, layers: Mapping[str, nn.Module], needs: Iterable[str], optional: Iterable[str] = ()) -> None:
        self.layers, self.needs, self.optional = dict(layers), check_needs(needs), frozenset(optional)
        self.streams = Streams()
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.tokens: dict[str, int] = defaultdict(int)
        self.sequences = 0
        self.leader: dict[str, str] = {}
        self._batch = 1
        self._last: tuple[Tensor, str] | None = None
        self._uses: dict[str, int] = defaultdict(int)  # forward passes of a layer whose backward pass is still to come
        self._partial: dict[str, Tensor] = {}  # (batch, out, in) gradients of a layer with uses to come
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

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """A pass over this batch comes next."""
        self.streams.begin(batch)
        self._batch = len(next(iter(batch.values())))
        self.sequences += self._batch
        self._uses.clear()
        self._partial.clear()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """layer -> {statistic: tensor}, as means, which take the place of the sums: the collector is spent.

        Raises:
            WeftError: naming a layer that saw nothing, only zeros, or NaN.
        """
        self.check(complete=True)
        for name, by_need in self.sums.items():
            for need, total in by_need.items():
                total /= self.sequences if need.startswith("fisher") else self.tokens[name]
        there = [name for name in self.layers if name not in self.optional or self._complete(name)]
        return {name: {need: self._sum(name, need) for need in self.needs} for name in there}  # type: ignore[misc]

    def check(self, *, complete: bool) -> None:
        """Raises WeftError naming a layer that saw only zeros or NaN; or nothing, once the passes are complete."""
        for name in self.layers:
            for need in self.needs if name not in self.optional or self._complete(name) else ():
                total = self._sum(name, need)
                if total is not None:
                    _check(name, need, total)
                elif complete:
                    cause = "does not touch the loss" if self.tokens[name] else "was not reached"
                    raise WeftError(
                        f"The layer {name} {cause} on the calibration batches; leave it out with a layer pattern."
                    )

    def _complete(self, name: str) -> bool:
        totals = [self._sum(name, need) for need in self.needs]
        return all(total is not None and bool(total.any()) for total in totals)

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take now."""
        return sum(t.numel() * t.element_size() for by_need in self.sums.values() for t in by_need.values())

    def named_sums(self) -> dict[str, Tensor]:
        """The sums by "layer:statistic"; with `words`, the whole state."""
        return {f"{name}:{need}": total for name, sums in self.sums.items() for need, total in sums.items()}

    def words(self) -> dict[str, Any]:
        """The JSON-able part of the state."""
        return {"sequences": self.sequences, "tokens": dict(self.tokens), "leader": self.leader}

    def restore(self, sums: Mapping[str, Tensor], words: Mapping[str, Any]) -> int:
        """Take in a state; returns the number of batches that its words say, 0 where there are none."""
        for key, total in sums.items():
            name, need = key.rsplit(":", 1)
            self.sums[name][need] = total.to(next(self.layers[name].parameters()).device)
        self.tokens.update(words.get("tokens", {}))
        self.leader.update(words.get("leader", {}))
        self.sequences = words.get("sequences", 0)
        return int(words.get("batches", 0))

    def _sum(self, name: str, need: str) -> Tensor | None:
        owner = self.leader.get(name, name) if need in INPUT_NEEDS else name
        return self.sums.get(owner, {}).get(need)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            keep, tokens = self.streams.now.keep(args[0]), routed(args[0])
            self.tokens[name] += x[..., 0].numel() if keep is None else int(keep.sum())
            if self._leads(name, args[0]):
                self._add_input(name, x, keep)
            if any(need in self.needs for need in OUTPUT_NEEDS):
                self._add_output(name, output.detach(), keep)
            if args[0].requires_grad and "input_relevance" in self.needs:
                args[0].register_hook(lambda grad: self._add_relevance(name, x, grad, keep))
            if output.requires_grad and any(need in self.needs for need in GRADIENT_NEEDS):
                self._uses[name] += 1
                held = x if _READS_INPUT_AND_GRADIENT & set(self.needs) else None
                output.register_hook(lambda grad: self._add_gradient(name, held, grad, keep, tokens))  # type: ignore[no-untyped-call]

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
        if "input_mean" in self.needs:
            rows = rows.double()  # who asks for the mean subtracts it, and fp32 products would cancel
            self._add(name, "input_mean", rows.sum(0))
        if "input_moment" in self.needs:
            self._add(name, "input_moment", rows.mT @ rows)
        if "input_abs_mean" in self.needs:
            self._add(name, "input_abs_mean", rows.abs().double().sum(0))

    def _add_output(self, name: str, y: Tensor, keep: Tensor | None) -> None:
        rows = _rows(y, keep)
        if "output_mean" in self.needs:
            rows = rows.double()
            self._add(name, "output_mean", rows.sum(0))
        if "output_moment" in self.needs:
            self._add(name, "output_moment", rows.mT @ rows)

    def _add_gradient(
        self, name: str, x: Tensor | None, grad: Tensor, keep: Tensor | None, tokens: Routed | None
    ) -> None:
        if "output_grad_moment" in self.needs:
            rows = _rows(grad, keep)
            self._add(name, "output_grad_moment", rows.mT @ rows)
        if x is None:
            return
        if "mean_grad" in self.needs:
            self._add(name, "mean_grad", _rows(grad).mT @ _rows(x))
        if "fisher_rows" in self.needs or "fisher_columns" in self.needs:
            self._add_fisher(name, self._sequences_of(x, tokens), self._sequences_of(grad, tokens))

    def _add_relevance(self, name: str, x: Tensor, grad: Tensor, keep: Tensor | None) -> None:
        self._add(name, "input_relevance", (_rows(x, keep) * _rows(grad, keep)).abs().double().sum(0))

    def _add_fisher(self, name: str, x: Tensor, grad: Tensor) -> None:
        """Squares of whole-sequence gradients: sums over tokens and the layer's uses come before the square."""
        pairs = zip(grad, x, strict=True)
        gradients: Iterable[Tensor] = (g.mT @ inputs for g, inputs in pairs)
        self._uses[name] -= 1
        if self._uses[name] or name in self._partial:
            total = torch.stack(list(gradients)) + self._partial.pop(name, 0)
            if self._uses[name]:
                self._partial[name] = total
                return
            gradients = total
        for gradient in gradients:
            squared = gradient.double().square()
            if "fisher_rows" in self.needs:
                self._add(name, "fisher_rows", squared.sum(1))
            if "fisher_columns" in self.needs:
                self._add(name, "fisher_columns", squared.sum(0))

    def _sequences_of(self, x: Tensor, tokens: Routed | None) -> Tensor:
        """x as (batch, tokens, features): some models flatten their tokens, and an expert sees some of them."""
        if tokens is not None:
            x = x.new_zeros(tokens.total, x.shape[-1]).index_copy_(0, tokens.rows, x)
        return _wide(x).reshape(self._batch, -1, x.shape[-1])

    def _add(self, name: str, need: str, value: Tensor) -> None:
        sums = self.sums[name]
        if need in sums:
            sums[need] += value
        else:
            sums[need] = value if need == "mean_grad" else value.double()


def kept_rows(x: Tensor, stream: Stream) -> Tensor:
    """The tokens of x (..., features) that the stream's mask keeps, as fp32 rows."""
    return _rows(x, stream.keep(x))


def _rows(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The kept tokens as rows (tokens, features)."""
    rows = _wide(x).reshape(-1, x.shape[-1])
    return rows if keep is None else rows[keep.flatten()]


def _wide(x: Tensor) -> Tensor:
    """At least fp32: half precision would overflow in the products."""
    return x if x.dtype == torch.float64 else x.float()


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
