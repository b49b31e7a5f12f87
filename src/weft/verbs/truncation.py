"""How `compress` works through a model: survey every layer, spend the budget, then replace layer by layer.

    survey       W, moments -> Factors, and what the allocation wants to know (`LayerInfo`)
    one_shot     replace each layer by the first r components of the surveyed factors
    sequential   walk the blocks; factorise each group anew on the inputs that it gets in the model compressed so far

With a `Store` that has a directory, finished blocks are kept on disk, and an interrupted run goes on from them to the
same bits. Their names carry a key of all that decides them, so that no other run takes them for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.allocate import NEEDS, LayerInfo, Ranks
from weft.allocate.base import rank_limit
from weft.errors import WeftError
from weft.linalg.principal import tail_losses
from weft.linalg.svd import singular_values
from weft.linalg.whiten import moment_root
from weft.methods.base import Factors, LowRankSplit, Method, Moments
from weft.signals import finishing
from weft.stats.calibrate import Batch, Stats, calibrate, layers_by_block
from weft.stats.collect import INPUT_NEEDS
from weft.stats.walk import walk
from weft.tensors import read_tensors
from weft.terms.layers import bias_of, set_low_rank, shape_of, weight_of

__all__ = ["Plan", "Store", "one_shot", "sequential", "survey", "surveyed_factors", "truncate"]


def _plain(items: Iterable[Any], what: str) -> Iterable[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the result, resolved and checked."""

    method: Method
    options: Mapping[str, Any]
    layers: tuple[str, ...]
    reads: tuple[str, ...] = ()  # fields of LayerInfo that the allocation looks at
    fixed: Ranks | None = None  # ranks that the user gave, when no allocation has to find them
    sequential: bool = False
    correction: float = 0.0
    by_block: bool = False  # one pass over the batches for each block, so that only its moments are in memory
    track: Callable[[Iterable[Any], str], Iterable[Any]] = _plain

    @property
    def reads_factors(self) -> bool:
        """Whether the survey has to factorise."""
        return not self.sequential or "spectrum" in self.reads or "losses" in self.reads

    @property
    def carried(self) -> tuple[str, ...]:
        """Statistics that the sequential walk, which runs forward only, takes over from the survey."""
        return tuple(need for need in self.method.needs if need not in INPUT_NEEDS) if self.sequential else ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics of the survey."""
        read = [need for name in self.reads for need in NEEDS.get(name, ())]
        return tuple(dict.fromkeys([*(self.method.needs if self.reads_factors else self.carried), *read]))


@dataclass
class Store:
    """Finished pieces by name: in memory, or as safetensors files in a directory, under a key."""

    directory: Path | None = None
    key: str = ""
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The piece, or None when it is not finished."""
        if self.directory is None:
            return self.memory.get(name)
        try:
            return read_tensors(self._path(name))
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a finished piece."""
        if self.directory is None:
            self.memory[name] = tensors
            return
        path = self._path(name)
        beside = path.with_suffix(".tmp")
        save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, beside)
        beside.replace(path)

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}-{self.key}.safetensors"


def survey(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], stats: Stats | None, store: Store
) -> dict[str, LayerInfo]:
    """What the allocation reads of every layer.

    Factors (one-shot) or carried statistics (sequential) go to the store, block by block.
    """
    infos: dict[str, LayerInfo] = {}
    whole = stats
    chunks = layers_by_block(model, plan.layers)
    for i, names in enumerate(plan.track(chunks, "factorising")):
        piece = store.get(f"survey-{i}")
        if piece is None:
            if whole is None and plan.needs and not plan.by_block:
                with finishing():
                    whole = calibrate(
                        model, batches, plan.needs, layers=plan.layers, cache=store.directory, track=plan.track
                    )
            with finishing():
                moments = whole or (calibrate(model, batches, plan.needs, layers=names) if plan.needs else {})
                piece = {}
                for name in names:
                    entry = _survey_layer(model, name, moments.get(name, {}), plan)
                    piece |= {f"{name}:{key}": tensor for key, tensor in entry.items()}
                store.put(f"survey-{i}", piece)
        for name in names:
            infos[name] = LayerInfo(
                shape_of(model.get_submodule(name)),
                spectrum=piece.get(f"{name}:s"),
                weight_spectrum=piece.get(f"{name}:weight_spectrum"),
                losses=piece.get(f"{name}:losses"),
            )
    return infos


def one_shot(model: nn.Module, plan: Plan, ranks: Ranks, store: Store) -> None:
    """Replace every layer that has a rank by the first components of its surveyed factors."""
    for name, factors in surveyed_factors(model, plan, store):
        rank = ranks[name]
        if rank is not None:
            truncate(model, name, factors, rank)


def surveyed_factors(model: nn.Module, plan: Plan, store: Store) -> Iterator[tuple[str, Factors]]:
    """Every layer's name and factors, as the survey left them; one block's in memory at a time."""
    for i, names in enumerate(layers_by_block(model, plan.layers)):
        piece = store.get(f"survey-{i}") or {}
        for name in names:
            yield name, Factors(**{key: piece.get(f"{name}:{key}") for key in Factors._fields})  # type: ignore[arg-type]


def sequential(model: nn.Module, plan: Plan, ranks: Ranks, batches: Sequence[Batch], store: Store) -> None:
    """Walk the blocks, replacing each group of layers on the inputs it gets after everything before it was replaced.

    With `plan.correction` = a > 0, the target is not this layer's own map W but W ((1 - a) X + a C) X^-1, where
    X = E[x x^T] of the inputs x now and C = E[x_o x^T] with the inputs x_o of the original model: the least-squares
    map from x to the mix (1 - a) W x + a W x_o. It is the objective of SAES-SVD (Hu et al., 2026, arXiv 2602.03051),
    ||(W' - W) x||^2 + alpha ||W' x - W x_o||^2 with alpha = a / (1 - a), in the method's own metric.
    Deviations: one share for all layers, where the paper chooses alpha for each.
    """
    piece_of = {name: f"survey-{i}" for i, names in enumerate(layers_by_block(model, plan.layers)) for name in names}
    chosen = hashlib.sha256(json.dumps(ranks, sort_keys=True).encode()).hexdigest()[:12]

    def restore(block: str) -> bool:
        done = store.get(f"block-{block}-{chosen}")
        for name in plan.layers if done else ():
            if done and f"{name}:B" in done:
                set_low_rank(model, name, done[f"{name}:B"], done[f"{name}:A"], done.get(f"{name}:bias"))
        return done is not None

    needs = [need for need in INPUT_NEEDS if need in plan.method.needs or need == "input_moment"]
    groups = walk(model, batches, plan.layers, needs, original=plan.correction > 0, done=restore, track=plan.track)
    for block, members in groupby(groups, key=lambda group: group.block):
        changed: dict[str, Tensor] = {"": torch.zeros(1)}  # a block that stays dense is finished too
        carried: dict[str, Tensor] = {}
        with finishing():
            for group in members:
                carried = carried or store.get(piece_of[group.names[0]]) or {}
                for name in group.names:
                    rank = ranks[name]
                    if rank is not None:
                        moments = {**group.moments, **{need: carried[f"{name}:{need}"] for need in plan.carried}}
                        changed |= _refactorise(model, name, rank, moments, plan)
            store.put(f"block-{block}-{chosen}", changed)


def truncate(
    model: nn.Module, name: str, factors: Factors, rank: int, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Replace a layer by the first `rank` components, and correct its bias where the factors ask for it.

    Args:
        target: the weight (out, in) that the factors approximate; None for the layer's own.

    Returns what was stored, by name.
    """
    layer = model.get_submodule(name)
    weight, bias = weight_of(layer), bias_of(layer)
    B, A = (t.to(weight.device, weight.dtype) for t in factors.truncate(rank)[:2])
    if factors.mean is not None:
        # the factors as they will be stored, so that their rounding is corrected too
        target = weight if target is None else target
        error = (target.double() - B.double() @ A.double()) @ factors.mean.to(weight.device)
        bias = error if bias is None else bias.double() + error
    new = set_low_rank(model, name, B, A, bias)
    stored = {f"{name}:B": B, f"{name}:A": A}
    return stored if new.bias is None else stored | {f"{name}:bias": new.bias.detach()}


def _survey_layer(model: nn.Module, name: str, moments: Moments, plan: Plan) -> dict[str, Tensor]:
    """What is kept of one layer: factors up to the largest rank that saves, spectra, losses, carried statistics."""
    W, dtype = _weight(model, name), weight_of(model.get_submodule(name)).dtype
    entry: dict[str, Tensor] = {need: moments[need] for need in plan.carried}
    if "weight_spectrum" in plan.reads:
        entry["weight_spectrum"] = singular_values(W)
    if plan.reads_factors:
        factors = _factorise(name, W, moments, plan)
        entry["s"] = factors.s
        if "losses" in plan.reads:
            entry["losses"] = tail_losses(factors.B, factors.A, moments["input_moment"], moments["output_grad_moment"])
        if not plan.sequential or "measure" in plan.reads:
            most = rank_limit(LayerInfo((W.shape[0], W.shape[1])))
            kept = factors.truncate((plan.fixed or {}).get(name) or most)
            entry |= {"B": kept.B.to(dtype), "A": kept.A.to(dtype)} | (
                {} if kept.mean is None else {"mean": kept.mean.clone()}
            )
    return {key: tensor.cpu() for key, tensor in entry.items()}


def _refactorise(model: nn.Module, name: str, rank: int, moments: Moments, plan: Plan) -> dict[str, Tensor]:
    W = _weight(model, name)
    moments = {need: tensor.to(W.device) for need, tensor in moments.items()}
    if plan.correction:
        W = _corrected(W, moments["input_moment"], moments["cross_moment"], plan.correction)
    return truncate(model, name, _factorise(name, W, moments, plan), rank, W)


def _weight(model: nn.Module, name: str) -> Tensor:
    """In fp64. Raises WeftError if it holds NaN or infinity."""
    W = weight_of(model.get_submodule(name), torch.float64)
    if not torch.isfinite(W).all():
        raise WeftError(f"The weight of layer {name} holds NaN or infinity; leave it out with a layer pattern.")
    return W


def _factorise(name: str, W: Tensor, moments: Moments, plan: Plan) -> Factors:
    assert isinstance(plan.method.split, LowRankSplit)
    try:
        return plan.method.split.factorise(W, moments, **plan.options)
    except WeftError:
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise WeftError(f"{plan.method.name} cannot factorise {name} ({W.shape[0]} x {W.shape[1]}): {error}") from error


def _corrected(W: Tensor, X: Tensor, C: Tensor, a: float) -> Tensor:
    """W ((1 - a) X + a C) X^-1, one ridge on both moments."""
    ridge = 1e-4
    root = moment_root(X, ridge=ridge)
    mixed = (1 - a) * X + a * C + torch.eye(len(X), dtype=X.dtype, device=X.device) * (ridge * X.diagonal().mean())
    return root.solve_transposed(root.solve((W @ mixed).mT)).mT
