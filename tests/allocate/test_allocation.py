"""Budgets, and the file that says what is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.allocate import Allocation, Budget, Choice, LayerInfo, Shape
from weft.errors import WeftError
from weft.methods.base import low_rank_sizes


@pytest.mark.parametrize(
    "text, value, unit",
    [
        (0.6, 0.6, "share"),
        ("0.6", 0.6, "share"),
        (" .6 ", 0.6, "share"),
        ("60%", 0.6, "share"),
        ("62.5 %", 0.625, "share"),
        (1, 1.0, "share"),
        ("1.", 1.0, "share"),
        ("3.5 bits", 3.5, "bits"),
        ("3bits", 3, "bits"),
        ("1 bit", 1, "bits"),
        ("500MB", 500e6, "bytes"),
        ("500 mb", 500e6, "bytes"),
        ("1.5GB", 1.5e9, "bytes"),
        ("2GiB", 2 * 1024**3, "bytes"),
        ("8kib", 8 * 1024, "bytes"),
        ("1TB", 1e12, "bytes"),
        ("12345B", 12345, "bytes"),
        (Budget(0.3), 0.3, "share"),
    ],
)
def test_budgets_that_are_read(text: Any, value: float, unit: str) -> None:
    budget = Budget.parse(text)
    assert budget.value == pytest.approx(value) and budget.unit == unit
    again = Budget.parse(str(budget))
    assert again.value == pytest.approx(value) and again.unit == unit


@pytest.mark.parametrize("text", ["", "half", "0.6.1", "-0.5", "5XB", "500iB", "nan", "1e-1", "MB", "0,6", None])
def test_budgets_that_are_no_number(text: Any) -> None:
    sentence = f"The budget {text!r} is no share and no size; give what to keep, as 0.6, 60%, '3.5 bits' or 500MB."
    with pytest.raises(WeftError) as error:
        Budget.parse(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize("text", ["0", 0.0, "1.5", 60, "101%", "0%"])
def test_shares_out_of_range(text: Any) -> None:
    with pytest.raises(WeftError, match="is out of range: it is the share of parameters kept, above 0 and at most 1"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0 bits", "65bits"])
def test_bits_out_of_range(text: str) -> None:
    with pytest.raises(WeftError, match="is out of range: it is the mean bits a weight"):
        Budget.parse(text)


def test_a_share_is_of_the_matrices() -> None:
    assert Budget(0.29).allowed([Shape(10, 10, 1)], other_bytes=10**9) == 29
    assert Budget(1.0).allowed([Shape(10, 10, 2)], other_bytes=0) == 200


def test_bits_are_of_the_weights() -> None:
    assert Budget(3.0, "bits").allowed([Shape(10, 10, 2), Shape(5, 4, 4)], other_bytes=10**9) == 45
    assert Budget(64.0, "bits").allowed([Shape(10, 10, 2)], other_bytes=0) == 200


def test_a_size_is_of_the_whole_model() -> None:
    shapes = [Shape(10, 10), Shape(5, 20)]
    assert Budget(1000.0, "bytes").allowed(shapes, other_bytes=600) == 400
    assert Budget(1e9, "bytes").allowed(shapes, other_bytes=600) == 800
    with pytest.raises(
        WeftError, match=r"budget of 0\.000601MB is below what cannot be compressed.*take 0\.06MB; give a"
    ):
        Budget(601.0, "bytes").allowed(shapes, other_bytes=60000)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 50))
def test_factors_are_always_smaller_than_the_matrix(out: int, inn: int, rank: int) -> None:
    shape = Shape(out, inn, 2)
    sizes = low_rank_sizes(shape, {})
    assert [r for r, _ in sizes] == list(range(1, len(sizes) + 1))
    assert all(nbytes == 2 * r * (out + inn) < shape.nbytes for r, nbytes in sizes)
    assert 2 * (len(sizes) + 1) * (out + inn) >= shape.nbytes
    layer = LayerInfo(shape, [*(Choice(*size) for size in sizes), Choice(None, shape.nbytes)])
    found = layer.at_rank(rank)
    if found.size is None:
        assert max(rank, 1) > len(sizes)
    else:
        assert found.size == max(rank, 1)


def example() -> Allocation:
    choices = {"a": Choice(3, 90, method="svd"), "b": Choice(None, 64)}
    return Allocation(choices, {"a": Shape(10, 20, 1), "b": Shape(8, 8, 1)}, "0.6", "best", 160, {"round": 1})


def test_an_allocation_says_exactly_what_it_spends() -> None:
    allocation = example()
    assert allocation["a"] == 3 and dict(allocation) == {"a": 3, "b": None} and len(allocation) == 2
    assert allocation.spent == 3 * 30 + 64 and allocation.total == 264
    record = allocation.record()
    assert record["bytes"] == {"dense": 264, "allowed": 160, "spent": 154}
    assert record["share_spent"] == 154 / 264
    assert record["bits_per_weight"] == 8 * 154 / 264
    assert record["layers"] == {
        "a": {"size": 3, "method": "svd", "bytes": 90, "shape": [10, 20]},
        "b": {"size": "dense", "bytes": 64, "shape": [8, 8]},
    }


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    example().save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == example()


def edited(tmp_path: Path, change: Any) -> Path:
    example().save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    change(record)
    (tmp_path / "a.json").write_text(json.dumps(record))
    return tmp_path / "a.json"


def test_sizes_edited_by_hand_are_taken(tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["layers"]["a"]["size"] = "dense"
        record["layers"]["b"]["size"] = 2

    assert dict(Allocation.load(edited(tmp_path, change))) == {"a": None, "b": 2}


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    layers = {"a": {"rank": 3, "shape": [10, 20]}, "b": {"rank": "dense", "shape": [8, 8]}}
    (tmp_path / "a.json").write_text(json.dumps({"parameters": {"allowed": 9}, "layers": layers}))
    assert dict(Allocation.load(tmp_path / "a.json")) == {"a": 3, "b": None}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"layers": []}', '{"layers": {"a": {}}}', "3", "null",
                                     '{"layers": {"a": {"rank": 1, "shape": [2]}}}'])  # fmt: skip
def test_files_that_are_no_allocation(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(WeftError, match=r"a\.json is not an allocation file \(.*weft compress writes one beside"):
        Allocation.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="No such file"):
        Allocation.load(tmp_path / "none.json")
