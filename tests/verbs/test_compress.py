"""Compression as a whole: on models in memory, and from directory to directory."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import processes
from tests.stats.models import GROUPED, batches, build, ids
from weft import signals
from weft.allocate import ALLOCATIONS, Allocation, Choice, Shape
from weft.errors import WeftError
from weft.methods import METHODS
from weft.methods.base import LowRankSplit
from weft.runs.pieces import Piece, Store
from weft.stats import calibrate as collection
from weft.stats.calibrate import calibrate
from weft.terms import LowRank, SumLinear
from weft.terms.layers import linear_layers, shape_of, weight_of
from weft.verbs import compress as verb
from weft.verbs import moments, placing, spending
from weft.verbs import survey as surveying
from weft.verbs.compress import compress, needs, run
from weft.verbs.merge import merge

NAMES = [
    name for name, method in METHODS.items() if method.kind == "compress" and isinstance(method.split, LowRankSplit)
]


def sums(model: nn.Module) -> dict[str, SumLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SumLinear)}


def logits(model: nn.Module, seed: int = 7) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(2, 8, seed)).logits


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(one: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    a, b = ({n: m.dense() for n, m in sums(model).items()} for model in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


# in memory


@pytest.mark.parametrize("name", NAMES)
def test_every_method_with_its_own_allocation(name: str) -> None:
    model, data = build("llama"), batches("llama")
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    before = logits(model)
    done = compress(model, name, budget=0.6, batches=data)
    assert done.allocation.spent <= done.allocation.allowed == int(0.6 * done.allocation.total)
    found = sums(model)
    assert {n: m.terms["low_rank"].rank for n, m in found.items()} == {
        n: r for n, r in done.allocation.items() if r is not None
    }
    assert sum(term.nbytes for m in found.values() for term in m.terms.values()) == sum(
        choice.bytes for choice in done.allocation.choices.values() if choice.size is not None
    )
    assert model.lm_head.weight is head and model.model.embed_tokens.weight is embedding
    assert all(m.weight.dtype == torch.float32 and not m.training for m in found.values())
    after = logits(model)
    assert torch.isfinite(after).all() and not torch.equal(after, before)


# relevance is of units of joints: tests/methods/test_lrp.py
@pytest.mark.parametrize("allocate", [name for name in ALLOCATIONS if "relevance" not in ALLOCATIONS[name].reads])
def test_every_allocation(allocate: str) -> None:
    model = build("llama")
    done = compress(model, "svd-llm", budget=0.5, allocate=allocate, batches=batches("llama"), round=2)
    assert done.allocation.allocate == allocate and 0.3 < done.allocation.spent / done.allocation.total <= 0.5
    assert all(rank is None or rank % 2 == 0 for rank in done.allocation.values())
    assert done.allocation.details == {"round": 2}


def test_a_budget_of_everything_changes_nothing() -> None:
    model = build("llama")
    before = copy.deepcopy(model)
    compress(model, "svd", budget=1.0)
    assert equal(model, before) and not sums(model)


def test_the_sensitivity_search_measures_all_the_calibration_text() -> None:
    model, data = build("llama"), [{"input_ids": ids(2, 8, 1)}, {"input_ids": ids(1, 20, 2)}]
    layers = tuple(linear_layers(model))
    plan = surveying.Plan(method=METHODS["svd"], options={}, layers=layers, reads=("spectrum", "measure"))
    store = Store()
    surveying.survey(model, plan, surveying.offered(model, plan), data, None, store)
    measure = placing.measure(model, plan, data, store)
    before, name = copy.deepcopy(model), layers[0]
    (measured,) = measure(name, [3])
    assert equal(model, before)

    compress(model, "svd", allocate={n: 3 if n == name else None for n in layers})
    flat = nn.functional.cross_entropy
    with torch.no_grad():  # every prediction counts once, whatever the length of its batch
        each = [(model(input_ids=b["input_ids"]).logits[:, :-1], b["input_ids"][:, 1:]) for b in data]
    losses = torch.cat([flat(scores.flatten(0, 1), labels.flatten(), reduction="none") for scores, labels in each])
    assert measured == pytest.approx(losses.mean().item(), rel=1e-5)
    assert abs(measured - losses[:14].mean().item()) > 1e-3


@pytest.mark.parametrize("name", ["svd", "svd-llm", "kfac-svd", "fwsvd", "asvd"])
def test_a_layer_becomes_the_methods_own_truncation(name: str) -> None:
    model, data = build("llama"), batches("llama")
    dense = copy.deepcopy(model)
    stats = calibrate(model, data, METHODS[name].needs)
    done = compress(model, name, budget=0.5, allocate="uniform", batches=data)
    factorise = METHODS[name].split.factorise
    assert factorise is not None
    for layer, rank in done.allocation.items():
        factors = factorise(weight_of(dense.get_submodule(layer), torch.float64), stats[layer]).truncate(rank or 0)
        torch.testing.assert_close(sums(model)[layer].dense(), (factors.B @ factors.A).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_transposed_weights_and_biases(name: str) -> None:
    model, data = build(name), batches(name)
    dense = copy.deepcopy(model)
    compress(model, "svd-llm", budget=0.5, batches=data)
    for layer, new in sums(model).items():
        old = dense.get_submodule(layer)
        assert torch.equal(new.bias, old.bias)
        assert new.transposed == (name == "gpt2")
    merge(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in dense.named_modules()}


def test_tied_embeddings_stay_tied_and_whole() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).eval()
    done = compress(model, "svd", budget=0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("lm_head" in name or "embed" in name for name in done.allocation)


def test_grouped_query_attention_has_ranks_of_its_shapes() -> None:
    model = build("llama")
    done = compress(model, "svd", budget=0.5)
    assert done.allocation.shapes["model.layers.0.self_attn.k_proj"] == (8, 16)
    assert done.allocation["model.layers.0.self_attn.k_proj"] == int(0.5 * 8 * 16 / 24)


def test_layers_left_out() -> None:
    model = build("llama")
    every = list(linear_layers(model))
    assert list(linear_layers(model, "!*.0.*q_proj")) == [n for n in every if ".0." not in n or "q_proj" not in n]
    assert list(linear_layers(model, ["*mlp*", "!*up_proj"])) == [n for n in every if "mlp" in n and "up" not in n]
    assert linear_layers(model, []) == {}
    with pytest.raises(WeftError, match=r"The layer pattern '!\*mlpp\*' matches no linear layer"):
        linear_layers(model, "!*mlpp*")
    with pytest.raises(WeftError, match=r"The patterns !\* leave no linear layer"):
        linear_layers(model, "!*")


def test_chosen_layers_only() -> None:
    model = build("llama")
    done = compress(model, "svd", budget=0.5, layers=["*mlp*", "*.0.*q_proj"])
    assert len(done.allocation) == 7 and sums(model).keys() == set(done.allocation)


def test_a_budget_that_leaves_all_as_it_is_says_so() -> None:
    with pytest.warns(UserWarning, match=r"The budget of 40 bits keeps all 14 matrices as they are"):
        compress(build("llama"), "svd", budget="40 bits")


def test_half_precision_weights_stay_half() -> None:
    model = build("llama").bfloat16()
    compress(model, "kfac-svd", budget=0.5, batches=batches("llama"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_statistics_may_be_given() -> None:
    data = batches("llama")
    for method in ("kfac-svd", "svd-llm", "afm"):
        one, other = build("llama"), build("llama")
        stats = calibrate(other, data, needs(method))
        compress(one, method, budget=0.5, batches=data)
        compress(other, method, budget=0.5, stats=stats)
        assert equal(one, other)


def test_needs_are_those_of_method_and_allocation() -> None:
    assert needs("svd") == () and needs("svd-llm") == ("input_moment",)
    assert needs("svd-llm", allocate="best") == needs("kfac-svd") == ("input_moment", "output_grad_moment")
    with pytest.raises(WeftError, match="no method called 'svd-lm'; the nearest are: svd-llm"):
        needs("svd-lm")


@pytest.mark.parametrize("method", ["kfac-svd", "fwsvd", "afm"])
@pytest.mark.parametrize("sequential", [False, True])
def test_one_block_at_a_time_gives_the_same_bits(method: str, sequential: bool) -> None:
    data = batches("llama")
    whole, by_block = build("llama"), build("llama")
    a = compress(whole, method, budget=0.5, batches=data, sequential=sequential)
    b = compress(by_block, method, budget=0.5, batches=data, sequential=sequential, by_block=True)
    assert a.allocation == b.allocation and equal(whole, by_block)


def test_sequential_is_one_shot_where_nothing_comes_before() -> None:
    """q, k and v of the first block see the same inputs in both forms; later layers see the compressed ones'."""
    data = batches("llama")
    one_shot, walked = build("llama"), build("llama")
    compress(one_shot, "svd-llm", budget=0.5, batches=data, sequential=False)
    compress(walked, "svd-llm", budget=0.5, batches=data, sequential=True)
    for name, layer in sums(one_shot).items():
        other = sums(walked)[name].dense()
        first = "layers.0.self_attn" in name and "o_proj" not in name
        assert torch.allclose(layer.dense(), other, rtol=1e-4, atol=1e-5) == first


def outputs_error(dense: nn.Module, model: nn.Module, data: Any) -> float:
    with torch.no_grad():
        pairs = [(dense(**batch).logits, model(**batch).logits) for batch in data]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_correction_brings_the_calibration_outputs_nearer() -> None:
    dense, data = build("gpt2"), [{"input_ids": ids(16, 24, seed=3)}]
    errors = {}
    for correction in (0.0, 0.5):
        model = copy.deepcopy(dense)
        compress(model, "svd-llm", budget=0.7, batches=data, sequential=True, correction=correction)
        errors[correction] = outputs_error(dense, model, data)
    assert errors[0.5] < errors[0.0]


def test_correction_without_compression_before_it_is_none() -> None:
    """One layer alone: its inputs have not drifted, so every correction is the plain answer."""
    data = batches("llama")
    plain, corrected = build("llama"), build("llama")
    only = "model.layers.0.self_attn.q_proj"
    compress(plain, "svd-llm", budget=0.5, layers=only, batches=data, sequential=True)
    compress(corrected, "svd-llm", budget=0.5, layers=only, batches=data, sequential=True, correction=1.0)
    close(plain, corrected, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_afm_restores_the_mean_of_every_output(name: str) -> None:
    """Exactly so for the first layers of the first block, whose inputs are those of the dense model."""
    model, data = build(name), batches(name)
    layer = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[name]
    before = calibrate(model, data, ["output_mean"], layers=layer)[layer]["output_mean"]
    compress(model, "afm", budget=0.5, batches=data)
    assert model.get_submodule(layer).bias is not None
    after = calibrate(model, data, ["output_mean"], layers=layer)[layer]["output_mean"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


# ranks that the user gives


def test_ranks_as_mapping_file_and_path(tmp_path: Path) -> None:
    first = build("llama")
    done = compress(first, "svd", budget=0.5)
    done.allocation.save(tmp_path / "ranks.json")
    for given in (dict(done.allocation), done.allocation, tmp_path / "ranks.json", str(tmp_path / "ranks.json")):
        model = build("llama")
        again = compress(model, "svd", allocate=given)
        assert equal(model, first)
        assert dict(again.allocation) == dict(done.allocation) and again.allocation.allocate == "given"


def test_ranks_edited_by_hand(tmp_path: Path) -> None:
    model = build("llama")
    compress(copy.deepcopy(model), "svd", budget=0.5).allocation.save(tmp_path / "ranks.json")
    record = json.loads((tmp_path / "ranks.json").read_text())
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    record["layers"][up]["size"], record["layers"][down]["size"] = 16, "dense"
    (tmp_path / "ranks.json").write_text(json.dumps(record))
    done = compress(model, "svd", allocate=tmp_path / "ranks.json")
    assert sums(model)[up].terms["low_rank"].rank == 16  # more than saves, and asked for
    assert type(model.get_submodule(down)) is nn.Linear and done.allocation[down] is None


# again


def test_a_compressed_model_can_be_compressed_further() -> None:
    model, data = build("gpt2"), batches("gpt2")
    compress(model, "svd-llm", budget=0.7, batches=data)
    done = compress(model, "svd-llm", budget=0.4, batches=data)
    found = sums(model)
    assert all(isinstance(m.terms["low_rank"], LowRank) and len(m.terms) == 1 for m in found.values())
    assert 4 * sum(m.num_params - m.bias.numel() for m in found.values()) <= done.allocation.allowed
    assert all(m.transposed for m in found.values())  # it is still a Conv1D that they stand for
    with pytest.raises(WeftError, match=r"compressed already: its matrices keep 0\.3.* within the budget of 0\.6"):
        compress(model, "svd-llm", budget=0.6, batches=data)


def test_sizes_count_the_rest_of_the_model() -> None:
    model = build("llama")
    size = sum(p.numel() for p in model.parameters()) * 4
    matrices = 4 * sum(weight_of(m).numel() for m in linear_layers(model).values())
    done = compress(model, "svd", budget=f"{size - matrices // 2}B")
    assert done.allocation.allowed == matrices // 2
    after = sum(p.numel() for p in model.parameters()) * 4
    assert after <= size - matrices // 2
    smaller = compress(model, "svd", budget=f"{size - matrices * 6 // 10}B")  # again, from what is left
    assert sum(p.numel() for p in model.parameters()) * 4 <= size - matrices * 6 // 10
    assert smaller.allocation.allowed == matrices - matrices * 6 // 10


# what is refused, before any work


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything is calibrated or factorised."""

    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(spending, "survey", started)
    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", started)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "svdllm"},
        "There is no method to compress, quantize or prune called 'svdllm'; the nearest are: svd-llm",
    ),
    (
        {"method": "minitronn"},
        "There is no method to compress, quantize or prune called 'minitronn'; the nearest are: minitron",
    ),
    ({"method": "loram"}, "loram cuts a model to another shape, and no weight to fewer bytes: use weft finetune"),
    ({"method": "lora"}, "There is no method to compress, quantize or prune called 'lora': it is of kind adapt;"),
    ({"budget": 1.2}, "The budget 1.2 is out of range: it is the share of parameters kept, above 0 and at most 1."),
    ({"budget": "lots"}, "The budget 'lots' is no share and no size; give what to keep, as 0.6, 60%"),
    (
        {"budget": 0.01},
        "The budget keeps 0.0100 of the matrices' bytes (",
    ),
    (
        {"budget": "5kB"},
        "The budget of 0.005MB is below what cannot be compressed: embeddings, norms and head take 0.00",
    ),
    ({"allocate": "unifrom"}, "There is no allocation called 'unifrom'; the nearest are: uniform"),
    ({"allocate": {"a": 3}}, "allocate and the model differ in the layer a; make an allocation for this model"),
    ({"allocate": "none.json"}, "none.json is not an allocation file ([Errno 2] No such file or directory"),
    ({"layers": "*mlpp*"}, "The layer pattern '*mlpp*' matches no linear layer; the nearest names are: "),
    ({"round": 0}, "--round is 0: ranks are multiples of a whole number from 1 on."),
    (
        {"round": 64},
        "The budget keeps 0.6000 of the matrices' bytes (19.200 bits a weight), but the smallest",
    ),
    ({"correction": 2.0}, "The correction is 2.0; it is a share between 0 and 1."),
    ({"rigde": 1}, "The method 'svd-llm' has no option 'rigde'; its options are: ridge."),
    ({"method": "gptq", "bits": "three"}, "The option bits of 'gptq' is 'three': give a number from 0 on"),
    ({"ridge": "big"}, "The option ridge of 'svd-llm' is 'big': give a number, such as "),
    ({"method": "fwsvd", "axis": "up"}, "fwsvd's axis is 'input' or 'output', not 'up'."),
    ({"batches": None}, "The method 'svd-llm' needs calibration text here; give batches."),
    ({"batches": None, "method": "svd", "allocate": "asvd"}, "The method 'svd' needs calibration text here; give"),
    ({"batches": None, "stats": {}, "sequential": True}, "The method 'svd-llm' needs calibration text here; give"),
    (
        {"method": ["rtn", "eora"], "bits": 3, "allocate": "asvd"},
        "This allocation measures what a cut does to the model",
    ),
    ({"batches": None, "stats": {"model.layers.0.self_attn.q_proj": {}}}, "The statistics lack input_moment of layer"),
]


@pytest.mark.parametrize("arguments, sentence", MISTAKES, ids=[str(m[0])[:40] for m in MISTAKES])
def test_mistakes_are_sentences(no_work: None, arguments: dict[str, Any], sentence: str) -> None:
    model = build("llama")
    with pytest.raises(WeftError) as error:
        compress(model, **{"method": "svd-llm", "batches": batches("llama"), **arguments})
    assert str(error.value).startswith(sentence)
    assert not sums(model)


def test_ranks_of_another_model_are_refused(no_work: None, tmp_path: Path) -> None:
    model = build("llama")
    shapes = {name: (3, 3) for name in linear_layers(model)}
    Allocation({name: Choice(1, 24) for name in shapes}, {name: Shape(3, 3) for name in shapes}).save(
        tmp_path / "a.json"
    )
    with pytest.raises(WeftError, match=r"a.json and the model differ in the layer model.layers.0.mlp.down_proj"):
        compress(model, "svd", allocate=tmp_path / "a.json")
    wrong = dict.fromkeys(shapes, 99)
    with pytest.raises(WeftError, match="the rank 99, but a 16 x 16 matrix has ranks from 1 to 16"):
        compress(model, "svd", allocate=wrong)


def test_sizes_of_another_method_are_refused(no_work: None, tmp_path: Path) -> None:
    model = build("llama")
    shapes: dict[str, Any] = {name: Shape(*shape_of(layer)) for name, layer in linear_layers(model).items()}
    file = tmp_path / "bits.json"
    Allocation({name: Choice(3, 24, method="nf") for name in shapes}, shapes).save(file)
    with pytest.raises(WeftError, match="a size of nf, not of svd: give --method nf"):
        compress(model, "svd", allocate=file)  # 3 bits are no rank 3


@pytest.mark.parametrize("method", ["svd", "welore", "svd-llm"])
def test_an_allocation_by_the_weights_themselves_serves_a_walk_too(method: str) -> None:
    model = build("llama")
    done = compress(model, method, budget=0.6, allocate="welore", batches=batches("llama"), sequential=True)
    assert 0.5 < done.allocation.spent / done.allocation.total <= 0.6


def test_a_layer_that_the_walk_leaves_out_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an expert that no token reaches any more."""
    walk = placing.walk
    monkeypatch.setattr(
        placing, "walk", lambda *args, **more: (g for g in walk(*args, **more) if not g.names[0].endswith("down_proj"))
    )
    model = build("llama")
    allocation = compress(model, "rtn", budget="4 bits", batches=batches("llama"), sequential=True).allocation
    for name, choice in allocation.choices.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SumLinear) == (choice.size is not None) != name.endswith("down_proj")
        assert choice.bytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


def test_a_weight_with_nan_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(WeftError, match="The weight of layer model.layers.1.mlp.up_proj holds NaN or infinity"):
        compress(model, "svd")


def test_given_statistics_that_cannot_be_are_named() -> None:
    model = build("llama")
    stats = calibrate(model, batches("llama"), ["input_moment"])
    stats["model.layers.1.mlp.down_proj"]["input_moment"][0, 0] = float("nan")
    with pytest.raises(WeftError, match=r"model.layers.1.mlp.down_proj \(16 x 24\) cannot be factorised: .* NaN"):
        compress(model, "svd-llm", stats=stats)


# progress


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Raise KeyboardInterrupt once `count` pieces are finished."""
    put, done = Store.put, []

    def counted(self: Store, name: str, piece: Piece) -> None:
        put(self, name, piece)
        done.append(name)
        if len(done) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", counted)


@pytest.mark.parametrize(
    "method, sequential, pieces",
    [("kfac-svd", False, 2), ("afm", False, 2), ("kfac-svd", True, 4), ("afm", True, 2)],  # afm's walk needs no survey
)
def test_interrupted_work_goes_on_to_the_same_bits(
    method: str, sequential: bool, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"budget": 0.5, "batches": batches("llama"), "sequential": sequential, "correction": 0.5}
    whole = build("llama")
    compress(whole, method, **settings)
    for count in {1, pieces - 1, pieces}:
        place = tmp_path / str(count)
        place.mkdir()
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(KeyboardInterrupt):
                compress(build("llama"), method, progress=place, **settings)
        finished = {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
        again = build("llama")
        compress(again, method, progress=place, **settings)
        assert equal(again, whole)
        assert finished.items() <= {f.name: f.stat().st_mtime_ns for f in place.iterdir()}.items()  # nothing done twice


def test_finished_pieces_serve_the_same_work_alone(tmp_path: Path) -> None:
    """Another method, option, text or model takes nothing for its own; another budget takes the factors."""
    data = batches("llama")

    def files(method: str = "svd-llm", data: Any = data, change: Any = None, **settings: Any) -> int:
        model = build("llama")
        if change is not None:
            change(model)
        expected = copy.deepcopy(model)
        compress(model, method, progress=tmp_path, batches=data, **settings)
        compress(expected, method, batches=data, **settings)
        assert equal(model, expected)
        return len(list(tmp_path.glob("survey-*")))

    assert files() == 2
    assert files(budget=0.4) == 2
    assert files(sequential=True) == 2  # the walk factorises by itself
    assert files("svd") == 4
    assert files(ridge=0.3) == 6
    assert files(data=data[:1]) == 8
    assert files(change=lambda m: m.model.layers[0].mlp.up_proj.weight.data.mul_(2)) == 10


# from directory to directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.py"
    path.write_text(Path(json.__file__).read_text() + Path(copy.__file__).read_text())
    return path


@pytest.fixture
def settings(tiny_directory: Path, text: Path) -> dict[str, Any]:
    return {"model": str(tiny_directory), "calibration": text, "windows": 4, "window": 32, "budget": 0.5}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_layers_that_are_cut_together_count_as_covered(settings: dict[str, Any], tmp_path: Path) -> None:
    """They stand in the allocation under the name of their joint."""
    result = run(out=tmp_path / "out", **{**settings, "method": "modegpt", "budget": 0.8})
    assert result["covered"] == 1 and result["left"] == [] and result["matrices"] == 14


def test_layers_that_a_method_cannot_cut_are_left(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning):
        result = run(out=tmp_path / "out", **{**settings, "method": "lrp-pruning", "budget": 0.9})
    assert result["covered"] < 1 and any("q_proj" in name for name in result["left"])


def test_a_directory_holds_all_that_is_needed(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(out=out, **settings)
    assert files(out) >= {"config.json", "model.safetensors", "run.json", "allocation.json", "README.md"}
    assert files(out) >= {"tokenizer.json", "tokenizer_config.json"}
    assert files(tmp_path) == {"out"}
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == "compress" and record["arguments"]["budget"] == 0.5 and record["seed"] == 0
    assert record["metrics"].items() <= result.items() and result["output"] == str(out)
    assert result["covered"] == 1 and result["left"] == []
    allocation = Allocation.load(out / "allocation.json")
    assert allocation.spent == result["matrix_bytes"] <= result["matrix_bytes_allowed"]
    assert "weft compress" in (out / "README.md").read_text()
    stored = sum(t.numel() for t in load_file(out / "model.safetensors").values())
    assert stored == result["parameters"] < result["parameters_before"]


@pytest.mark.parametrize("method", ["kfac-svd", "afm"])
def test_the_directory_opens_natively_with_equal_logits(
    settings: dict[str, Any], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Tensor] = []
    save = verb.save_model

    def seen(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        saved.append(logits(model))
        save(model, *args, **kwargs)

    monkeypatch.setattr(verb, "save_model", seen)
    run(out=tmp_path / "out", method=method, **settings)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(opened), saved[0])
    biases = [m.bias for m in sums(opened).values()]
    assert all(b is not None and b.any() for b in biases) == (method == "afm")  # new ones, in a model without


def test_the_same_call_writes_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(out=tmp_path / name, **settings)
    for file in ("model.safetensors", "allocation.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_allocation_file_is_used_again(settings: dict[str, Any], tmp_path: Path) -> None:
    run(out=tmp_path / "a", **settings)
    file = str(tmp_path / "a" / "allocation.json")
    with pytest.raises(WeftError, match="Sizes are given, which leave nothing of the budget of .* to choose"):
        run(out=tmp_path / "b", allocate=file, **settings)
    run(out=tmp_path / "b", allocate=file, **{**settings, "budget": None})
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_compressed_directory_is_compressed_further(settings: dict[str, Any], tmp_path: Path) -> None:
    run(out=tmp_path / "a", **settings)
    result = run(out=tmp_path / "b", **{**settings, "model": str(tmp_path / "a"), "budget": 0.3})
    assert result["share_kept"] <= 0.3 and hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_a_text_of_one_line_is_too_short(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello\n")
    (tmp_path / "empty.txt").write_text("  \n")
    for name, sentence in (("short", "The text is too short"), ("empty", "empty")):
        with pytest.raises(WeftError, match=sentence):
            run(out=tmp_path / "out", **{**settings, "calibration": tmp_path / f"{name}.txt"})
    assert files(tmp_path) == {"short.txt", "empty.txt"}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"method": "svdllm"}, "no method to compress, quantize or prune called 'svdllm'"),
        ({"allocate": "bst"}, "no allocation called 'bst'; the nearest are: best"),
        ({"budget": "0"}, "out of range"),
        ({"windows": 0}, "--windows of at least 1"),
        ({"window": 4096}, "The window is 4096 tokens and the model's context 128: give a smaller --window"),
        ({"windows": 10**6}, "The text is too short: 1000000 windows of 32 tokens need 32000000 tokens"),
        ({"seed": -1}, "seed"),
        ({"alpha": 1}, "has no option 'alpha'"),
        ({"calibration": "none.txt"}, "none.txt"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(verb, "load_model", None)
    with pytest.raises(WeftError, match=sentence):
        run(out=tmp_path / "out", **{**settings, **change})
    assert not files(tmp_path)


def test_an_output_that_is_taken_is_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    monkeypatch.setattr(verb, "load_model", None)
    with pytest.raises(WeftError, match="exists and is not empty; choose another -o, or remove it first"):
        run(out=tmp_path / "out", **settings)
    assert files(tmp_path / "out") == {"mine.txt"}


def test_a_full_disk_leaves_nothing_half_written(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "expected"
    run(out=expected, **settings)

    def full(self: Any, directory: Path, **kwargs: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(hf.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(WeftError, match="The disk is full: nothing was written to .*out"):
            run(out=tmp_path / "out", **settings)
    assert files(tmp_path) == {"expected", "out.partial"}
    assert files(tmp_path / "out.partial") == {"arguments.json", "progress"}
    run(out=tmp_path / "out", **settings)
    assert files(tmp_path) == {"expected", "out"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["calibration", "survey", "saving"])
def test_an_interrupted_run_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run(out=tmp_path / "expected", **settings)
    with monkeypatch.context() as patch:
        if where == "survey":
            stop_after(patch, 1)
        else:
            module, name = {"calibration": (moments, "calibrate"), "saving": (verb, "save_model")}[where]

            def interrupted(*args: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    if where != "calibration":
        with pytest.raises(WeftError, match="budget was 0.5 and is 0.4"):
            run(out=tmp_path / "out", **{**settings, "budget": 0.4})
    run(out=tmp_path / "out", **settings)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name, sequential, where, kept",
    [
        ("SIGTERM", False, "_survey_site", "survey-0"),
        ("SIGUSR1", True, "_split", "block-"),
        ("SIGHUP", False, "run_batch", "*"),
    ],
)
def test_a_signal_lets_the_block_under_way_finish(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, sequential: bool, where: str, kept: str,
) -> None:  # fmt: skip
    """It comes in the midst of the first block, or of the statistics; the same command ends with the same bytes."""
    chosen = {**settings, "sequential": sequential, "method": "svd-llm", "windows": 12}
    run(out=tmp_path / "expected", **chosen)
    module = {"run_batch": collection, "_survey_site": surveying, "_split": placing}[where]
    calls, work = [], getattr(module, where)

    def sending(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.Signals[name])
        return work(*args, **kwargs)

    out = tmp_path / "out"
    before = signal.signal(signal.Signals[name], signal.SIG_DFL)  # under nohup it is ignored, and stays so
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=name), signals.listening():
            patch.setattr(module, where, sending)
            run(out=out, **chosen)
    finally:
        signal.signal(signal.Signals[name], before)
    assert not out.exists()
    assert len(calls) >= 2 and len(list((tmp_path / "out.partial" / "progress").glob(f"{kept}*"))) == 1
    run(out=out, **chosen)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()


def weft_until(stop: int, words: list[str]) -> None:
    """The command, interrupted as it has kept so many pieces; 0: not at all."""
    seen, put = [], Store.put

    def counted(self: Store, name: str, tensors: Any) -> None:
        put(self, name, tensors)
        seen.append(name)
        if len(seen) == stop:
            os.kill(os.getpid(), signal.SIGINT)

    Store.put = counted  # type: ignore[method-assign]
    processes.weft(words)


def words(out: Path, settings: dict[str, Any], *more: str) -> list[str]:
    options = [f"--{key}={value}" for key, value in settings.items() if key != "model"]
    return ["compress", settings["model"], "-o", str(out), *options, *more]


def command(out: Path, settings: dict[str, Any], *more: str, stop: int = 0) -> tuple[int, str]:
    """The exit code of the command in a process of its own, and what it wrote to stderr."""
    started = processes.start(out.parent, weft_until, stop, words(out, settings, *more))
    return started.wait(), started.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more, points", [((), (1, 2)), (("--sequential",), (1, 3))])
def test_sigint_in_a_process_and_the_same_command_again(
    settings: dict[str, Any], tmp_path: Path, more: tuple[str, ...], points: tuple[int, ...]
) -> None:
    assert command(tmp_path / "expected", settings, *more)[0] == 0
    for stop in points:
        out = tmp_path / f"out{stop}"
        code, said = command(out, settings, *more, stop=stop)
        assert code == 130
        assert said.strip().splitlines()[-1] == (
            "weft: Interrupted; the same command goes on from the last finished step."
        )
        assert not out.exists() and (tmp_path / f"out{stop}.partial").is_dir()
        assert command(out, settings, *more)[0] == 0
        assert not (tmp_path / f"out{stop}.partial").exists()
        for file in ("model.safetensors", "allocation.json", "config.json"):
            assert (out / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


@pytest.mark.slow
def test_sigint_at_any_moment(settings: dict[str, Any], tmp_path: Path) -> None:
    """A signal from outside, earlier and earlier, until one comes while it works."""
    out = tmp_path / "out"
    call = [sys.executable, "-m", "weft", *words(out, settings)]  # a Python of its own, which hashes by another seed
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.partial"
    while process.poll() is None and not partial.exists():
        time.sleep(0.005)  # a loop without it takes the processor from what it waits for
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (0, 130) and (process.returncode == 0) == out.exists()
    if not out.exists():
        assert command(out, settings)[0] == 0
    assert command(tmp_path / "expected", settings)[0] == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()


def test_windows_begin_as_asked(settings: dict[str, Any], tmp_path: Path) -> None:
    for bos in (False, True):
        run(out=tmp_path / str(bos), bos=bos, **settings)
    without, with_it = (load_file(tmp_path / str(bos) / "model.safetensors") for bos in (False, True))
    assert without.keys() == with_it.keys()
    assert any(not torch.equal(tensor, with_it[name]) for name, tensor in without.items())
