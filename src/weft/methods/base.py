"""The record of a published method: its five decisions, its paper and its defaults.

    needs      which statistics of the data it must see first                      (names from `weft.stats`)
    allocate   how a budget is spread over the layers                              (a name from `weft.allocate`)
    init       how a weight is split into terms: `factorise` for compression, `attach` for adapters
    rule       what happens around each training step                              (`weft.rules`)
    optimizer  how gradients become updates, and which numbers receive them        (`weft.optim`)

A method is one file in this room that ends in `METHOD = Method(...)`, and one line in the list of
`weft/methods/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.errors import WeftError

__all__ = ["Factors", "Method", "Moments", "Site", "low_rank_terms", "no_terms", "smaller_side"]

Moments = Mapping[str, Tensor]
"""The statistics of one layer by name, e.g. {"input_moment": (in, in)}; see `weft.stats`."""


class Factors(NamedTuple):
    """A weight as an ordered sum of rank-one matrices: W = B A; keeping the first r columns of B and rows of A is the
    method's rank-r answer.
    """

    B: Tensor  # (out, m)
    A: Tensor  # (m, in)
    s: Tensor  # (m,) singular values in the method's own metric, falling: sum of s^2 beyond r is the error it minimises
    mean: Tensor | None = None  # (in,) mean input; the error on it, (W - B_r A_r) mean, is then added to the bias

    def truncate(self, rank: int) -> Factors:
        """The first `rank` components."""
        return Factors(self.B[:, :rank], self.A[:rank], self.s[:rank], self.mean)


@dataclass(frozen=True)
class Site:
    """One layer that is about to receive an adapter.

    Args:
        name: the layer's name in the model.
        base: its terms, without those of other adapters.
        rank: of this layer's adapter.
        nominal: the rank that was asked for; differs from `rank` where ranks are spread over layers.
        moments: the statistics that the method needs.
        generator: a CPU generator of this layer's own; draw in fp32.
        dtype: of the trainable tensors.
        shared: what the method's `share` made for the whole model.
        bias: the layer's bias (out,), or None.
    """

    name: str
    base: Mapping[str, Any]
    rank: int
    nominal: int
    moments: Moments
    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    shared: Any = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        term = next(iter(self.base.values()))
        return term.out_features, term.in_features

    @property
    def device(self) -> torch.device:
        """Where the layer lies."""
        device: torch.device = next(iter(self.base.values()))._reference().device
        return device

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in), the sum of the base's terms."""
        first, *rest = (term.dense(dtype).detach() for term in self.base.values())
        return sum(rest, start=first)


def smaller_side(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """The rank beyond which a matrix has nothing."""
    return min(out_features, in_features)


def low_rank_terms(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every term that is not dense: what WeLore and most recoveries train."""
    from weft.terms import Dense, Term

    terms = (m for m in model.modules() if isinstance(m, Term) and not isinstance(m, Dense))
    return [p for term in terms for p in term.parameters()]


def no_terms(model: nn.Module) -> list[nn.Parameter]:
    """Nothing: the method leaves no recipe for training what it made."""
    return []


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as data. Frozen; every field but `name`, `summary`, `paper` and `kind` has a default that means "does
    not do this".

    Args:
        name: as in the list of methods and on the command line.
        summary: one line.
        paper: authors, year and identifier, or "weft" where it is ours.
        kind: "compress" (replaces weights by fewer numbers), "adapt" (adds trainable terms), or "train" (changes no
            weight, chooses what is trained).
        needs: the statistics that `factorise` or `attach` reads from its `moments`.
        allocate: the published allocation, a name from `weft.allocate.ALLOCATIONS`.
        sequential: whether each block is calibrated on the outputs of the blocks already changed.
        correction: share (0 to 1) of the drift of a layer's inputs that the sequential form corrects, see
            `weft.verbs.truncation.sequential`.
        factorise: (W (out, in) in fp64, moments, **options) -> Factors. For kind "compress".
        attach: (site, **options) -> terms by role, "" for the main one; what shall be trained requires a gradient. For
            kind "adapt", as are all below.
        count: (out, in, rank, options) -> trainable numbers of one matrix, the paper's formula.
        count_shared: (shapes by layer, rank, options) -> trainable numbers that the layers share, counted once.
        limit: (out, in, options) -> the largest rank that makes sense.
        share: (shapes by layer, rank, generator, options) -> what all layers share (a random store, a pool), handed to
            each `attach` in its site.
        spread: (moments by layer, shapes by layer, rank, options) -> rank by layer; 0 leaves a layer out. Among a
            layer's moments is its "weight" (out, in), made when asked for.
        rates: (options) -> factor of the learning rate by parameter name within a term.
        extras: (layer names, parameter names, options) -> parameters of the model itself to be trained along.
        deviates: how the function differs at the start; "" where it does not.
        exempt: property of the conformance suite (`weft.testing_adapters`) -> a sentence saying why the method does not
            have it.
        rules: factories of `weft.rules.Rule`, called with the method's options (and `adapter`, its name, for kind
            "adapt"), run around each training step.
        optimizer: (parameter groups with their "lr" and "weight_decay", options) -> the optimizer that the method was
            published with, where AdamW's state per parameter will not do (an age of each entry, say).
        trained: (model) -> the parameters that training updates; all others are frozen.
        defaults: the paper's hyperparameters, which are also the names of the options that the method takes.
    """

    name: str
    summary: str
    paper: str
    kind: str
    needs: tuple[str, ...] = ()
    allocate: str = "uniform"
    sequential: bool = False
    correction: float = 0.0
    factorise: Callable[..., Factors] | None = None
    attach: Callable[..., Mapping[str, Any]] | None = None
    count: Callable[[int, int, int, Mapping[str, Any]], int] | None = None
    count_shared: Callable[[Mapping[str, tuple[int, int]], int, Mapping[str, Any]], int] | None = None
    limit: Callable[[int, int, Mapping[str, Any]], int] = smaller_side
    share: Callable[..., Any] | None = None
    spread: Callable[..., dict[str, int]] | None = None
    rates: Callable[[Mapping[str, Any]], dict[str, float]] | None = None
    extras: Callable[[Sequence[str], Sequence[str], Mapping[str, Any]], list[str]] | None = None
    deviates: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Callable[..., Any], ...] = ()
    optimizer: Callable[[list[dict[str, Any]], Mapping[str, Any]], torch.optim.Optimizer] | None = None
    trained: Callable[[nn.Module], list[nn.Parameter]] = no_terms
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults overridden by what the user gave.

        Raises WeftError for an option that the method does not have.
        """
        strange = sorted(set(given) - set(self.defaults))
        if strange:
            known = ", ".join(self.defaults) or "none"
            raise WeftError(f"The method {self.name!r} has no option {strange[0]!r}; its options are: {known}.")
        return {**self.defaults, **given}

    def freeze(self, model: nn.Module) -> list[nn.Parameter]:
        """Make exactly the method's own parameters trainable, and return them.

        Raises WeftError when the model holds none of them.
        """
        chosen = self.trained(model)
        if not chosen:
            raise WeftError(
                f"The method {self.name!r} finds nothing to train in this model; compress it first (weft compress), or "
                "choose "
                "'lora' or 'full'."
            )
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def record(self) -> dict[str, Any]:
        """What `weft methods` lists, JSON-able."""
        defaults = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in self.defaults.items()}
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "paper": self.paper,
            "needs": list(self.needs),
            "allocate": self.allocate if self.kind == "compress" else None,
            "defaults": defaults,
        }
