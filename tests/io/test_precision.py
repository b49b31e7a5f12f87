"""What was widened to compute in is written as it was read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import weft
from weft.io.precision import saved_size
from weft.io.save import save_model
from weft.runs.loading import load_model
from weft.terms import LowRank
from weft.terms.layers import weight_of
from weft.terms.put import put

NORM = "model.norm.weight"


@pytest.fixture
def half(dense: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A bf16 checkpoint of which one norm is in fp32."""
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {NORM: torch.full((32,), 1 + 2.0**-20)}, file, metadata={"format": "pt"})
    return tmp_path / "half"


def test_every_tensor_returns_to_the_dtype_of_its_file(half: Path, tmp_path: Path) -> None:
    model = load_model(half, device="cpu")
    assert model.dtype == torch.float32
    save_model(model, None, tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (half, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], t) and before[name].dtype == t.dtype for name, t in after.items())
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config.dtype == torch.float32
    assert saved_size(model)[1] == sum(t.nbytes for t in before.values())


def test_terms_get_the_dtype_of_the_weight_whose_place_they_take(half: Path, tmp_path: Path) -> None:
    model = load_model(half, device="cpu")
    name = "model.layers.0.mlp.up_proj"
    U, s, V = torch.linalg.svd(weight_of(model.get_submodule(name)), full_matrices=False)
    put(model, name, {"low_rank": LowRank.from_factors(U[:, :4] * s[:4], V[:4])}, None)
    save_model(model, None, tmp_path / "smaller")
    after = load_file(tmp_path / "smaller" / "model.safetensors")
    assert {t.dtype for key, t in after.items() if key.startswith(name)} == {torch.bfloat16}
    written = sum(f.stat().st_size for f in (tmp_path / "smaller").glob("*.safetensors"))
    assert written < sum(f.stat().st_size for f in half.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and loaded.config.dtype == torch.bfloat16


def test_adapters_keep_their_own(half: Path, tmp_path: Path) -> None:
    model = weft.adapt(load_model(half, device="cpu"), "lora", 2, targets="q_proj")
    save_model(model, None, tmp_path / "adapted")
    after = load_file(tmp_path / "adapted" / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj.terms."
    assert after[layer + "default.A"].dtype == torch.float32 and after[layer + "base.matrix"].dtype == torch.bfloat16


def test_a_dtype_that_was_asked_for_is_written(half: Path, tmp_path: Path) -> None:
    save_model(load_model(half, device="cpu", dtype="float32"), None, tmp_path / "wide")
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
