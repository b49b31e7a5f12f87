"""A batch that grows only when its gradient is too noisy: the norm test, on the gradients of the micro-batches.

J micro-batches of mu samples (all processes together) have gradients g_j with the mean g:

    D = sum_j ||g_j||^2 - J ||g||^2 = sum_j ||g_j - g||^2
    s2 = mu D / (J - 1)                    unbiased: the variance of a sample's gradient, summed over all coordinates
    G2 = ||g||^2 - D / (J (J - 1))         unbiased: ||E g||^2
    pass:  s2 / b <= eta^2 G2;    otherwise the next b is  s2 / (eta^2 G2),  the noise scale over eta^2

Norms are taken while the backward pass hands the gradients over, so nothing is stored but a few numbers.

Sources: AdAdaGrad (Lau, Liu and Kolar, 2024, arXiv 2402.11215) and, from workers' gradients, arXiv 2412.21124; the test
is Byrd et al.'s, 2012.
Deviations: s2 and G2 are unbiased and smoothed (the code tests one batch against ||g||^2, which contains the noise:
where noise dominates, each failed test multiplies the batch by 1 / eta^2), and the batch grows by a bounded factor. The
inner-product and orthogonality tests, which need a gradient for each sample, are not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from weft.errors import WeftError

__all__ = ["AdaptiveBatch", "noise_estimates"]

_FLOOR = 1e-2  # of ||g||^2: a smaller G2 is not told from 0
_STATE = ("size", "samples", "steps", "noise", "signal", "norm")


def noise_estimates(squares: float, norm: float, groups: int, samples: int) -> tuple[float, float]:
    """(s2, G2), unbiased, from sum_j ||g_j||^2, ||g||^2, J groups (2 or more) and mu samples a group."""
    spread = squares - groups * norm
    return samples * spread / (groups - 1), norm - spread / (groups * (groups - 1))


class AdaptiveBatch:
    """Measures the noise of the gradients in any training loop, and says how many samples the next step should take.

        batch = AdaptiveBatch(model.parameters(), micro=4, start=16, limit=512)
        while batch.samples < total:
            for _ in range(batch.accumulation):      # micro-batches of 4 samples on this process
                (loss_of(next(data)) / batch.accumulation).backward()
            batch.update()                           # before clipping and before the step
            optimizer.step()
            optimizer.zero_grad()

    Args:
        parameters: those whose gradients are measured; frozen ones are left out.
        micro: samples of a micro-batch of one process. Sequences, not tokens, which are not independent.
        start, limit: first and largest batch over all processes, rounded to multiples of micro * processes (up, down).
        eta: tolerated noise: the standard deviation of g over the length of its mean. The batch grows to the noise
            scale over eta^2.
        every: steps between two tests; each step is measured.
        growth: at most this factor at a test.
        beta: of the running means of s2 and G2.

    Under DDP each process measures its own micro-batches, with or without `no_sync`, and two numbers are summed.
    The batch never shrinks. Schedules should run in samples (`weft.optim.schedules` with `samples` for steps); the
    learning rate is not changed. A step whose gradients are not finite is counted and not measured.

    Raises WeftError for a batch of fewer than two micro-batches, sharded parameters, and an `update` after another
    number of backward passes than `accumulation`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        micro: int,
        start: int,
        limit: int,
        eta: float = 0.5,
        every: int = 10,
        growth: float = 2.0,
        beta: float = 0.9,
    ) -> None:
        self.workers = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.micro, self.eta, self.every, self.growth, self.beta = micro, eta, every, growth, beta
        self._check(start, limit)
        unit = micro * self.workers
        self.size, self.limit = unit * math.ceil(start / unit), unit * (limit // unit)
        self._check_size()
        self.samples, self.steps = 0, 0
        self.noise, self.signal, self.norm = 0.0, 0.0, 0.0  # running means of s2, G2 and ||g||^2, not yet corrected
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise WeftError("None of the parameters requires a gradient, so there is no noise to measure.")
        if any(isinstance(p, DTensor) for p in self._parameters):
            raise WeftError(
                "The gradients of sharded parameters are averaged before they can be measured; "
                "use DDP, or a fixed batch."
            )
        self._squares: dict[torch.device, Tensor] = {}
        self._passes: dict[Tensor, int] = {}
        self._handles = [p.register_hook(self._measure(p)) for p in self._parameters]  # type: ignore[no-untyped-call]

    @property
    def accumulation(self) -> int:
        """Backward passes of a step on each process."""
        return self.size // (self.micro * self.workers)

    @property
    def noise_scale(self) -> float:
        """s2 / G2 (samples): the batch whose gradient is as much noise as signal; NaN before the first `update`."""
        return self.noise / max(self.signal, _FLOOR * self.norm) if self.norm > 0 else math.nan

    def update(self) -> int:
        """Close a step: measure, decide, and return the size of the next batch. `.grad` holds the mean gradient."""
        squares, norm = self._collect()
        if math.isfinite(squares + norm):
            s2, signal = noise_estimates(squares, norm, self.size // self.micro, self.micro)
            for name, value in (("noise", max(s2, 0.0)), ("signal", signal), ("norm", norm)):
                setattr(self, name, self.beta * getattr(self, name) + (1 - self.beta) * value)
        self.samples, self.steps = self.samples + self.size, self.steps + 1
        if self.steps % self.every == 0 and self.norm > 0:
            self.size = self._next()
        return self.size

    def _next(self) -> int:
        """The batch that would have passed the test, within its bounds."""
        unit = self.micro * self.workers
        wanted = min(self.noise_scale / self.eta**2, self.growth * self.size, self.limit)
        # a request that is met but for rounding is met
        return max(self.size, min(unit * math.ceil(wanted / unit - 1e-9), self.limit))

    def remove(self) -> None:
        """Stop measuring."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; taken between two steps."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with the batch rounded up where micro-batch or processes are others now."""
        if set(state_dict) != set(_STATE):
            raise WeftError(f"This is not the state of an adaptive batch, which has {', '.join(_STATE)}.")
        for name in _STATE:
            setattr(self, name, state_dict[name])
        unit = self.micro * self.workers
        self.size = min(unit * math.ceil(self.size / unit), self.limit)
        self._check_size()

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _measure(self, parameter: Tensor) -> Any:
        """The hook of a parameter: called with each backward pass's own gradient, before it is added to `.grad`."""

        def hook(grad: Tensor) -> None:
            self._passes[parameter] = self._passes.get(parameter, 0) + 1
            square = _square(grad)
            held = self._squares.get(grad.device)
            self._squares[grad.device] = square if held is None else held + square

        return hook

    def _collect(self) -> tuple[float, float]:
        """sum_j ||g_j||^2 over all micro-batches of all processes, and ||g||^2; ready for the next step."""
        passes, expected = max(self._passes.values(), default=0), self.accumulation
        squares = sum(float(square) for square in self._squares.values()) * expected**2  # losses are divided by it
        norm = sum(float(_square(p.grad)) for p in self._parameters if p.grad is not None)
        self._squares.clear()
        self._passes.clear()
        if passes != expected:
            raise WeftError(
                f"update() came after {passes} backward passes, and this step has {expected}; call it once "
                "after `accumulation` of them, each of a loss divided by `accumulation`."
            )
        if self.workers > 1:
            both = torch.tensor([squares, norm], dtype=torch.float64, device=self._parameters[0].device)
            dist.all_reduce(both)
            squares, norm = float(both[0]), float(both[1]) / self.workers
        return squares, norm

    def _check(self, start: int, limit: int) -> None:
        if self.micro < 1 or self.every < 1 or not 1 <= start <= limit:
            raise WeftError(
                f"micro and every are 1 or more, and start is from 1 to limit; these are {self.micro}, {self.every}, "
                f"{start} and {limit}."
            )
        if not self.eta > 0 or not self.growth > 1 or not 0 <= self.beta < 1:
            raise WeftError(
                f"eta is above 0, growth above 1 and beta from 0 to below 1; these are {self.eta}, {self.growth} and "
                f"{self.beta}."
            )

    def _check_size(self) -> None:
        unit = self.micro * self.workers
        if self.size < 2 * self.micro or self.size > self.limit:
            raise WeftError(
                f"A batch from {self.size} to {self.limit} samples cannot be made of micro-batches of {self.micro} on "
                f"{self.workers} processes: noise shows between two micro-batches or more, and batches are multiples "
                f"of {unit}. Raise start and limit, or make micro-batches smaller."
            )


def _square(grad: Tensor) -> Tensor:
    """||grad||^2 as an fp64 scalar, from a norm in fp32 at least."""
    high = torch.promote_types(grad.dtype, torch.float32)
    return torch.linalg.vector_norm(grad.detach(), dtype=high).double().square()
