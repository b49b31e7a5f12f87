"""What `compress` learns of every layer before it spends the budget: the sizes that there are, and what each loses.

    plan       everything that decides the result, resolved and checked
    offered    the choices of each layer, their losses unknown
    survey     W, moments -> finished pieces (factors, or terms of each size tried) and what an allocation wants to know

A loss is tr(D^T G D X), D = W' - W, in the Kronecker-factored Fisher norm: one unit for all layers and all methods. It
is known in closed form for all ranks at once where a method's answers are nested (`LowRankSplit`), and measured on the
terms of each size where they are not (of a large layer along random directions, `weft.linalg.weighted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from weft.allocate import NEEDS, Choice, LayerInfo, Shape
from weft.errors import WeftError
from weft.io.precision import saved_dtype
from weft.linalg.principal import tail_losses
from weft.linalg.svd import singular_values
from weft.linalg.weighted import WeightedLoss
from weft.methods.base import Factors, JointShape, LowRankSplit, Method, Moments, Site, Size, Split
from weft.methods.combined import MixtureSplit
from weft.runs.pieces import Piece, Store, named, packed, unpacked
from weft.seeds import generator
from weft.signals import finishing
from weft.stats.calibrate import Batch, Stats, layers_by_block
from weft.stats.collect import INPUT_NEEDS
from weft.terms.adapters import base_terms
from weft.terms.joints import Joint
from weft.terms.layers import bias_of, shape_of
from weft.verbs.moments import UNIT, BlockMoments, kept_unit

__all__ = [
    "BEFORE",
    "Plan",
    "carried_moments",
    "check_finite",
    "check_weight",
    "offered",
    "piece_name",
    "site_of",
    "survey",
    "surveyed_split",
]

BEFORE = ("influence", "relevance")
"""What allocations read of the model as it is, before the survey."""
_LARGE = 2**28  # bytes of a model whose finished pieces lie on a disk


def _plain(items: Iterable[Any], what: str) -> Iterable[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the result, resolved and checked."""

    method: Method
    options: Mapping[str, Any]
    layers: tuple[str, ...]
    joints: Mapping[str, Joint] = field(default_factory=dict)  # by name: layers that are cut together
    stage: int = 0  # of a chain of methods
    reads: tuple[str, ...] = ()  # what the allocation looks at
    fixed: Mapping[str, Size] | None = None  # the sizes, where they are known before the survey
    round: int = 1  # whole-number sizes are multiples of this
    sequential: bool = False
    correction: float = 0.0
    by_block: bool | None = None  # one pass for each block; None: as many blocks at a time as fit
    originals: Mapping[str, Tensor] = field(default_factory=dict)  # weights (out, in) before the chain began
    seed: int = 0
    track: Callable[[Iterable[Any], str], Iterable[Any]] = _plain

    @property
    def sites(self) -> tuple[str, ...]:
        """What is split by itself: the layers, and the joints in the place of theirs."""
        joined = {member.layer: joint for joint in self.joints.values() for member in joint.members.values()}
        return tuple(dict.fromkeys(joined[name].name if name in joined else name for name in self.layers))

    @property
    def nested(self) -> LowRankSplit | None:
        """The method's split, where its answers of all ranks are the first components of one factorisation."""
        return self.method.split if isinstance(self.method.split, LowRankSplit) else None

    @property
    def mixed(self) -> bool:
        """Whether the method chooses among others, so that its sizes are pairs of a candidate and a size."""
        return isinstance(self.method.split, MixtureSplit)

    def plain(self, choice: Choice) -> Choice:
        """The choice as an allocation tells it: of a mixture, the candidate's size under the candidate's name."""
        return choice._replace(size=choice.size[1]) if self.mixed and choice.size is not None else choice

    @property
    def reads_weights(self) -> bool:
        """Whether the survey has to split."""
        return not self.sequential or self.tries or any(name in self.reads for name in ("spectrum", "losses"))

    @property
    def tries(self) -> bool:
        """Whether the allocation tries surveyed sizes on the model."""
        return any(name in self.reads for name in ("measure", "divergence"))

    @property
    def carried(self) -> tuple[str, ...]:
        """Statistics that the sequential walk, which runs forward only, takes over from the survey."""
        return tuple(need for need in self.reads_of if need not in INPUT_NEEDS) if self.sequential else ()

    @property
    def reads_of(self) -> tuple[str, ...]:
        """The statistics that the method reads with its options."""
        return self.method.reads(self.options)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics of the survey."""
        read = [need for name in self.reads for need in NEEDS.get(name, ())]
        return tuple(dict.fromkeys([*(self.reads_of if self.reads_weights else self.carried), *read]))

    def on_disk(self, nbytes: int) -> bool:
        """Whether finished pieces of a model of so many bytes lie on a disk: of a large one, since one block's
        statistics at a time are of no use while all factors, or the tries of several methods, pile up.
        """
        return bool(self.by_block or self.carried or self.mixed or self.in_unit) or nbytes > _LARGE

    @property
    def in_unit(self) -> bool:
        """Whether its losses are in the unit of the model before the chain began, see `weft.verbs.moments`."""
        return self.stage > 0 and "losses" in self.reads and self.reads_weights


def offered(model: nn.Module, plan: Plan) -> dict[str, LayerInfo]:
    """The choices of each layer by rising bytes, without losses; None, as it is, costs a compensation nothing."""
    infos: dict[str, LayerInfo] = {}
    blocks = layers_by_block(model, plan.sites)
    for i, names in enumerate(blocks):
        for name in names:
            shape = _shape(model, plan, name)
            infos[name] = LayerInfo(shape, _choices(plan, shape), depth=i / max(len(blocks) - 1, 1))
    return {name: infos[name] for name in plan.sites}


def _shape(model: nn.Module, plan: Plan, name: str) -> Shape:
    """That of a layer, or of a joint, as they are saved."""
    joint = plan.joints.get(name)
    layer = name if joint is None else next(iter(joint.members.values())).layer
    module = model.get_submodule(layer)
    stored = saved_dtype(model, f"{layer}.weight", module.weight)  # type: ignore[arg-type]
    return Shape(*shape_of(module), stored.itemsize) if joint is None else JointShape.of(joint, stored.itemsize)


def _choices(plan: Plan, shape: Shape) -> list[Choice]:
    if plan.method.joints is not None and not isinstance(shape, JointShape):
        return [Choice(None, shape.nbytes)]
    sizes = [
        Choice(size, nbytes, method=size[0] if plan.mixed else plan.method.name)
        for size, nbytes in plan.method.sizes(shape, plan.options)
        if nbytes < shape.nbytes and (plan.round == 1 or not isinstance(size, int) or size % plan.round == 0)
    ]
    if plan.method.kind == "compensate":
        return [Choice(None, 0), *sizes]
    return [*sizes, Choice(None, shape.nbytes)]


def site_of(model: nn.Module, plan: Plan, name: str, stats: Mapping[str, Moments], size: Size) -> Site:
    """The layer, or the joint, as its method sees it; nothing in the model is touched."""
    joint = plan.joints.get(name)
    if joint is not None:
        members = {role: site_of(model, plan, member.layer, stats, size) for role, member in joint.members.items()}
        own = generator(plan.seed, plan.method.name, name)
        return Site(name, {}, size, size, {}, own, next(iter(members.values())).dtype, joint=joint, members=members)
    layer, moments = model.get_submodule(name), stats.get(name, {})
    dtype = layer.weight.dtype
    assert isinstance(dtype, torch.dtype)
    terms, own = base_terms(model, name), generator(plan.seed, plan.method.name, name)
    original = plan.originals.get(name)
    return Site(name, terms, size, size, moments, own, dtype, bias=bias_of(layer), original=original)


def survey(
    model: nn.Module,
    plan: Plan,
    infos: Mapping[str, LayerInfo],
    batches: Sequence[Batch],
    stats: Stats | None,
    store: Store,
) -> dict[str, LayerInfo]:
    """What the allocation reads of every layer; factors and terms (one-shot) or carried statistics (sequential) go to
    the store, block by block.
    """
    found: dict[str, LayerInfo] = {}
    source = moments_of(model, plan, batches, stats, store)
    for i, names in enumerate(plan.track(layers_by_block(model, plan.sites), "factorising")):
        found |= _survey_block(model, plan, source, store, i, {name: infos[name] for name in names})
    return {name: found[name] for name in plan.sites}


def _survey_block(
    model: nn.Module, plan: Plan, source: BlockMoments, store: Store, block: int, infos: Mapping[str, LayerInfo]
) -> dict[str, LayerInfo]:
    """The layers of a block. Its statistics end with this call: the next ones must not find them in memory."""
    piece = store.get(piece_name(plan, block))
    if piece is None:
        with finishing():
            moments = source.of(block)
            unit = kept_unit(store, block, infos) if plan.in_unit else moments
            piece = Piece()
            for name, info in infos.items():
                piece.add(_survey_site(model, name, moments, unit, plan, info))
            store.put(piece_name(plan, block), piece)
    return {name: _filled(info, name, piece) for name, info in infos.items()}


def surveyed_split(
    model: nn.Module, plan: Plan, store: Store, block: int | None = None
) -> Iterator[tuple[str, Callable[[Size], Split]]]:
    """Every site's name (of one block, or of all), and what splits it at a surveyed size; one block's pieces are in
    memory at a time.
    """
    for i, names in enumerate(layers_by_block(model, plan.sites)):
        if block not in (None, i):
            continue
        piece = store.get(piece_name(plan, i)) or Piece()
        for name in names:

            def split(size: Size, name: str = name, piece: Piece = piece) -> Split:
                if plan.nested is None:
                    return _unpacked(model, plan, piece, name, size)
                kept = {key: piece.tensors.get(f"{name}:{key}") for key in Factors._fields}
                return plan.nested.terms(site_of(model, plan, name, {}, size), Factors(**kept))  # type: ignore[arg-type]

            yield name, split


def carried_moments(plan: Plan, piece: Piece | None, name: str) -> dict[str, Tensor]:
    """The statistics of a layer that the survey kept for the sequential walk."""
    return {need: piece.tensors[f"{name}:{need}"] for need in plan.carried} if piece is not None else {}


def moments_of(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], stats: Stats | None, store: Store
) -> BlockMoments:
    """The statistics of the model as it is now that the survey collects."""
    needs = [need for need in plan.needs if need in plan.reads_of or not plan.in_unit]
    return BlockMoments(model, plan.layers, needs, batches, stats, plan.by_block, store, plan.track)


def unit_of(model: nn.Module, plan: Plan, batches: Sequence[Batch], store: Store) -> BlockMoments:
    """The same, of what is kept of the model before the chain begins."""
    return BlockMoments(model, plan.layers, UNIT, batches, None, plan.by_block, store, plan.track)


def piece_name(plan: Plan, block: int) -> str:
    """Of what the survey keeps of a block: factors serve every size, terms the sizes that they were made for."""
    name = f"survey-{block}" if plan.stage == 0 else f"survey-{plan.stage}-{block}"
    if plan.nested is not None or plan.fixed is None:
        return name
    return named(name, dict(plan.fixed))


def _survey_site(
    model: nn.Module,
    name: str,
    stats: Mapping[str, Moments],
    unit: Mapping[str, Moments],
    plan: Plan,
    info: LayerInfo,
) -> Piece:
    """What is kept of one site: factors up to the largest size, or terms of every size; spectra, losses, moments."""
    site = site_of(model, plan, name, stats, None)
    check_finite(site)
    entry: dict[str, Tensor] = {need: site.moments[need] for need in plan.carried}
    if "weight_spectrum" in plan.reads:
        entry["weight_spectrum"] = singular_values(site.weight(torch.float64))
    tried = Piece()
    if plan.reads_weights and (plan.nested is not None or plan.fixed is None or plan.fixed[name] is not None):
        if plan.nested is not None:
            entry |= _factors(site, unit, plan.nested, plan, info)
        else:
            tried, losses = _tries(site, unit, plan, info)
            entry |= {"losses": losses} if "losses" in plan.reads else {}
    tried.tensors |= {f"{name}:{key}": t.cpu() for key, t in entry.items()}
    return tried


def _factors(
    site: Site, unit: Mapping[str, Moments], nested: LowRankSplit, plan: Plan, info: LayerInfo
) -> dict[str, Tensor]:
    """The spectrum, the loss of each choice in closed form, and the factors up to the largest size."""
    factors = nested.factors(site, **plan.options)
    entry = {"s": factors.s}
    if "losses" in plan.reads:
        tails = tail_losses(factors.B, factors.A, *(unit[site.name][need] for need in UNIT))
        whole = tails[0] if plan.method.kind == "compensate" else tails[-1]  # of the size None
        entry["losses"] = torch.stack([whole if c.size is None else tails[c.size] for c in info.choices])
    if not plan.sequential or plan.tries:
        most = max((choice.size for choice in info.sizes), default=0)  # whatever the budget: another one takes them too
        kept = factors.truncate(max(most, (plan.fixed or {}).get(site.name) or 0))
        entry |= {"B": kept.B.to(site.dtype), "A": kept.A.to(site.dtype)}
        entry |= {} if kept.mean is None else {"mean": kept.mean.clone()}
    return entry


def _tries(site: Site, unit: Mapping[str, Moments], plan: Plan, info: LayerInfo) -> tuple[Piece, Tensor]:
    """The terms of every size that may be chosen, and what each choice loses."""
    sizes = [plan.fixed[site.name]] if plan.fixed else [choice.size for choice in info.choices]
    terms = plan.method.each(site, [size for size in sizes if size is not None], plan.options)
    made, found, lost = Piece(), dict[str, Tensor](), _lost(site, unit, plan)
    for size, split in chain([(None, Split())] if None in sizes else [], terms):
        if size is not None and (not plan.sequential or plan.tries):
            made.add(_packed(site, size, split))
        if "losses" in plan.reads:
            found[str(size)] = lost(size, split)
    losses = [found[str(size)] for size in sizes if str(size) in found]
    return made, torch.stack(losses) if losses else torch.zeros(0)


def _lost(site: Site, unit: Mapping[str, Moments], plan: Plan) -> Callable[[Size, Split], Tensor]:
    """(size, its terms) -> what they lose; of a joint, by the effect of all changes."""

    @cache
    def loss(role: str) -> WeightedLoss:
        of = site.members[role] if role else site
        X, G = (unit[of.name][need] for need in UNIT)
        return WeightedLoss(X, G, generator(plan.seed, "losses", of.name))

    @torch.no_grad()  # terms are trainable: a loss with its graph would keep every dense matrix until the block ends
    def of_joint(size: Size, split: Split) -> Tensor:
        if size is None:
            return torch.zeros((), dtype=torch.float64)
        assert split.effect is not None, f"{plan.method.name} does not say the effect of its changes"
        role, change = split.effect
        return loss(role)(change)

    @torch.no_grad()
    def of_layer(size: Size, split: Split) -> Tensor:
        W = site.weight() if site.original is None else site.original.float()
        now = site.weight() if plan.method.kind == "compensate" or size is None else torch.zeros_like(W)
        return loss("")(sum((term.dense(torch.float32) for term in split.terms.values()), start=now) - W)

    return of_joint if site.members else of_layer


def _packed(site: Site, size: Size, split: Split) -> Piece:
    """The terms of one size of a site, for `surveyed_split`."""
    if not site.members:
        return packed(f"{site.name}@{size}", split.terms, split.bias)
    piece = Piece()
    for role, part in split.members.items():
        piece.add(_packed(site.members[role], size, part))
    return piece


def _unpacked(model: nn.Module, plan: Plan, piece: Piece, name: str, size: Size) -> Split:
    joint = plan.joints.get(name)
    if joint is None:
        return Split(*unpacked(piece, f"{name}@{size}", model.get_submodule(name)))
    return Split(members={r: _unpacked(model, plan, piece, m.layer, size) for r, m in joint.members.items()})


def _filled(info: LayerInfo, name: str, piece: Piece) -> LayerInfo:
    """What the allocation may look at, with what the survey found."""
    losses = piece.tensors.get(f"{name}:losses")
    choices = info.choices
    if losses is not None:
        choices = [c._replace(loss=loss) for c, loss in zip(choices, losses.tolist(), strict=True)]
    return replace(
        info,
        choices=choices,
        spectrum=piece.tensors.get(f"{name}:s"),
        weight_spectrum=piece.tensors.get(f"{name}:weight_spectrum"),
    )


def check_finite(site: Site) -> None:
    """Raises WeftError where the weight holds NaN or infinity."""
    for member in site.members.values():
        check_finite(member)
    if not site.members:
        check_weight(site.name, site.weight())


def check_weight(layer: str, weight: Tensor) -> None:
    """Raises WeftError where the weight of a layer holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise WeftError(f"The weight of layer {layer} holds NaN or infinity; leave it out by a pattern.")
