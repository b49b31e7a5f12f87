"""The record of a published method: its five decisions, its paper and its defaults.

    needs      which statistics of the data it must see first                      (names from `weft.stats`)
    allocate   how a budget is spread over the layers                              (a name from `weft.allocate`)
    split      how a weight is split into terms: (site, **options) -> Split
    rule       what happens around each training step                              (`weft.rules`)
    optimizer  how gradients become updates, and which numbers receive them        (`weft.optim`)

A method is one file in this room that ends in `METHOD = Method(...)`, and one line in the list of
`weft/methods/__init__.py`. Whether its terms take the base's place (compress, quantize, pretrain) or stand beside it
(adapt, compensate) is the verb's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.allocate.base import Shape
from weft.errors import WeftError
from weft.records import Record
from weft.terms.joints import Joint
from weft.terms.units import Kept

__all__ = [
    "Factors",
    "JointShape",
    "LowRankSplit",
    "Method",
    "Moments",
    "Shape",
    "Site",
    "Size",
    "Split",
    "Splitter",
    "factor_bytes",
    "low_rank_sizes",
    "low_rank_split",
    "low_rank_terms",
    "no_terms",
    "one_stream",
    "smaller_side",
]

Moments = Mapping[str, Tensor]
"""The statistics of one layer by name, e.g. {"input_moment": (in, in)}; see `weft.stats`."""

Size = Any
"""How large a layer's representation is, JSON-able: a rank, bits a weight, a density, a list of them; None is dense."""


class JointShape(Shape):
    """The shape of a joint, layers that are cut together: all their numbers in one column, and what it is of."""

    joint: Joint

    @classmethod
    def of(cls, joint: Joint, itemsize: int) -> JointShape:
        """That of a joint of numbers of so many bytes."""
        made = cls(joint.numel, 1, itemsize)
        made.joint = joint
        return made


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
class Split:
    """What a site becomes.

    Args:
        terms: by role; "" for the main one, "base" for one that takes the base's place where the others stand beside
            it. What shall be trained requires a gradient.
        bias: the layer's new bias (out,); None where it stays as it is.
        members: of a joint: what each layer becomes, by role; it has no terms of its own then.
        effect: of a joint: a role and the change (out, in) of that layer that does alone what all changes do together,
            so that the loss of the joint is the loss of that.
    """

    terms: Mapping[str, Any] = field(default_factory=dict)
    bias: Tensor | None = None
    members: Mapping[str, Split] = field(default_factory=dict)
    effect: tuple[str, Tensor] | None = None


@dataclass(frozen=True)
class Site:
    """One layer that is about to be split into terms; or a joint, layers that are cut together, with a site of each.

    Args:
        name: the layer's name in the model; of a joint, see `weft.terms.joints`.
        terms: its terms so far, without those of adapters.
        size: the chosen size: for most methods the rank.
        nominal: the size that was asked for; differs from `size` where sizes are spread over layers.
        moments: the statistics that the method needs.
        generator: a CPU generator of this layer's own; draw in fp32.
        dtype: of the floating-point tensors of the new terms.
        shared: what the method's `share` made for the whole model.
        bias: the layer's bias (out,), or None.
        original: the weight (out, in) before any method touched it; None where that is the sum of the terms.
        joint: how the layers are joined, where they are.
        members: the sites of a joint's layers, by role; the joint has no terms of its own.
    """

    name: str
    terms: Mapping[str, Any]
    size: Size
    nominal: Size
    moments: Moments
    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    shared: Any = None
    bias: Tensor | None = None
    original: Tensor | None = None
    joint: Joint | None = None
    members: Mapping[str, Site] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The size of a method whose sizes are whole numbers."""
        return int(self.size)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        term = next(iter(self.terms.values()))
        return term.out_features, term.in_features

    @property
    def device(self) -> torch.device:
        """Where the layer lies."""
        device: torch.device = next(iter(self.terms.values()))._reference().device
        return device

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in), the sum of the terms so far."""
        first, *rest = (term.dense(dtype).detach() for term in self.terms.values())
        return sum(rest, start=first)

    def missing(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the terms so far lack of the original: (out, in)."""
        now = self.weight(dtype)
        return torch.zeros_like(now) if self.original is None else self.original.to(now.device, dtype) - now


def smaller_side(out_features: int, in_features: int, options: Mapping[str, Any]) -> int:
    """The rank beyond which a matrix has nothing."""
    return min(out_features, in_features)


def low_rank_sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rank, bytes) for every rank at which two factors are smaller than the matrix: r (out + in) numbers."""
    out_features, in_features = shape
    unit = out_features + in_features
    return [(rank, factor_bytes(shape, rank)) for rank in range(1, (shape.numel - 1) // unit + 1)]


def factor_bytes(shape: Shape, rank: int) -> int:
    """Bytes of two factors of that rank."""
    return rank * sum(shape) * shape.itemsize


class Splitter:
    """A `split` whose answers of several sizes share work: an object that is called for one of them, or gives many."""

    def __call__(self, site: Site, **options: Any) -> Split:
        """The terms of the site's size."""
        ((_, split),) = self.each(site, [site.size], **options)
        return split

    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """Every size with its terms, one after another; what they share is done once."""
        raise NotImplementedError  # abstract


@dataclass(frozen=True)
class LowRankSplit(Splitter):
    """A `split` whose terms are one LowRank, the first r components of the factors of a weight.

    Its answers of all ranks are nested, so that a survey factorises once and knows the loss of every rank.

    Args:
        factorise: (W (out, in), moments, **options) -> Factors.
        role: of the term.
        of: (site, dtype) -> the matrix to be factorised: the weight, or what is missing of the original.
        dtype: that the matrix is handed over in.
        form: (B (out, r), A (r, in)) -> the term of the product; None for LowRank.
        nbytes: (shape, rank) -> bytes of the term, for every rank that a user may give by hand.
        partial: whether `factorise` has an option `rank`, beyond which it need not give components.
    """

    factorise: Callable[..., Factors]
    role: str = "low_rank"
    of: Callable[[Site, torch.dtype], Tensor] = Site.weight
    dtype: torch.dtype = torch.float64
    form: Callable[[Tensor, Tensor], Any] | None = None
    nbytes: Callable[[Shape, int], int] = factor_bytes
    partial: bool = False

    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The first components of one factorisation."""
        factors = self.factors(site, **options | ({"rank": max(sizes)} if self.partial and sizes else {}))
        for size in sizes:
            yield size, self.terms(replace(site, size=size, nominal=size), factors)

    def factors(self, site: Site, **options: Any) -> Factors:
        """Those of the site's weight. Raises WeftError with the layer's name where it cannot be factorised."""
        W = self.of(site, self.dtype)
        if not torch.isfinite(W).all():
            raise WeftError(
                f"The weight of layer {site.name} holds NaN or infinity; leave it out with a layer pattern."
            )
        try:
            return self.factorise(W, site.moments, **options)
        except WeftError:
            raise
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            shape = f"{W.shape[0]} x {W.shape[1]}"
            raise WeftError(f"{site.name} ({shape}) cannot be factorised: {error}") from error

    def terms(self, site: Site, factors: Factors) -> Split:
        """The first components of known factors, and the bias that takes up their mean error where they ask for it."""
        from weft.terms import LowRank

        B, A = (t.to(site.device, site.dtype) for t in factors.truncate(site.rank)[:2])
        term = (self.form or LowRank.from_factors)(B, A)
        if factors.mean is None:
            return Split({self.role: term})
        # the factors as they are stored, so that their rounding is corrected too
        error = (self.of(site, torch.float64) - B.double() @ A.double()) @ factors.mean.to(site.device)
        bias = error if site.bias is None else site.bias.double() + error
        return Split({self.role: term}, bias.to(site.dtype))


def low_rank_split(factorise: Callable[..., Factors]) -> LowRankSplit:
    """The `split` of a method that is a way to factorise the weight: see `LowRankSplit`."""
    return LowRankSplit(factorise)


def low_rank_terms(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every term that is not dense: what WeLore and most recoveries train."""
    from weft.terms import Dense, Term

    terms = (m for m in model.modules() if isinstance(m, Term) and not isinstance(m, Dense))
    return [p for term in terms for p in term.parameters()]


def no_terms(model: nn.Module) -> list[nn.Parameter]:
    """Nothing: the method leaves no recipe for training what it made."""
    return []


def one_stream(
    shapes: Mapping[str, Shape], rank: int, generator: torch.Generator, options: Mapping[str, Any]
) -> torch.Generator:
    """A `share` of nothing that is kept: one stream of numbers, which the layers draw from in turn."""
    return torch.Generator().manual_seed(generator.initial_seed())


@dataclass(frozen=True, kw_only=True)
class Method(Record):
    """One method, as data. Frozen; every field but `name`, `summary`, `paper` and `kind` has a default that means "does
    not do this".

    Args:
        kind: "compress" (replaces weights by fewer numbers), "quantize" (by codes), "adapt" (adds trainable terms),
            "compensate" (adds terms that take up what a compression lost), "pretrain" (makes layers that are
            trained as a whole, fresh ones or those of a given model), "train" (chooses what is trained; a `split` makes
            what it is trained as, `finish` what is stored of that), or "prune" (cuts rows and columns out of layers).
        needs: the statistics that `split` reads from its site's `moments`.
        needs_with: (options) -> those that it reads with these options besides.
        allocate: the published allocation, a name from `weft.allocate.ALLOCATIONS`.
        sequential: whether each block is calibrated on the outputs of the blocks already changed.
        correction: share (0 to 1) of the drift of a layer's inputs that the sequential form corrects, see
            `weft.verbs.placing.sequential`.
        split: (site, **options) -> Split.
        sizes: (shape, options) -> [(size, bytes), ...] by rising bytes: what an allocation may choose from; of a joint,
            the shape is a `JointShape`.
        joints: (model, names of layers) -> the joints among them, whose layers `split` gets together; the method leaves
            all other layers as they are. None: every layer by itself.
        replaces: whether an adapter's term "base" stands in the base's place while the adapter is on.
        count: (out, in, rank, options) -> numbers of one matrix that are trained, the paper's formula.
        held: the same for the numbers of its trainable tensors, where these have room for more than is ever trained.
        count_shared: (shapes by layer, rank, options) -> trainable numbers that the layers share, counted once.
        limit: (out, in, options) -> the largest rank that makes sense.
        ranked: whether its size is a rank that one may ask for; else what it makes follows from its options alone.
        share: (shapes by layer, rank, generator, options) -> what all layers share (a random store, a pool), handed to
            each `split` in its site.
        spread: (moments by layer, shapes by layer, rank, options) -> rank by layer; 0 leaves a layer out. Among a
            layer's moments is its "weight" (out, in), made when asked for.
        rates: (options) -> factor of the learning rate by parameter name within a term.
        extras: (layer names, parameter names, options) -> parameters of the model itself to be trained along.
        deviates: how the function differs at the start; "" where it does not.
        exempt: property of the conformance suite (`weft.testing_adapters`) -> a sentence saying why the method does not
            have it.
        rules: factories of `weft.rules.Rule`, each called with those of the method's options, and of `rank`, `ranks`
            (by layer), `seed` and, in pre-training, `original` (a frozen copy of the model that training goes on with)
            that it names; run around each training step, on the method's terms.
        optimizer: (parameter groups with their "lr" and "weight_decay", options) -> the optimizer that the method was
            published with, where AdamW's state per parameter will not do (an age of each entry, say).
        trained: (model) -> the parameters that training updates; all others are frozen.
        begins: what a method of kind "pretrain" may begin with, what it was made for first: "fresh", weights that are
            drawn, or "given", those of a trained model.
        given: defaults that differ where a method of kind "pretrain" goes on with a trained model.
        shrink: of kind "prune": (model, calibration batches, numbers at most, a directory from which it goes on when it
            was interrupted, or None, **options) -> (a smaller plain model of the same class, the units of the given one
            that it has).
        labels: of a method that learns a teacher's predictions, and so needs one: the published weight of the labels'
            own loss beside them.
        finish: (site) -> Split: what a layer becomes when its training has ended, of the options those that it names;
            a single Dense term is a plain layer again. None: it stays as it is.
    """

    needs: tuple[str, ...] = ()
    needs_with: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    allocate: str = "uniform"
    sequential: bool = False
    correction: float = 0.0
    split: Callable[..., Split] | None = None
    sizes: Callable[[Shape, Mapping[str, Any]], Sequence[tuple[Size, int]]] = low_rank_sizes
    joints: Callable[[nn.Module, Sequence[str]], Sequence[Joint]] | None = None
    replaces: bool = False
    count: Callable[[int, int, int, Mapping[str, Any]], int] | None = None
    held: Callable[[int, int, int, Mapping[str, Any]], int] | None = None
    count_shared: Callable[[Mapping[str, tuple[int, int]], int, Mapping[str, Any]], int] | None = None
    limit: Callable[[int, int, Mapping[str, Any]], int] = smaller_side
    ranked: bool = True
    share: Callable[..., Any] | None = None
    spread: Callable[..., dict[str, int]] | None = None
    rates: Callable[[Mapping[str, Any]], dict[str, float]] | None = None
    extras: Callable[[Sequence[str], Sequence[str], Mapping[str, Any]], list[str]] | None = None
    deviates: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Callable[..., Any], ...] = ()
    optimizer: Callable[[list[dict[str, Any]], Mapping[str, Any]], torch.optim.Optimizer] | None = None
    trained: Callable[[nn.Module], list[nn.Parameter]] = no_terms
    begins: tuple[str, ...] = ("fresh",)
    given: Mapping[str, Any] = field(default_factory=dict)
    labels: float | None = None
    finish: Callable[..., Split] | None = None
    shrink: Callable[..., tuple[Any, Kept]] | None = None

    def reads(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The statistics that it needs with these options."""
        more = () if self.needs_with is None else self.needs_with(options)
        return tuple(dict.fromkeys([*self.needs, *more]))

    def each(self, site: Site, sizes: Sequence[Size], options: Mapping[str, Any]) -> Iterator[tuple[Size, Split]]:
        """The terms of each of these sizes, one after another."""
        assert self.split is not None
        if isinstance(self.split, Splitter):
            yield from self.split.each(site, sizes, **options)
            return
        drawn = site.generator.get_state()
        for size in sizes:
            site.generator.set_state(drawn)  # a size's draw does not depend on which others are tried
            yield size, self.split(replace(site, size=size, nominal=size), **options)

    def freeze(self, model: nn.Module) -> list[nn.Parameter]:
        """Make exactly the method's own parameters trainable, and return them.

        Raises WeftError when the model holds none of them.
        """
        chosen = self.trained(model)
        if not chosen:
            raise WeftError(
                f"The method {self.name!r} finds nothing to train in this model; compress it first (weft compress), or "
                f"choose 'lora' or 'full'. {self.name} is for: {self.summary}"
            )
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def record(self) -> dict[str, Any]:
        """What `weft methods` lists, JSON-able."""
        allocate = self.allocate if self.kind == "compress" else None
        head = super().record()
        return {**head, "needs": list(self.needs), "allocate": allocate}
