"""The benchmark of what measures predict: its correlations, its cuts, and the table that is made of them."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from weft.testing_grafts import tiny_decoder

ROOT = Path(__file__).parent.parent


def module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measures() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # as a script finds what lies beside it
        return module_of(ROOT / "benchmarks" / "measures.py")


def test_correlations_are_of_ranks_and_say_when_there_are_too_few(
    measures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "DRAWS", 100)
    x = [float(i) for i in range(12)]
    up = measures.ranked(x, [math.exp(v) for v in x])
    assert up["rho"] == pytest.approx(1) and up["low"] == pytest.approx(1) and up["n"] == 12
    noise = measures.ranked(x, torch.randn(12, generator=torch.Generator().manual_seed(0)).tolist())
    assert noise["low"] < 0 < noise["high"]
    assert math.isnan(measures.ranked([1.0, 2.0, math.nan], [1.0, 2.0, 3.0])["rho"])
    assert math.isnan(measures.ranked([1.0] * 9, x[:9])["rho"]), "a figure that is always the same"
    assert math.isnan(measures.ranked(x[:7], x[:7])["low"]), "of so few a bootstrap is always certain"


def test_cuts_keep_what_they_say(measures: ModuleType) -> None:
    model = tiny_decoder()
    W, cut = measures.cut_matrix(model, "model.layers.0.mlp.up_proj", "svd", 0.25)
    rank = int(torch.linalg.matrix_rank(cut))
    assert 0 < rank * sum(W.shape) <= 0.25 * W.numel() < (rank + 1) * sum(W.shape)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    with measures.replaced(layer, cut):
        assert torch.equal(layer.weight, cut)
    assert torch.equal(layer.weight, before)


def test_the_table_tells_what_is_told_from_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    table = module_of(ROOT / "docs" / "measure_results.py")
    sure, chance = ({"n": 9, "rho": 0.8, "low": low, "high": 0.9} for low in (0.3, -0.1))
    none = {"n": 2, "rho": None, "low": None, "high": None}
    lines = table._table("what happened", {"m": {"predicted_svd": sure, "alpha": chance, "sparsity": none}})
    assert "| predicted | **+0.80 [+0.30, +0.90]** |" in lines and "With what happened (9 of m):" in lines
    assert lines[-1] == "Told from chance on no model: alpha, sparsity."
