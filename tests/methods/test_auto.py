"""auto: the curves of several methods in one unit, one budget, and for each layer the method that was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.verbs.test_chains import llama
from weft.allocate import Allocation, Shape
from weft.errors import WeftError
from weft.linalg.principal import weighted_loss
from weft.methods import METHODS, gptq
from weft.methods.combined import candidates
from weft.runs.pieces import Store
from weft.stats.calibrate import calibrate
from weft.terms import LowRank, NormalFloat, SumLinear
from weft.terms.layers import linear_layers, weight_of
from weft.testing_adapters import task
from weft.verbs.survey import Plan, offered, survey

AUTO = METHODS["auto"]


def plan_of(model: nn.Module, methods: str, **settings: Any) -> Plan:
    layers = tuple(linear_layers(model))
    return Plan(method=AUTO, options=AUTO.options({"methods": methods}), layers=layers, reads=("losses",), **settings)


def surveyed(model: nn.Module, plan: Plan, store: Store | None = None) -> Any:
    return survey(model, plan, offered(model, plan), task(), calibrate(model, task(), plan.needs), store or Store())


LOW = "model.layers.0.mlp.up_proj"


def steep() -> nn.Module:
    """A model with a layer of rank 1: what low rank is for."""
    model, draw = llama(1), torch.Generator().manual_seed(1)
    W = model.get_submodule(LOW).weight
    with torch.no_grad():
        W.copy_(torch.randn(W.shape[0], 1, generator=draw) @ torch.randn(1, W.shape[1], generator=draw) * 0.2)  # type: ignore[operator, misc]
    return model


def test_curves_of_all_candidates_are_one_curve_in_one_unit() -> None:
    model = llama(1)
    merged = surveyed(model, plan_of(model, "nf,kfac-svd,nf+eora"))
    for word in ("nf", "kfac-svd"):
        method = METHODS[word]
        alone = Plan(method=method, options=method.options({}), layers=tuple(merged), reads=("losses",))
        infos = surveyed(model, alone)
        for name, info in merged.items():
            theirs = {choice.size: choice for choice in infos[name].choices}
            mine = [choice for choice in info.choices if choice.method == word]
            assert mine
            for choice in mine:
                assert choice.bytes == theirs[choice.size[1]].bytes
                assert choice.loss == pytest.approx(theirs[choice.size[1]].loss, rel=1e-4)
    for info in merged.values():
        assert [c.bytes for c in info.choices] == sorted(c.bytes for c in info.choices)
        codes = {c.size[1]: c.loss for c in info.choices if c.method == "nf"}
        both = [c for c in info.choices if c.method == "nf+eora"]
        assert both and all(c.loss < codes[c.size[1][0]] for c in both)


def test_a_chain_takes_over_what_its_first_method_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of gptq over a layer, and the same curves as those of the chain by itself."""
    model, passes, quantise = llama(1), [], gptq.quantise

    def counted(W: Any, how: Any, bits: Any, *rest: Any, **more: Any) -> Any:
        passes.append(bits)
        return quantise(W, how, bits, *rest, **more)

    monkeypatch.setattr(gptq, "quantise", counted)
    both = surveyed(model, plan_of(model, "gptq:group=32+eora,gptq:group=32"))
    assert len(passes) == len(both)  # 2 to 8 bits together
    chain = surveyed(model, plan_of(model, "gptq:group=32+eora"))
    assert len(passes) == 2 * len(both)
    for name, info in both.items():
        mine = {c.size: c.loss for c in info.choices if c.method == "gptq:group=32+eora"}
        assert mine == {c.size: c.loss for c in chain[name].choices if c.method}
        assert {c.method for c in info.choices} == {"", "gptq:group=32", "gptq:group=32+eora"}


def test_each_layer_gets_the_structure_that_suits_it() -> None:
    model = steep()
    done = weft.compress(model, "auto", budget="6 bits", batches=task(), methods="nf,kfac-svd")
    chosen = done.allocation.choices
    assert chosen[LOW].method == "kfac-svd" and chosen[LOW].size >= 1
    assert {choice.method for name, choice in chosen.items() if name != LOW} >= {"nf"}
    assert done.allocation.bits_per_weight <= 6
    for name, choice in chosen.items():
        layer = model.get_submodule(name)
        if choice.size is not None:
            assert isinstance(layer, SumLinear)
            assert sum(term.nbytes for term in layer.terms.values()) == choice.bytes  # type: ignore[misc]


def predicted(allocation: Allocation) -> float:
    return sum(choice.loss for choice in allocation.choices.values())


@pytest.mark.parametrize("budget", ["4 bits", "6 bits"])
def test_it_is_predicted_to_lose_no_more_than_any_of_its_methods(budget: str) -> None:
    found = {}
    for methods in ("nf", "nf+eora", "nf,nf+eora", "nf,kfac-svd,nf+eora"):
        model = steep()
        done = weft.compress(model, "auto", budget=budget, batches=task(), methods=methods)
        found[methods] = predicted(done.allocation)
    # the greedy on hulls is exact but for its last step
    assert found["nf,nf+eora"] <= 1.05 * min(found["nf"], found["nf+eora"])
    assert found["nf,kfac-svd,nf+eora"] <= 1.05 * found["nf,nf+eora"]


def test_a_chain_in_one_layer_is_the_two_methods_after_each_other() -> None:
    one, other = llama(1), llama(1)
    sizes = dict.fromkeys(linear_layers(one), ("nf+eora", (2, 1)))
    weft.compress(one, "auto", allocate=sizes, batches=task(), methods="nf+eora")
    weft.compress(other, ["nf2", "eora"], rank=1, batches=task())
    first = "model.layers.0.self_attn.q_proj"  # before which nothing has changed
    mine, theirs = (model.get_submodule(first) for model in (one, other))
    assert [type(t) for t in mine.terms.values()] == [NormalFloat, LowRank]  # type: ignore[union-attr, operator]
    torch.testing.assert_close(weight_of(mine), weight_of(theirs), atol=1e-6, rtol=1e-5)


def test_the_file_says_method_size_and_bytes_and_serves_again(tmp_path: Path) -> None:
    one, other, edited = steep(), steep(), steep()
    three = {"batches": task(), "methods": "nf,kfac-svd,nf+eora"}
    done = weft.compress(one, "auto", budget="5 bits", **three)
    done.allocation.save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    for name, entry in record["layers"].items():
        assert entry["method"] == done.allocation.choices[name].method
        assert entry["bytes"] == done.allocation.choices[name].bytes and "size" in entry
    assert {entry["method"] for entry in record["layers"].values()} >= {"kfac-svd"}
    again = weft.compress(other, "auto", allocate=tmp_path / "a.json", **three)
    assert again.allocation.spent == done.allocation.spent
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    name = next(iter(record["layers"]))
    record["layers"][name] |= {"method": "nf", "size": 8}
    (tmp_path / "a.json").write_text(json.dumps(record))
    changed = weft.compress(edited, "auto", allocate=tmp_path / "a.json", **three)
    assert changed.allocation.choices[name][:2] == (8, changed.allocation.choices[name].bytes)
    assert edited.get_submodule(name).terms["base"].format.bits == 8  # type: ignore[union-attr, operator]


def test_the_sequential_form_keeps_no_terms_of_what_was_only_tried() -> None:
    model = llama(1)
    for sequential in (True, False):
        store = Store()
        surveyed(model, plan_of(model, "nf,nf+eora", sequential=sequential), store)
        kept = sum(t.nbytes for piece in store.memory.values() for t in piece.tensors.values())
        codes = any("codes" in key for piece in store.memory.values() for key in piece.tensors)
        assert codes is not sequential and kept > 0


def test_losses_of_a_chain_are_those_of_its_terms() -> None:
    model = llama(1)
    infos = surveyed(model, plan_of(model, "nf+eora"))
    stats = calibrate(model, task(), AUTO.needs)
    name = LOW
    choice = next(c for c in infos[name].choices if c.method == "nf+eora")
    changed = llama(1)
    weft.compress(
        changed, "auto", allocate={n: choice.size if n == name else None for n in infos}, batches=task(),
        sequential=False, methods="nf+eora",
    )  # fmt: skip
    D = weight_of(changed.get_submodule(name), torch.float64) - weight_of(model.get_submodule(name), torch.float64)
    loss = weighted_loss(D, stats[name]["input_moment"], stats[name]["output_grad_moment"])
    assert choice.loss == pytest.approx(float(loss), rel=1e-3)


def test_measured_points_put_merged_curves_to_scale() -> None:
    model = llama(1)
    done = weft.compress(model, "auto", budget="6 bits", allocate="lems", batches=task(), methods="nf,kfac-svd")
    assert done.allocation.bits_per_weight <= 6 and done.allocation.allocate == "lems"


def test_candidates_are_words() -> None:
    found = candidates("nf:block=32, nf+eora,asvd:alpha=0.7")
    assert list(found) == ["nf:block=32", "nf+eora", "asvd:alpha=0.7"]
    assert found["nf:block=32"].options["block"] == 32 and found["asvd:alpha=0.7"].options["alpha"] == 0.7
    assert found["nf+eora"].sizes(Shape(64, 64), 9999)[0][0][0] == 2
    assert set(AUTO.reads({"methods": "asvd"})) > set(AUTO.needs)


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ("", "There are no methods to choose from"),
        ("nff", "no method to compress or quantize called 'nff'"),
        ("eora", "no method to compress or quantize called 'eora'"),
        ("nf+svd", "no method to compensate called 'svd'"),
        ("nf+eora+eora", "chains 3 methods; a chain has two here"),
        ("nf:block", "'block' in the candidate 'nf:block' is no NAME=VALUE"),
        ("nf:blok=32", "'nf' has no option 'blok'"),
        ("auto", "auto chooses among methods, and cannot be one of them"),
        ("modegpt", "modegpt cuts several layers together, and cannot be among the methods"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(methods: str, sentence: str) -> None:
    model = llama(1)
    with pytest.raises(WeftError, match=sentence):
        weft.compress(model, "auto", budget="4 bits", batches=task(), methods=methods)
    assert not any(isinstance(m, SumLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"allocate": "equal"}, "takes more bytes than .* and is no larger, so that none is the same"),
        ({"allocate": "energy"}, "This allocation reads singular values, and auto has none"),
        ({"round": 8}, "--round makes the ranks of one method multiples; auto chooses among the sizes of several"),
    ],
)
def test_what_a_mixture_cannot_honour_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WeftError, match=sentence):
        weft.compress(llama(1), "auto", budget="5 bits", batches=task(), **given)


def test_a_size_that_no_candidate_has() -> None:
    model = llama(1)
    with pytest.raises(WeftError, match=r"gives .* the size 3, but auto offers \('kfac"):
        weft.compress(model, "auto", allocate=dict.fromkeys(linear_layers(model), 3), batches=task())


@pytest.mark.parametrize("name", ["auto", "wanda", "dsformer", "modegpt", "eora"])
def test_what_a_survey_finds_holds_no_matrix_by_its_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms are trainable: a loss that remembered how it was made would keep every dense matrix of the block."""
    found, put = list[torch.Tensor](), Store.put

    def watched(store: Store, key: str, piece: Any) -> None:
        found.extend(t for which, t in piece.tensors.items() if which.endswith(":losses"))
        put(store, key, piece)

    monkeypatch.setattr(Store, "put", watched)
    chain = ["nf2", "eora"] if name == "eora" else [name]
    weft.compress(llama(1), chain, budget="6 bits" if name == "auto" else 0.8, allocate="best", batches=task())
    assert found and all(t.grad_fn is None for t in found)


@pytest.mark.parametrize("settings", [{"allocate": "lems"}, {"sequential": False}])
def test_pieces_of_codes_that_stand_in_several_choices_are_kept_on_a_disk(tmp_path: Path, settings: Any) -> None:
    model = llama(1)
    done = weft.compress(
        model, "auto", budget="3 bits", methods="rtn,rtn+eora", batches=task(), progress=tmp_path, **settings
    )
    assert done.allocation.spent <= done.allocation.allowed and any(tmp_path.iterdir())
