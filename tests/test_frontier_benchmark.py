"""The benchmark of bits and perplexity: its lines, and what it makes of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from weft.errors import WeftError
from weft.methods import METHODS

FILE = Path(__file__).parent.parent / "benchmarks" / "frontier.py"


@pytest.fixture(scope="module")
def frontier() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frontier", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FILE.parent)  # as for a script
        spec.loader.exec_module(module)
    return module


def line(row: str, budget: float, seed: int, perplexity: float, **more: Any) -> dict[str, Any]:
    head = {"model": "m", "calibrate": "python", "seed": seed, "windows": 8, "window": 64, "judged": 2}
    return {**head, "row": row, "budget": budget, "perplexity": {"python": perplexity}, **more}


def test_lines_are_told_apart_and_drawn(frontier: ModuleType, tmp_path: Path) -> None:
    found = [line("dense", 16.0, 0, 8.0), *(line("auto", 3.0, seed, 9.0 + seed / 10, bits=2.9) for seed in range(3))]
    assert len({frontier.key(one) for one in found}) == len(found)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in found))
    assert frontier.lines(file) == found
    frontier.plot(file)
    assert "auto: 2.9, 9" in (tmp_path / "a_python.svg").read_text()


def test_texts_are_judged_on_what_was_not_calibrated_on(frontier: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("calibrate judge!")
    assert frontier.half(str(file), 0) + frontier.half(str(file), 1) == file.read_text()


def test_rows_name_methods_and_options_that_there_are(frontier: ModuleType) -> None:
    for row, (method, given) in frontier.ROWS.items():
        stages = [method] if isinstance(method, str) else method
        if method == frontier.PEER:
            continue
        for stage in stages:
            name, options = (stage, {}) if isinstance(stage, str) else stage
            METHODS.find(name).options(options)
        assert set(given) <= {"allocate", "methods"}, row
        assert row.removesuffix(", allocated") in frontier.ROWS, row


def test_allocated_ranks_take_the_bytes_of_equal_ones(frontier: ModuleType) -> None:
    equal, other = line("nf2 + eora", 3.0, 0, 9.0, bits=2.9), line("nf2 + eora", 3.0, 1, 9.0, bits=2.8)
    assert frontier.bits_beside([other, equal], line("nf2 + eora, allocated", 3.0, 0, 9.0)) == 2.9
    assert frontier.bits_beside([equal], line("nf2 + eora, allocated", 3.25, 0, 9.0)) == 3.25
    assert frontier.bits_beside([equal], line("auto", 3.0, 0, 9.0)) == 3.0


@pytest.mark.parametrize(
    ("budget", "bits", "symmetric", "groups"),
    [(3.25, 3, False, {96: 32, 128: 128}), (3.2, 3, True, {96: 32, 128: 128}), (2.75, 2, False, {96: 32, 128: 32})],
)
def test_a_peer_gets_the_most_bits_then_zeros_then_scales(
    frontier: ModuleType, budget: float, bits: int, symmetric: bool, groups: dict[int, int]
) -> None:
    model = nn.Sequential(nn.Linear(128, 512, bias=False), nn.Linear(96, 128, bias=False))
    found = frontier.llm_compressor.chosen(model, budget)
    assert found[:2] == (bits, symmetric)
    assert {model.get_submodule(name).in_features: group for name, group in found[2].items()} == groups
    beside = 16 if symmetric else 16 + bits
    numbers = {128: 128 * 512, 96: 96 * 128}
    taken = sum(n * (bits + beside / groups[inn]) for inn, n in numbers.items()) / sum(numbers.values())
    assert found[3] == pytest.approx(taken) and taken <= budget
    with pytest.raises(WeftError, match=r"has nothing of 2.0 bits"):
        frontier.llm_compressor.chosen(model, 2.0)
