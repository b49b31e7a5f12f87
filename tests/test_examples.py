"""The examples in the docstrings of the public names run, on a tiny model."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from weft.embedded.text import default_text
from weft.train.windows import calibration_batches

NAMES = [name for name in weft.__all__ if name != "__version__"]


@pytest.fixture
def names(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example speaks of: a model, its tokenizer, text, batches of it, and a directory to write to."""
    monkeypatch.chdir(tmp_path)
    text = default_text("evaluation")[:20_000]
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    return {
        **{"weft": weft, "torch": torch, "copy": copy, "dataclasses": dataclasses},
        "model": AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32),
        "tokenizer": tokenizer,
        "text": text,
        "batches": calibration_batches(tokenizer, text, windows=4, window=32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = inspect.getdoc(getattr(weft, name)) or ""
    example = doctest.DocTestParser().get_doctest(words, names, f"weft.{name}", None, None)
    assert example.examples, f"weft.{name} has no example"
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert not said, "".join(said)
