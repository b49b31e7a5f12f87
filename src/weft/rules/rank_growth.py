"""RankGrowth: layers gain components while they train, where the loss is most sensitive (IncreLoRA, Zhang et
al., 2023, arXiv 2308.12043).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.optim.entries import EntryAdamW
from weft.rules.base import Rule, State
from weft.rules.hooks import watch
from weft.rules.orthonormal import orthonormal_pull
from weft.rules.schedule import in_time, length
from weft.rules.sensitivity import Sensitivity
from weft.rules.sharded import sharded_like, whole
from weft.terms import Spectral
from weft.terms.adapters import unwrapped

__all__ = ["RESERVE", "Growth", "RankGrowth", "live_components"]

RESERVE = 1e-5
"""The fixed coefficient of a component that is trained in advance."""


@dataclass(frozen=True)
class Growth:
    """When and by how much.

    Args:
        start: live components of a layer at first.
        increment: components that a chosen layer gains, and that are trained in advance; None for half the rank.
        top_h: layers chosen at once; None for an eighth of them, or for as many as it takes in a short run.
        warmup, interval: growth after step t where t > warmup and t is a multiple of interval. None for such that
            growth is complete after a third of the run, as in the published ones; the warm-up is one interval.
        ramp: steps over which what is new is brought to the full learning rate; None for an interval.
        smoothing: of the sensitivity and of its uncertainty.
        coefficient: of the orthonormality of the components.
    """

    start: int = 1
    increment: int | None = None
    top_h: int | None = None
    warmup: int | None = None
    interval: int | None = None
    ramp: int | None = None
    smoothing: float = 0.85
    coefficient: float = 0.1

    def gain(self, rank: int) -> int:
        """The increment; the paper's are 1, 2, 3 and 4 for ranks 2, 4, 6 and 8."""
        return max(rank // 2, 1) if self.increment is None else self.increment

    def planned(self, missing: int, gain: int, layers: int, steps: int | None) -> Growth:
        """With every number found that was None, for `missing` components in all and a run of `steps`.

        Raises WeftError, or warns, where nothing would grow before the last step; warns where growth would not be
        complete.
        """
        top_h, interval = self.top_h or max(1, layers // 8), self.interval
        if interval is None:
            third = max(2, length(steps, "The interval between two growths") // 3)
            if self.top_h is None:
                top_h = max(top_h, math.ceil(missing / (gain * (third - 1))))
            interval = max(1, third // (math.ceil(missing / (gain * top_h)) + 1))
        warmup, ramp = (interval if given is None else given for given in (self.warmup, self.ramp))
        first = (warmup // interval + 1) * interval
        if missing:
            given = self.warmup is not None or self.interval is not None
            in_time(first, steps, "The warm-up with the interval between growths (warmup, interval)", given=given)
        grown = gain * top_h * max(0, (steps - 1 - first) // interval + 1) if steps is not None else missing
        if 0 < grown < missing:
            warnings.warn(
                f"{steps} steps are too few for this growth: {grown} of {missing} components will be added; lower "
                "warmup and interval, or raise top_h.",
                stacklevel=2,
            )
        return replace(self, top_h=top_h, warmup=warmup, interval=interval, ramp=ramp)


class RankGrowth(Rule):
    """Grows Spectral terms of preallocated size: a layer's components are live (all three factors trained), in reserve
    (s fixed at 1e-5, the sides trained), or not yet there (s = 0, nothing trained).

        I = sum |dW o dL/d(dW)| / sqrt(out in),  I_bar <- b I_bar + (1 - b) I,  U <- b U + (1 - b) |I - I_bar|
        score = I_bar U; the `top_h` layers with the highest gain `increment` components, up to the sum of all ranks

    With an `EntryAdamW` each component has moments and an age of its own, and those that are not there have none.
    Scores are averaged over the processes.

    Args:
        growth: when and by how much.
        rank: that the layers shall have on average; None for all components that they have room for.
        ranks: layer -> rank instead, of which the sum counts.
    """

    works_on = (Spectral,)

    def __init__(self, growth: Growth, *, rank: int | None = None, ranks: Mapping[str, int] | None = None) -> None:
        self.given, self.rank, self.ranks = growth, rank, ranks
        self.optimizer: EntryAdamW | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer if isinstance(optimizer, EntryAdamW) else None

    def begin(self, model: nn.Module) -> None:
        found = self.found(Spectral)
        self.parts = [part for _, part in found]
        room = [part.rank for part in self.parts]
        rank = max(room) if self.rank is None else self.rank
        self.total = sum(self.ranks.values()) if self.ranks else sum(min(rank, most) for most in room)
        self.gain = self.given.gain(rank)
        self.live = [live_components(part, self.given.start) for part in self.parts]
        from_the_start = self.total - self.given.start * len(self.parts)  # a resumed run keeps its plan
        self.growth = self.given.planned(from_the_start, self.gain, len(self.parts), self.steps)
        self.hooks = [Sensitivity(part) for part in self.parts]
        for (layer, _), hook in zip(found, self.hooks, strict=True):
            self.hang(watch(unwrapped(model).get_submodule(layer), hook))
        assert self.growth.ramp is not None
        never = torch.full((len(self.parts), max(room)), -self.growth.ramp)
        self.born, self.lived = never, never.clone()  # the steps since which sides, and s, are trained
        device = self.parts[0].s.device
        self.mean, self.doubt = (torch.zeros(len(self.parts), device=device) for _ in range(2))
        self._remember()
        self._choose(anew=False)

    @property
    def missing(self) -> int:
        """Components still to be given out."""
        return self.total - sum(self.live)

    def reserve(self, i: int) -> int:
        """Components of layer i that are trained in advance."""
        return min(self.gain, self.parts[i].rank - self.live[i]) if self.missing else 0

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        self._aside: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for i, term in enumerate(self.parts):
            known = self.live[i] + self.reserve(i)
            self._pull(term.U, known, columns=True)
            self._pull(term.V, known, columns=False)
            if term.s.grad is not None:
                live = (torch.arange(term.rank, device=term.s.device) < self.live[i]).to(term.s.dtype)
                term.s.grad.mul_(sharded_like(live, term.s))
            sides, gates = (self._share(since[i, : term.rank], step, term.s) for since in (self.born, self.lived))
            for parameter, share in ((term.U, sides), (term.V, sides.unsqueeze(1)), (term.s, gates)):
                if bool((share < 1).any()):
                    self._aside.append((parameter, parameter.detach().clone(), share))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for parameter, before, share in self._aside:
            weight = sharded_like(share.expand(parameter.shape).contiguous(), parameter)
            parameter.copy_(torch.lerp(before, parameter, weight))
        self._aside = []
        if not self.missing:
            return
        self._measure()
        assert self.growth.warmup is not None and self.growth.interval is not None
        if step > self.growth.warmup and step % self.growth.interval == 0:
            self._grow(step)

    def state_dict(self) -> State:
        return {
            "live": torch.tensor(self.live),
            "born": self.born,
            "lived": self.lived,
            "mean": self.mean,
            "doubt": self.doubt,
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        self.live = tensors["live"].tolist()
        self.born, self.lived = tensors["born"].clone(), tensors["lived"].clone()
        self.mean, self.doubt = (tensors[name].to(self.mean.device, copy=True) for name in ("mean", "doubt"))
        self._remember()

    def _share(self, since: Tensor, step: int, like: Tensor) -> Tensor:
        """Of the step that each component takes."""
        return ((step - since) / max(self.growth.ramp or 0, 1)).clamp(0, 1).to(like.device, like.dtype)

    def _pull(self, parameter: nn.Parameter, known: int, *, columns: bool) -> None:
        if parameter.grad is None or not self.growth.coefficient:
            return
        side = whole(parameter).mT if columns else whole(parameter)
        pull = torch.zeros_like(side)
        pull[:known] = orthonormal_pull(side[:known]) * (self.growth.coefficient / (2 * len(self.parts)))
        parameter.grad.add_(sharded_like((pull.mT if columns else pull).contiguous(), parameter))

    def _measure(self) -> None:
        now = torch.stack([hook.take(self.mean).to(self.mean.device) for hook in self.hooks])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(now)
            now /= dist.get_world_size()
        self.mean.lerp_(now, 1 - self.growth.smoothing)
        self.doubt.lerp_((now - self.mean).abs(), 1 - self.growth.smoothing)

    def _grow(self, step: int) -> None:
        scores = (self.mean * self.doubt).tolist()
        room = [i for i, term in enumerate(self.parts) if self.live[i] < term.rank]
        for i in sorted(room, key=lambda i: (-scores[i], i))[: self.growth.top_h]:
            old = self.live[i]
            gain = min(self.gain, self.parts[i].rank - old, self.missing)
            trained = old + self.reserve(i)
            self.live[i] = old + gain
            self.lived[i, old : old + gain] = step
            self.born[i, trained : old + gain + self.gain] = step
        for i, term in enumerate(self.parts):
            self._settle(term.s, self.live[i], self.live[i] + self.reserve(i))
        self._remember()
        self._choose(anew=True)

    def _settle(self, s: nn.Parameter, live: int, known: int) -> None:
        """1e-5 for what is in reserve, and for nothing else, by which it is known again; 0 beyond."""
        values = whole(s).clone()
        reserve = torch.full_like(values, RESERVE)
        values = torch.where(values == reserve, torch.nextafter(reserve, 2 * reserve), values)
        values[live:known], values[known:] = RESERVE, 0
        s.copy_(sharded_like(values, s))

    def _remember(self) -> None:
        for hook in self.hooks:
            hook.on = bool(self.missing)

    def _choose(self, *, anew: bool) -> None:
        """Tell the optimizer which components there are; what a resumed one knows already stays."""
        if self.optimizer is None:
            return
        for i, term in enumerate(self.parts):
            known = torch.arange(self.live[i] + self.reserve(i))
            for parameter, index, axis in (
                (term.U, known, 1),
                (term.V, known, 0),
                (term.s, known[: self.live[i]], None),
            ):
                if anew or not self.optimizer.state.get(parameter):
                    self.optimizer.choose(parameter, index, axis)


def live_components(part: Spectral, start: int) -> int:
    """How many components are live already: those before the reserve, or all that are not zero; `start` at first."""
    s = whole(part.s.detach())
    reserve = (s == torch.tensor(RESERVE, dtype=s.dtype, device=s.device)).nonzero()
    known = int(reserve[0]) if len(reserve) else int(s.nonzero().max()) + 1 if s.any() else 0
    return max(known, start)
