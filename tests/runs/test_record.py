"""run.json says everything that a run depended on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

import weft
from weft.files import jsonable
from weft.runs.record import Result, begin


def test_a_record_names_versions_arguments_seed_times_and_metrics(tmp_path: Path) -> None:
    run = begin("compress", {"model": "pico", "out": tmp_path, "dtype": torch.bfloat16}, seed=3, device="cpu")
    record = run.write(tmp_path, {"perplexity": 7.5})
    assert json.loads((tmp_path / "run.json").read_text()) == record
    assert record["command"] == "compress" and record["seed"] == 3 and record["device"] == "cpu"
    assert record["arguments"] == {"model": "pico", "out": str(tmp_path), "dtype": "torch.bfloat16"}
    assert record["versions"]["weft"] == weft.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["metrics"] == {"perplexity": 7.5}
    assert record["started"] <= record["finished"]


def test_beside_a_file_the_record_takes_its_name(tmp_path: Path) -> None:
    begin("inspect", {}).write(tmp_path / "report.html", {})
    assert [p.name for p in tmp_path.iterdir()] == ["report.run.json"]


def test_jsonable_is_strict_json() -> None:
    value = {"a": math.nan, "b": (1, torch.tensor([2.0, math.inf])), 3: Path("x"), "t": True, "n": None}
    assert jsonable(value) == {"a": None, "b": [1, [2.0, None]], "3": "x", "t": True, "n": None}
    json.dumps(jsonable(value), allow_nan=False)


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({"bytes_before": 269_030_016, "bytes": 453_000_000}, "larger than the input: 453.0 MB against 269.0 MB"),
        ({"update_lost": 0.89}, "loses 89% of the adapter's update: write the merged model with --dtype float32"),
        ({"bytes_before": 10, "bytes": 9, "update_lost": 0.01}, ""),
    ],
)
def test_what_asks_for_a_decision_is_said(tmp_path, capsys, metrics, sentence) -> None:
    begin("merge", {}).write(tmp_path, metrics)
    said = capsys.readouterr().err
    assert sentence in said and bool(said) == bool(sentence)


def test_a_result_is_a_dictionary_that_shows_itself() -> None:
    result = Result({"perplexity": 8.3571, "tokens": 12264, "bos": False, "model": "pico"})
    lines = ["perplexity  8.357", "tokens      12,264", "bos         False", "model       'pico'"]
    assert repr(result).splitlines() == lines
    assert json.loads(json.dumps(result)) == result and repr(Result()) == ""
