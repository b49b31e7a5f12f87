"""Adapters on a model: targets, ranks, names, switching, merging, and one clear sentence for each mistake."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.terms import Dense, LowRank, Sparse, SumLinear
from weft.terms.adapters import adapters_of, base_terms, find_adapter
from weft.terms.layers import linear_layers, replace, weight_of
from weft.terms.put import put
from weft.testing_adapters import task, tiny_gpt2, tiny_llama, train
from weft.verbs.adapt import adapt, effective_rates, parameter_groups, trainable
from weft.verbs.merge import run
from weft.verbs.targets import resolve_targets

Q = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(task()[0]["input_ids"]).logits
    return out


def moved(
    name: str = "default", method: str = "lora", seed: int = 1, model: nn.Module | None = None, **options: Any
) -> nn.Module:
    """A model whose adapter is no longer at its start."""
    model = adapt(tiny_llama() if model is None else model, method, 2, name=name, **options)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in find_adapter(model, name).named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rank": 17},
            r"Rank 17 is not possible for 'lora' on model\.layers\.0\.self_attn\.q_proj \(16 x 16\); give a rank from",
        ),
        ({"rank": 0}, "Rank 0 is not possible"),
        ({"method": "lora-ga", "rank": 9, "batches": []}, "give a rank from 1 to 8"),
        ({"targets": "q_prj"}, "The target 'q_prj' matches no linear layer; the nearest names are: q_proj"),
        ({"targets": ["q_proj", "*.7.*"]}, r"The target '\*\.7\.\*' matches no linear layer"),
        ({"method": "lorra"}, "There is no method to adapt or graft called 'lorra'; the nearest are: lora"),
        ({"method": "svd"}, "There is no method to adapt or graft called 'svd'"),
        ({"alhpa": 3.0}, "The method 'lora' has no option 'alhpa'; its options are: alpha"),
        ({"method": "eva"}, r"The method 'eva' starts from data \(input_moment, input_mean\); give batches="),
        ({"method": "eva", "stats": {}}, "The statistics lack 'input_moment' of the layer"),
        ({"ranks": {"model.layers.0.self_attn.q_prj": 2}}, r"nearest names are: model\.layers\.0\.self_attn\.q_proj"),
        ({"ranks": {Q: 0}}, "No layer is given a rank above 0"),
        ({"name": "a.b"}, "letters, digits and underscores"),
        ({"name": "base"}, "has a term called 'base' already"),
    ],
)
def test_a_mistake_gets_one_sentence_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(WeftError, match=message) as caught:
        adapt(model, **{"method": "lora", "rank": 2, **arguments})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == modules and all(p.requires_grad for p in model.parameters())


def test_a_name_is_used_once() -> None:
    model = moved()
    with pytest.raises(WeftError, match="There is an adapter 'default' on this model already"):
        adapt(model, "lora", 2)
    with pytest.raises(WeftError, match="There is no adapter 'defualt' on this model; there is: default"):
        weft.remove_adapter(model, "defualt")
    adapt(model, "lora", 2, name="second")
    with pytest.raises(WeftError, match="several adapters on this model"):
        weft.remove_adapter(model)
    with pytest.raises(WeftError, match="There is no adapter on this model"):
        weft.remove_adapter(tiny_llama())


# ---- targets and ranks


def test_targets() -> None:
    model = tiny_llama()
    assert list(resolve_targets(model, "all-linear")) == list(linear_layers(model))
    assert list(resolve_targets(model, "q_proj")) == [Q]
    assert list(resolve_targets(model, ["self_attn.*", Q])) == [n for n in linear_layers(model) if "self_attn" in n]
    assert list(resolve_targets(model, "*.mlp.*")) == [n for n in linear_layers(model) if "mlp" in n]
    assert list(resolve_targets(model, "!*.mlp.*")) == [n for n in linear_layers(model) if "mlp" not in n]
    assert list(resolve_targets(model, ["self_attn.*", "!q_proj"])) == [
        n for n in linear_layers(model) if "self_attn" in n and n != Q
    ]
    with pytest.raises(WeftError, match="The target '!q_prj' matches no linear layer; the nearest names are: q_proj"):
        resolve_targets(model, "!q_prj")
    with pytest.raises(WeftError, match="The patterns q_proj, !self_attn.* leave no linear layer"):
        resolve_targets(model, ["q_proj", "!self_attn.*"])


def test_layers_too_small_for_the_rank_get_what_they_can_have() -> None:
    """The gate of a shared expert has one row."""
    model = tiny_llama()
    layer = model.get_submodule("model.layers.0.self_attn")
    layer.k_proj = torch.nn.Linear(16, 1, bias=False)
    with pytest.warns(UserWarning, match=r"Rank 4 is more than 1 of 7 layers can have, such as .*k_proj \(1 x 16\)"):
        adapt(model, "lora", 4)
    assert {name: term["default"].rank for name, term in find_adapter(model).terms.items() if "_proj" in name} == {
        name: 1 if "k_proj" in name else 4 for name in linear_layers(model)
    }
    with pytest.raises(WeftError, match=r"Rank 4 is not possible for 'lora' on .*k_proj \(1 x 16\)"):
        adapt(model, "lora", 4, targets="k_proj", name="other")


def test_ranks_of_an_allocation() -> None:
    ranks = {Q: 3, "model.layers.0.mlp.up_proj": 1}
    model = adapt(tiny_llama(), "lora", 8, ranks=ranks, alpha=4.0)
    terms = {layer: terms["default"] for layer, terms in find_adapter(model).terms.items()}
    assert {layer: term.rank for layer, term in terms.items()} == ranks
    assert {term.scale for term in terms.values()} == {0.5}


# ---- what is trained


def test_trainable_and_its_groups() -> None:
    model = adapt(tiny_llama(), "dora", 2, targets="q_proj")
    found = trainable(model)
    assert found.count == 2 * 32 + 16 and found.total == sum(p.numel() for p in model.parameters())
    assert set(found.parameters) == {f"{Q}.terms.default.{n}" for n in ("magnitude", "update.A", "update.B")}
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.0), (2, 0.1)]


def test_effective_rates() -> None:
    model = adapt(tiny_llama(), "lora", 4, alpha=16.0)
    adapt(model, "pissa", 4, alpha=16.0, rslora=True, name="shifted")
    assert effective_rates(model, 1e-3) == pytest.approx({"default": 4e-3, "shifted": 8e-3})


def test_parameters_frozen_before_stay_frozen_after() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    adapt(model, "lora", 2)
    weft.remove_adapter(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_half_precision_factors_are_asked_for() -> None:
    model = adapt(tiny_llama(torch.bfloat16), "lora", 2, dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(model).parameters.values()} == {torch.bfloat16}


# ---- several adapters


def test_deltas_add_up_and_are_switched() -> None:
    model = moved("one")
    base, one = logits(tiny_llama()), logits(model)
    moved("two", "pissa", seed=2, model=model)
    delta = {name: find_adapter(model, name).terms[Q][name].dense().detach() for name in ("one", "two")}
    W = base_terms(model, Q)["base"].dense()
    torch.testing.assert_close(model.get_submodule(Q).dense(), W + delta["one"] + delta["two"])
    both = logits(model)
    weft.set_adapter(model, "one")
    assert torch.equal(logits(model), one)
    weft.set_adapter(model, ["two"])
    assert not torch.equal(logits(model), one)
    weft.set_adapter(model, ["one", "two"])
    assert torch.equal(logits(model), both)
    weft.remove_adapter(model, "two")
    assert torch.equal(logits(model), one)
    weft.remove_adapter(model, "one")
    assert torch.equal(logits(model), base) and not any(isinstance(m, SumLinear) for m in model.modules())


def test_only_adapters_in_use_are_trained() -> None:
    model = moved("one")
    moved("two", model=model)
    weft.set_adapter(model, "two")
    assert {name.split(".terms.")[1].split(".")[0] for name in trainable(model).parameters} == {"two"}
    train(model, 1)


def test_disable_is_undone_by_an_error() -> None:
    model = moved()
    adapted = logits(model)
    with pytest.raises(RuntimeError), weft.disable(model):
        raise RuntimeError
    assert torch.equal(logits(model), adapted)


def test_a_sum_beside_dora() -> None:
    """DoRA takes the base's place; another adapter adds to it; each leaves alone."""
    model = moved("dora", "dora", targets="q_proj")
    only = logits(model)
    moved("lora", model=model, targets="q_proj")
    assert list(model.get_submodule(Q).terms) == ["dora", "lora"]
    weft.remove_adapter(model, "lora")
    assert torch.equal(logits(model), only)
    weft.remove_adapter(model)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_two_adapters_cannot_train_one_bias() -> None:
    model = tiny_gpt2()
    adapt(model, "soma", 2, name="one")
    with pytest.raises(WeftError, match="both train"):
        adapt(model, "soma", 2, name="two")
    assert list(adapters_of(model)) == ["one"]


# ---- bases that are sums already


def compressed() -> nn.Module:
    model = tiny_llama()
    for name, layer in linear_layers(model).items():
        U, s, V = torch.linalg.svd(weight_of(layer), full_matrices=False)
        put(model, name, {"low_rank": LowRank.from_factors(U[:, :8] * s[:8], V[:8])}, None)
    return model


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "sorsa"])
def test_an_adapter_on_a_compressed_model(method: str) -> None:
    model = compressed()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    adapt(model, method, 2)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert trainable(model).count < sum(t.numel() for t in state.values())
    train(model, 2)
    after = logits(model)
    twin = copy.deepcopy(model)
    weft.remove_adapter(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    weft.merge_adapter(twin)
    torch.testing.assert_close(logits(twin), after, atol=1e-5, rtol=1e-5)
    assert type(twin.get_submodule(Q)) is nn.Linear


def test_a_base_of_several_terms() -> None:
    model = tiny_llama()
    W = weight_of(model.get_submodule(Q))
    mask = torch.arange(W.numel()).reshape(W.shape) % 2 == 0
    replace(model, Q, SumLinear({"sparse": Sparse.from_mask(W, mask), "rest": Dense.from_matrix(W * ~mask)}))
    before = logits(model)
    adapt(model, "dora", 2)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert list(model.get_submodule(Q).terms) == ["default"]
    weft.remove_adapter(model)
    assert list(model.get_submodule(Q).terms) == ["sparse", "rest"] and torch.equal(logits(model), before)


# ---- merging


def test_merging_one_of_two() -> None:
    model = moved("one")
    moved("two", seed=2, model=model)
    both = logits(model)
    lost = weft.merge_adapter(model, "one")
    assert list(adapters_of(model)) == ["two"] and max(lost.values()) < 1e-5
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)


def test_merging_into_bf16_says_what_is_lost() -> None:
    model = adapt(tiny_llama(torch.bfloat16), "lora", 2)
    for _, parameter in find_adapter(model).named_parameters():
        parameter.data.fill_(1e-3)
    lost = weft.merge_adapter(model)
    assert min(lost.values()) > 0.5
    assert max(weft.merge_adapter(moved()).values()) < 1e-5


def test_merge_on_the_command_line(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    model = moved(model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    save_adapter(model, tmp_path / "adapter")
    result = run(str(tmp_path / "model"), tmp_path / "merged", adapter=tmp_path / "adapter")
    assert result["matrices"] == 7 and result["update_lost"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.get_submodule(Q)) is nn.Linear
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(WeftError, match="holds no adapter"):
        run(str(tmp_path / "model"), tmp_path / "again", adapter=tmp_path / "model")


# ---- around the model


def test_a_compiled_model_is_adapted_as_itself() -> None:
    model = torch.compile(tiny_llama(), backend="eager")
    adapt(model, "lora", 2, targets="q_proj")
    assert list(find_adapter(model).terms) == [Q]
    weft.remove_adapter(model)


def test_the_base_keeps_its_memory() -> None:
    model = tiny_llama()
    layer = model.get_submodule(Q)
    parameter = layer.weight
    adapt(model, "pissa", 2)
    base = model.get_submodule(Q).terms["base"].matrix
    assert base is parameter and base.data_ptr() == parameter.data_ptr()


def test_dtype_and_device_moves_reach_adapters_in_use() -> None:
    model = moved().to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    term = find_adapter(model).terms[Q]["default"]
    assert isinstance(term, LowRank) and term.A.dtype == torch.float64


def test_loading_beside_another_adapter(tmp_path: Path) -> None:
    save_adapter(moved("one"), tmp_path / "one")
    model = moved("two", seed=2)
    load_adapter(model, tmp_path / "one", name="other")
    assert [a.name for a in adapters_of(model).values() if a.active] == ["two", "other"]
    weft.set_adapter(model, "other")
    assert torch.equal(logits(model), logits(moved("one")))


@pytest.mark.parametrize("method", ["lora", "dora", "soma"])
@pytest.mark.parametrize("inside", [False, True])
def test_adapters_put_aside_follow_the_model(method: str, inside: bool) -> None:
    """What `model.to` does to a model it does to its adapters out of use: those put aside, those within `disable`."""
    moved, aside = adapt(tiny_gpt2(), method, 2), adapt(tiny_gpt2(), method, 2)
    for model in (moved, aside):
        for key, parameter in sorted(weft.trainable(model).parameters.items()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
    moved.to(torch.bfloat16)
    if inside:
        with weft.disable(aside):
            aside.to(torch.bfloat16)
    else:
        weft.set_adapter(aside, [])
        aside.to(torch.bfloat16)
        weft.set_adapter(aside, "default")
    for key, parameter in weft.trainable(moved).parameters.items():
        assert torch.equal(weft.trainable(aside).parameters[key], parameter), key
        assert weft.trainable(aside).parameters[key].dtype is torch.bfloat16
    assert torch.equal(logits(aside), logits(moved))
