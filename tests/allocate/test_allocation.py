"""Budgets, and the file that says what is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.allocate import Allocation, Budget, LayerInfo
from weft.allocate.base import check_ranks, dense_or, rank_limit, spend
from weft.errors import WeftError


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
    sentence = f"The budget {text!r} is no share and no size; give what to keep, as 0.6, 60% or 500MB."
    with pytest.raises(WeftError) as error:
        Budget.parse(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize("text", ["0", 0.0, "1.5", 60, "101%", "0%"])
def test_shares_out_of_range(text: Any) -> None:
    with pytest.raises(WeftError, match="is out of range: it is the share of parameters kept, above 0 and at most 1"):
        Budget.parse(text)


def test_a_share_is_of_the_matrices() -> None:
    layers = {"a": LayerInfo((10, 10))}
    assert Budget(0.29).parameters(layers, other_bytes=10**9, itemsize=4) == 29
    assert Budget(1.0).parameters(layers, other_bytes=0, itemsize=2) == 100


def test_a_size_is_of_the_whole_model() -> None:
    layers = {"a": LayerInfo((10, 10)), "b": LayerInfo((5, 20))}
    assert Budget(1000.0, "bytes").parameters(layers, other_bytes=600, itemsize=4) == 100
    assert Budget(1e9, "bytes").parameters(layers, other_bytes=600, itemsize=4) == 200
    with pytest.raises(
        WeftError, match=r"budget of 0\.000601MB is below what cannot be compressed.*take 0\.06MB; give a"
    ):
        Budget(601.0, "bytes").parameters(layers, other_bytes=60000, itemsize=4)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 50), st.integers(1, 8))
def test_factors_are_always_smaller_than_the_matrix(out: int, inn: int, rank: int, multiple: int) -> None:
    layer = LayerInfo((out, inn))
    limit = rank_limit(layer, multiple)
    assert limit % multiple == 0 and spend(layer, limit) < layer.size
    assert spend(layer, limit + multiple) >= layer.size
    rounded = dense_or(layer, rank, multiple)
    if rounded is None:
        assert max(rank, multiple) > limit
    else:
        assert rounded % multiple == 0 and multiple <= rounded <= limit and rounded <= max(rank, multiple)


def example() -> Allocation:
    shapes = {"a": (10, 20), "b": (8, 8)}
    return Allocation({"a": 3, "b": None}, shapes, "0.6", "best", 160, {"round": 1})


def test_an_allocation_says_exactly_what_it_spends() -> None:
    allocation = example()
    assert allocation["a"] == 3 and dict(allocation) == {"a": 3, "b": None} and len(allocation) == 2
    assert allocation.spent == 3 * 30 + 64 and allocation.total == 264
    record = allocation.record()
    assert record["parameters"] == {"dense": 264, "allowed": 160, "spent": 154}
    assert record["share_spent"] == 154 / 264
    assert record["layers"] == {"a": {"rank": 3, "shape": [10, 20]}, "b": {"rank": "dense", "shape": [8, 8]}}


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    example().save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == example()


def edited(tmp_path: Path, change: Any) -> Path:
    example().save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    change(record)
    (tmp_path / "a.json").write_text(json.dumps(record))
    return tmp_path / "a.json"


def test_ranks_edited_by_hand_are_taken_and_accounted(tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["layers"]["a"]["rank"] = "dense"
        record["layers"]["b"]["rank"] = 2

    loaded = Allocation.load(edited(tmp_path, change))
    assert dict(loaded) == {"a": None, "b": 2} and loaded.spent == 200 + 32


@pytest.mark.parametrize("rank", [0, -1, 11, 2.5, "three", True, [3]])
def test_ranks_that_a_matrix_cannot_have(tmp_path: Path, rank: Any) -> None:
    path = edited(tmp_path, lambda record: record["layers"]["a"].update(rank=rank))
    with pytest.raises(WeftError) as error:
        Allocation.load(path)
    assert str(error.value) == (
        f"{path} gives a the rank {rank!r}, but a 10 x 20 matrix has ranks from 1 to 10, or is left dense."
    )


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


def test_ranks_given_in_code_are_checked_too() -> None:
    check_ranks({"a": 3, "b": None}, {"a": (4, 4), "b": (4, 4)}, "allocate")
    with pytest.raises(WeftError, match="allocate gives a the rank 5, but a 4 x 4 matrix has ranks from 1 to 4"):
        check_ranks({"a": 5}, {"a": (4, 4)}, "allocate")
