"""The exponent of a power-law tail: density ~ x^-alpha for x >= xmin.

    alpha = 1 + m / sum_j ln(x_j / xmin)   over the m values from xmin on             (Hill, 1975: maximum likelihood)

Where the tail begins is a choice: "middle" takes the median value, "peak" the best of the values near the peak of the
histogram of log10 x, and "any" the best of all (Clauset, Shalizi and Newman, 2009), best by the Kolmogorov-Smirnov
distance of the tail to its fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import WeftError

__all__ = ["tail_exponent"]

_BINS = 100
_LEAST = 2  # values that a tail is fitted to at least
_CANDIDATES = 2000  # of the start of a tail


def tail_exponent(values: Tensor, start: str = "peak") -> float:
    """alpha of the tail of positive values (n,), in fp64; NaN where they are fewer than two or all the same.

    Raises ValueError for another `start`.
    """
    x = values.double().flatten().sort().values
    x = x[x > 0]
    if start not in ("middle", "peak", "any"):
        raise WeftError(f"A tail starts at the 'middle', the 'peak' or 'any' value, not at {start!r}")
    if x.numel() < _LEAST or x[0] == x[-1]:
        return float("nan")
    logs = x.log()
    sums = logs.flip(0).cumsum(0).flip(0)  # over the tail from each value on
    sizes = torch.arange(x.numel(), 0, -1, dtype=x.dtype, device=x.device)
    alphas = 1 + sizes / (sums - sizes * logs)
    if start == "middle":
        return float(alphas[x.numel() // 2])
    candidates = torch.arange(x.numel() - _LEAST + 1, device=x.device)
    if start == "peak":
        low, high = _peak(logs)
        near = candidates[(x[candidates] >= low) & (x[candidates] <= high)]
        candidates = near if near.numel() else candidates
    candidates = candidates[torch.isfinite(alphas[candidates])]
    if not candidates.numel():
        return float("nan")
    step = -(-candidates.numel() // _CANDIDATES)
    distances = torch.stack([_distance(logs[i:] - logs[i], float(alphas[i])) for i in candidates[::step]])
    return float(alphas[candidates[::step][distances.argmin()]])


def _peak(logs: Tensor) -> tuple[float, float]:
    """Values from just below to half beyond the fullest of 100 bins of log10 x (WeightWatcher's xmin_peak)."""
    tens = logs / torch.log(torch.tensor(10.0, dtype=logs.dtype))
    low, high = float(tens[0]), float(tens[-1])
    counts = torch.histc(tens.cpu(), _BINS, low, high)
    edge = 10 ** (low + (high - low) / _BINS * int(counts.argmax()))
    return 0.95 * edge, 1.5 * edge


def _distance(logs: Tensor, alpha: float) -> Tensor:
    """The Kolmogorov-Smirnov distance of a tail, as logarithms of x / xmin, to the power law."""
    below = torch.arange(logs.numel(), dtype=logs.dtype, device=logs.device) / logs.numel()
    return (below - 1 + torch.exp((1 - alpha) * logs)).abs().amax()
