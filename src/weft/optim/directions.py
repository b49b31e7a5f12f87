"""The random directions of a zeroth-order step: named by (step, sample, parameter), drawn again whenever they are
needed (MeZO, Malladi et al., 2023, arXiv 2305.17333).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.optim.seeds import Draw, normal, runs, signs, uniform
from weft.seeds import mix

__all__ = ["Directions", "Estimator"]

_DRAWS: dict[str, Draw] = {"gaussian": normal, "rademacher": signs, "sphere": normal}


@dataclass(frozen=True)
class Estimator:
    """How the gradient is estimated.

    Args:
        samples: q, the directions a step.
        two_sided: 2 q losses a step; one-sided takes q + 1 and is biased by eps/2 u^T H u.
        direction: gaussian: N(0, I). rademacher: entries -1 or 1, with slightly less variance and cheaper to draw.
            sphere: gaussian, scaled to length sqrt(d).
        density: share of the entries that are perturbed and updated, drawn at random and fixed for `redraw` steps
            (None: for the whole run, the only choice that lowers the dimension of the search).
        blockwise: perturb and update one parameter group after the other, each with its own losses (Gauss-Seidel).
    """

    samples: int = 1
    two_sided: bool = True
    direction: Literal["gaussian", "rademacher", "sphere"] = "gaussian"
    density: float = 1.0
    redraw: int | None = None
    blockwise: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0.0 < self.density <= 1.0 or (self.redraw is not None and self.redraw < 1):
            raise WeftError(f"samples and redraw are at least 1 and density is in (0, 1]; this is {self}.")
        if self.direction not in _DRAWS:
            raise WeftError(f"A direction is one of {', '.join(_DRAWS)}; this is {self.direction!r}.")


class Directions:
    """u_k for numbered parameters, in runs of `chunk` entries.

    The chunk is at most a 512th of all entries, so that the working memory is small beside the weights; it is part of
    what decides the directions.
    """

    def __init__(self, estimator: Estimator, parameters: Sequence[Tensor]) -> None:
        self.estimator, self._parameters = estimator, parameters
        entries = sum(parameter.numel() for parameter in parameters)
        self.chunk = 2 ** min(max((entries // 512).bit_length(), 16), 24)
        self._factors: dict[tuple[int, int, int, tuple[int, ...]], float] = {}  # of the spheres of the latest step

    def runs(self, seed: int, step: int, k: int, i: int, block: Collection[int]) -> Iterator[tuple[int, int, Tensor]]:
        """u_k of a step over parameter i, one of the parameters `block` it spans: (first, last + 1, values)."""
        sphere = self.estimator.direction == "sphere"
        factor = self._sphere(seed, step, k, tuple(block)) if sphere else 1.0
        return ((first, last, u.mul_(factor)) for first, last, u in self._masked(seed, step, k, i))

    def _sphere(self, seed: int, step: int, k: int, block: tuple[int, ...]) -> float:
        """What scales a direction to length sqrt(entries kept); found once a step, by drawing it all."""
        key = (seed, step, k, block)
        if key not in self._factors:
            if any(known[1] != step for known in self._factors):
                self._factors.clear()
            square, kept = 0.0, 0
            for u in (u for i in block for _, _, u in self._masked(seed, step, k, i)):
                square += float(u.double().square().sum())
                kept += int(u.count_nonzero()) if self.estimator.density < 1.0 else u.numel()
            self._factors[key] = math.sqrt(kept / square) if square else 0.0
        return self._factors[key]

    def _masked(self, seed: int, step: int, k: int, i: int) -> Iterator[tuple[int, int, Tensor]]:
        density = self.estimator.density
        values = self._drawn(_DRAWS[self.estimator.direction], mix(seed, step, k, i), i)
        if density == 1.0:
            return values
        period = 0 if self.estimator.redraw is None else step // self.estimator.redraw
        kept = self._drawn(uniform, mix(seed, -1 - period, i), i)
        return ((a, b, u.mul_(keep < density)) for (a, b, u), (_, _, keep) in zip(values, kept, strict=True))

    def _drawn(self, draw: Draw, seed: int, i: int) -> Iterator[tuple[int, int, Tensor]]:
        parameter = self._parameters[i]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        drawn = runs(draw, seed, parameter.numel(), parameter.device, self.chunk)
        return ((first, last, values.to(wide)) for first, last, values in drawn)
