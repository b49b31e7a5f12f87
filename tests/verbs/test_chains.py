"""Chains of methods and codes under a budget: what `compress` makes of more than one factorisation."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import weft
from weft.allocate import Allocation, greedy, integer_program
from weft.errors import WeftError
from weft.linalg.principal import weighted_loss
from weft.memory.live import Live
from weft.methods import METHODS
from weft.runs.pieces import Store
from weft.runs.report.frontier import frontier, frontier_page
from weft.stats.calibrate import calibrate, layers_by_block
from weft.stats.groups import moment_bytes
from weft.terms import LowRank, NormalFloat, SumLinear
from weft.terms.layers import linear_layers, weight_of
from weft.testing_adapters import task
from weft.verbs.compress import run
from weft.verbs.moments import UNIT
from weft.verbs.survey import Plan, moments_of, offered, survey


def llama(blocks: int = 2) -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": blocks}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).eval()


def output_error(model: nn.Module, original: nn.Module, stats: Any) -> float:
    total = 0.0
    for name in linear_layers(original):
        D = (weight_of(model.get_submodule(name)) - weight_of(original.get_submodule(name))).double()
        total += float((D @ stats[name]["input_moment"] * D).sum())
    return total


def test_codes_and_what_takes_up_their_error() -> None:
    original, alone, chained = llama(), llama(), llama()
    weft.compress(alone, "nf2")
    done = weft.compress(chained, ["nf2", "eora"], budget="6 bits", batches=task())
    stats = calibrate(original, task(), ("input_moment",))
    assert output_error(chained, original, stats) < 0.8 * output_error(alone, original, stats)
    assert done.allocation.bits_per_weight <= 6 and done.allocation.spent <= done.allocation.allowed
    for name, layer in linear_layers(chained).items():
        assert isinstance(layer, SumLinear) and list(layer.terms) == ["base", "eora"]
        assert isinstance(layer.terms["base"], NormalFloat) and isinstance(layer.terms["eora"], LowRank)
        assert done.allocation[name] == [2, layer.terms["eora"].rank]
        assert sum(t.nbytes for t in layer.terms.values()) == done.allocation.choices[name].bytes  # type: ignore[misc]
    assert len({layer.terms["eora"].rank for layer in linear_layers(chained).values()}) == 1  # type: ignore[union-attr]


def test_a_chain_is_the_two_verbs_after_each_other() -> None:
    one, other = llama(), weft.quantize(llama(), "nf2")
    weft.compress(one, ["nf2", "eora"], rank=4, batches=task())
    weft.compensate(other, llama(), task(), rank=4)
    ids = task()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(one(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_the_first_of_a_chain_may_be_the_one_that_the_budget_is_spent_on() -> None:
    model = llama()
    done = weft.compress(
        model, ["nf", ("eora", {"rank": 2})], budget="6.5 bits", allocate="best", batches=task(), block=32
    )
    widths = {size[0] for size in done.allocation.values()}
    assert {size[1] for size in done.allocation.values()} == {2} and widths <= {2, 3, 4, 8} and len(widths) > 1
    assert done.allocation.bits_per_weight <= 6.5
    for name, layer in linear_layers(model).items():
        assert sum(t.nbytes for t in layer.terms.values()) == done.allocation.choices[name].bytes  # type: ignore[misc, union-attr, operator]
    again = llama()
    weft.compress(again, ["nf", ("eora", {"rank": 2})], allocate=done.allocation, batches=task(), block=32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_lorc_and_eora_each_win_in_their_own_norm() -> None:
    original, errors = llama(), {}
    stats = calibrate(original, task(), ("input_moment",))
    for then in ("lorc", "eora"):
        model = llama()
        weft.compress(model, ["nf2", then], rank=3, batches=task(), sequential=False)
        plain = sum(
            float((weight_of(model.get_submodule(n)) - weight_of(original.get_submodule(n))).square().sum())
            for n in linear_layers(original)
        )
        errors[then] = (plain, output_error(model, original, stats))
    assert errors["lorc"][0] < errors["eora"][0] and errors["eora"][1] < errors["lorc"][1]


def unit_losses(model: nn.Module, original: nn.Module) -> dict[str, float]:
    """What each layer's change is predicted to lose, by statistics of the original."""
    stats, found = calibrate(original, task(), ("input_moment", "output_grad_moment")), {}
    for name in linear_layers(original):
        D = weight_of(model.get_submodule(name), torch.float64) - weight_of(original.get_submodule(name), torch.float64)
        found[name] = float(weighted_loss(D, stats[name]["input_moment"], stats[name]["output_grad_moment"]))
    return found


def test_allocated_ranks_lose_less_than_equal_ones() -> None:
    original, losses, budget = llama(), [], 5.0
    for allocate in ("equal", "best"):
        model = llama()
        done = weft.compress(model, ["nf2", "eora"], budget=f"{budget} bits", allocate=allocate, batches=task())
        losses.append(sum(unit_losses(model, original).values()))
        assert done.allocation.bits_per_weight <= budget
        budget = done.allocation.bits_per_weight  # what equal ranks take
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("given", [False, True])
def test_a_compensation_is_predicted_in_the_unit_of_the_dense_model(given: bool) -> None:
    """Two bits are so far from the dense model that gradients there say nothing of the way back."""
    original, model = llama(), llama()
    stats = calibrate(original, task(), ("input_moment", "output_grad_moment")) if given else None
    how: dict[str, Any] = {"budget": "4 bits", "allocate": "best", "batches": task(), "sequential": False}
    done = weft.compress(model, ["nf2", "eora"], stats=stats, **how)
    losses = unit_losses(model, original)
    for name, choice in done.allocation.choices.items():
        assert choice.loss == pytest.approx(losses[name], rel=1e-3)
    assert done.layers["model.layers.0.mlp.up_proj"].choices[0].loss > 0


def test_widths_are_spent_where_they_help() -> None:
    model = llama()
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight.data *= 8  # type: ignore[operator, union-attr]
    even, best = copy.deepcopy(model), copy.deepcopy(model)
    first = weft.compress(even, "nf", budget="3.6 bits")
    second = weft.compress(best, "nf", budget="3.6 bits", allocate="best", batches=task())
    assert set(first.allocation.values()) == {3} and len(set(second.allocation.values())) > 1
    assert second.allocation.bits_per_weight <= 3.6
    losses = {name: choice.loss for name, choice in second.allocation.choices.items()}
    plan = Plan(method=METHODS["nf"], options=METHODS["nf"].options({}), layers=tuple(losses), reads=("losses",))
    infos = survey(model, plan, offered(model, plan), task(), calibrate(model, task(), plan.needs), Store())
    at_three = sum(next(c.loss for c in info.choices if c.size == 3) for info in infos.values())
    assert sum(losses.values()) < at_three
    for solve in (greedy.solve, integer_program.solve):
        found = solve({name: info.choices for name, info in infos.items()}, second.allocation.allowed)
        assert found is not None and sum(c.bytes for c in found.values()) <= second.allocation.allowed


def test_the_allocation_file_of_a_chain_serves_again(tmp_path: Path) -> None:
    one, other = llama(), llama()
    done = weft.compress(one, ["nf3", "eora"], budget="7 bits", allocate="best", batches=task())
    done.allocation.save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert all(entry["method"].startswith("nf3") for entry in record["layers"].values())
    again = weft.compress(other, ["nf3", "eora"], allocate=tmp_path / "a.json", batches=task())
    assert dict(again.allocation) == dict(done.allocation) == dict(Allocation.load(tmp_path / "a.json"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("method", "given", "sentence"),
    [
        (["eora"], {}, "There is no method to compress, quantize or prune called 'eora'"),
        (["svd", "eora"], {"budget": 0.5}, "eora offers several sizes and so does svd: give one of them a single size"),
        (["nf3", "svd"], {}, "svd would replace what nf3 made"),
        (["nf3", "eora"], {}, "eora offers several sizes: say what to keep"),
        (["nf3", "eora"], {"budget": "2 bits"}, r"The budget keeps 0\.06"),
        (["nf3", "eora"], {"rank": 65}, "Rank 65 is not possible on a"),
        (["nf3", "eora"], {"ranc": 2}, r"The option 'ranc' belongs to none of the methods; their options are \(nf3: "),
        ("nf", {}, "nf offers several sizes: say what to keep"),
        ("nf3", {"budget": "2 bits"}, "the smallest sizes take"),
        ("nf", {"budget": "4 bits", "allocate": "energy"}, "This allocation reads singular values, and nf has none"),
        ("nf", {"allocate": {"x": 3}}, "allocate and the model differ in the layer"),
        ([], {}, "There is no method; give one"),
        (["nf3", ("eora", {"ranc": 2})], {}, "The method 'eora' has no option 'ranc'"),
    ],
)
def test_mistakes(method: Any, given: dict[str, Any], sentence: str) -> None:
    model = llama()
    with pytest.raises(WeftError, match=sentence):
        weft.compress(model, method, batches=task(), **given)
    assert not any(isinstance(m, SumLinear) for m in model.modules())


def test_a_size_that_a_code_lacks() -> None:
    model = llama()
    sizes = dict.fromkeys(linear_layers(model), 5)
    with pytest.raises(WeftError, match=r"the size 5, but nf offers 2, 3, 4, 8 for a 64 x 64 matrix"):
        weft.compress(model, "nf", allocate=sizes)


def test_adapters_are_named_before_anything_is_done() -> None:
    with pytest.raises(WeftError, match=r"adapters on this model \(default\); merge or remove them first"):
        weft.compress(weft.adapt(llama(), "lora", rank=2), "svd")


def test_from_directory_to_directory(tiny_directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    small = {"calibration": text, "windows": 4, "window": 32}
    done = run(str(tiny_directory), tmp_path / "out", method="nf3", then="eora", budget="8 bits", **small)
    assert done["bits_per_weight"] <= 8 and done["bytes"] < done["bytes_before"]
    assert json.loads((tmp_path / "out/run.json").read_text())["arguments"]["then"] == "eora"
    other = run(str(tiny_directory), tmp_path / "b", method="nf3", then="eora", then_options={"rank": 1}, **small)
    assert other["bits_per_weight"] != done["bits_per_weight"]
    with pytest.raises(WeftError, match="--then-option is for the method of --then"):
        run(str(tiny_directory), tmp_path / "c", method="nf3", then_options={"rank": 1}, **small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {tuple(m.terms) for m in model.modules() if isinstance(m, SumLinear)} == {("base", "eora")}


def test_statistics_of_a_few_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many as take 1.5 times the model's bytes; the result is that of one pass."""
    model = llama(blocks=4)
    plan = Plan(method=METHODS["kfac-svd"], options={"ridge": 1e-2}, layers=tuple(linear_layers(model)))
    source = moments_of(model, plan, task(), None, Store())
    groups, block = [], 0
    while block < len(source.blocks):
        groups.append(len(source.group(block)))
        block += groups[-1]
    assert sum(groups) == 4 and len(groups) > 1
    one, other = llama(blocks=4), llama(blocks=4)
    weft.compress(one, "kfac-svd", budget=0.5, batches=task(), by_block=False)
    weft.compress(other, "kfac-svd", budget=0.5, batches=task(), progress=tmp_path)
    for a, b in zip(linear_layers(one).values(), linear_layers(other).values(), strict=True):
        torch.testing.assert_close(weight_of(a), weight_of(b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "needs"), [("svd-llm", UNIT[:1]), ("kfac-svd", UNIT)])
def test_peak_memory_is_bounded(method: str, needs: Sequence[str]) -> None:
    """Live tensors: at most four times the model's bytes, the model itself included, and one block's statistics."""
    model = llama(blocks=6)
    own = sum(p.nbytes for p in model.parameters())
    block = moment_bytes(model, layers_by_block(model, linear_layers(model))[0], needs)
    with Live() as live:
        live.count(model.parameters())
        weft.compress(model, method, budget=0.6, batches=task())
    assert 1.5 * own < live.peak <= 4 * own + block, f"{live.peak / own:.2f} times the model"


def test_the_report_says_what_was_chosen_and_why(tiny_directory: Path, tmp_path: Path) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "frontier.html"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    small: dict[str, Any] = {"calibration": text, "windows": 4, "window": 32, "budget": "5 bits"}
    with pytest.raises(WeftError, match=r"must end in \.html"):
        run(str(tiny_directory), tmp_path / "out", method="auto", report=tmp_path / "a.pdf", **small)
    done = run(str(tiny_directory), tmp_path / "out", method="auto", report=page, **small)
    words, allocation = page.read_text(), Allocation.load(tmp_path / "out/allocation.json")
    assert done["report"] == str(page) and f"{allocation.bits_per_weight:.3f} bits a weight" in words
    for name, choice in allocation.choices.items():
        assert name in words and (choice.method or "dense") in words
    assert all(said in words for said in ("measured rise", "predicted rise", "all together", "nats a token"))
    run(str(tiny_directory), tmp_path / "b", method="nf3", report=page, **{**small, "budget": None})
    assert "measured rise" in page.read_text()


def test_the_chosen_point_lies_on_the_frontier_and_long_names_are_letters_in_cells() -> None:
    done = weft.compress(llama(1), "kfac-svd", budget=0.95, batches=task())
    assert done.allocation.bits_per_weight > 8, "where the frontier ended"
    said = frontier_page("tiny", done.allocation, done.layers, {"before": 1.0, "after": 1.1})
    (curve,) = [line for line in re.findall('<polyline points="([^"]*)"', said) if " " in line]
    dots = re.findall('<circle cx="([^"]*)" cy="([^"]*)"', said)
    assert max(float(point.split(",")[0]) for point in curve.split()) >= float(dots[0][0]) - 3
    mixed = weft.compress(llama(1), "auto", budget="5 bits", batches=task())
    cells = frontier_page("tiny", mixed.allocation, mixed.layers, {"before": 1.0, "after": 1.1})
    assert " A is " in cells and max(map(len, re.findall(r'font-size="10" style="[^"]*">([^<]*)<', cells))) < 12


def test_a_frontier_of_all_methods_lies_under_each(tmp_path: Path) -> None:
    done = weft.compress(llama(1), "auto", budget="5 bits", batches=task(), methods="nf,kfac-svd")
    together = frontier(done.layers)
    for name in ("nf", "kfac-svd"):
        alone = frontier(done.layers, name)
        assert len(alone) > 4
        for bits, loss in alone:
            reached = [theirs for there, theirs in together if there <= bits]
            assert not reached or min(reached) <= 1.3 * loss + 1e-9  # budgets lie between steps
    assert min(loss for _, loss in together) < max(loss for _, loss in together)
