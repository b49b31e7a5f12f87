"""How far a model's predictions move when layers are cut: what an allocation measures to calibrate its predictions.

    K = mean over positions of KL(softmax(z / T) || softmax(z' / T)),   z of the model as it is, z' with the layers cut

T = 0.6, positions from 256 on (in shorter windows from their middle on), as in Thoma et al., 2026 (openreview
IjIgNPFuCt).
Deviations: four windows, spread over the calibration text, are enough for a difference on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weft.methods.base import Size
from weft.runs.pieces import Piece, Store, named
from weft.signals import finishing
from weft.stats.calibrate import Batch, forward_inputs, frozen, layers_by_block, to_device
from weft.terms.joints import layers_of
from weft.terms.layers import replace as replace_layer
from weft.verbs.placing import place
from weft.verbs.survey import Plan, surveyed_split

__all__ = ["divergence"]

TEMPERATURE = 0.6
CONTEXT = 256  # positions of a window that only serve as context
WINDOWS = 4
_TOGETHER = 8  # layers that are held cut, all cuts measured on one pass of the model as it is together
_KEPT = 2**28  # bytes of predictions of the model as it is that are kept
_ROWS = 256  # positions turned into fp32 probabilities at a time

Cut = Mapping[str, Size]


def divergence(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], store: Store
) -> Callable[[Sequence[Cut]], list[float]]:
    """(cuts) -> K of each, on some of the calibration text. Finished ones are kept in the store."""
    undisturbed = _Undisturbed(model, spread(batches))

    def measure(cuts: Sequence[Cut]) -> list[float]:
        names = [_name(cut) for cut in cuts]
        open_ = [i for i, name in enumerate(names) if store.get(name) is None]
        for group in plan.track(_groups([(i, len(cuts[i])) for i in open_]), "measuring"):
            with finishing():
                found = _measured(model, plan, [cuts[i] for i in group], undisturbed, store)
                for i, value in zip(group, found, strict=True):
                    store.put(names[i], Piece({"divergence": torch.tensor(value, dtype=torch.float64)}))
        pieces = [store.get(name) for name in names]
        return [float(piece.tensors["divergence"]) for piece in pieces if piece is not None]

    return measure


def _groups(cuts: Sequence[tuple[int, int]]) -> list[list[int]]:
    """(cut, its layers) in order -> the cuts that are measured together, each one at least."""
    groups: list[list[int]] = []
    held = _TOGETHER
    for cut, size in cuts:
        if held + size > _TOGETHER:
            groups.append([])
            held = 0
        groups[-1].append(cut)
        held += size
    return groups


def spread(batches: Sequence[Batch]) -> list[Batch]:
    """About four windows' batches, evenly over all."""
    rows = max(len(next(iter(batches[0].values()))), 1)
    count = min(max(WINDOWS // rows, 1), len(batches))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]


@torch.no_grad()
def _measured(
    model: nn.Module, plan: Plan, cuts: Sequence[Cut], undisturbed: _Undisturbed, store: Store
) -> list[float]:
    modules = [_modules(model, plan, cut, store) for cut in cuts]
    totals, count = [0.0] * len(cuts), 0
    with frozen(model):
        for batch, z in undisturbed:
            count += len(z)
            for i, cut in enumerate(modules):
                with _instead(model, cut):
                    totals[i] += summed_divergence(z, _predictions(model, batch))
    return [total / max(count, 1) for total in totals]


class _Undisturbed:
    """The batches with the predictions of the model as it is, made once where they are small."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, [to_device(batch, model) for batch in batches]
        self.kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        for i, batch in enumerate(self.batches):
            z = self.kept[i] if i in self.kept else _predictions(self.model, batch)
            if z.nbytes + sum(t.nbytes for n, t in self.kept.items() if n != i) <= _KEPT:
                self.kept[i] = z
            yield batch, z


def _predictions(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (positions, vocabulary) of the positions that count."""
    logits: Tensor = model(**forward_inputs(model, batch, logits=True)).logits
    if logits.dim() < 3:
        return logits.reshape(len(logits), -1)
    mask = batch.get("attention_mask")
    start = min(CONTEXT, logits.shape[1] // 2)
    kept = logits[:, start:]
    if mask is None or mask.shape != logits.shape[:2]:
        return kept.flatten(0, 1)
    return kept[mask[:, start:].bool()]


def summed_divergence(z: Tensor, cut: Tensor) -> float:
    """The sum over the rows of z, cut (n, v) of KL(softmax(z / T) || softmax(cut / T)), in fp32 by rows."""
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for p, q in zip(torch.split(z, _ROWS), torch.split(cut, _ROWS), strict=True):
        p, q = ((t.float() / TEMPERATURE).log_softmax(-1) for t in (p, q))
        total += (p.exp() * (p - q)).sum().double()
    return max(float(total), 0.0)  # of a cut that changes next to nothing, rounding may leave less; NaN stays


def _modules(model: nn.Module, plan: Plan, cut: Cut, store: Store) -> dict[str, nn.Module]:
    """What takes the layers' places, made once; one block's factors are in memory at a time."""
    made: dict[str, nn.Module] = {}
    for block, names in enumerate(layers_by_block(model, plan.sites)):
        if not any(cut.get(name) is not None for name in names):
            continue
        for name, split in surveyed_split(model, plan, store, block):
            if cut.get(name) is not None:
                before = {layer: model.get_submodule(layer) for layer in layers_of(name)}
                made |= place(model, plan, name, split(cut[name]))
                for layer, module in before.items():
                    replace_layer(model, layer, module)
    return made


@contextmanager
def _instead(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The modules in their places; what was there comes back."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_layer(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_layer(model, name, module)


def _name(cut: Cut) -> str:
    return named("divergence", {name: size for name, size in cut.items() if size is not None})
