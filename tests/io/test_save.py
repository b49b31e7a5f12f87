from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import weft
from weft.embedded import model_path
from weft.errors import WeftError
from weft.io.quantizer import mark
from weft.io.save import model_card, save_model
from weft.runs.output import open_output

RUN = {
    "command": "compress",
    "arguments": {"model": "some-org/some-model", "budget": 0.6, "layers": None, "note": "a | b\nc"},
    "metrics": {"before": {"perplexity": 8.2}, "perplexity": 9.25, "curve": [1, 2, 3]},
    "versions": {"torch": "2.13.0"},
}


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_model_card_says_what_is_known(model: LlamaForCausalLM) -> None:
    mark(model, method="svd-llm")
    card = model_card(model, RUN)
    front = front_matter(card)
    assert front == {
        "base_model": "some-org/some-model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["weft", "svd-llm"],
    }
    assert "import weft" in card and f'{type(model).__name__}.from_pretrained("' in card
    for row in ("| before.perplexity | 8.2 |", "| perplexity | 9.25 |", "| budget | 0.6 |", "| torch | 2.13.0 |"):
        assert row in card
    assert r"| note | a \| b c |" in card
    assert "curve" not in card and "layers" not in card


def test_model_card_says_no_more_than_is_known(model: LlamaForCausalLM, tmp_path: Path) -> None:
    known = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["weft"]}
    assert front_matter(model_card(model, {})) == known
    local = model_card(model, {"arguments": {"model": str(tmp_path)}})
    assert "base_model" not in front_matter(local)


def test_model_card_of_a_merged_model_needs_no_weft(model: LlamaForCausalLM) -> None:
    mark(model)
    assert "import weft" not in model_card(weft.merge(model), RUN)


def test_tokenizer_and_card_lie_beside_the_weights(model: LlamaForCausalLM, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path("pico"))
    save_model(model, tokenizer, tmp_path, run=RUN)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("def f():") == tokenizer.encode("def f():")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}


def test_saving_marks_and_unmarks(
    model: LlamaForCausalLM, tmp_path: Path, same_tensors: Callable[[nn.Module, nn.Module], None]
) -> None:
    save_model(model, None, tmp_path / "sums")  # never marked before
    same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path / "sums"))
    weft.merge(model)
    mark(model)
    save_model(model, None, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not hasattr(plain.config, "quantization_config")


def test_a_full_disk_leaves_nothing(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def fill(tensors: dict[str, torch.Tensor], filename: str, metadata: object = None) -> None:
        written.append(Path(filename))
        Path(filename).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fill)
    with pytest.raises(WeftError, match="The disk is full: nothing was written"):  # noqa: SIM117
        with open_output(tmp_path / "out", {}) as place:
            save_model(model, None, place.path)
    assert written and not list(tmp_path.iterdir())


CARD = """---
license: other
license_name: some-licence
language: [en]
base_model: some-org/base
pipeline_tag: text-generation
tags: [theirs]
---
# Theirs
"""


def test_what_belongs_to_a_model_goes_along_and_its_card_hands_down_the_licence(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As a sentence-transformers directory: modules.json names a pooling module in a folder of its own."""
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    modules = [{"idx": 0, "path": "", "type": "T"}, {"idx": 1, "path": "1_Pooling", "type": "P"}, {"path": "../secret"}]
    (tmp_path / "secret").mkdir()
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    for name, text in {
        "modules.json": json.dumps(modules),
        "LICENSE": "ours",
        "README.md": CARD,
        "x.bin": "no",
    }.items():
        (source / name).write_text(text)
    loaded = AutoModelForCausalLM.from_pretrained(source)
    save_model(loaded, None, out, run={"command": "merge", "arguments": {"model": str(source), "data": "a/b/c.txt"}})
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "LICENSE"} <= there
    assert not [name for name in there if "secret" in name or name == "x.bin"]
    card = (out / "README.md").read_text()
    front = front_matter(card)
    assert front["license_name"] == "some-licence" and front["base_model"] == "some-org/base"
    assert front["language"] == ["en"] and front["tags"] == ["weft"]
    assert str(tmp_path) not in card and "| data | c.txt |" in card and "| model | source |" in card
