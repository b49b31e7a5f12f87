"""Shrink a model: a smaller plain one of the same class, all blocks cut alike.

done = shrink(model, "minitron", budget=0.7, batches=batches)
done.model.save_pretrained("smaller")

`weft compress MODEL -o OUT --method minitron` does it; `weft finetune OUT --method full --teacher MODEL` teaches it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from weft.allocate import Budget
from weft.errors import WeftError
from weft.files import write_json
from weft.io.precision import note_as, saved_size
from weft.methods import METHODS, Method
from weft.runs.output import Workplace
from weft.stats.calibrate import Batch
from weft.terms.adapters import adapters_of
from weft.terms.units import Kept
from weft.verbs.evaluate import model_size

__all__ = ["Shrunk", "check_shrinks", "shrink", "shrinks", "shrunk"]


@dataclass(frozen=True)
class Shrunk:
    """The smaller model, and the units of the given one that it has."""

    model: Any
    kept: Kept

    def save(self, path: Path) -> None:
        """Write what was kept as JSON."""
        lists = {axis: [t.tolist() for t in getattr(self.kept, axis)] for axis in ("heads", "neurons")}
        own = {"blocks": self.kept.blocks.tolist(), "channels": self.kept.channels.tolist()}
        write_json(path, {**own, **lists})


def shrink(
    model: Any,
    method: str | Method = "minitron",
    *,
    budget: str | float | Budget | None = None,
    batches: Sequence[Batch] = (),
    progress: Path | None = None,
    **options: Any,
) -> Shrunk:
    """A smaller plain model; the given one is not touched.

    Args:
        model: a transformers model of Llama's blocks, with plain weights.
        method: a name of `weft.methods()` of kind "prune" that makes a model, or a `Method`.
        budget: what is kept: a share of all the model's numbers, or a size ("500MB"); None: 0.6.
        batches: calibration batches; `weft.train.windows` makes them.
        progress: a directory for what was found so far, from which an interrupted call goes on to the same bits.
        options: the method's own hyperparameters.

    Raises:
        WeftError: an unknown method or option, no batches, adapters on the model, a budget in bits or below reach, or
            blocks of other layers.
    """
    found = METHODS.find(method, "prune")
    if found.shrink is None:
        raise WeftError(f"{found.name} makes no model of its own; give minitron.")
    data = list(batches)
    if not data:
        raise WeftError(f"The method {found.name!r} needs calibration text; give batches.")
    if adapters_of(model):
        raise WeftError("There are adapters on this model; merge or remove them first, then shrink.")
    most = _numbers(model, Budget.parse(0.6 if budget is None else budget))
    made, kept = found.shrink(model, data, most, progress, **found.options(options))
    note_as(made, model)
    return Shrunk(made, kept)


def _numbers(model: Any, budget: Budget) -> int:
    numbers, nbytes = saved_size(model)
    if budget.unit == "bits":
        raise WeftError("A smaller plain model has no bits to choose; give a share of it (0.6), or a size (500MB).")
    return int((budget.value if budget.unit == "share" else min(budget.value / nbytes, 1)) * numbers + 1e-6)


def shrunk(
    source: PreTrainedModel,
    method: Method,
    budget: Any,
    data: Sequence[Batch],
    place: Workplace,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The smaller model and what is said of it, its units written beside it: the work of `weft compress`."""
    started, before = time.perf_counter(), model_size(source)
    done = shrink(source, method, budget=budget, batches=data, progress=place.progress, **options)
    done.save(place.path / "kept.json")
    after = model_size(done.model)
    sizes = {"parameters_before": before[0], "parameters": after[0], "bytes_before": before[1], "bytes": after[1]}
    share = after[0] / before[0]
    return done.model, {**sizes, "share_kept": share, **done.kept.counts, "seconds": time.perf_counter() - started}


def shrinks(method: str | Method) -> Method | None:
    """The method of that name, if it makes a smaller plain model."""
    found = method if isinstance(method, Method) else METHODS.known(str(method))
    return found if found is not None and found.shrink is not None else None


def check_shrinks(method: Method, options: Mapping[str, Any], budget: Any, given: Mapping[str, Any]) -> None:
    """Raises WeftError for options that there are not, and for arguments of `compress` that have no meaning here."""
    method.options(options)
    if budget is not None:
        Budget.parse(budget)
    strange = next((name for name, value in given.items() if value), None)
    if strange is not None:
        raise WeftError(f"{method.name} cuts the whole model alike; leave --{strange.replace('_', '-')} out.")
