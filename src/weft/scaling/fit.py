"""A power law above a floor, fitted to runs, with intervals.

    L(x_1, ..., x_k) = E + sum_i A_i / x_i^a_i                       one quantity: E + (x0 / x)^a,  x0 = A^(1 / a)
    minimise sum over runs of Huber_delta(ln L_predicted - ln L)     over ln E, ln A_i, ln a_i; delta = 1e-3

The form is that of Hestness et al. (2017, arXiv 1712.00409), Henighan et al. (2020, arXiv 2010.14701) and, for two
quantities, Hoffmann et al. (2022, arXiv 2203.15556), whose objective this is. Intervals come from a bootstrap over runs
with expanded percentiles (Hesterberg, 2015, The American Statistician 69, 371-386), since plain ones are too narrow for
a dozen runs.

Deviations: minimised by a trust region with exact derivatives from a grid of starts, not by L-BFGS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Fit", "fit"]

LEVEL = 0.95
_EXPONENTS = (0.01, 5.0)


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        floor: E, the loss that no amount of the quantities goes below.
        coefficients: A by quantity.
        exponents: a by quantity.
        intervals: 95 % intervals of "floor" and of "NAME" (its exponent).
        error: root mean square of the residuals, a share of the loss.
        held_out: error of the largest run's loss as predicted from all others, a share; None where too few are left.
        runs: how many were fitted.
        cautions: sentences on what the runs cannot tell.
    """

    floor: float
    coefficients: Mapping[str, float]
    exponents: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    error: float
    held_out: float | None
    runs: int
    cautions: tuple[str, ...] = ()

    def predict(self, **at: float) -> float:
        """The loss at these quantities."""
        return self.floor + sum(a / at[name] ** self.exponents[name] for name, a in self.coefficients.items())

    def optimum(self, compute: float) -> dict[str, float] | None:
        """Parameters and tokens of least loss at `compute` = 6 parameters tokens; None for another pair."""
        if set(self.exponents) != {"parameters", "tokens"}:
            return None
        (A, a), (B, b) = ((self.coefficients[n], self.exponents[n]) for n in ("parameters", "tokens"))
        parameters = (a * A / (b * B)) ** (1 / (a + b)) * (compute / 6) ** (b / (a + b))
        return {"parameters": parameters, "tokens": compute / 6 / parameters}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        one = next(iter(self.exponents)) if len(self.exponents) == 1 else None
        x0 = {"x0": self.coefficients[one] ** (1 / self.exponents[one])} if one else {}
        return {
            "floor": self.floor,
            "coefficients": dict(self.coefficients),
            "exponents": dict(self.exponents),
            **x0,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "error": self.error,
            "held_out": self.held_out,
            "runs": self.runs,
            "cautions": list(self.cautions),
        }


def fit(
    quantities: Mapping[str, Sequence[float]],
    loss: Sequence[float],
    *,
    delta: float = 1e-3,
    draws: int = 200,
    seed: int = 0,
) -> Fit:
    """Fit a power law above a floor.

    Args:
        quantities: what was varied, by name, a value a run: tokens, parameters, compute, bits ...; one or two of them.
        loss: of every run, in nats.
        delta: where the Huber loss turns from square to linear, in ln L.
        draws: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap.

    Raises:
        WeftError: too few runs, a quantity that does not vary, values that are not positive, a loss that does not fall.

    Example:
        >>> tokens = [10.0**k for k in range(6, 12)]
        >>> law = weft.scaling.fit({"tokens": tokens}, [2 + 50 / x**0.3 for x in tokens], draws=0)
        >>> round(law.floor, 3), round(law.exponents["tokens"], 3)
        (2.0, 0.3)
    """
    import numpy as np

    names = list(quantities)
    X, y = _logs(quantities, loss)
    center = X.mean(0)
    best = _best(X - center, y, delta)
    residuals = y - _predicted(best, X - center)[0]
    coefficients, exponents = _constants(best, center, names)
    cautions = _cautions(names, X, y, math.exp(best[0]))
    return Fit(
        floor=math.exp(best[0]),
        coefficients=coefficients,
        exponents=exponents,
        intervals=_intervals(names, X - center, y, best, delta, draws, seed) if draws else {},
        error=float(np.sqrt(np.mean(residuals**2))),
        held_out=_held_out(X, y, delta),
        runs=len(y),
        cautions=tuple(cautions),
    )


def _logs(quantities: Mapping[str, Sequence[float]], loss: Sequence[float]) -> tuple[Array, Array]:
    """ln x (runs, k) and ln L (runs,), checked."""
    import numpy as np

    columns = [np.asarray(values, dtype=np.float64) for values in quantities.values()]
    values = np.asarray(loss, dtype=np.float64)
    if not columns or any(len(column) != len(values) for column in columns):
        raise WeftError("Give at least one quantity, and for each run its value and the loss.")
    need = 2 * len(columns) + 2
    if len(values) < need:
        raise WeftError(f"{len(values)} runs are too few: {len(columns)} quantities ask for {need} at least.")
    for name, column in [*zip(quantities, columns, strict=True), ("loss", values)]:
        if not (np.isfinite(column).all() and (column > 0).all()):
            raise WeftError(f"Every {name} must be a positive number; one of them is not.")
    X, y = np.log(np.stack(columns, 1)), np.log(values)
    for i, name in enumerate(quantities):
        if np.unique(X[:, i]).size < 3:
            raise WeftError(f"{name} takes fewer than three values: nothing can be fitted to it.")
    slope = np.linalg.lstsq(np.column_stack([X - X.mean(0), np.ones(len(y))]), y, rcond=None)[0]
    for name, s in zip(quantities, slope[:-1], strict=True):
        if s >= 0:
            raise WeftError(
                f"The loss does not fall with {name}: no power law can be fitted. Are these runs comparable?"
            )
    return X, y


def _predicted(theta: Array, X: Array) -> tuple[Array, Array]:
    """ln L (runs,) and the share of each part of the sum in L (runs, 1 + k)."""
    import numpy as np

    k = X.shape[1]
    parts = np.concatenate([np.full((len(X), 1), theta[0]), theta[1 : 1 + k] - np.exp(theta[1 + k :]) * X], axis=1)
    largest = parts.max(1, keepdims=True)
    shares = np.exp(parts - largest)
    total = shares.sum(1, keepdims=True)
    return (largest + np.log(total))[:, 0], shares / total


def _jacobian(theta: Array, X: Array) -> Array:
    """d ln L / d theta (runs, 1 + 2 k)."""
    import numpy as np

    _, shares = _predicted(theta, X)
    return np.concatenate([shares, -shares[:, 1:] * X * np.exp(theta[1 + X.shape[1] :])], axis=1)


def _minimum(
    X: Array, y: Array, start: Array, delta: float, tolerance: float = 1e-12, most: int = 300
) -> tuple[float, Array]:
    """The objective and the constants of the minimum that lies nearest to the start."""
    import numpy as np
    from scipy.optimize import least_squares

    k = X.shape[1]
    low = np.concatenate([np.full(1 + k, -60.0), np.full(k, math.log(_EXPONENTS[0]))])
    high = np.concatenate([np.full(1 + k, 60.0), np.full(k, math.log(_EXPONENTS[1]))])
    found = least_squares(
        lambda theta: _predicted(theta, X)[0] - y, start, lambda theta: _jacobian(theta, X), bounds=(low, high),
        loss="huber", f_scale=delta, x_scale="jac", xtol=tolerance, ftol=tolerance, gtol=tolerance, max_nfev=most,
    )  # fmt: skip
    return float(found.cost), found.x


def _best(X: Array, y: Array, delta: float) -> Array:
    """The best minimum from a grid of starts: floors below the least loss, and exponents."""
    import numpy as np

    k, found = X.shape[1], []
    for share, exponents in itertools.product((0.1, 0.5, 0.9), itertools.product((0.1, 0.3, 0.8), repeat=k)):
        floor = y.min() + math.log(share)
        part = math.log(np.exp(y).mean() - math.exp(floor)) - math.log(k)
        start = np.concatenate([[floor], np.full(k, part), np.log(exponents)])
        found.append(_minimum(X, y, start, delta, 1e-6, 100))
    return _minimum(X, y, min(found, key=lambda pair: pair[0])[1], delta)[1]


def _constants(theta: Array, center: Array, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    k = len(names)
    exponents = {name: math.exp(theta[1 + k + i]) for i, name in enumerate(names)}
    coefficients = {n: math.exp(theta[1 + i] + exponents[n] * center[i]) for i, n in enumerate(names)}
    return coefficients, exponents


def _intervals(
    names: Sequence[str], X: Array, y: Array, best: Array, delta: float, draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Expanded percentiles of the floor and the exponents over draws of the runs with replacement."""
    import numpy as np
    from scipy.stats import norm, t

    runs, count = len(y), len(best)
    random = np.random.default_rng(seed)
    found: list[Array] = []
    while len(found) < draws:
        chosen = random.integers(0, runs, runs)
        if np.unique(chosen).size > count:
            found.append(_minimum(X[chosen], y[chosen], best, delta, 1e-6, 60)[1])
    if runs <= count:
        return {}
    tail = norm.cdf(-math.sqrt(runs / (runs - count)) * t.ppf((1 + LEVEL) / 2, runs - count))
    low, high = np.exp(np.quantile(np.stack(found), [tail, 1 - tail], axis=0))
    k = len(names)
    pairs = {"floor": 0, **{name: 1 + k + i for i, name in enumerate(names)}}
    return {name: (float(low[i]), float(high[i])) for name, i in pairs.items()}


def _held_out(X: Array, y: Array, delta: float) -> float | None:
    """The error of the largest run's loss when it is left out."""
    largest = int(X.sum(1).argmax())
    rest = [i for i in range(len(y)) if i != largest]
    if len(rest) < 2 * X.shape[1] + 2:
        return None
    center = X[rest].mean(0)
    said = _predicted(_best(X[rest] - center, y[rest], delta), X[largest : largest + 1] - center)[0][0]
    return float(math.exp(said - y[largest]) - 1)


def _cautions(names: Sequence[str], X: Array, y: Array, floor: float) -> list[str]:
    found = []
    for i, name in enumerate(names):
        decades = float(X[:, i].max() - X[:, i].min()) / math.log(10)
        if decades < 2:
            found.append(
                f"{name} spans {decades:.1f} decades: below two, the floor and the exponent cannot be told apart well."
            )
    if floor < 0.05 * math.exp(y.min()):
        found.append("No floor is seen within these runs: what lies far beyond them is not known.")
    return found
