"""What moving a cut model is measured by: a loop over positions as the oracle; finished measurements are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.stats.models import batches, build, ids
from weft.errors import WeftError
from weft.methods import METHODS
from weft.runs.pieces import Store
from weft.terms.layers import linear_layers
from weft.verbs import divergence as measuring
from weft.verbs.compress import compress
from weft.verbs.divergence import divergence
from weft.verbs.survey import Plan, offered, survey


def surveyed(
    data: Sequence[dict[str, Tensor]], store: Store
) -> tuple[nn.Module, tuple[str, ...], Callable[[Sequence[Any]], list[float]]]:
    model = build("llama")
    layers = tuple(linear_layers(model))
    plan = Plan(method=METHODS["svd"], options={}, layers=layers, reads=("spectrum", "divergence"))
    survey(model, plan, offered(model, plan), data, None, store)
    return model, layers, divergence(model, plan, data, store)


def test_it_is_the_mean_over_the_later_positions_that_are_not_masked() -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    data = [{"input_ids": ids(2, 12, 1), "attention_mask": mask}, {"input_ids": ids(2, 12, 2)}]
    model, layers, measure = surveyed(data, Store())
    cut = {layers[0]: 2, layers[5]: 3, layers[1]: None}
    before = copy.deepcopy(model)
    (found,) = measure([cut])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))

    compress(model, "svd", allocate={name: cut.get(name) for name in layers})
    values = []
    with torch.no_grad():
        for batch in data:
            z, other = (m(**batch).logits.double() for m in (before, model))
            for row in range(2):
                for position in range(6, 12):
                    if batch.get("attention_mask", torch.ones(2, 12))[row, position]:
                        p, q = ((t[row, position] / 0.6).softmax(-1) for t in (z, other))
                        values.append(float((p * (p / q).log()).sum()))
    assert len(values) == 21
    assert found == pytest.approx(sum(values) / 21, rel=1e-4)


def test_long_windows_count_from_position_256_on() -> None:
    logits = torch.randn(1, 600, 5, generator=torch.Generator().manual_seed(0))

    class Fixed(nn.Module):
        def forward(self, **batch: Tensor) -> Any:
            return type("Output", (), {"logits": logits})()

    kept = measuring._predictions(Fixed(), {"input_ids": torch.zeros(1, 600, dtype=torch.int64)})
    assert torch.equal(kept, logits[0, 256:])


def test_a_cut_of_nothing_moves_nothing_and_a_deeper_one_moves_more() -> None:
    _, layers, measure = surveyed(batches("llama"), Store())
    nothing, little, much = measure([{layers[0]: None}, {layers[6]: 8}, {layers[6]: 1}])
    assert nothing == pytest.approx(0, abs=1e-6) and 0 < little < much


@pytest.mark.parametrize(("rows", "count"), [(4, 1), (1, 4), (2, 2), (8, 1)])
def test_about_four_windows_are_taken_evenly(rows: int, count: int) -> None:
    data = [{"input_ids": torch.full((rows, 3), i)} for i in range(8)]
    taken = [int(batch["input_ids"][0, 0]) for batch in measuring.spread(data)]
    assert len(taken) == count and taken == [(2 * i + 1) * 8 // (2 * count) for i in range(count)]


def test_few_layers_are_held_cut_at_a_time() -> None:
    assert measuring._groups([(i, 1) for i in range(10)]) == [list(range(8)), [8, 9]]
    assert measuring._groups([(0, 1), (1, 56), (2, 56), (3, 4), (4, 4)]) == [[0], [1], [2], [3, 4]]


def test_an_interrupted_measurement_goes_on_from_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches("llama")
    whole = build("llama")
    expected = compress(whole, "svd-llm", budget=0.5, allocate="lems", batches=data)

    real, calls = measuring._predictions, [0]

    def counted(*args: Any) -> Tensor:
        calls[0] += 1
        return real(*args)

    def interrupted(*args: Any) -> Tensor:
        if calls[0] == 12:
            raise KeyboardInterrupt
        return counted(*args)

    model = build("llama")
    monkeypatch.setattr(measuring, "_predictions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, "svd-llm", budget=0.5, allocate="lems", batches=data, progress=tmp_path)
    assert not [m for m in model.modules() if type(m).__name__ == "SumLinear"]  # what was cut is put back
    first = calls[0]
    monkeypatch.setattr(measuring, "_predictions", counted)
    done = compress(model, "svd-llm", budget=0.5, allocate="lems", batches=data, progress=tmp_path)
    a, b = whole.state_dict(), model.state_dict()
    assert dict(done.allocation) == dict(expected.allocation) and all(torch.equal(a[key], b[key]) for key in a)

    total = calls[0]
    compress(build("llama"), "svd-llm", budget=0.5, allocate="lems", batches=data, progress=tmp_path)
    assert first == 12 and calls[0] == total  # all of it was there


def test_progress_is_shown() -> None:
    seen: list[str] = []

    def track(items: Any, what: str) -> Any:
        seen.append(what)
        return items

    compress(build("llama"), "svd-llm", budget=0.5, allocate="lems", batches=batches("llama"), track=track)
    assert "measuring" in seen


def test_without_text_and_for_a_compensation_it_is_refused() -> None:
    with pytest.raises(WeftError, match="needs calibration text here; give batches"):
        compress(build("llama"), "svd", budget=0.5, allocate="lems")
    with pytest.raises(WeftError, match="says nothing of what eora brings back; give allocate='best' or 'equal'"):
        compress(build("llama"), ["nf3", "eora"], budget="5 bits", allocate="lems", batches=batches("llama"))
