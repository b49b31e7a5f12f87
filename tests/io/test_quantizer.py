from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from weft.errors import WeftError
from weft.io.quantizer import WeftConfig, mark, sum_specs, unmark
from weft.terms import LowRank, SumLinear
from weft.terms.put import put

Same = Callable[[nn.Module, nn.Module], None]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def test_native_load_gives_the_same_model(
    model: LlamaForCausalLM, saved: Path, ids: Tensor, same_tensors: Same
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    same_tensors(model, loaded)
    assert torch.equal(logits(model, ids), logits(loaded, ids))
    assert sum_specs(loaded) == sum_specs(model)
    assert loaded.config.quantization_config.method == "by-hand"
    assert loaded.config.quantization_config.settings == {"budget": 0.5}


def test_config_json_says_what_it_is(model: LlamaForCausalLM, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("weft", 1)
    assert config["layers"] == sum_specs(model)
    assert set(config) == {"quant_method", "format", "weft", "method", "settings", "layers"}


@pytest.mark.parametrize("shards", ["10KB", "1KB"])
def test_save_again_is_exact(
    model: LlamaForCausalLM, saved: Path, tmp_path: Path, shards: str, ids: Tensor, same_tensors: Same
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shards)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    same_tensors(model, again)
    assert torch.equal(logits(model, ids), logits(again, ids))


def test_base_and_head_models_find_their_layers(
    model: LlamaForCausalLM, saved: Path, tmp_path: Path, same_tensors: Same
) -> None:
    base = AutoModel.from_pretrained(saved)
    same_tensors(model.model, base)
    base.save_pretrained(tmp_path / "base")
    same_tensors(model.model, AutoModelForCausalLM.from_pretrained(tmp_path / "base").model)
    same_tensors(model.model, AutoModelForSequenceClassification.from_pretrained(saved).model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(model: LlamaForCausalLM, saved: Path, device_map: object, same_tensors: Same) -> None:
    same_tensors(model, AutoModelForCausalLM.from_pretrained(saved, device_map=device_map))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_disk_offload(
    model: LlamaForCausalLM, saved: Path, tmp_path: Path, ids: Tensor, offload_buffers: bool, same_tensors: Same
) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        saved,
        device_map={**places, "lm_head": "disk", "model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
    )
    assert loaded.get_parameter("model.layers.1.self_attn.q_proj.terms.low_rank.A").is_meta
    assert torch.equal(logits(model, ids), logits(loaded, ids))
    loaded.save_pretrained(tmp_path / "again")
    same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_dtype(model: LlamaForCausalLM, saved: Path, ids: Tensor) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    layer = loaded.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == layer.terms["low_rank"].A.dtype == torch.bfloat16
    assert layer.terms["sparse"].positions.dtype == torch.int32
    assert torch.equal(logits(model.to(torch.bfloat16), ids), logits(loaded, ids))
    loaded.save_pretrained(saved)
    assert AutoModelForCausalLM.from_pretrained(saved).dtype == torch.bfloat16


def test_mixed_precision_is_kept(model: LlamaForCausalLM, tmp_path: Path, same_tensors: Same) -> None:
    """An fp32 term on a bf16 base stays fp32; what has its layer's dtype follows the caller."""
    mark(model.to(torch.bfloat16))
    model.model.layers[0].mlp.up_proj.terms["spectral"].float()
    model.save_pretrained(tmp_path)
    same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16).model.layers[0].mlp.up_proj
    assert halved.weight.dtype == halved.terms["base"].matrix.dtype == torch.float16
    assert halved.terms["spectral"].s.dtype == torch.float32


def test_a_loaded_model_can_be_cast_and_trained(saved: Path, ids: Tensor) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved).half().float()
    assert not loaded.is_quantized
    before = loaded.model.layers[0].self_attn.q_proj.terms["low_rank"].A.clone()
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in loaded.parameters())
    assert not torch.equal(before, loaded.model.layers[0].self_attn.q_proj.terms["low_rank"].A)


def test_what_is_saved_is_what_is_there(
    model: LlamaForCausalLM, saved: Path, tmp_path: Path, same_tensors: Same
) -> None:
    """Layers changed after `mark`, also in a loaded model, are saved as they are."""
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    for changed in (model, loaded):
        put(
            changed,
            "model.layers.0.mlp.up_proj",
            {"low_rank": LowRank.from_factors(torch.ones(48, 1), torch.ones(1, 32))},
            None,
        )
        changed.save_pretrained(tmp_path / "changed")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
        assert again.model.layers[0].mlp.up_proj.terms["low_rank"].rank == 1
        same_tensors(changed, again)


def test_copies_are_saved_too(model: LlamaForCausalLM, saved: Path, tmp_path: Path, same_tensors: Same) -> None:
    for number, duplicate in enumerate([copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        duplicate.save_pretrained(tmp_path / f"copy{number}")
        same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path / f"copy{number}"))


def test_unmark(model: LlamaForCausalLM) -> None:
    plain = model.config.to_dict()
    mark(model)
    assert "quantization_config" in model.config.to_dict()
    unmark(model)
    assert model.config.to_dict() == plain


def test_mark_keeps_what_was_said(model: LlamaForCausalLM) -> None:
    mark(model, method="svd", budget=0.6)
    mark(model, steps=3)
    config = model.config.quantization_config
    assert (config.method, config.settings) == ("svd", {"budget": 0.6, "steps": 3})


def test_given_state_dict_is_what_is_saved(model: LlamaForCausalLM, saved: Path, tmp_path: Path) -> None:
    """As Trainer does with the gathered tensors of a sharded model."""
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    state = {name: torch.zeros_like(tensor) for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "given", state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    assert not any(p.any() for p in again.parameters())


def test_trainer_saves_and_resumes(saved: Path, tmp_path: Path, ids: Tensor, same_tensors: Same) -> None:
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]

    def train(steps: int, resume: bool) -> LlamaForCausalLM:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(saved), arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    train(2, resume=False)
    resumed = train(4, resume=True)
    same_tensors(resumed, AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4"))


def test_only_what_weft_made_is_loaded_as_weft(dense: LlamaForCausalLM, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=WeftConfig())


def test_an_unsaved_sum_is_empty_only_in_its_weight(model: LlamaForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, SumLinear):
            assert module.weight.shape == (0,)


def test_wrong_class_is_refused(saved: Path) -> None:
    with pytest.raises(WeftError, match="GPT2LMHeadModel has no linear layer"):
        GPT2LMHeadModel.from_pretrained(saved)


def test_rank_zero_survives(model: LlamaForCausalLM, tmp_path: Path, ids: Tensor, same_tensors: Same) -> None:
    name = "model.layers.0.mlp.up_proj"
    empty = LowRank.from_factors(torch.empty(48, 0), torch.empty(0, 32))
    model.set_submodule(name, SumLinear({"low_rank": empty}))
    mark(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_tensors(model, loaded)
    assert torch.equal(logits(model, ids), logits(loaded, ids))
