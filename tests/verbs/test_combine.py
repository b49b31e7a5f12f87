"""Combining adapters: the sum of what each does, in both formats, and one sentence for what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.terms.adapters import find_adapter
from weft.testing_adapters import task, tiny_gpt2, tiny_llama
from weft.verbs.combine import run

Q = "model.layers.0.self_attn.q_proj"


def moved(make: Any, method: str, rank: int, seed: int, **options: Any) -> nn.Module:
    """A model with an adapter that has learned something."""
    model = weft.adapt(make(), method, rank, **options)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in find_adapter(model).named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A PiSSA adapter of rank 2 (a LoRA of rank 4) with a scale, and a LoRA of rank 3, on all layers."""
    place = tmp_path_factory.mktemp("adapters")
    weft.save_adapter(moved(tiny_llama, "pissa", 2, 1, alpha=3.0), place / "a")
    weft.save_adapter(moved(tiny_llama, "lora", 3, 2), place / "b")
    return place / "a", place / "b"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(task()[0]["input_ids"]).logits
    return out


def delta(directory: Path, layer: str = Q) -> Tensor:
    model = weft.load_adapter(tiny_llama(), directory)
    (*terms,) = find_adapter(model).terms[layer].values()
    return sum((term.dense().detach() for term in terms), start=torch.zeros(()))


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_the_exact_methods_are_both_adapters_in_use(method: str, two: tuple[Path, Path], tmp_path: Path) -> None:
    both = weft.load_adapter(weft.load_adapter(tiny_llama(), two[0]), two[1], name="other")
    combined = weft.combine(two, method=method)
    one = weft.load_adapter(tiny_llama(), combined)
    torch.testing.assert_close(logits(one), logits(both), atol=1e-5, rtol=1e-5)
    assert combined.rank == 7
    combined.save(tmp_path / "ab")
    torch.testing.assert_close(logits(weft.load_adapter(tiny_llama(), tmp_path / "ab")), logits(one))


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "lego"])
def test_the_calls_of_the_issue_and_every_reader(method: str, two: tuple[Path, Path], tmp_path: Path) -> None:
    made = weft.combine([f"{two[0]}/", f"{two[1]}/"], method=method, rank=6, weights=[0.7, -0.5], out=tmp_path / "ab")
    assert made.rank == (7 if method in ("linear", "cat") else 6)
    ours = logits(weft.load_adapter(tiny_llama(), tmp_path / "ab"))
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ab")
    torch.testing.assert_close(logits(theirs), ours, atol=1e-5, rtol=1e-5)
    expected = 0.7 * delta(two[0]) - 0.5 * delta(two[1])
    close = {"linear": 1e-6, "cat": 1e-6, "svd": 0.2, "lego": 2.0}[method]
    assert (delta(tmp_path / "ab") - expected).norm() <= close * expected.norm()
    assert json.loads((tmp_path / "ab" / "weft_adapter.json").read_text())["settings"]["combined"]["method"] == method
    config = json.loads((tmp_path / "ab" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and "q_proj" in config["target_modules"]


def test_svd_is_the_best_of_its_rank_and_the_default_rank(two: tuple[Path, Path], tmp_path: Path) -> None:
    assert weft.combine(two, method="svd").rank == 4
    weft.combine(two, method="svd", rank=2, out=tmp_path / "ab")
    whole = delta(two[0]) + delta(two[1])
    best = torch.linalg.svdvals(whole)[2:].norm()
    torch.testing.assert_close((whole - delta(tmp_path / "ab")).norm(), best, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_bytes(two: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        weft.combine(two, method="lego", rank=3, out=tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second


def test_the_global_seed_has_no_say_and_one_object_loads_twice(two: tuple[Path, Path]) -> None:
    torch.manual_seed(1)
    made = weft.combine(two, method="lego", rank=3)
    torch.manual_seed(2)
    model = weft.load_adapter(weft.load_adapter(tiny_llama(), made), made, name="again")
    twice = [find_adapter(model, name).terms[Q][name] for name in ("combined", "again")]
    assert twice[0].B is not twice[1].B and torch.equal(twice[0].B, twice[1].B)
    again = weft.combine(two, method="lego", rank=3).adapter.terms[Q]["combined"]
    assert torch.equal(again.B, twice[0].B)


def test_adapters_of_different_layers_ranks_and_formats(tmp_path: Path) -> None:
    weft.save_adapter(moved(tiny_llama, "lora", 2, 1, targets=["q_proj"]), tmp_path / "a", format="weft")
    weft.save_adapter(moved(tiny_llama, "lora", 3, 2, targets=["q_proj", "v_proj"]), tmp_path / "b", format="peft")
    made = weft.combine([tmp_path / "a", tmp_path / "b"], method="lego", rank=5, out=tmp_path / "ab", reweight=False)
    ranks = {layer: term["combined"].rank for layer, term in made.adapter.terms.items()}
    assert ranks == {Q: 5, Q.replace("q_proj", "v_proj"): 3}
    both = weft.load_adapter(weft.load_adapter(tiny_llama(), tmp_path / "a", "a"), tmp_path / "b", "b")
    for model in (weft.load_adapter(tiny_llama(), made), PeftModel.from_pretrained(tiny_llama(), tmp_path / "ab")):
        torch.testing.assert_close(logits(model), logits(both), atol=1e-5, rtol=1e-5)


def test_conv1d(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        weft.save_adapter(moved(tiny_gpt2, "lora", 2, seed), tmp_path / name)
    weft.combine([tmp_path / "a", tmp_path / "b"], out=tmp_path / "ab")
    both = weft.load_adapter(weft.load_adapter(tiny_gpt2(), tmp_path / "a", "a"), tmp_path / "b", "b")
    for model in (
        weft.load_adapter(tiny_gpt2(), tmp_path / "ab"),
        PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ab"),
    ):
        torch.testing.assert_close(logits(model), logits(both), atol=1e-5, rtol=1e-5)


def test_a_combined_adapter_is_trained_on(two: tuple[Path, Path]) -> None:
    model = weft.load_adapter(tiny_llama(), weft.combine(two, method="svd", rank=2))
    found = weft.trainable(model)
    assert found.count == sum(2 * (m.in_features + m.out_features) for m in model.modules() if hasattr(m, "terms"))
    model(**task()[0]).loss.backward()
    assert all(p.grad is not None for p in found.parameters.values())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "cmlora"}, "There is no method to merge called 'cmlora'"),
    ({"method": "leg"}, "There is no method to merge called 'leg'; the nearest are: lego"),
    ({"weights": [1.0]}, "There are 2 adapters and 1 weights; give one weight for each"),
    ({"weights": [1.0, float("nan")]}, "are not all finite"),
    ({"method": "svd", "rank": 8}, "the adapters have 7 components together; give 1 to 7"),
    ({"method": "lego", "rank": 0}, "Rank 0 is not possible"),
    ({"method": "svd", "canonical": True}, "'svd' has no option 'canonical'; its options are: none"),
    ({"method": "lego", "centre": 1}, "its options are: canonical, normalise, reweight, restarts"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_bad_arguments(arguments: dict[str, Any], sentence: str, two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=sentence):
        weft.combine(two, out=tmp_path / "ab", **arguments)
    with pytest.raises(WeftError, match=sentence):
        run(two, tmp_path / "ab", **arguments)
    assert not list(tmp_path.iterdir())


def test_what_is_no_list_of_adapters(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="Give a list of adapter directories"):
        weft.combine(str(two[0]))
    with pytest.raises(WeftError, match="Give a list of adapter directories"):
        weft.combine([])
    with pytest.raises(WeftError, match="holds no adapter"):
        weft.combine([two[0], tmp_path])
    with pytest.raises(WeftError, match="'rws' takes 2 adapters, in their order, and not 3"):
        weft.combine([*two, two[0]], "rws")
    (tmp_path / "mine").write_text("")
    with pytest.raises(WeftError, match="exists and is not empty"):
        weft.combine(two, out=tmp_path)


@pytest.mark.parametrize(
    ("method", "make", "reason"),
    [
        ("dora", tiny_llama, r"is a dora adapter and cannot be combined: its delta on model.* \(magnitude\)"),
        ("soma", tiny_gpt2, "it trains parameters of the model itself too"),
        ("lq-lora", tiny_llama, r"\(replacement\) is no product of two thin matrices"),
    ],
)
def test_what_is_no_lora(method: str, make: Any, reason: str, two: tuple[Path, Path], tmp_path: Path) -> None:
    weft.save_adapter(weft.adapt(make(), method, 2), tmp_path / "a")
    with pytest.raises(WeftError, match=reason):
        weft.combine([tmp_path / "a", tmp_path / "a"])


def test_an_adapter_of_peft_that_is_no_lora(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes((two[1] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(WeftError, match="is a PEFT adapter of type LOHA"):
        weft.combine([two[0], tmp_path])


def test_different_bases_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    weft.save_adapter(moved(lambda: other, "lora", 2, 1), tmp_path / "other")
    with pytest.raises(WeftError, match=r"b and .*other were made on different bases: their weights differ in model\."):
        weft.combine([two[1], tmp_path / "other"])
    weft.save_adapter(moved(lambda: tiny_llama(torch.bfloat16), "lora", 2, 1), tmp_path / "half")
    weft.save_adapter(moved(lambda: weft.quantize(tiny_llama(), "nf4"), "lora", 2, 3), tmp_path / "code")
    assert weft.combine([two[1], tmp_path / "half", tmp_path / "code"]).rank == 7, "one base in three dtypes"


def test_different_names_and_shapes_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Where nothing but PEFT's files is there, the base's name is all that is known."""
    places = [tmp_path / name for name in ("a", "b")]
    for place, name in zip(places, ("org/one", "org/two"), strict=True):
        model = moved(tiny_llama, "lora", 2, 1)
        model.config.name_or_path = name
        weft.save_adapter(model, place, format="peft")
    with pytest.raises(WeftError, match="org/one and org/two; if these are the same weights"):
        weft.combine(places)
    assert weft.combine([places[0], two[0]]).base.name == "org/one"

    def wider() -> nn.Module:
        model = tiny_llama()
        model.set_submodule(Q, nn.Linear(16, 24))
        return model

    weft.save_adapter(moved(wider, "lora", 2, 1, targets=["q_proj"]), tmp_path / "wide", format="peft")
    with pytest.raises(WeftError, match=f"{Q} is 16 x 16 in one and 24 x 16 in the other"):
        weft.combine([places[0], tmp_path / "wide"])


def test_run_writes_what_it_did(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(two, tmp_path / "ab", method="cat", rank=5)
    assert done["rank"] == 7 and "cat is exact: the rank is 7, not 5" in capsys.readouterr().err
    record = json.loads((tmp_path / "ab" / "run.json").read_text())
    assert record["command"] == "combine" and record["metrics"]["layers"] == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ab"]
    with pytest.raises(WeftError, match="not empty"):
        run(two, tmp_path / "ab")
    weft.load_adapter(tiny_llama(), tmp_path / "ab")
