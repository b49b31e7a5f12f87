"""The conformance suite of measures, for ours and for those of others: `check_measure("farms")` or
`check_measure(MEASURE)` runs every property on a tiny Llama.

    record         what it looks at, its paper and its cost are said, and how each figure reads
    complete       its figures are those that it says, and numbers
    deterministic  the same again gives the same
    inspected      `weft.inspect` takes it, leaves the model as it was, and writes a page that explains each figure
    refused        without what it looks at it is refused in one sentence
    options        each option is one that its function takes
"""

from __future__ import annotations

import copy
import inspect as signatures
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures import MEASURES, Measure
from weft.testing_grafts import tiny_decoder
from weft.verbs.inspect import Report, inspect

__all__ = ["PROPERTIES", "check_measure", "texts"]


def check_measure(measure: str | Measure) -> None:
    """Run every property on a measure.

    Raises:
        AssertionError: a property does not hold; its name is in the message.
    """
    chosen = MEASURES.find(measure)
    for name, check in PROPERTIES.items():
        try:
            check(chosen)
        except AssertionError as error:
            raise AssertionError(f"{chosen.name}: the property {name!r} does not hold: {error}") from error


def texts(count: int = 3, length: int = 24) -> list[dict[str, Tensor]]:
    """Batches of one text of random tokens; the last text is padded."""
    ids = torch.randint(3, 32, (count, length), generator=torch.Generator().manual_seed(0))
    masks = torch.ones_like(ids)
    masks[-1, length // 2 :] = 0
    return [{"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, masks, strict=True)]


def _taken(measure: Measure, model: nn.Module | None = None) -> Report:
    model = tiny_decoder() if model is None else model
    other = copy.deepcopy(model) if measure.pair else None
    for i, p in enumerate(other.parameters() if other is not None else ()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        p.data += 0.1 * p.data.std().nan_to_num() * noise
    batches: Sequence[Any] = texts() if measure.data else ()
    return inspect(model, "*layers*", measures=[measure], batches=batches, against=other)


def _record(measure: Measure) -> None:
    said = measure.record()
    assert all(said[key] for key in ("summary", "paper", "looks_at", "cost", "reads")), f"something is empty: {said}"
    assert all(words for words in said["reads"].values()), "a figure without a reading"
    assert not measure.needs or measure.of == "input", "only a measure of inputs is given statistics"


def _complete(measure: Measure) -> None:
    report = _taken(measure)
    found = {key for matrix in report.matrices for key in matrix.figures}
    assert found == set(measure.reads), f"of matrices {sorted(found)}, said {sorted(measure.reads)}"
    assert set(report.figures) == set(measure.reads_model), f"of the model {sorted(report.figures)}"
    values = [x for row in (report.figures, *(m.figures for m in report.matrices)) for x in row.values()]
    assert values and all(isinstance(x, int | float) and x == x for x in values), "a figure that is no number"


def _deterministic(measure: Measure) -> None:
    first, second = _taken(measure), _taken(measure)
    assert first.figures == second.figures, "other figures of the model"
    assert [m.figures for m in first.matrices] == [m.figures for m in second.matrices], "other figures of a matrix"


def _inspected(measure: Measure) -> None:
    model = tiny_decoder().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = _taken(measure, model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the weights changed"
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters()), "its mode changed"
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks, "a hook is left"
    with tempfile.TemporaryDirectory() as folder:
        report.save(Path(folder) / "page.html")
        page = (Path(folder) / "page.html").read_text(encoding="utf-8")
    assert all(key.replace("_", " ") in page for key in (*measure.reads, *measure.reads_model)), "not on the page"


def _refused(measure: Measure) -> None:
    for lacks in {"data": measure.data, "pair": measure.pair}.items():
        if not lacks[1]:
            continue
        try:
            inspect(tiny_decoder(), measures=[measure])
        except WeftError as error:
            words = str(error)
            assert "\n" not in words and measure.name in words, f"not one sentence that names it: {words}"
            assert ("--data" if lacks[0] == "data" else "--against") in words, f"it does not say what to give: {words}"
        else:
            raise AssertionError(f"taken without {lacks[0]}")


def _options(measure: Measure) -> None:
    taken = signatures.signature(measure.value).parameters
    assert all(name in taken for name in measure.defaults), "an option that the function has not"
    own = {name for name, p in taken.items() if p.kind is p.KEYWORD_ONLY}
    assert own == set(measure.defaults), f"options {sorted(own)}, defaults {sorted(measure.defaults)}"


PROPERTIES: Mapping[str, Callable[[Measure], None]] = {
    "record": _record,
    "complete": _complete,
    "deterministic": _deterministic,
    "inspected": _inspected,
    "refused": _refused,
    "options": _options,
}
