"""Bytes are those on the disk: what a verb reports, what `weft eval` counts and what the files hold are one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from weft.terms import SumLinear
from weft.verbs import compress, evaluate, quantize

TEXT = "import os\n\n\ndef add(first, second):\n    return first + second\n\n\n" * 12


@pytest.fixture(scope="module")
def half(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bf16."""
    import shutil

    place = tmp_path_factory.mktemp("half")
    shutil.copytree(tiny_directory, place, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(tiny_directory).to(torch.bfloat16).save_pretrained(place)
    return place


def on_disk(directory: Path) -> tuple[int, float]:
    """(bytes of all tensors, bits a weight of the linear layers) by the headers of the files alone."""
    sizes: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    widths = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "I8": 1, "I64": 8}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                shapes[name] = opened.get_slice(name).get_shape()
                sizes[name] = torch.Size(shapes[name]).numel() * widths[opened.get_slice(name).get_dtype()]
    model = AutoModelForCausalLM.from_pretrained(directory)
    linear = (SumLinear, torch.nn.Linear)
    layers = {name: m for name, m in model.model.named_modules(prefix="model") if isinstance(m, linear)}
    inside = sum(size for name, size in sizes.items() if name.split(".terms.")[0].removesuffix(".weight") in layers)
    return sum(sizes.values()), 8 * inside / sum(m.out_features * m.in_features for m in layers.values())


CASES: dict[str, dict[str, Any]] = {
    "ranks": {"method": "svd", "budget": 0.6},
    "factors of coded columns": {"method": "pifa", "budget": 0.6},
    "codes": {"method": "nf4"},
    "codes and factors": {"method": "nf3", "then": "eora", "budget": "7bits"},
}


@pytest.mark.parametrize("case", CASES)
def test_compress_and_eval_count_what_is_stored(case: str, half: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    how = {"calibration": tmp_path / "text.txt", "windows": 2, "window": 32, "device": "cpu", **CASES[case]}
    done = compress.run(str(half), tmp_path / "out", **how)
    nbytes, bits = on_disk(tmp_path / "out")
    found = evaluate.run(str(tmp_path / "out"), text=tmp_path / "text.txt", window=32, windows=1, device="cpu")
    assert done["bytes"] == found["bytes"] == nbytes
    assert done["bits_per_weight"] == pytest.approx(bits) and found["bits_per_weight"] == pytest.approx(bits)


def test_quantize_too(half: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    done = quantize.run(str(half), tmp_path / "out", scheme="int8", device="cpu")
    nbytes, bits = on_disk(tmp_path / "out")
    found = evaluate.run(str(tmp_path / "out"), text=tmp_path / "text.txt", window=32, windows=1, device="cpu")
    plain = evaluate.run(str(half), text=tmp_path / "text.txt", window=32, windows=1, device="cpu")
    assert done["bytes"] == found["bytes"] == nbytes and plain["bits_per_weight"] == 16
    assert done["bits_per_weight"] == pytest.approx(bits) and found["bits_per_weight"] == pytest.approx(bits)
