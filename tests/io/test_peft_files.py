"""What people train with PEFT and bring along: every field of its configuration, modules and rows trained beside the
LoRA, resized vocabularies. The oracle is PEFT itself, which loads the same files on the same base.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.io.peft_config import CONFIG, HARMLESS, HONOURED, REFUSED
from weft.terms.extras import new_head

peft = pytest.importorskip("peft")
IDS = torch.arange(2, 18).view(2, 8)
ROWS = 32


def make(tied: bool = True, cls: Callable[[LlamaConfig], nn.Module] = LlamaForCausalLM) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=ROWS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=tied, initializer_range=0.2,
        )  # fmt: skip
        return cls(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(IDS).logits
    return out


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def trained(path: Path, base: nn.Module, *, bin: bool = False, **config: Any) -> Any:
    """An adapter of PEFT whose every trained number differs from its start, saved in `path`."""
    config.setdefault("target_modules", ["q_proj", "up_proj"])
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path, safe_serialization=not bin)
    return model


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BOTH = ["embed_tokens", "lm_head"]
TWO = {"embed_tokens": [3, 5], "lm_head": [4, 6]}
ALONG = [
    pytest.param(tied, config, id=f"{'tied' if tied else 'untied'}-{name}")
    for name, config in {
        "embedding": {"modules_to_save": ["embed_tokens"]},
        "head": {"modules_to_save": ["lm_head"]},
        "both": {"modules_to_save": BOTH},
        "ensured": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "rows": {"trainable_token_indices": [3, 5]},
        "rows-by-name": {"trainable_token_indices": {"embed_tokens": [5, 3]}},
        "rows-of-the-head": {"trainable_token_indices": {"lm_head": [3, 5]}},
        "rows-of-both": {"trainable_token_indices": TWO},
        "norm": {"modules_to_save": ["norm"]},
    }.items()
    for tied in (True, False)
]


@pytest.mark.parametrize(("tied", "config"), ALONG)
def test_what_is_trained_along_is_what_peft_computes(tied: bool, config: dict[str, Any], tmp_path: Path) -> None:
    theirs = trained(tmp_path / "theirs", make(tied), **config)
    model, before = make(tied), logits(make(tied))
    own = {name: p for name, p in model.named_parameters()}
    load_adapter(model, tmp_path / "theirs")
    assert_agree(logits(model), logits(theirs))
    with weft.disable(model):
        assert torch.equal(logits(model), before)
    assert_agree(logits(model), logits(theirs))

    save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(make(tied), tmp_path / "ours")), logits(model))
    reopened = peft.PeftModel.from_pretrained(make(tied), tmp_path / "ours")
    assert_agree(logits(reopened), logits(theirs))

    weft.remove_adapter(model)
    assert torch.equal(logits(model), before) and model.config.tie_word_embeddings is tied
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in own.items()}

    merged = load_adapter(make(tied), tmp_path / "theirs")
    weft.merge_adapter(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert_agree(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs))


@pytest.mark.parametrize("config", [{}, {"trainable_token_indices": [33, 34]}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_resizes_the_model(tied: bool, config: dict[str, Any], tmp_path: Path) -> None:
    make(tied).save_pretrained(tmp_path / "base")
    larger = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    larger.resize_token_embeddings(ROWS + 3)
    theirs = trained(tmp_path / "theirs", larger, **config)
    model = make(tied)
    load_adapter(model, tmp_path / "theirs")
    assert_agree(logits(model), logits(theirs))
    assert model.config.vocab_size == ROWS + 3 == model.get_input_embeddings().num_embeddings
    with weft.disable(model):
        assert torch.equal(logits(model), logits(make(tied))) and model.config.vocab_size == ROWS
    save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(make(tied), tmp_path / "ours")), logits(model))
    weft.merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    assert_agree(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs))


def test_a_classifier_comes_along(tmp_path: Path) -> None:
    theirs = trained(tmp_path / "theirs", make(cls=LlamaForSequenceClassification), task_type="SEQ_CLS")
    model = load_adapter(make(cls=LlamaForSequenceClassification), tmp_path / "theirs")
    assert_agree(logits(model), logits(theirs))


def test_a_new_head_is_trained_and_saved(tmp_path: Path) -> None:
    """What `weft.trainable` lists is what is saved, and PEFT reads it."""
    model = weft.adapt(make(cls=LlamaForSequenceClassification), "lora", 2)
    assert "score.weight" in weft.trainable(model).parameters
    for parameter in weft.trainable(model).parameters.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "ours")
    again = load_adapter(make(cls=LlamaForSequenceClassification), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    assert weft.trainable(again).parameters.keys() == weft.trainable(model).parameters.keys()
    reopened = peft.PeftModel.from_pretrained(make(cls=LlamaForSequenceClassification), tmp_path / "ours")
    assert_agree(logits(reopened), logits(model))
    weft.remove_adapter(model)
    assert torch.equal(logits(model), logits(make(cls=LlamaForSequenceClassification)))
    assert not new_head(make())


def test_a_second_adapter_leaves_the_head_to_the_first() -> None:
    model = weft.adapt(make(cls=LlamaForSequenceClassification), "lora", 2)
    weft.adapt(model, "lora", 2, name="second")
    assert "score.weight" in weft.trainable(model).parameters


@pytest.mark.parametrize("thawed", ["lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_thawed_by_hand_is_saved(thawed: str, tied: bool, tmp_path: Path) -> None:
    model = weft.adapt(make(tied), "lora", 2)
    model.get_parameter(thawed).requires_grad_(True)
    for parameter in weft.trainable(model).parameters.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(make(tied), tmp_path / "ours")), logits(model))
    reopened = peft.PeftModel.from_pretrained(make(tied), tmp_path / "ours")
    assert_agree(logits(reopened), logits(model))


def test_what_is_trained_and_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = weft.adapt(make(), "lora", 2)
    model.get_parameter("model.layers.0.self_attn.q_proj.terms.base.matrix").requires_grad_(True)
    with pytest.raises(WeftError, match=r"q_proj\.terms\.base\.matrix is trained too"):
        save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_pickled_file_is_read_as_tensors_alone(tmp_path: Path) -> None:
    theirs = trained(tmp_path, make(), bin=True)
    assert (tmp_path / "adapter_model.bin").is_file() and not (tmp_path / "adapter_model.safetensors").exists()
    assert_agree(logits(load_adapter(make(), tmp_path)), logits(theirs))
    torch.save({"evil": Path("/tmp")}, tmp_path / "adapter_model.bin")
    with pytest.raises(WeftError, match="damaged"):
        load_adapter(make(), tmp_path)


def test_a_lora_on_an_untied_head_is_read(tmp_path: Path) -> None:
    theirs = trained(tmp_path, make(False), target_modules=["q_proj", "lm_head"])
    assert_agree(logits(load_adapter(make(False), tmp_path)), logits(theirs))
    with pytest.raises(WeftError, match="tied"):
        load_adapter(make(True), tmp_path)


def test_a_lora_on_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    trained(tmp_path, make(False), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(WeftError, match="an update of an embedding"):
        load_adapter(make(False), tmp_path)


FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_field_of_pefts_configuration_is_looked_at() -> None:
    """A field that PEFT adds must be put in one of the three lists; until then it is refused where it is set."""
    assert not FIELDS - HONOURED - HARMLESS.keys() - REFUSED.keys()
    assert not HONOURED & HARMLESS.keys() | HONOURED & REFUSED.keys() | HARMLESS.keys() & REFUSED.keys()


@pytest.mark.parametrize("field", [*sorted(REFUSED), "a_field_of_tomorrow"])
def test_a_field_that_changes_the_meaning_is_refused_by_name(field: str, tmp_path: Path) -> None:
    trained(tmp_path, make())
    config = json.loads((tmp_path / CONFIG).read_text())
    for unset in (None, False, {}, []):
        (tmp_path / CONFIG).write_text(json.dumps(config | {field: unset}))
        load_adapter(make(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {field: [1, 2]}))
    with pytest.raises(WeftError, match=field):
        load_adapter(make(), tmp_path)


def test_activated_lora_is_not_read_as_a_plain_one(tmp_path: Path) -> None:
    trained(tmp_path, make(), task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])
    with pytest.raises(WeftError, match="alora_invocation_tokens"):
        load_adapter(make(), tmp_path)


@pytest.mark.parametrize("lost", ["embed_tokens.weight", "trainable_tokens_delta"])
def test_what_the_configuration_promises_must_be_there(lost: str, tmp_path: Path) -> None:
    config = {"modules_to_save": ["embed_tokens"]} if "embed" in lost else {"trainable_token_indices": [3]}
    trained(tmp_path, make(), **config)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if not k.endswith(lost)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeftError, match="missing"):
        load_adapter(make(), tmp_path)


def test_names_from_before_language_models_moved_are_understood(tmp_path: Path) -> None:
    """transformers 4.52 moved `language_model.model.layers` to `model.language_model.layers`; files did not follow."""

    def llava() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            text = make().config.to_dict()
            vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "image_size": 8,
                      "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
            return LlavaForConditionalGeneration(
                LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
            ).eval()

    theirs = trained(tmp_path, llava(), target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    today = load_file(file)
    before = {
        key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision_tower.", "model.vision_tower."
        ): tensor
        for key, tensor in today.items()
    }
    assert before.keys() != today.keys()
    save_file(before, file)
    assert_agree(logits(load_adapter(llava(), tmp_path)), logits(theirs))
