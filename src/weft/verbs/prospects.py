"""What `compress` would do to each matrix: the fewest bytes at which it is predicted to lose no more than is allowed.

    with data       loss(size) = 1/2 tr(D^T G D X) nats a token, at most NATS for all matrices
    without         loss(size) = ||D||_F^2 / ||W||_F^2, at most SHARE

for D = W' - W. Each matrix may lose its share of NATS by bytes. The second form knows nothing of what the model is used
for.

With data, the same curves say what `compress --method kfac-svd` costs at several budgets: the sum of the losses of the
ranks that the allocation `best` takes. Beside it stands what is published for weights alone, the share that is removed
times the mean stable rank (Xu, 2026, arXiv 2604.18085), a score to which a line has to be fitted.

X and G are the second moments of the layer's inputs and output gradients. Ranks are those of the splitter of the one
metric or the other, widths of code those of rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from weft.allocate import Choice, LayerInfo, best
from weft.allocate.best import predicted_loss
from weft.errors import WeftError
from weft.linalg.spectrum import stable_rank
from weft.linalg.weighted import WeightedLoss
from weft.methods import METHODS
from weft.methods.base import Method
from weft.seeds import generator
from weft.terms import SumLinear
from weft.terms.dense import sum_dense
from weft.verbs.moments import UNIT
from weft.verbs.survey import Plan, offered, site_of

__all__ = ["NATS", "SHARE", "Outlook", "Prospect", "Prospects", "commands", "predicted"]

NATS = 0.05
"""A rise of the loss a token that all matrices together may be predicted to cost."""
SHARE = 0.01
"""The share of a matrix's squared norm that it may lose, where nothing is known of its inputs."""
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of the matrices' bytes for which the loss of all together is predicted."""


@dataclass(frozen=True)
class Prospect:
    """What a matrix would become. A size is None where none that saves bytes keeps the loss."""

    rank: int | None
    rank_bytes: int | None
    bits: int | None
    bits_bytes: int | None
    bytes: int  # of the smaller of the two, or of the matrix as it is
    dense_bytes: int
    loss: float  # predicted for it: nats a token, or a share of the squared norm

    @property
    def words(self) -> str:
        """In two words."""
        if self.bytes == self.bits_bytes:
            return f"{self.bits} bits"
        return f"rank {self.rank}" if self.bytes == self.rank_bytes else "as it is"


@dataclass(frozen=True)
class Outlook:
    """What is predicted of the model where a share of its matrices' bytes is kept."""

    keep: float
    loss: float | None  # nats a token more; None without data, or where so little cannot be kept
    score: float  # the share removed times the mean stable rank


def predicted(data: str | None) -> dict[str, Any]:
    """What losses are predicted by, in which unit, and how much of it is allowed."""
    if data is None:
        return {"by": "weights", "unit": "share of a matrix's squared norm", "limit": SHARE}
    return {"by": "data", "unit": "nats a token, all matrices together", "limit": NATS}


_Found = tuple[Choice, float]  # and its loss


class Prospects:
    """name, singular values, statistics -> Prospect, for the linear layers of a model.

    Args:
        layers: names.
        data: whether there will be statistics.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], *, data: bool, seed: int = 0) -> None:
        names = tuple(name for name in layers if not isinstance(model.get_submodule(name), SumLinear))
        self.model, self.data, self.seed = model, data, seed
        self.ranked, self.coded = (_plan(METHODS[name], names) for name in ("kfac-svd" if data else "svd", "rtn"))
        self.offers = {name: infos for name, *infos in _offers(model, self.ranked, self.coded)}
        self.all_bytes = sum(ranks.shape.nbytes for ranks, _ in self.offers.values())
        self.curves: dict[str, LayerInfo] = {}
        self.stable_ranks: list[float] = []

    def of(self, name: str, s: Tensor, moments: Mapping[str, Tensor] | None) -> Prospect | None:
        """Of a layer; None where it is none that can be compressed, is compressed already, or has no statistics."""
        if name not in self.offers or (self.data and moments is None):
            return None
        ranks, codes = self.offers[name]
        dense = ranks.shape.nbytes
        W = site_of(self.model, self.coded, name, {}, None).weight(torch.float32)
        if moments is None:
            loss, whole = _share_of(W), SHARE
            tails = _tails(s) / max(float(s.double().square().sum()), 1e-300)
        else:
            loss, whole = self._nats(name, moments), NATS * dense / self.all_bytes
            tails = _tails(self._values(name, moments)) / 2
            curve = [c._replace(loss=0.0 if c.size is None else float(tails[c.size])) for c in ranks.choices]
            self.curves[name] = replace(ranks, choices=curve)
        self.stable_ranks.append(stable_rank(s))
        by_rank = next(((c, float(tails[c.size])) for c in ranks.sizes if float(tails[c.size]) <= whole), None)
        by_bits = self._bits(name, W, codes, loss, whole)
        found = [option for option in (by_rank, by_bits) if option is not None]
        size, lost = min(found, key=lambda option: option[0].bytes) if found else (Choice(None, dense), 0.0)
        return Prospect(
            rank=by_rank and by_rank[0].size, rank_bytes=by_rank and by_rank[0].bytes,
            bits=by_bits and by_bits[0].size, bits_bytes=by_bits and by_bits[0].bytes,
            bytes=size.bytes, dense_bytes=dense, loss=lost,
        )  # fmt: skip

    def outlook(self, keeps: Sequence[float] = KEEPS) -> list[Outlook]:
        """Of the layers that `of` was asked for."""
        if not self.stable_ranks:
            return []
        mean = math.fsum(self.stable_ranks) / len(self.stable_ranks)
        return [Outlook(keep, self._loss(keep), (1 - keep) * mean) for keep in keeps]

    def _loss(self, keep: float) -> float | None:
        """Nats that the best ranks lose together."""
        if not self.curves:
            return None
        try:
            return predicted_loss(best.allocate(self.curves, int(keep * self.all_bytes)))
        except WeftError:  # below the smallest ranks
            return None

    def _values(self, name: str, moments: Mapping[str, Tensor]) -> Tensor:
        """Singular values in the metric of the data."""
        site = site_of(self.model, self.ranked, name, {name: moments}, None)
        assert self.ranked.nested is not None
        return self.ranked.nested.factors(site, **self.ranked.options).s

    def _nats(self, name: str, moments: Mapping[str, Tensor]) -> Callable[[Tensor], float]:
        X, G = (moments[need] for need in UNIT)
        loss = WeightedLoss(X, G, generator(self.seed, "losses", name))
        return lambda D: float(loss(D)) / 2

    def _bits(
        self, name: str, W: Tensor, info: LayerInfo, loss: Callable[[Tensor], float], most: float
    ) -> _Found | None:
        """The narrowest code that keeps the loss."""
        site, choices = site_of(self.model, self.coded, name, {}, None), {choice.size: choice for choice in info.sizes}
        for size, split in self.coded.method.each(site, list(choices), self.coded.options):
            lost = loss(sum_dense(split.terms.values()) - W)
            if lost <= most:
                return choices[size], lost
        return None


def _tails(s: Tensor) -> Tensor:
    """sum(s[r:]^2) for r = 0 ... len(s), in fp64."""
    squares = s.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def _share_of(W: Tensor) -> Callable[[Tensor], float]:
    whole = float(W.double().square().sum())
    return lambda D: float(D.double().square().sum()) / whole if whole else 0.0


def _plan(method: Method, names: tuple[str, ...]) -> Plan:
    return Plan(method=method, options=method.options({}), layers=names)


def _offers(model: nn.Module, *plans: Plan) -> Iterator[tuple[Any, ...]]:
    found = [offered(model, plan) for plan in plans]
    yield from ((name, *(infos[name] for infos in found)) for name in plans[0].sites)


def commands(
    model: str, prospects: Mapping[str, Prospect], *, layers: Sequence[str], data: str | None, against: str | None
) -> list[str]:
    """The commands that follow from what was found; `layers` are the patterns that it was found for."""
    calibration = f" --calibration {quote(data)}" if data else ""
    text = f" --text {quote(data)}" if data else ""
    bits = [p.bits for p in prospects.values() if p.bits is not None]
    dense, small = (sum(getattr(p, key) for p in prospects.values()) for key in ("dense_bytes", "bytes"))
    found, place = [], quote(model)
    if small < dense:
        only = "".join(f" --layers {quote(pattern)}" for pattern in layers)
        share = max(1, round(100 * small / dense))
        found.append(f"weft compress {place} -o smaller --method auto --budget {share}%{only}{calibration}")
    if bits and len(bits) == len(prospects):  # one width for all: that of the matrix that needs most
        only = "".join(f" --targets {quote(pattern)}" for pattern in layers)
        found.append(f"weft quantize {place} -o coded --scheme rtn --bits {max(bits)}{only}")
    evaluated = dict.fromkeys(one for one in (model, against) if one is not None)
    return [*found, *(f"weft eval {quote(one)}{text}" for one in evaluated)]
