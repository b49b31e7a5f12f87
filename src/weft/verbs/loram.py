"""LoRAM: train an adapter on a pruned copy of the model, infer with it on the whole one (2025, arXiv 2502.13533).

    kept = choose(model, ratio=0.85, batches=batches)    # which MLP neurons and KV groups each block keeps
    small = kept.prune(model)                            # in place; then align it on plain text, once, if you can
    weft.adapt(small, "lora", rank=8, alpha=16, dropout=0.05) ... train ... weft.save_adapter(small, "small/")
    recover("small/", kept).save("large/")               # A[:, C] = A_p, B[R] = B_p, zero elsewhere; on the original

What it is is in `weft.methods.loram`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.files import write_json
from weft.io.adapters import LooseAdapter, read_adapter
from weft.io.base import Base, base_of
from weft.methods import lora
from weft.methods.loram import METHOD, cut, kept_sets, scatter, worth
from weft.seeds import check_seed, generator
from weft.stats.calibrate import Batch, calibrate
from weft.terms import LowRank, Term
from weft.terms.adapters import Adapter, unwrapped
from weft.terms.layers import linear_layers, replace, shape_of
from weft.terms.units import LAYERS, blocks_of
from weft.verbs.combine import common_pairs

__all__ = ["Kept", "choose", "recover"]


@dataclass(frozen=True)
class Kept:
    """What a pruned model has of the original.

    Args:
        rows: layer -> the kept rows R, ascending; a layer that is absent keeps all.
        columns: layer -> the kept columns C.
        shapes: layer -> (out, in) in the original.
        base: the original, with its fingerprint.
    """

    rows: Mapping[str, list[int]]
    columns: Mapping[str, list[int]]
    shapes: Mapping[str, tuple[int, int]]
    base: Base

    def prune(self, model: nn.Module) -> nn.Module:
        """Cut the rows and columns out of a model of the original's shapes, in place; the same model is returned.

        Raises:
            WeftError: its layers are of other shapes, or no plain ones (prune first, quantise then).
        """
        layers = linear_layers(unwrapped(model))
        for name, shape in self.shapes.items():
            layer = layers.get(name)
            if type(layer) is not nn.Linear or tuple(layer.weight.shape) != shape:
                raise WeftError(
                    f"The layer {name} is no plain {shape[0]} x {shape[1]} one, so it cannot be pruned; give the "
                    "original model, before quantisation and adapters."
                )
        for name in [n for n in self.shapes if n in self.rows or n in self.columns]:
            replace(unwrapped(model), name, cut(layers[name], self.rows.get(name), self.columns.get(name)))  # type: ignore[arg-type]
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, to be kept with the adapter."""
        write_json(Path(path), {**vars(self), "base": self.base.json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Kept:
        """What `save` wrote. Raises WeftError where that is not there or damaged."""
        try:
            said: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            shapes = {name: (out, inn) for name, (out, inn) in said["shapes"].items()}
            return cls(said["rows"], said["columns"], shapes, Base.from_json(said["base"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeftError(f"{path} does not say what was kept ({error!r}); give the file of Kept.save.") from error


def choose(
    model: nn.Module,
    ratio: float = 0.85,
    batches: Iterable[Batch] | None = None,
    *,
    first: int = 4,
    last: int = 2,
    seed: int = 0,
) -> Kept:
    """Which neurons and KV groups each block keeps; the model is not touched.

    Args:
        ratio: of them that is dropped in each block (0.85 in the paper's recipe for 70B); at least one of each stays.
        batches: to rank them by sum |w g|, g the gradient of the loss; None draws them at random (LoRAM-Rand).
        first, last: so many blocks at either end stay whole.
        seed: of the random choice.

    Raises:
        WeftError: a ratio outside [0, 1), no block between the first and the last, or blocks without the seven layers
            q, k, v, o, gate, up, down.
    """
    model = unwrapped(model)
    if not 0 <= ratio < 1:
        raise WeftError(f"The ratio {ratio} is what is dropped of each block; give at least 0 and less than 1.")
    check_seed(seed)
    blocks = blocks_of(model)
    layers = {f"{block}.{name}": model.get_submodule(f"{block}.{name}") for block in blocks for name in LAYERS}
    shapes = {name: shape_of(layer) for name, layer in layers.items()}
    cut = blocks[first : len(blocks) - last]
    if not cut:
        raise WeftError(f"first={first} and last={last} leave none of the {len(blocks)} blocks to prune; give less.")
    stats = calibrate(model, list(batches), ("mean_grad",), layers=list(layers)) if batches is not None else None
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    for block in cut:
        grads = None if stats is None else {n: stats[f"{block}.{n}"]["mean_grad"] for n in LAYERS}
        found = worth(model.get_submodule(block), grads, generator(seed, METHOD.name, block))
        for what, kept in kept_sets(model.get_submodule(block), found, ratio).items():
            name, side = what
            (rows if side == 0 else columns)[f"{block}.{name}"] = kept.tolist()
    return Kept(rows, columns, shapes, base_of(model, layers))


@torch.no_grad()
def recover(adapter: str | os.PathLike[str], kept: Kept) -> LooseAdapter:
    """The adapter of the original model that does on the kept rows and columns what the pruned one's does.

    Args:
        adapter: a directory, weft's or PEFT's, of an adapter of the pruned model.

    Raises:
        WeftError: its delta is no product of thin matrices (see `weft.combine`), or it was made on other sets.
    """
    loose = read_adapter(adapter)
    terms: dict[str, dict[str, Term]] = {}
    for layer, [(B, A)] in common_pairs([adapter], [loose], [1.0]).items():
        out_features, in_features = kept.shapes.get(layer, (len(B), A.shape[1]))
        R = kept.rows.get(layer, range(out_features))
        C = kept.columns.get(layer, range(in_features))
        if (len(R), len(C)) != (len(B), A.shape[1]):
            raise WeftError(
                f"The adapter in {adapter} is {len(B)} x {A.shape[1]} on {layer}, where {len(R)} rows and {len(C)} "
                "columns were kept; give what was kept when its model was pruned."
            )
        factors = scatter(B, A, R, C, (out_features, in_features))
        terms[layer] = {"recovered": LowRank.from_factors(*factors)}
    own = kept.base
    base = Base(own.name, own.task, own.transposed, loose.base.targets, own.samples)
    made = LooseAdapter(Adapter("recovered", lora.METHOD.name, terms), base)
    made.adapter.settings["rank"] = made.rank
    return made
