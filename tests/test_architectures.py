"""Every architecture that weft says it supports: tiny, random, through compression, saving, merging and training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import weft
from weft.io.quantizer import mark
from weft.io.save import save_model
from weft.terms import LowRank, SumLinear
from weft.terms.layers import bias_of, linear_layers, weight_of
from weft.terms.put import put

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

IDS = torch.arange(3, 27).view(2, 12)
TOKENS = {"input_ids": IDS, "labels": IDS}
SENTENCES = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
IMAGES = {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])}


class Case(NamedTuple):
    model: type[hf.PreTrainedModel]
    config: hf.PreTrainedConfig
    inputs: dict[str, Tensor]
    per_block: int  # linear layers of a block
    blocks: int = 2


CASES: dict[str, Callable[[], Case]] = {
    "llama": lambda: Case(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), TOKENS, 7),
    "llama-tied": lambda: Case(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, tie_word_embeddings=True), TOKENS, 7),
    "qwen3": lambda: Case(hf.Qwen3ForCausalLM, hf.Qwen3Config(**HEADED), TOKENS, 7),
    "gemma": lambda: Case(hf.GemmaForCausalLM, hf.GemmaConfig(**HEADED), TOKENS, 7),
    "gemma2": lambda: Case(hf.Gemma2ForCausalLM, hf.Gemma2Config(**HEADED), TOKENS, 7),
    "gemma3": lambda: Case(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**HEADED), TOKENS, 7),
    "mistral": lambda: Case(hf.MistralForCausalLM, hf.MistralConfig(**GROUPED), TOKENS, 7),
    "phi": lambda: Case(hf.PhiForCausalLM, hf.PhiConfig(**COMMON), TOKENS, 6),
    "gpt2": lambda: Case(
        hf.GPT2LMHeadModel, hf.GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64), TOKENS, 4
    ),
    "opt": lambda: Case(
        hf.OPTForCausalLM,
        hf.OPTConfig(
            **SPECIAL,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        TOKENS,
        6,
    ),
    "bert": lambda: Case(hf.BertForMaskedLM, hf.BertConfig(**COMMON), TOKENS, 6),
    "roberta": lambda: Case(hf.RobertaForSequenceClassification, hf.RobertaConfig(**COMMON), SENTENCES, 6),
    "t5": lambda: Case(
        hf.T5ForConditionalGeneration,
        hf.T5Config(**SPECIAL, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        TOKENS,
        6 + 10,  # an encoder's and a decoder's
    ),
    "vit": lambda: Case(
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        IMAGES,
        6,
    ),
}

MIXTURES: dict[str, Callable[[], Case]] = {
    "mixtral": lambda: Case(hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=2), TOKENS, 8),
    "qwen3-moe": lambda: Case(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**HEADED, **EXPERTS), TOKENS, 8),
    "gpt-oss": lambda: Case(
        hf.GptOssForCausalLM, hf.GptOssConfig(**HEADED, num_local_experts=2, num_experts_per_tok=1), TOKENS, 8
    ),
}


def dense_model(case: Case) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return case.model(copy.deepcopy(case.config)).eval()


def halve_ranks(model: nn.Module) -> nn.Module:
    """Every linear layer by its truncated SVD of half the rank."""
    for name, layer in linear_layers(model).items():
        U, s, V = (
            t.to(layer.weight.dtype) for t in torch.linalg.svd(weight_of(layer, torch.float64), full_matrices=False)
        )
        rank = len(s) // 2
        put(model, name, {"low_rank": LowRank.from_factors(U[:, :rank] * s[:rank], V[:rank])}, bias_of(layer))
    return model


@torch.no_grad()
def outputs(model: nn.Module, case: Case) -> Tensor:
    return model(**case.inputs).logits


def training_step(model: nn.Module, case: Case) -> tuple[float, float]:
    """The loss before and after a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    loss = model(**case.inputs).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        return loss.item(), model(**case.inputs).loss.item()


@pytest.fixture(scope="module", params=[*CASES, *MIXTURES])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(name: str) -> Case:
    return {**CASES, **MIXTURES}[name]()


@pytest.fixture(scope="module")
def low_rank(case: Case) -> hf.PreTrainedModel:
    """Not to be changed by a test."""
    model = halve_ranks(dense_model(case))
    mark(model)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def saved(low_rank: hf.PreTrainedModel, root: Path, name: str) -> Path:
    save_model(low_rank, None, root / name)
    low_rank.save_pretrained(root / f"{name}-sharded", max_shard_size="20KB")
    return root / name


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]), key


def test_all_linear_layers_but_the_head_are_replaced(case: Case, low_rank: hf.PreTrainedModel) -> None:
    sums = [key for key, module in low_rank.named_modules() if isinstance(module, SumLinear)]
    assert len(sums) == case.per_block * case.blocks
    inside = {key for key, module in low_rank.base_model.named_modules() if type(module) is nn.Linear}
    assert inside <= {"pooler.dense", "lm_head"}


def test_save_and_load(case: Case, saved: Path, low_rank: hf.PreTrainedModel, tmp_path: Path) -> None:
    loaded = case.model.from_pretrained(saved)
    assert_same(low_rank, loaded)
    assert torch.equal(outputs(low_rank, case), outputs(loaded, case))
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert_same(low_rank, case.model.from_pretrained(tmp_path / "again"))


def test_base_model_loads(saved: Path, low_rank: hf.PreTrainedModel) -> None:
    base = hf.AutoModel.from_pretrained(saved).state_dict()
    stored = low_rank.base_model.state_dict()
    for key in base.keys() & stored.keys():
        assert torch.equal(base[key], stored[key]), key
    assert any(".terms." in key for key in base.keys() & stored.keys())


def test_merge_and_load_as_a_plain_model(case: Case, low_rank: hf.PreTrainedModel, root: Path, name: str) -> None:
    merged = weft.merge(copy.deepcopy(low_rank))
    assert_same_names(merged, dense_model(case))
    save_model(merged, None, root / f"{name}-merged")
    loaded, info = case.model.from_pretrained(root / f"{name}-merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(outputs(loaded, case), outputs(low_rank, case), atol=1e-5, rtol=1e-5)


def assert_same_names(a: nn.Module, b: nn.Module) -> None:
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


def test_training_step(case: Case, saved: Path) -> None:
    loaded = case.model.from_pretrained(saved)
    before, after = training_step(loaded, case)
    assert after < before
    for key, module in loaded.named_modules():
        if isinstance(module, SumLinear):
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters()), key


@pytest.mark.parametrize("method", ["svd-llm", "kfac-svd"])
def test_compress_saves_and_loads(case: Case, method: str, tmp_path: Path) -> None:
    model = dense_model(case)
    compressed = weft.compress(model, method, budget=0.6, batches=[dict(case.inputs)])
    allocation = compressed.allocation
    assert 0.5 * allocation.total < allocation.spent <= 0.6 * allocation.total
    model.save_pretrained(tmp_path)
    loaded = case.model.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.method == method
    assert_same(model, loaded)
    assert torch.equal(outputs(model, case), outputs(loaded, case))


def test_full_rank_is_the_dense_model(case: Case) -> None:
    """An oracle for weights, biases and transposes: factors of full rank compute what the plain layers did."""
    model = dense_model(case)
    expected = outputs(model, case)
    for key, layer in linear_layers(model).items():
        W = weight_of(layer)
        put(model, key, {"low_rank": LowRank.from_factors(W, torch.eye(W.shape[1]))}, bias_of(layer))
    torch.testing.assert_close(outputs(model, case), expected, atol=1e-5, rtol=1e-5)


def test_t5_encoder_alone(tmp_path: Path) -> None:
    model = halve_ranks(dense_model(CASES["t5"]()))
    save_model(model, None, tmp_path)
    encoder = hf.T5EncoderModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.encoder(IDS).last_hidden_state
        assert torch.equal(encoder(IDS).last_hidden_state, expected)


def test_t5_keeps_wo_in_fp32_under_fp16(tmp_path: Path) -> None:
    """T5 casts the input of `wo` to the dtype that `wo.weight` shows."""
    case = CASES["t5"]()
    save_model(halve_ranks(dense_model(case)), None, tmp_path)
    loaded = case.model.from_pretrained(tmp_path, dtype=torch.float16)
    wo = loaded.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == wo.terms["low_rank"].A.dtype == torch.float32
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wi.terms["low_rank"].A.dtype == torch.float16
    assert outputs(loaded, case).isfinite().all()


WITHOUT_WEFT = """
import json, sys
sys.modules["weft"] = None  # not installed
import torch, transformers
transformers.logging.set_verbosity_error()
root, names = sys.argv[1], json.loads(sys.argv[2])
autos = [n for n in dir(transformers) if n.startswith("AutoModel") and n != "AutoModelForPreTraining"]
options = {"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"output_loading_info": True}
opened, refused, merged = [], 0, []
for name, architecture in names.items():
    own = getattr(transformers, architecture)
    ways = [(name, own, given) for given in options] + [(f"{name}-sharded", own, {})]
    for directory, cls, given in ways + [(name, getattr(transformers, auto), {}) for auto in autos]:
        try:
            cls.from_pretrained(f"{root}/{directory}", **given)
            opened.append([name, cls.__name__, str(given)])
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), error
            refused += 1
        except ValueError as error:
            assert "Unrecognized configuration class" in str(error), error
    missing = own.from_pretrained(f"{root}/{name}-merged", output_loading_info=True)[1]
    merged.append([name, sum(len(missing[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))])
own = transformers.LlamaForCausalLM
disk = own.from_pretrained(f"{root}/llama", device_map={"": "disk"}, offload_folder=f"{root}/off")
try:  # what lies on the disk is read when it is used
    disk(input_ids=torch.ones(1, 4, dtype=torch.long))
    opened.append(["llama", "disk", ""])
except ValueError as error:
    assert "shape torch.Size([0])" in str(error), error
print(json.dumps({"opened": opened, "refused": refused, "merged": merged}))
"""

# Heads whose class looks for another prefix than the model's: transformers loads nothing into them from a dense
# checkpoint either, and says that everything is newly initialised.
LOADS_NOTHING = {"AutoModelForQuestionAnswering": ("llama", "qwen3", "qwen3-moe", "llama-tied")}


@pytest.mark.slow
def test_without_weft_nothing_opens_but_what_is_merged(root: Path) -> None:
    """Plain transformers refuses a weft directory by every auto class, whole or sharded, and reads a merged one."""
    cases: dict[str, Any] = {key: make() for key, make in {**CASES, **MIXTURES}.items()}
    for key, case in cases.items():
        if not (root / f"{key}-merged").is_dir():  # when this test runs alone
            model = halve_ranks(dense_model(case))
            save_model(model, None, root / key)
            model.save_pretrained(root / f"{key}-sharded", max_shard_size="20KB")
            save_model(weft.merge(model), None, root / f"{key}-merged")
    names = {key: case.model.__name__ for key, case in cases.items()}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_WEFT, str(root), json.dumps(names)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    unexpected = [opened for opened in result["opened"] if opened[0] not in LOADS_NOTHING.get(opened[1], ())]
    assert not unexpected
    assert result["refused"] > 100
    assert result["merged"] == [[key, 0] for key in cases]
