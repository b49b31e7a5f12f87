"""PEFT on compressed models: its LoRA takes sums of terms, whichever way it is asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.terms import SumLinear
from weft.terms.layers import linear_layers
from weft.testing_adapters import task, tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft")
BATCH = task()[0]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(BATCH["input_ids"]).logits
    return out


def compressed(make: Any = tiny_llama) -> Any:
    model = make()
    weft.compress(model, "svd", budget=0.7)
    return model


def in_peft(model: nn.Module, targets: Any = "all-linear", **config: Any) -> Any:
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **config))
    for parameter in weft.trainable(made).parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "c_attn"]])
def test_peft_adapts_a_compressed_model(make: Any, targets: Any, tmp_path: Path) -> None:
    base = compressed(make)
    sums = [name for name, module in base.named_modules() if isinstance(module, SumLinear)]
    theirs = in_peft(base, targets)
    adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and "lora" not in name]
    assert sums and len(adapted) == (len(linear_layers(make())) if targets == "all-linear" else 1)
    theirs(**BATCH).loss.backward()
    assert all(parameter.grad is not None for parameter in weft.trainable(theirs).parameters.values())

    moved = logits(theirs)
    assert not torch.allclose(moved, logits(compressed(make)), atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_adapter(compressed(make), tmp_path / "theirs")), moved, atol=1e-5, rtol=0)
    theirs.merge_adapter()
    torch.testing.assert_close(logits(theirs), moved, atol=1e-5, rtol=0)
    theirs.unmerge_adapter()
    torch.testing.assert_close(logits(theirs), moved, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), moved, atol=1e-5, rtol=0)


def test_peft_opens_wefts_adapter_of_a_compressed_model(tmp_path: Path) -> None:
    ours = weft.adapt(compressed(), "lora", 2)
    for parameter in weft.trainable(ours).parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(compressed(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "word"), [({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "pissa")]
)
def test_what_reads_the_weight_is_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(WeftError, match=word):
        in_peft(compressed(), **config)
