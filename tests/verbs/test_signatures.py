"""Signatures of checkpoints and of adapters: add, scale, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.errors import WeftError
from weft.merging.signatures import orthogonal_part
from weft.terms.adapters import find_adapter
from weft.testing_adapters import task, tiny_llama
from weft.verbs.signatures import (
    adapter_signature,
    patch,
    patched,
    read_signature,
    weight_signature,
)

UP = "model.layers.0.mlp.up_proj.weight"


def model(seed: int | None = None, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two blocks, moved a little by a seed."""
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    for parameter in made.parameters() if seed is not None else ():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return made.eval().to(dtype)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("start", None), ("clean", 1), ("changed", 2)):
        model(seed).save_pretrained(place / name, max_shard_size="6KB")
    return {name: place / name for name in ("changed", "clean", "start")}


def states() -> list[dict[str, Tensor]]:
    return [model(seed).state_dict() for seed in (2, 1, None)]


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(float((one[name] - other[name]).abs().max()) <= tolerance for name in one)


def test_of_checkpoints_it_is_the_orthogonal_part(three: dict[str, Path]) -> None:
    found = weight_signature(**three, bits=None)
    changed, clean, start = states()
    assert found.codes.keys() == start.keys()
    for name in start:
        expected = orthogonal_part(changed[name] - start[name], clean[name] - start[name])
        torch.testing.assert_close(found.tensor(name), expected, atol=1e-6, rtol=1e-5)
        assert abs(found.facts[name]["cosine"]) <= 1 and found.facts[name]["norm"] > 0
    assert weight_signature(*states(), bits=None).tensor(UP).equal(found.tensor(UP))


def test_add_scale_remove(three: dict[str, Path]) -> None:
    found, other = weight_signature(**three), weight_signature(three["clean"], three["changed"], three["start"])
    for weight in (1.0, 0.3, -2.0):
        gained = patch(model(1), found, weight)
        delta = gained.get_parameter(UP) - model(1).get_parameter(UP)
        torch.testing.assert_close(delta, weight * found.tensor(UP), atol=1e-6, rtol=1e-4)
        assert same(patch(gained, found, -weight), model(1), 1e-6)
    one, two = (patch(patch(model(1), a), b) for a, b in ((found, other), (other, found)))
    assert same(one, two, 1e-6) and not same(one, model(1), 1e-3)
    assert same(patch(model(1), found, 0.0), model(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_a_block_and_back_bit_for_bit(three: dict[str, Path], dtype: torch.dtype) -> None:
    found, clean = weight_signature(**three), model(1, dtype)
    with pytest.raises(RuntimeError), patched(clean, found) as gained:
        assert gained is clean and not same(clean, model(1, dtype))
        raise RuntimeError
    assert same(clean, model(1, dtype))


def test_the_mask_leaves_later_blocks_exactly(three: dict[str, Path]) -> None:
    gained = patch(model(1), weight_signature(**three, blocks=1))
    for name, tensor in model(1).state_dict().items():
        assert torch.equal(gained.state_dict()[name], tensor) is not name.startswith("model.layers.0."), name
    kept = weight_signature(**three, layers="*mlp*", blocks=1)
    assert set(kept.codes) == {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_it_is_stored_in_eight_bits(three: dict[str, Path], tmp_path: Path) -> None:
    found = weight_signature(**three, out=tmp_path / "s")
    again = read_signature(tmp_path / "s")
    exact = weight_signature(**three, bits=None)
    for name in found.codes:
        assert torch.equal(again.tensor(name), found.tensor(name))
        assert (found.tensor(name) - exact.tensor(name)).abs().max() <= found.codes[name].step / 2 * 1.0001
    numbers = sum(p.numel() for p in model().parameters())
    assert sum(t.nbytes for t in load_file(tmp_path / "s" / "weft_signature.safetensors").values()) == numbers
    assert again.facts == found.facts and [p.name for p in tmp_path.iterdir()] == ["s"]
    with pytest.raises(WeftError, match="not empty"):
        weight_signature(**three, out=tmp_path / "s")


def test_bad_checkpoints(three: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="There are no safetensors files in"):
        weight_signature(tmp_path, three["clean"], three["start"])
    (tmp_path / "model.safetensors").write_bytes(b"12345678123")
    with pytest.raises(WeftError, match="damaged or cut short"):
        weight_signature(tmp_path, three["clean"], three["start"])
    save_file({UP: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeftError, match="The changed checkpoint and the start differ in the tensor"):
        weight_signature(tmp_path, three["clean"], three["start"])
    with pytest.raises(WeftError, match="No tensor is left by blocks=0"):
        weight_signature(**three, blocks=0)
    with pytest.raises(WeftError, match="give 2 to 8"):
        weight_signature(**three, bits=9)
    with pytest.raises(WeftError, match="The signature in .* cannot be read"):
        read_signature(tmp_path)
    with pytest.raises(WeftError, match="which this LlamaForCausalLM lacks"):
        patch(tiny_llama(), weight_signature(**three))


def moved(seed: int, method: str = "pissa") -> nn.Module:
    made = weft.adapt(tiny_llama(), method, 2)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in find_adapter(made).named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def test_of_adapters_it_is_an_adapter(tmp_path: Path) -> None:
    for seed, name in enumerate(("changed", "clean")):
        weft.save_adapter(moved(seed), tmp_path / name)
    found = adapter_signature(tmp_path / "changed", tmp_path / "clean")
    assert found.rank == 8
    for layer in find_adapter(moved(0)).terms:
        deltas = [find_adapter(moved(seed)).terms[layer]["default"].dense().detach() for seed in (0, 1)]
        ours = found.adapter.terms[layer]["signature"].dense().detach()
        torch.testing.assert_close(ours, orthogonal_part(*deltas), atol=1e-5, rtol=1e-4)
        assert abs((ours * deltas[1]).sum()) <= 1e-5 * ours.norm() * deltas[1].norm()
    by_verb = weft.combine([tmp_path / "changed", tmp_path / "clean"], "rws")
    for layer, terms in found.adapter.terms.items():
        assert torch.equal(terms["signature"].dense(), by_verb.adapter.terms[layer]["combined"].dense())
    found.save(tmp_path / "signature")
    clean = weft.load_adapter(tiny_llama(), tmp_path / "clean")
    with torch.no_grad():
        before = clean(**task()[0]).logits
        weft.load_adapter(clean, tmp_path / "signature")
        assert not torch.allclose(clean(**task()[0]).logits, before, atol=1e-3)
        weft.remove_adapter(clean, "signature")
        assert torch.equal(clean(**task()[0]).logits, before)
    scaled = weft.combine([tmp_path / "clean", tmp_path / "signature"], weights=[1.0, 0.5])
    assert scaled.rank == 6, "two trained pairs and the start that both share"


def test_layers_that_one_of_them_lacks(tmp_path: Path) -> None:
    """Nothing of the clean one alone is in it; what the changed one has alone is in it whole."""
    for seed, (name, targets) in enumerate({"changed": ["q_proj", "k_proj"], "clean": ["k_proj", "v_proj"]}.items()):
        made = weft.adapt(tiny_llama(), "lora", 2, targets=targets)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in find_adapter(made).named_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        weft.save_adapter(made, tmp_path / name)
        ends = made if name == "changed" else ends  # noqa: F821
    found = weft.combine([tmp_path / "changed", tmp_path / "clean"], "rws").adapter.terms
    assert {layer.rpartition(".")[2] for layer in found} == {"q_proj", "k_proj"}
    for layer, terms in found.items():
        whole = find_adapter(ends).terms[layer]["default"].dense()
        assert torch.allclose(terms["combined"].dense(), whole, atol=1e-7) == layer.endswith("q_proj")


def test_of_adapters_that_do_not_go_together(tmp_path: Path) -> None:
    weft.save_adapter(moved(0), tmp_path / "a")
    weft.save_adapter(moved(0, "dora"), tmp_path / "d")
    with pytest.raises(WeftError, match="is a dora adapter"):
        adapter_signature(tmp_path / "a", tmp_path / "d")
    with pytest.raises(WeftError, match="No tensor is left"):
        adapter_signature(tmp_path / "a", tmp_path / "a", blocks=0)
    same = adapter_signature(tmp_path / "a", tmp_path / "a")
    assert max(float(t.dense().detach().abs().max()) for t in same.adapter.all_terms()) < 1e-6
