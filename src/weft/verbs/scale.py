"""Scaling laws: what a published one says, and fits of runs.

run      a law's answer
run_fit  a power law above a floor, fitted to runs in files
runs_of  the runs in a table, in a log of metrics, or in the directories that `weft pretrain` wrote
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import WeftError, nearest
from weft.files import METRICS_FILE
from weft.scaling import LAWS, fit, number
from weft.train.records import records_of

__all__ = ["run", "run_fit", "runs_of"]

QUANTITIES = ("parameters", "tokens", "compute", "bits", "rank", "step")
"""What is fitted where nothing is named: the first two of these that the runs have and that vary."""


def run(law: str, **quantities: str | float | None) -> dict[str, Any]:
    """`weft scale LAW`: what the law says; see `weft.scaling.Law.predict`.

    Raises WeftError for an unknown law, and quantities that are missing or wrong.
    """
    return LAWS.find(law).predict(**quantities)


def run_fit(
    runs: Sequence[str | Path],
    *,
    by: Sequence[str] | None = None,
    loss: str | None = None,
    compute: str | float | None = None,
    delta: float = 1e-3,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """`weft scale fit`: a power law above a floor.

    Args:
        runs: tables (.jsonl, .csv, .tsv, .parquet) with a line a run, or directories that `weft pretrain` wrote.
        by: the quantities that were varied, one or two columns; None: those of `QUANTITIES` that vary.
        loss: the column of the loss; None: "loss", or the logarithm of "perplexity".
        compute: also say how this many floating-point operations are best split, for runs of parameters and tokens.
        delta: see `weft.scaling.fit`; `draws`, `seed` too.

    Raises:
        WeftError: files that cannot be read, columns that are missing, and whatever `weft.scaling.fit` refuses.
    """
    budget = None if compute is None else number(compute, "compute")
    points = [point for path in runs for point in runs_of(Path(path))]
    if not points:
        raise WeftError("There are no runs in what was given: a table needs a line a run.")
    columns = list(by) if by else _varied(points)
    values = {name: [_value(point, name) for _, point in points] for name in columns}
    found = fit(values, [_loss(place, point, loss) for place, point in points], delta=delta, draws=draws, seed=seed)
    said = found.to_dict()
    if any(Path(path).name == METRICS_FILE for path in runs):
        said["cautions"].append("Steps of one run share its schedule: fit the ends of runs of several lengths instead.")
    if budget is not None:
        said["optimum"] = found.optimum(budget)
        if said["optimum"] is None:
            raise WeftError("A split of compute needs runs of parameters and tokens: give --by parameters --by tokens.")
    return said


def runs_of(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, figures by name) of every run of a file or a directory. Raises WeftError where it is neither."""
    if path.is_dir():
        yield str(path), _directory(path)
        return
    if not path.is_file():
        raise WeftError(f"There is no table of runs and no directory {path}.")
    records = records_of(path)
    if records is None:
        raise WeftError(f"{path} is no table of runs: give .jsonl, .csv, .tsv or .parquet, a line a run.")
    for place, record in records:
        if isinstance(record, WeftError):
            raise record
        if not isinstance(record, Mapping):
            raise WeftError(f"{place}: a run is an object of figures, not {type(record).__name__}.")
        yield place, record


def _directory(path: Path) -> Mapping[str, Any]:
    try:
        figures = json.loads((path / "run.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError) as error:
        raise WeftError(f"{path} is no run that weft wrote: its run.json cannot be read ({error}).") from None
    return figures if isinstance(figures, Mapping) else {}


def _varied(points: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The known quantities that every run has and that differ."""
    common = [name for name in QUANTITIES if all(name in point for _, point in points)]
    varied = [name for name in common if len({str(point[name]) for _, point in points}) > 1][:2]
    if not varied:
        raise WeftError(
            f"None of {', '.join(QUANTITIES)} is in every run and varies; name the columns that were varied by --by."
        )
    return varied


def _value(point: Mapping[str, Any], name: str) -> float:
    if name not in point:
        raise WeftError(f"A run has no {name!r}; the nearest of what it has: {', '.join(nearest(name, point))}.")
    return number(point[name], name)


def _loss(place: str, point: Mapping[str, Any], name: str | None) -> float:
    """The loss of a run, in nats."""
    if name is None and "loss" not in point and "perplexity" in point:
        return math.log(max(number(point["perplexity"], f"{place}: perplexity"), 1 + 1e-12))
    key = name or "loss"
    if key not in point:
        raise WeftError(f"{place}: there is no {key!r}; name the column of the loss by --loss, of: {', '.join(point)}.")
    return number(point[key], f"{place}: {key}")
