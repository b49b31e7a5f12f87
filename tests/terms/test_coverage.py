"""Which layers a sum of terms can stand for, what share of a model they are, and what is said of the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.terms import SumLinear
from weft.terms.coverage import coverage
from weft.terms.experts import fuse, open_experts
from weft.terms.layers import eligible, is_linear, linear_layers

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from architectures import CASES, build  # the page of architectures shows the same models

IDS = torch.arange(3, 27).view(2, 12)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
TEXT = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(cls: type[hf.PreTrainedModel], config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return cls(config).eval()


def mamba() -> hf.PreTrainedModel:
    return model_of(hf.MambaForCausalLM, hf.MambaConfig(**SMALL, state_size=4))


def mixture() -> hf.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return model_of(hf.MixtralForCausalLM, hf.MixtralConfig(**TEXT, **experts))


def falcon() -> hf.PreTrainedModel:
    return model_of(hf.FalconForCausalLM, hf.FalconConfig(**SMALL, num_attention_heads=4))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


class Reader(nn.Module):
    """Calls one layer, reads two, one of them by a name of its own, only peeks at a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.named, self.peeked = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.named
        x = F.linear(F.linear(self.called(x), self.read.weight), layer.weight)
        if isinstance(self.peeked.weight, Tensor) and x.dtype != self.peeked.weight.dtype:
            x = x.to(self.peeked.weight.dtype)
        return self.peeked(x)


def test_a_layer_whose_weight_is_read_directly_is_left() -> None:
    with pytest.warns(UserWarning, match="Reader reads its weight itself"):
        assert list(linear_layers(Reader())) == ["called", "peeked"]


def test_mamba_is_adapted_and_runs() -> None:
    """dt_proj and out_proj go into fused kernels as weights; the other layers take part."""
    model = mamba()
    expected = logits(model)
    with pytest.warns(UserWarning, match="MambaMixer reads its weight itself instead of calling it"):
        weft.adapt(model, "lora", rank=2)
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, SumLinear)} == {"in_proj"}
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(WeftError, match="matches no linear layer"):
        linear_layers(mamba(), "*dt_proj")


def test_sliced_weights_are_left_only_where_they_are_sliced() -> None:
    class Sliced(nn.Module):
        def __init__(self, pretraining_tp: int) -> None:
            super().__init__()
            self.config = hf.LlamaConfig(pretraining_tp=pretraining_tp)
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.config.pretraining_tp > 1:
                return F.linear(x, self.up.weight.split(2)[0])
            return self.up(x)

    assert list(eligible(Sliced(1))) == ["up"] and not eligible(Sliced(2))


def test_falcons_own_linear_is_one_and_comes_back() -> None:
    model = falcon()
    expected, kind = logits(model), type(model.transformer.h[0].mlp.dense_h_to_4h)
    assert kind is not nn.Linear and len(linear_layers(model)) == 8
    weft.adapt(model, "pissa", rank=2)
    torch.testing.assert_close(logits(model), expected)
    weft.remove_adapter(model)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is kind and torch.equal(logits(model), expected)


def test_other_subclasses_are_not() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Coded(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.scale[:, None], self.bias)

    assert not is_linear(Doubled(3, 4)) and not is_linear(Coded())
    model = nn.Sequential(nn.Linear(4, 4), Coded())
    assert coverage(model, ["0"]).left == {"1": "a Coded is no linear layer that weft knows"}


def test_the_share_is_counted_in_numbers() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    found = coverage(model, ["1"])
    assert found.share == 24 / 54 and found.left == {"2": "it is not among the layers that were named"}
    assert str(found).startswith("44 % of the numbers in the model's matrices; left as they are: 1 x 2 (it is not")
    assert found.facts() == {"covered": 24 / 54, "left": ["1 x 2 (it is not among the layers that were named)"]}
    whole = coverage(model, ["1", "2"])
    assert whole.share == 1 and not whole.left


class Table(nn.Module):
    """Experts as one matrix, of a kind that nobody has told weft of."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(400, 100))


def test_less_than_half_asks_for_the_layers() -> None:
    model = model_of(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT))
    model.model.layers[0].mlp.more = Table()
    with pytest.raises(WeftError, match=r"less than half; name the layers .* layers='\*.*' \(for adapters targets="):
        weft.compress(model, "svd", budget=0.5)
    with pytest.raises(WeftError, match="holds it as one tensor"):
        weft.adapt(model, "lora")


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: weft.adapt(m, "lora", rank=2, targets=["q_proj", "v_proj"]),
        lambda m: weft.adapt(m, "lora", rank=2, targets="*self_attn*"),
        lambda m: weft.quantize(m, "nf4", targets="*self_attn*"),
        lambda m: weft.compress(m, "svd", budget=0.5, layers="*self_attn*"),
        lambda m: weft.compress(m, "svd-llm", budget=0.5, layers="*self_attn*", batches=[{"input_ids": IDS}]),
    ],
    ids=["adapt by name", "adapt by pattern", "quantize", "compress", "compress with data"],
)
def test_attention_of_a_mixture_is_reached_by_name(verb) -> None:  # type: ignore[no-untyped-def]
    model = mixture()
    verb(model)
    sums = [name for name, module in model.named_modules() if isinstance(module, SumLinear)]
    assert sums and all("self_attn" in name for name in sums)
    assert logits(model).isfinite().all()


def test_an_adapter_of_a_mixture_is_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = weft.adapt(mixture(), "lora", rank=2, targets="*self_attn*")
    with torch.no_grad():
        for parameter in weft.trainable(model).parameters.values():
            parameter.add_(0.1)
    weft.save_adapter(model, tmp_path / "a")
    again = weft.load_adapter(mixture(), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def inputs(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    given = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS
    if model.main_input_name == "input_features":
        del given["input_ids"]
        given["input_features"] = torch.linspace(-1, 1, 2 * 8 * 16).view(2, 8, 16)
    if hasattr(model, "vision_model"):
        given["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    return given


@torch.no_grad()
def first_output(model: hf.PreTrainedModel) -> Tensor:
    return next(value for key, value in model(**inputs(model)).items() if "logits" in key)


@pytest.mark.filterwarnings("ignore:The linear layers of this")
@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_covered_or_asks_for_layers(name: str, tmp_path: Path) -> None:
    """An adapter at its start changes nothing, codes are saved and opened; less than half is refused by name."""
    case = CASES[name]
    if getattr(hf, case.model, None) is None:
        pytest.skip(f"this transformers has no {case.model}")
    torch.manual_seed(0)
    model = build(case)
    expected = first_output(model)
    open_experts(model)
    share = coverage(model, eligible(model)).share
    fuse(model)
    if share < 0.5:
        with pytest.raises(WeftError, match="less than half; name the layers"):
            weft.adapt(model, "lora", rank=2)
    targets = case.layers or "all-linear"
    weft.adapt(model, "lora", rank=2, targets=targets)
    torch.testing.assert_close(first_output(model), expected, atol=1e-5, rtol=1e-4)
    weft.remove_adapter(model)
    weft.quantize(model, "int8", targets=targets)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(first_output(loaded), first_output(model), atol=1e-5, rtol=1e-4)
