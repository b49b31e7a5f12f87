"""ppl-sparsity: the share of an MLP's neurons that can be switched off, token by token, while perplexity rises by p
per cent (Luo et al., 2024, arXiv 2411.02335).

    y = sum_i h_i d_i   the MLP's output: neurons h (tokens, f), columns d_i of its last matrix (out, f)
    D = {i: |h_i| ||d_i|| <= eps},   cett(eps) = mean over tokens of ||sum_{i in D} h_i d_i|| / ||y||

Every MLP gets the eps at which it loses one and the same share of its output, and that share is raised by bisection
until the perplexity is 1 + p / 100 of the dense one: the mean over the batches of exp(sparse loss - dense loss). Any
activation function will do. A high sparsity says that neurons can be skipped, or that the MLP can be narrower.

Source: github.com/thunlp/SparsingLaw: p = 1, the share to 1e-3, the first 10 batches.
Deviations: eps is read off a curve of `points` values, a pass over the data for all layers, where the code bisects for
each layer; a neuron at eps is switched off (<=), so that eps = 0 counts the zeros of a ReLU; a curve that falls, where
neurons cancel, is taken at its height so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures.base import Measure
from weft.signals import stop_here
from weft.stats.calibrate import Batch, frozen, to_device, token_loss
from weft.stats.collect import kept_rows
from weft.stats.layerwise import watch
from weft.stats.streams import Stream, Streams
from weft.terms.joints import joints
from weft.terms.layers import linear_layers, weight_of

__all__ = ["MEASURE", "Curve", "lost_share", "readers", "value"]

_STEPS = 12  # of bisection at most: to 2^-12
_LOWEST = 1e-4  # the least threshold that is tried, as a share of the layer's largest neuron


class Curve:
    """What a layer loses at each of some rising thresholds, summed over tokens.

    Args:
        norms: (f,) of the columns of its matrix.
        thresholds: (k,) rising, the first 0.
    """

    def __init__(self, norms: Tensor, thresholds: Tensor) -> None:
        self.norms, self.thresholds = norms, thresholds
        self.lost = torch.zeros(len(thresholds), dtype=torch.float64)
        self.tokens = 0

    def add(self, h: Tensor, W: Tensor) -> None:
        """Count tokens: h (tokens, f) through W (out, f)."""
        self.lost += torch.stack(
            [lost_share(h, W, self.norms, float(eps)).double().sum().cpu() for eps in self.thresholds]
        )
        self.tokens += len(h)

    def threshold(self, share: float) -> float:
        """The eps that loses this share of the output, between two of the curve's; infinite for all of it."""
        curve = (self.lost / max(self.tokens, 1)).cummax(0).values
        if share >= 1 or share >= float(curve[-1]):
            return math.inf if share >= 1 else float(self.thresholds[-1])
        i = int(torch.searchsorted(curve, share, right=True))
        if i == 0:
            return 0.0
        low, high = float(curve[i - 1]), float(curve[i])
        part = (share - low) / (high - low) if high > low else 0.0
        return float(self.thresholds[i - 1] + part * (self.thresholds[i] - self.thresholds[i - 1]))


def lost_share(h: Tensor, W: Tensor, norms: Tensor, eps: float) -> Tensor:
    """(tokens,) the share of each token's output that the neurons at or below eps make; 0 where there is no output."""
    dead = torch.where(h.abs() * norms <= eps, h, torch.zeros_like(h))
    whole = (h @ W.mT).norm(dim=1)
    return torch.where(whole > 0, (dead @ W.mT).norm(dim=1) / whole.clamp(min=1e-30), torch.zeros_like(whole))


def readers(model: nn.Module) -> dict[str, nn.Module]:
    """The layer of each MLP that reads its neurons, by name. Raises WeftError where there is none."""
    found = [
        list(joint.members.values())[-1].layer for joint in joints(model, linear_layers(model)) if joint.kind == "mlp"
    ]
    if not found:
        raise WeftError(f"{type(model).__name__} has no MLP whose neurons weft knows: leave this measure out.")
    return {name: model.get_submodule(name) for name in found}


@torch.no_grad()
def value(
    model: nn.Module, batches: Sequence[Batch], *, percent: float = 1.0, points: int = 24, batches_at_most: int = 10
) -> dict[str, dict[str, float]]:
    """{layer: {"sparsity", "threshold"}, "": {"ppl_sparsity", "cett", "ppl_ratio"}}."""
    batches, layers = list(batches)[:batches_at_most], readers(model)
    with frozen(model):
        norms = {name: weight_of(layer, torch.float32).norm(dim=0) for name, layer in layers.items()}
        curves, dense = _curves(model, batches, layers, norms, points), _losses(model, batches)

        def tried(share: float) -> tuple[float, dict[str, float], dict[str, float]]:
            eps = {name: curve.threshold(share) for name, curve in curves.items()}
            with _sparse(model, layers, norms, eps) as switched:
                now = _losses(model, batches, switched)
            ratio = math.fsum(math.exp(min(b - a, 50)) for a, b in zip(dense, now, strict=True)) / len(dense)
            return ratio, eps, {name: off / max(of, 1) for name, (off, of) in switched.counts.items()}

        low, high, best = 0.0, 1.0, (0.0, *tried(0.0))
        for _ in range(_STEPS):
            share = (low + high) / 2
            ratio, eps, sparsity = tried(share)
            if ratio <= 1 + percent / 100:
                low, best = share, (share, ratio, eps, sparsity)
            else:
                high = share
            if high - low < 1e-3:
                break
    share, ratio, eps, sparsity = best
    found = {name: {"sparsity": sparsity[name], "threshold": eps[name]} for name in layers}
    mean = math.fsum(sparsity.values()) / len(sparsity)
    return {**found, "": {"ppl_sparsity": mean, "cett": share, "ppl_ratio": ratio}}


class _Switched:
    """Neurons that are switched off, counted over the tokens that are no padding."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.counts: dict[str, tuple[int, int]] = {}

    def add(self, name: str, h: Tensor, dead: Tensor) -> None:
        keep = self.streams.now.keep(h)
        rows = dead.reshape(-1, dead.shape[-1]) if keep is None else dead.reshape(-1, dead.shape[-1])[keep.flatten()]
        off, of = self.counts.get(name, (0, 0))
        self.counts[name] = (off + int(rows.sum()), of + rows.numel())


@contextmanager
def _sparse(
    model: nn.Module, layers: Mapping[str, nn.Module], norms: Mapping[str, Tensor], eps: Mapping[str, float]
) -> Iterator[_Switched]:
    """Run the layers without the neurons at or below their thresholds."""
    switched = _Switched()

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            dead = args[0].abs() * norms[name].to(args[0].dtype) <= eps[name]
            switched.add(name, args[0], dead)
            return (args[0].masked_fill(dead, 0), *args[1:])

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield switched
    finally:
        for handle in handles:
            handle.remove()


def _losses(model: nn.Module, batches: Sequence[Batch], switched: _Switched | None = None) -> list[float]:
    """The mean loss of each batch."""
    losses = []
    for batch in batches:
        batch = to_device(batch, model)
        if switched is not None:
            switched.streams.begin(batch)
        losses.append(float(token_loss(model, batch)[0]))
        stop_here()
    return losses


def _curves(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, Tensor],
    points: int,
) -> dict[str, Curve]:
    """The curve of every layer; thresholds spread evenly in their logarithms up to the first batch's largest neuron."""
    curves: dict[str, Curve] = {}

    def see(name: str, x: Tensor, y: Tensor, stream: Stream) -> None:
        h, W = kept_rows(x, stream).float(), weight_of(layers[name], torch.float32)
        if name not in curves:
            top = float((h.abs() * norms[name]).amax()) or 1.0
            spread = torch.logspace(math.log10(_LOWEST), 0, points - 1, dtype=torch.float64) * top
            curves[name] = Curve(norms[name], torch.cat([torch.zeros(1, dtype=torch.float64), spread]))
        curves[name].add(h, W)

    watch(model, batches, layers, see)
    return curves


MEASURE = Measure(
    name="ppl-sparsity",
    summary="Share of the MLPs' neurons that can be off while perplexity rises by 1 %.",
    paper="Luo et al., 2024, arXiv 2411.02335",
    value=value,
    of="model",
    reads={
        "sparsity": "share of the neurons that are switched off; high: skip them, or narrow the MLP",
        "threshold": "size of a neuron's output below which it is off",
    },
    reads_model={
        "ppl_sparsity": "mean share of the neurons that are off",
        "cett": "share of each MLP's output that is given up for it",
        "ppl_ratio": "perplexity with them off, of the dense one",
    },
    cost="some fourteen forward passes over the data",
    defaults={"percent": 1.0, "points": 24, "batches_at_most": 10},
)
