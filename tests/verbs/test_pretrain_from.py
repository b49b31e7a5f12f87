"""`weft pretrain --from`: a given model goes on in structure, ends as what the method leaves, and bad input is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from weft.cli import app
from weft.errors import WeftError
from weft.runs.loading import load_model, load_tokenizer
from weft.terms import LowRank, Masked, SumLinear
from weft.verbs.beginning import emptied
from weft.verbs.evaluate import evaluate
from weft.verbs.fresh import restructure
from weft.verbs.merge import run as merge
from weft.verbs.pretrain import run
from weft.verbs.quantize import run as quantize

METHODS = {
    "trp": {"energy": 0.8, "every": 2},
    "pela": {"ratio": 2.0},
    "spdf": {"sparsity": 0.5, "mask": "magnitude"},
    "nm-gradient-flow": {"n": 2, "m": 4},
    "monarch": {},
    None: {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with a tokenizer, in a directory."""
    path, tokenizer = tmp_path_factory.mktemp("given"), load_tokenizer("pico")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(150)))
    return path


@pytest.fixture
def go(tmp_path, model, text):
    def going(name="out", **arguments):
        usual = {
            "model": str(model), "text": text, "eval_text": text, "eval_windows": 2, "steps": 6, "window": 32,
            "batch": 2, "device": "cpu", "lr": 1e-3, "log_every": 1,
        }  # fmt: skip
        return run(tmp_path / name, **(usual | arguments))

    return going


@pytest.mark.parametrize("method", METHODS)
def test_a_given_model_goes_on_and_can_be_opened_and_merged(go, method, model, tmp_path):
    done = go(method=method, **METHODS[method])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["arguments"]["model"] == str(model) and done["perplexity"] > 1
    kinds = {type(t) for m in opened.modules() if isinstance(m, SumLinear) for t in m.terms.values()}
    expected = {"spdf": Masked, "nm-gradient-flow": Masked, "pela": LowRank, "trp": LowRank}
    assert method not in expected or kinds == {expected[method]}
    if kinds:
        merge(str(tmp_path / "out"), tmp_path / "dense", device="cpu")
        ids = torch.arange(12).view(1, -1)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert not any(isinstance(m, SumLinear) for m in plain.modules())
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, opened(ids).logits, rtol=1e-4, atol=1e-5)


def test_nm_gradient_flow_leaves_its_pattern_and_says_its_perplexity(go, tmp_path):
    go(method="nm-gradient-flow", n=1, m=4)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in opened.modules():
        if isinstance(layer, SumLinear):
            kept = (layer.dense() != 0).view(layer.out_features, -1, 4).sum(-1)
            assert int(kept.max()) == 1


def test_a_given_model_goes_on_at_a_tenth_of_the_rate_and_spdf_keeps_its_largest_entries(go, tmp_path, model):
    go(method="spdf", sparsity=0.5, lr=None, steps=1)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["lr"] == pytest.approx(1e-4)
    layers = [(n, m) for n, m in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_modules()]
    whole = AutoModelForCausalLM.from_pretrained(model)
    for name, layer in layers:
        if isinstance(layer, SumLinear):
            size, kept = whole.get_submodule(name).weight.abs(), layer.dense() != 0
            assert size[kept].min() >= size[~kept].max()


def test_a_weft_model_goes_on_as_it_is(go, tmp_path):
    go("sparse", method="spdf", sparsity=0.5)
    done = go("more", model=str(tmp_path / "sparse"))
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, layer in more.named_modules():
        if isinstance(layer, SumLinear):
            old = before.get_submodule(name)
            assert torch.equal(layer.terms["masked"].bits, old.terms["masked"].bits)
            assert not torch.equal(layer.terms["masked"].values, old.terms["masked"].values)
    assert done["parameters"] == sum(p.numel() for p in before.parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": None, "method": "trp"}, "--method trp goes on with a trained model: give --from MODEL; --size SIZE"),
        ({"model": None, "method": "pela"}, "--method pela goes on with a trained model: give --from MODEL."),
        ({"model": None, "size": "9m", "method": "pela"}, "--method pela goes on with a trained model"),
        ({"model": None, "method": "spdf"}, "--method spdf goes on with a trained model"),
        ({"model": None, "method": "nm-gradient-flow"}, "--method nm-gradient-flow goes on with a trained model"),
        ({"size": "9m"}, "--size is for a fresh model, and --from goes on with"),
        ({"mup": 128}, "--mup is for a fresh model"),
        ({"tokenizer": "pico"}, "brings its own tokenizer: leave out --tokenizer"),
        ({"method": "sltrain", "density": 0.1}, "--method sltrain draws its own weights and would read none of"),
        ({"low_rank": 4}, "--method low-rank draws its own weights"),
        ({"method": "trp", "rank": 4}, "--rank has no meaning for --method trp; its options are: energy"),
        ({"method": "spdf", "sparsity": 0.999}, "leaves model.layers.0.self_attn.q_proj"),
        ({"method": "nm-gradient-flow", "m": 5}, "groups of 5 entries, which do not divide the 32 inputs"),
        ({"method": "trp", "every": 6}, r"truncations \(every\) is 6 steps and the run has 6"),
        ({"method": "spdf", "optimizer": "galore", "optimizer_options": {"rank": 4}}, "no trainable matrix"),
        ({"method": "spdf", "refactorise": 2}, "works on trained LowRank terms"),
        ({"optimizer_options": {"lr": 0.5}}, "'adamw' has no option 'lr'"),
        ({"optimizer_options": {"steps": 1}}, "'adamw' has no option 'steps'"),
        ({"window": 65}, "The window is 65 tokens and the model's context 64"),
        ({"method": "pela", "plan": True}, "--plan counts one model and its pass, and pela holds the model"),
        ({"model": "nowhere/at/all"}, "There is no directory"),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_is_written(go, tmp_path, arguments, sentence):
    with pytest.raises(WeftError, match=sentence):
        go(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["trp", "spdf", "nm-gradient-flow"])
def test_the_plan_of_a_given_model_writes_nothing(go, tmp_path, model, method):
    found = go(method=method, plan=True)
    assert found["model"] == str(model) and found["peak_bytes"] > found["weights_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_an_emptied_model_has_the_shapes_and_none_of_the_numbers(model):
    whole = restructure(AutoModelForCausalLM.from_pretrained(model), "spdf")
    empty = emptied(whole)
    shapes = {name: (t.shape, t.dtype) for name, t in whole.state_dict().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert not any(t.is_meta for t in whole.parameters())


def test_the_command_takes_from(model, text, tmp_path):
    given = ["pretrain", "--from", str(model), "--method", "trp", "--steps", "4", "-o", str(tmp_path / "out")]
    more = [
        "--text",
        str(text),
        "--eval-text",
        str(text),
        "--window",
        "32",
        "--batch",
        "2",
        "--json",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, given + more)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("{") :])["method"] == "trp"


def test_a_given_model_is_written_in_the_dtype_of_its_file(go, model, tmp_path):
    """It is trained in fp32 on a CPU all the same."""
    LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer("pico").save_pretrained(tmp_path / "half")
    go(model=str(tmp_path / "half"), steps=1)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_model_in_codes_is_refused(go, model, tmp_path):
    """No step would change them, and the embedding alone would be trained."""
    quantize(str(model), tmp_path / "codes", bits=4)
    with pytest.raises(WeftError, match=r"14 matrices of this model are in codes that no step changes \(model.layers"):
        go(model=str(tmp_path / "codes"))


@pytest.mark.parametrize(
    ("dtype", "kept"), [(None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_auto_is_the_dtype_of_the_file(go, model, tmp_path, dtype, kept):
    LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer("pico").save_pretrained(tmp_path / "half")
    for given, expected in ((tmp_path / "half", kept), (model, torch.float32)):
        go(f"from-{given.name}", model=str(given), steps=1, dtype=dtype)
        written = load_file(tmp_path / f"from-{given.name}" / "model.safetensors")
        assert {t.dtype for t in written.values()} == {expected}


def test_the_perplexity_is_that_of_what_is_written(go, model, text, tmp_path):
    """Small steps are lost in part where fp32 is written in bf16."""
    LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer("pico").save_pretrained(tmp_path / "half")
    done = go(model=str(tmp_path / "half"), lr=1e-4, eval_text=str(text), eval_windows=2)
    written = evaluate(load_model(tmp_path / "out"), load_tokenizer("pico"), text.read_text(), 32, windows=2)
    assert done["perplexity"] == pytest.approx(written["perplexity"], rel=1e-5)


def test_a_record_of_a_run_is_taken_again(model, text, tmp_path):
    line = ["pretrain", "--from", str(model), "--text", str(text), "--steps", "2", "--window", "32", "--batch", "2"]
    line += ["--optimizer", "galore", "--optimizer-option", "rank=4", "--optimizer-option", "refresh=2"]
    assert CliRunner().invoke(app, [*line, "-o", str(tmp_path / "one")]).exit_code == 0
    again = ["pretrain", "--config", str(tmp_path / "one" / "run.json"), "-o", str(tmp_path / "two")]
    found = CliRunner().invoke(app, again)
    assert found.exit_code == 0, found.output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_given_model_is_judged_by_a_text_that_is_given(go):
    """Python's held-out sources, which judge fresh models by default, say little of it and take long."""
    assert "perplexity" not in go(eval_text=None, eval_windows=None, steps=1)
    with pytest.raises(WeftError, match="--eval-windows is for a text that judges"):
        go("refused", eval_text=None)
