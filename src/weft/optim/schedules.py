"""Learning-rate schedules as factors of the peak rate, step -> factor; steps count from 0.

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(10_000, warmup=1_000))

They are plain functions, so a scheduler's state_dict holds numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from weft.errors import WeftError

__all__ = ["Schedule", "constant", "cosine", "restarted", "wsd"]

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """1, after a linear warm-up whose first step has factor 1 / warmup."""
    return lambda step: _ramp(step, warmup)


def cosine(steps: int, warmup: int = 0, floor: float = 0.1) -> Schedule:
    """Linear warm-up, then half a cosine from 1 to `floor` (GaLore's pre-training recipe: 10 % warm-up, floor 0.1)."""
    _check(steps, warmup, 0, floor)

    def factor(step: int) -> float:
        if step < warmup:
            return _ramp(step, warmup)
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def wsd(steps: int, warmup: int = 0, decay: int = 0, floor: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: 1 until the last `decay` steps, then 1 - sqrt(progress) down to `floor`.

    Source: Hu et al., 2024, arXiv 2404.06395; the shape of the decay from Haegele et al., 2024, arXiv 2405.18392.
    """
    _check(steps, warmup, decay, floor)

    def factor(step: int) -> float:
        progress = min(max(step - (steps - decay), 0) / max(decay, 1), 1.0)
        return _ramp(step, warmup) * (floor + (1.0 - floor) * (1.0 - math.sqrt(progress)))

    return factor


def restarted(schedule: Schedule, every: int, warmup: int) -> Schedule:
    """`schedule`, warmed up again over `warmup` steps from each multiple of `every`: when a subspace is chosen anew.

    Moments that belong to the old subspace, or were set to zero, are then not trusted with full steps (ReLoRA's jagged
    schedule; Lialin et al., 2023, arXiv 2307.05695). The first `every` steps are left to the schedule's own warm-up.
    """
    if every < 1 or not 0 <= warmup <= every:
        raise WeftError(f"A restart every {every} steps with {warmup} steps of warm-up is impossible; warmup <= every.")
    return lambda step: schedule(step) * (1.0 if step < every else _ramp(step % every, warmup))


def _ramp(step: int, warmup: int) -> float:
    return min((step + 1) / warmup, 1.0) if warmup > 0 else 1.0


def _check(steps: int, warmup: int, decay: int, floor: float) -> None:
    if steps < 1 or warmup < 0 or decay < 0 or warmup + decay > steps or not 0.0 <= floor <= 1.0:
        raise WeftError(
            f"{warmup} steps of warm-up and {decay} of decay do not fit into {steps} steps with a floor of {floor}; "
            "warmup + decay <= steps and 0 <= floor <= 1."
        )
