"""Against PEFT: the same starts on the same weights, our exports in PEFT, PEFT's adapters in weft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.stats.calibrate import calibrate
from weft.terms import LowRank, Magnitude, Shifted
from weft.terms.adapters import find_adapter
from weft.testing_adapters import RANK, adapted, task, tiny_gpt2, tiny_llama, train
from weft.verbs.adapt import adapt

peft = pytest.importorskip("peft")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = task()[0]["input_ids"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(IDS).logits
    return out


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def in_peft(model: nn.Module, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=MODULES, **config))


def reopened(make: Any, path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make(), path)


def disturb(model: nn.Module) -> None:
    """Make every trainable tensor of a PEFT model differ from its start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def factors_of(model: Any, layer: str) -> tuple[Tensor, Tensor]:
    module = model.get_base_model().get_submodule(layer)
    return module.lora_B["default"].weight.detach(), module.lora_A["default"].weight.detach()


PLAIN = [("lora", {}, {}), ("lora", {"rslora": True, "alpha": 6.0}, {}), ("dora", {"alpha": 8.0}, {})]
SHIFTED = [("pissa", {"alpha": 3.0}), ("olora", {}), ("corda", {}), ("sorsa", {}), ("soma", {}), ("lora-ga", {})]
OTHERS = [("eva", {}), ("lora-sb", {}), ("lora-xs", {})]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o, _ in PLAIN] + SHIFTED + OTHERS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_peft_gives_our_logits(name: str, options: dict[str, Any], make: Any, tmp_path: Path) -> None:
    model = adapted(weft.methods.METHODS[name], make, **options, **({"biases": False} if name == "soma" else {}))
    train(model, 5, lr=1e-2)
    save_adapter(model, tmp_path / "adapter", format="peft")
    moved = float((logits(model) - logits(make())).abs().max())
    assert moved > 1e-3
    assert_agree(logits(reopened(make, tmp_path / "adapter")), logits(model))
    assert_agree(logits(load_adapter(make(), tmp_path / "adapter")), logits(model))


def test_the_export_is_safe_for_the_strictest_readers(tmp_path: Path) -> None:
    """One rank and one scale of 1 for all layers, nothing but lora_A and lora_B (vLLM 0.11, llama.cpp's converter)."""
    model = tiny_llama()
    layers = [f"model.layers.0.self_attn.{m}" for m in ("q_proj", "v_proj")]
    adapt(model, "pissa", 4, ranks={layers[0]: 4, layers[1]: 2}, targets=["q_proj", "v_proj"], alpha=7.0)
    train(model, 3)
    save_adapter(model, tmp_path / "adapter", format="peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 8 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and config["target_modules"] == ["q_proj", "v_proj"]
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    assert {t.shape[0] for k, t in state.items() if "lora_A" in k} == {8}
    delta = {layer: load(state, layer) for layer in layers}
    for layer, matrix in delta.items():
        whole = model.get_submodule(layer)
        base = tiny_llama().get_submodule(layer).weight.detach()
        torch.testing.assert_close(base + matrix, whole.dense().detach(), atol=1e-5, rtol=0)


def load(state: dict[str, Tensor], layer: str) -> Tensor:
    """The delta as a reader that knows only lora_alpha / r = 1 builds it."""
    prefix = f"base_model.model.{layer}."
    return state[prefix + "lora_B.weight"] @ state[prefix + "lora_A.weight"]


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "use_dora": True},
        {"lora_alpha": 6, "rank_pattern": {"q_proj": 2, "mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_we_load_pefts(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = in_peft(tiny_llama(), **config)
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(tiny_llama(), tmp_path)
    assert_agree(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "again")
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "again")), logits(ours))


def test_modules_to_save_come_along(tmp_path: Path) -> None:
    theirs = in_peft(tiny_llama(), modules_to_save=["lm_head"])
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    before = logits(model)
    assert_agree(logits(load_adapter(model, tmp_path)), logits(theirs))
    assert torch.equal(logits(weft.remove_adapter(model)), before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(start: str, tmp_path: Path) -> None:
    in_peft(tiny_llama(), init_lora_weights=start).save_pretrained(tmp_path)
    with pytest.raises(WeftError, match="path_initial_model_for_weight_conversion"):
        load_adapter(tiny_llama(), tmp_path)


def test_pefts_own_conversion_equals_ours(tmp_path: Path) -> None:
    theirs = in_peft(tiny_llama(), init_lora_weights="pissa", lora_alpha=RANK)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    disturb(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert_agree(logits(load_adapter(tiny_llama(), tmp_path / "converted")), logits(theirs))


@pytest.mark.parametrize("name", ["pissa", "olora", "corda"])
@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])
def test_shifted_starts_agree(name: str, alpha: int) -> None:
    """The same base plus the same disturbed factors: PEFT rounds its residual into the base, ours is a sum."""
    batch = {"input_ids": IDS[:1]}
    base = tiny_llama()
    if name == "corda":
        pytest.importorskip("attr", reason="PEFT's CorDA imports attrs without requiring it")
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=alpha,
            target_modules=MODULES,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="ipm"),
        )
        preprocess_corda(base, config, run_model=lambda: base(**batch))
        theirs = peft.get_peft_model(base, config)
    else:
        theirs = in_peft(base, init_lora_weights=name, lora_alpha=alpha)
    ours = adapt(tiny_llama(), name, RANK, batches=[batch], alpha=float(alpha))
    (adapter,) = weft.terms.adapters.adapters_of(ours).values()
    for layer, terms in adapter.terms.items():
        term = terms["default"]
        assert isinstance(term, Shifted) and isinstance(term.now, LowRank)
        B, A = factors_of(theirs, layer)
        product = term.now.B.detach() @ term.now.A.detach()
        torch.testing.assert_close(product, B @ A, atol=2e-4 * float(product.abs().max()), rtol=0)
    disturb(theirs)
    for layer, terms in adapter.terms.items():
        term = terms["default"]
        B, A = factors_of(theirs, layer)
        term.now.B.data, term.now.A.data = B.clone(), A.clone()
    # PEFT inverts CorDA's covariance in fp32, weft in fp64
    tolerance = 1e-4 if name == "corda" else 1e-5
    torch.testing.assert_close(logits(ours), logits(theirs), atol=tolerance * float(logits(theirs).abs().max()), rtol=0)


def test_eva_agrees() -> None:
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=MODULES,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, use_label_mask=False),
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    peft.initialize_lora_eva_weights(theirs, dataloader=[batch], show_progress_bar=False)
    ours = adapt(tiny_llama(), "eva", RANK, batches=[batch], rho=1.0)
    stats = calibrate(tiny_llama(), [batch], ("input_moment", "input_mean"))
    for layer, terms in find_adapter(ours).terms.items():
        A, theirs_A = terms["default"].A.detach(), factors_of(theirs, layer)[1]
        C = weft.methods.eva.covariance(stats[layer]).float()
        captured = [float(torch.trace(M @ C @ M.mT)) for M in (A, theirs_A)]
        assert captured[0] >= captured[1] * (1 - 1e-5), "PEFT's randomised components explain more than the exact ones"
        assert captured[1] >= 0.97 * captured[0], "the two span different directions"
        cosines = (A * theirs_A).sum(1).abs()
        assert cosines[0] > 0.99
    state = {key: value for key, value in theirs.state_dict().items() if "lora_A" in key}
    for layer, terms in find_adapter(ours).terms.items():
        terms["default"].A.data = state[f"base_model.model.{layer}.lora_A.default.weight"].clone()
        terms["default"].B.data.fill_(0.03)
        theirs.get_base_model().get_submodule(layer).lora_B["default"].weight.data.fill_(0.03)
    assert_agree(logits(ours), logits(theirs))


def test_dora_gradients_agree(tmp_path: Path) -> None:
    theirs = in_peft(tiny_llama(), use_dora=True, lora_alpha=6)
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(tiny_llama(), tmp_path)
    for model in (ours, theirs):
        model(**task()[0]).loss.backward()
    for layer, terms in find_adapter(ours).terms.items():
        term = terms["default"]
        assert isinstance(term, Magnitude)
        module = theirs.get_base_model().get_submodule(layer)
        for mine, other in (
            (term.update.A, module.lora_A["default"].weight),
            (term.update.B, module.lora_B["default"].weight),
            (term.magnitude, module.lora_magnitude_vector["default"].weight),
        ):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5 * float(other.grad.abs().max()), rtol=1e-4)


def test_missing_and_unexpected_tensors_are_errors(tmp_path: Path) -> None:
    in_peft(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    lacking = dict(state)
    del lacking[next(key for key in state if "lora_B" in key)]
    for damaged, word in ((lacking, "missing"), (state | {"base_model.model.strange": torch.zeros(1)}, "no place")):
        save_file(damaged, file)
        model = tiny_llama()
        with pytest.raises(WeftError, match=word):
            load_adapter(model, tmp_path)
        assert not weft.terms.adapters.adapters_of(model)
