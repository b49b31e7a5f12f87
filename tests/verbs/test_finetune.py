"""Fine-tuning: what is trained and what is not, mistakes, and interrupted runs that end in the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

from tests.methods.moving import moving_terms
from tests.processes import start
from weft.cli import app
from weft.errors import WeftError
from weft.grafts import GRAFTS
from weft.methods import METHODS, find
from weft.rules.annealed_decay import AnnealedDecay
from weft.runs.loading import load_model
from weft.terms import Dense, LowRank, RoundedInputs, SumLinear
from weft.terms.adapters import adapters_of
from weft.terms.layers import linear_layers, weight_of
from weft.terms.put import put
from weft.testing_rules import hooks_of
from weft.train.checkpoints import last_checkpoint
from weft.train.recipe import Recipe
from weft.train.sources import Completion
from weft.verbs import combine, evaluate, merge, preparing
from weft.verbs import finetune as verb
from weft.verbs.adapt import adapt, trainable
from weft.verbs.finetune import finetune, run
from weft.verbs.fresh import Structure, ends_of
from weft.verbs.preparing import load_teacher, with_totals

TEXT = "".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(120))
SETTINGS = {"steps": 6, "lr": 1e-2, "window": 32, "batch": 2, "log_every": 1, "device": "cpu"}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tokenizer(tiny_directory):
    return AutoTokenizer.from_pretrained(tiny_directory)


def model_of(directory, rank=None):
    """The tiny model; with a rank, its MLP matrices are factors."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, layer in linear_layers(model).items():
        if rank and ".mlp." in name:
            U, s, V = torch.linalg.svd(weight_of(layer), full_matrices=False)
            put(model, name, {"low_rank": LowRank.from_factors(U[:, :rank] * s[:rank], V[:rank])}, None)
    return model


@pytest.mark.parametrize("method", ["deft", "lora-ggpo", "increlora"])
def test_training_leaves_no_hooks_on_the_model(method, data, tokenizer, tiny_directory):
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    finetune(model, tokenizer, data.read_text(), method, rank=2, steps=40, lr=1e-2, window=32, batch=2)
    assert not hooks_of(model)


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


SHORT = {"steps": 4, "lr": 1e-2, "window": 32, "batch": 2, "log_every": 1}


def test_welore_trains_the_low_rank_components_and_nothing_else(tiny_directory, tokenizer):
    model = model_of(tiny_directory, rank=4)
    before = snapshot(model)
    result = finetune(model, tokenizer, TEXT, "welore", **SHORT, evaluation=TEXT, eval_windows=4)
    factors = {id(p) for m in model.modules() if isinstance(m, LowRank) for p in m.parameters()}
    assert changed(model, before) == {name for name, p in model.named_parameters() if id(p) in factors}
    assert result["trainable_parameters"] == sum(4 * (32 + 48) for _ in range(6))
    assert result["perplexity"] < result["perplexity_before"] and result["loss_last"] < result["loss_first"]


def test_a_run_shorter_than_a_log_line_still_says_its_loss(tiny_directory, tokenizer):
    result = finetune(
        model_of(tiny_directory), tokenizer, TEXT, "lora", rank=1, **SHORT | {"steps": 2, "log_every": 10}
    )
    assert result["loss_first"] == result["loss_last"] > 0


def test_methods_that_ask_for_the_runs_length_and_rate_are_told(tiny_directory, tokenizer, monkeypatch):
    started = []
    begin = AnnealedDecay.begin
    monkeypatch.setattr(AnnealedDecay, "begin", lambda self, model: (started.append(self), begin(self, model)))
    finetune(model_of(tiny_directory), tokenizer, TEXT, "soma", rank=2, **SHORT, targets="q_proj", skip=0.0)
    (rule,) = started
    assert rule.span == 4 and rule.peak == 1e-2 and rule.matrices
    given = with_totals(find("lora-sb"), Recipe(**SHORT), {})
    assert given == {"lr": 1e-2, "warmup": 1} and with_totals(find("lora"), Recipe(**SHORT), {}) == {}
    assert with_totals(find("lora-sb"), Recipe(**SHORT | {"steps": 200}), {}) == {"lr": 1e-2, "warmup": 4}
    assert with_totals(find("lora-sb"), Recipe(**SHORT | {"warmup": 2}), {}) == {"lr": 1e-2, "warmup": 2}


def test_sft_trains_with_its_own_optimizer_and_moves_its_entries(tiny_directory, tokenizer):
    model = model_of(tiny_directory)
    result = finetune(model, tokenizer, TEXT, "sft", rank=1, **SHORT, interval=3, phase=2)
    terms = moving_terms(model, "default")
    drawn = moving_terms(adapt(model_of(tiny_directory), "sft", 1), "default")
    assert result["loss_last"] < result["loss_first"]
    assert all(not torch.equal(term.positions, drawn[layer].positions) for layer, term in terms.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [("sft", {"interval": 4, "phase": 3}), ("lift", {"interval": 2, "filter_rank": 1}), ("sft", {"grow": "ma"})],
)
def test_moving_entries_go_on_from_a_checkpoint_bit_for_bit(method, options, tiny_directory, tokenizer, tmp_path):
    ends = []
    for again in (False, True):  # the second run goes on from step 2, amid a phase
        model = model_of(tiny_directory)
        if again:
            shutil.rmtree(tmp_path / "checkpoint-4")
            assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        finetune(model, tokenizer, TEXT, method, rank=1, **SHORT, **options, save_every=2, directory=tmp_path)
        ends.append({layer: term.state_dict() for layer, term in moving_terms(model, "default").items()})
    for layer, state in ends[0].items():
        assert all(torch.equal(tensor, ends[1][layer][key]) for key, tensor in state.items()), layer


def test_lora_trains_its_adapters_and_nothing_else(tiny_directory, tokenizer):
    model = model_of(tiny_directory)
    result = finetune(model, tokenizer, TEXT, "lora", rank=2, **SHORT, targets="q_proj", alpha=8.0)
    sums = [m for m in model.modules() if isinstance(m, SumLinear)]
    assert len(sums) == 2 and result["trainable_parameters"] == 2 * 2 * (32 + 32)
    fresh = model_of(tiny_directory)
    for name, layer in linear_layers(fresh).items():
        moved = model.get_submodule(name)
        if isinstance(moved, SumLinear):
            assert not torch.equal(moved.dense(), weight_of(layer))
        else:
            assert torch.equal(weight_of(moved), weight_of(layer)), name


def test_an_adapter_goes_on_the_layers_that_are_named(tiny_directory, data, tmp_path):
    line = (
        f"{tiny_directory} -o {tmp_path / 'out'} --method lora --rank 2 --data {data} --targets q_proj --targets *mlp*"
    )
    line += " --targets !*.1.* --steps 1 --batch 2 --window 16 --json"
    done = CliRunner().invoke(app, ["finetune", *line.split()])
    assert done.exit_code == 0, done.output
    (adapter,) = adapters_of(load_model(str(tmp_path / "out"))).values()
    assert {name.rpartition(".")[2] for name in adapter.terms} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".0." in name for name in adapter.terms)
    with pytest.raises(WeftError, match=r"The target 'q_prj' matches no linear layer; the nearest names are: q_proj"):
        finetune(model_of(tiny_directory), None, TEXT, "lora", targets="q_prj", **SHORT)


def test_full_trains_everything(tiny_directory, tokenizer):
    model = model_of(tiny_directory)
    before = snapshot(model)
    finetune(model, tokenizer, TEXT, "full", **SHORT)
    assert changed(model, before) == set(before)


def test_welore_on_a_dense_model_is_a_sentence(tiny_directory, tokenizer, monkeypatch):
    """At once, before the data are tokenised, which can take minutes."""
    monkeypatch.setattr(verb, "rows_of", None)
    with pytest.raises(WeftError, match="'welore' finds nothing to train in this model; compress it first"):
        finetune(model_of(tiny_directory), tokenizer, TEXT, "welore", **SHORT)


def test_a_named_optimizer_goes_on_from_its_checkpoint_bit_for_bit(tiny_directory, tokenizer, tmp_path):
    def go(directory):
        model = model_of(tiny_directory)
        directory.mkdir(exist_ok=True)
        settings = {**SHORT, "optimizer": "galore", "save_every": 2}
        finetune(model, tokenizer, TEXT, "full", rank=4, directory=directory, **settings)
        return model

    whole = go(tmp_path / "a")
    (tmp_path / "a" / "checkpoint-4" / "weft_rules.safetensors").unlink()  # as if killed while saving it
    resumed = go(tmp_path / "a")
    assert changed(whole, snapshot(model_of(tiny_directory)))
    assert changed(resumed, snapshot(whole)) == set()


def test_options_reach_the_method_and_the_optimizer_each(tiny_directory, tokenizer, tmp_path):
    """GradNormLoRP in its published form: on an adapter's factors, at a rank below the adapter's."""
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    line = f"{tiny_directory} -o {out} --method dora --rank 8 --optimizer gradnormlorp --optimizer-option rank=4"
    line += f" --data {text} --steps 3 --window 16 --batch 2 --device cpu --option alpha=4 --json"
    result = CliRunner().invoke(app, ["finetune", *line.split()])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["steps"] == 3 and answer["optimizer_options"] == {"refresh": 1, "rank": 4}
    arguments = json.loads((out / "run.json").read_text())["arguments"]
    assert arguments["alpha"] == 4 and arguments["optimizer_options"] == {"rank": 4}


def test_an_optimizer_without_a_subspace_takes_no_rank(tiny_directory, tokenizer):
    with pytest.raises(WeftError, match="'mfac' has no option 'rank'; it has: block, damping, gradients"):
        finetune(model_of(tiny_directory), tokenizer, TEXT, "full", optimizer="mfac", rank=4, **SHORT)


def test_rates_of_a_method_and_a_named_optimizer_exclude_each_other(tiny_directory, tokenizer):
    with pytest.raises(WeftError, match="learning rates of their own"):
        finetune(model_of(tiny_directory), tokenizer, TEXT, "lora", optimizer="galore", ratio=16.0, **SHORT)


def test_prompts_are_data_too(tiny_directory, tokenizer):
    documents = [Completion(f"add {i} and {i}:", f" {2 * i}") for i in range(20)]
    result = finetune(model_of(tiny_directory), tokenizer, documents, "full", **SHORT)
    assert result["examples"] == 20 and result["packed"] and result["loss_last"] < result["loss_first"]


@pytest.mark.parametrize("method", ["lora-ga", "eva", "corda", "lora-sb", "ce-ssl"])
def test_adapters_start_from_the_batches_that_training_sees(method, tiny_directory, tokenizer, monkeypatch):
    """Masked prompts, borders of documents and all, in the order of training."""
    documents = [Completion(f"add {i} and {i}: ", f"{2 * i}") for i in range(60)]
    model, first, trained = model_of(tiny_directory), [], []

    def adapting(*arguments, batches, **options):
        first.extend(batches)
        return adapt(*arguments, batches=batches, **options)

    def watch(module, arguments, given):
        if module.training:
            trained.append({key: given[key].clone() for key in ("input_ids", "labels", "position_ids")})

    monkeypatch.setattr(preparing, "adapt", adapting)
    model.register_forward_pre_hook(watch, with_kwargs=True)
    result = finetune(model, tokenizer, documents, method, rank=2, lean=False, **{**SHORT, "steps": 4})
    assert result["packed"] and len(first) >= 2 and len(trained) == 4
    for ours, theirs in zip(first, trained, strict=False):
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    labels = torch.cat([batch["labels"].flatten() for batch in first])
    assert 0 < (labels != -100).float().mean() < 0.5  # prompts are longer than what is learned


def test_run_writes_a_directory_that_transformers_opens(tiny_directory, data, tmp_path):
    out = tmp_path / "out"
    result = run(str(tiny_directory), out, method="lora", rank=2, data=data, eval_text=data, eval_windows=2, **SETTINGS)
    assert not (tmp_path / "out.partial").exists()
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == "finetune" and record["arguments"]["steps"] == 6
    assert record["metrics"]["loss_last"] == result["loss_last"] and record["metrics"]["covered"] == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all("scaled_learning_rate_default" in line for line in lines if "loss" in line)
    import weft.io  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(out)  # by PEFT, from its files
    assert model.config.use_cache


def test_a_method_of_adapters_writes_an_adapter(tiny_directory, data, tmp_path):
    """Not twice the base: PEFT's files and weft's, a card and the tokenizer; every verb takes the directory."""
    out = tmp_path / "out"
    given = {"method": "lora", "rank": 2, "data": data, "eval_text": data, "eval_windows": 2, **SETTINGS}
    result = run(str(tiny_directory), out, **given)
    assert {p.name for p in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json", "tokenizer.json",
        "tokenizer_config.json", "weft_adapter.json",
    }  # fmt: skip
    assert (out / "adapter_model.safetensors").stat().st_size < (
        tiny_directory / "model.safetensors"
    ).stat().st_size / 4
    assert "library_name: peft" in (out / "README.md").read_text()

    again = load_model(out, device="cpu")
    assert list(adapters_of(again)) == ["default"]
    assert trainable(again).count == result["trainable_parameters"]
    words = {"windows": 2, "text": [data], "window": 32, "device": "cpu"}
    assert evaluate.run(str(out), **words)["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)

    merge.run(str(out), tmp_path / "plain", device="cpu")
    merge.run(str(tiny_directory), tmp_path / "same", adapter=out, device="cpu")
    for name in ("plain", "same"):
        got = evaluate.run(str(tmp_path / name), **words)["perplexity"]
        assert got == pytest.approx(result["perplexity"], rel=1e-5)
    combine.run([out, out], tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "run.json").read_text())["metrics"]["rank"] == 2

    further = run(str(out), tmp_path / "further", method="lora", data=data, **SETTINGS)
    assert further["loss_first"] < result["loss_first"]
    with pytest.raises(WeftError, match="There is an adapter 'default' on this model already"):
        run(str(out), tmp_path / "other", method="pissa", data=data, **SETTINGS)


def test_the_adapter_is_merged_on_request(tiny_directory, data, tmp_path):
    given = {"method": "lora", "rank": 2, "data": data, "eval_text": data, "eval_windows": 2, **SETTINGS}
    result = run(str(tiny_directory), tmp_path / "out", merge=True, **given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(isinstance(m, SumLinear) for m in model.modules()) and result["update_lost"] < 1e-5
    words = {"windows": 2, "text": [data], "window": 32, "device": "cpu"}
    got = evaluate.run(str(tmp_path / "out"), **words)["perplexity"]
    assert got == pytest.approx(result["perplexity"], rel=1e-5)
    with pytest.raises(WeftError, match="--merge folds an adapter into its model, and compacter cannot be"):
        run(str(tiny_directory), tmp_path / "no", **given | {"method": "compacter", "merge": True})
    bent = model_of(tiny_directory)
    bent_layer = next(iter(linear_layers(bent)))
    put(bent, bent_layer, {"base": RoundedInputs.of(Dense.from_matrix(weight_of(bent.get_submodule(bent_layer))))})
    bent.save_pretrained(tmp_path / "bent")
    AutoTokenizer.from_pretrained(tiny_directory).save_pretrained(tmp_path / "bent")
    with pytest.raises(WeftError, match=f"{bent_layer}: a layer that rounds its inputs is no matrix"):
        run(str(tmp_path / "bent"), tmp_path / "no", merge=True, **given)
    with pytest.raises(WeftError, match="--merge folds an adapter into its model, and full trains none"):
        run(str(tiny_directory), tmp_path / "no", **given | {"method": "full", "rank": None, "merge": True})


def test_an_adapter_whose_base_is_gone_says_so(tiny_directory, data, tmp_path):
    base = shutil.copytree(tiny_directory, tmp_path / "base")
    run(str(base), tmp_path / "out", method="lora", rank=2, data=data, **SETTINGS)
    shutil.rmtree(base)
    with pytest.raises(WeftError, match=r"was made on .*base, which is not here .* weft merge BASE --adapter"):
        load_model(tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "lorra"}, "no method to .* called 'lorra'; the nearest are: lora"),
        ({"method": "lora", "alfa": 3}, "'lora' has no option 'alfa'"),
        ({"optimizer_options": {"rank": 4}}, "give --optimizer NAME too"),
        ({"optimizer": "galore", "optimizer_options": {"rnak": 4}}, "'galore' has no option 'rnak'"),
        ({"optimizer": "galor"}, "no optimizer called 'galor'; the nearest are: galore"),
        ({"optimizer": "mezo"}, "mezo cannot be used here. It asks for a loss and no gradient"),
        ({"rank": 0}, "--rank is 0"),
        ({"method": "full", "rank": 8}, "--rank is an adapter's, or an --optimizer's, and full has none"),
        ({"method": "full", "targets": ["q_proj"]}, "Targets are layers that get an adapter, and full is none"),
        ({"eval_windows": 2}, "--eval-windows is for a text that judges: give --eval-text"),
        ({"steps": 0}, "--steps is 0"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"window": 256}, "The window is 256 tokens and the model's context 128"),
        ({"data": "nowhere.txt"}, "no data at nowhere.txt"),
        ({"eval_text": "nowhere.txt"}, "no data at nowhere.txt"),
        ({"text_field": "a", "prompt_field": "b"}, "Fields were given for text and prompt"),
        ({"teacher_top": 5}, "--teacher-top is for a teacher that you name: give --teacher MODEL too"),
        ({"teacher": "pico", "teacher_labels": -1.0}, "The labels cannot count -1.0 times"),
    ],
)
def test_mistakes_are_sentences_before_the_model_is_loaded(
    tiny_directory, data, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(verb, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(WeftError, match=sentence):
        run(str(tiny_directory), tmp_path / "out", **{"method": "full", "data": data, **SETTINGS, **arguments})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def divergence(model, teacher, tokenizer):
    """The mean KL(teacher || model) on the text, of whole logits."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :120]
    with torch.no_grad():
        q, p = (m.eval()(ids).logits.log_softmax(-1) for m in (model, teacher))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("how", [{}, {"teacher_top": 3}])
def test_a_compressed_model_learns_of_the_dense_one(tiny_directory, tokenizer, how):
    teacher = model_of(tiny_directory)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)  # of its own opinion
    model = model_of(tiny_directory, rank=4)
    before, weights = divergence(model, teacher, tokenizer), snapshot(teacher)
    finetune(model, tokenizer, TEXT, "full", **SHORT | {"steps": 12}, teacher=teacher, **how)
    assert divergence(model, teacher, tokenizer) < 0.8 * before
    assert not changed(teacher, weights) and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(WeftError, match="The teacher is the model itself"):
        finetune(model, tokenizer, TEXT, "welore", **SHORT, teacher=model)


def test_a_teacher_in_a_directory(tiny_directory, data, tmp_path):
    given = {"method": "lora", "rank": 2, "data": data, **SETTINGS, "teacher": str(tiny_directory)}
    done = run(str(tiny_directory), tmp_path / "out", **given)
    assert done["loss_first"] < 1e-5  # lora begins as the teacher
    assert json.loads((tmp_path / "out/run.json").read_text())["arguments"]["teacher"] == str(tiny_directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(WeftError, match="has other tokens than the model, such as '<one more>'"):
        load_teacher(str(tiny_directory), tokenizer, torch.device("cpu"))


def program(model, data, out, method):
    options = {"dropout": 0.2, "rank": 2} if method == "lora" else {}
    settings = {"steps": 30, "lr": 1e-2, "window": 32, "batch": 2, "log_every": 1, "save_every": 7, "device": "cpu"}
    try:
        run(model, out, method=method, data=data, **settings, **options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def begun(model, data, out, method):
    return start(out.parent, program, str(model), data, out, method)


def stop_at(process, metrics, step, number):
    """Send a signal once that step has been logged."""
    deadline = time.monotonic() + 120
    while process.running() and time.monotonic() < deadline:
        if metrics.is_file() and sum('"loss"' in line for line in metrics.read_text().splitlines()) >= step:
            process.send(number)
            break
        time.sleep(0.002)
    return process.wait(120)


@pytest.mark.slow
def test_interrupted_runs_end_in_the_same_bytes(tiny_directory, data, tmp_path):
    """With dropout; interrupted by SIGINT, then by SIGKILL, which leaves only the periodic checkpoint."""
    whole = begun(tiny_directory, data, tmp_path / "whole", "lora")
    out, metrics = tmp_path / "broken", tmp_path / "broken.partial" / "progress" / "metrics.jsonl"
    for step, number, expected in ((4, signal.SIGINT, 130), (12, signal.SIGKILL, -9)):
        assert stop_at(begun(tiny_directory, data, out, "lora"), metrics, step, number) == expected
        assert not out.exists() and metrics.is_file()
    last = begun(tiny_directory, data, out, "lora")
    assert last.wait(120) == 0, last.stderr
    assert whole.wait(120) == 0, whole.stderr
    for name in ("adapter_model.safetensors", "weft_adapter.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))


def test_another_command_does_not_take_over_unfinished_work(tiny_directory, data, tmp_path):
    partial = tmp_path / "out.partial"
    (partial / "progress" / "checkpoint-3").mkdir(parents=True)
    (partial / "arguments.json").write_text("{}")
    with pytest.raises(WeftError, match="unfinished work of another command"):
        run(str(tiny_directory), tmp_path / "out", method="full", data=data, **SETTINGS)


@pytest.mark.parametrize("what", ["data", "model", "eval_text"])
def test_a_run_is_not_gone_on_with_after_a_file_was_changed_in_its_place(tiny_directory, data, tmp_path, what):
    model, judged = tmp_path / "model", tmp_path / "judged.txt"
    shutil.copytree(tiny_directory, model)
    judged.write_text(TEXT)
    stop = KeyboardInterrupt()

    class Stop(TrainerCallback):
        def on_save(self, *_, **__):
            raise stop

    def go(**more):
        settings = {**SETTINGS, "save_every": 2, **more}
        return run(str(model), tmp_path / "out", method="full", data=data, eval_text=judged, eval_windows=1, **settings)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("weft.train.trainer.Progress", Stop)
        go()
    assert (tmp_path / "out.partial" / "progress" / "checkpoint-2").is_dir()
    changed = {"data": data, "model": model / "tokenizer_config.json", "eval_text": judged}[what]
    changed.write_text(changed.read_text().replace("return", "yield ") if what != "model" else "{}")
    with pytest.raises(WeftError, match=rf"on other files: since then, {what} \({changed.name}\) changed"):
        go()


JUDGED = {**SHORT, "steps": 12, "eval_every": 2, "save_every": 2}
OTHER = "".join(f"class Other{i}:\n    pass\n\n" for i in range(60))


def test_the_loss_on_data_held_out_is_logged_and_the_best_weights_kept(tiny_directory, tokenizer, tmp_path):
    """A rate so high that the loss on other text soon rises: the end is not the best."""
    model = model_of(tiny_directory)
    result = finetune(
        model, tokenizer, TEXT, "full", eval_data=[OTHER], directory=tmp_path, **{**JUDGED, "lr": 0.1}, load_best=True
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=lambda step: losses[step])
    assert best < 12 and result["eval_loss"] == losses[best]
    saved = load_file(tmp_path / f"checkpoint-{best}" / "weft_weights.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_a_run_that_no_longer_learns_ends_early(tiny_directory, tokenizer):
    settings = {**JUDGED, "lr": 0.1, "steps": 60, "early_stopping": 2}
    result = finetune(model_of(tiny_directory), tokenizer, TEXT, "full", eval_data=[OTHER], **settings)
    assert result["steps"] < 60 and result["epochs"] == pytest.approx(result["steps"] * 2 / result["rows"])


def test_what_goes_by_data_held_out_asks_for_some(tiny_directory, tokenizer):
    for setting in ({"load_best": True}, {"early_stopping": 2}):
        with pytest.raises(WeftError, match=r"goes by the loss on data held out: give --eval-data"):
            finetune(model_of(tiny_directory), tokenizer, TEXT, "full", **JUDGED, **setting)
    with pytest.raises(WeftError, match="--save-every 3 does not save where --eval-every 2 judges"):
        Recipe(load_best=True, save_every=3, eval_every=2)
    with pytest.raises(WeftError, match="--save-every 4 does not save where --eval-every 2 judges"):
        Recipe(load_best=True, save_every=4, eval_every=2)  # the best may lie between two checkpoints


@pytest.mark.parametrize("method", ["pst", "qvgen", "acm"])
def test_a_run_that_has_an_end_to_come_to_is_not_cut_short(method, tiny_directory, tokenizer):
    for setting in ({"load_best": True}, {"early_stopping": 2}):
        with pytest.raises(WeftError, match=r"of before the end of the run, and .* comes only there: leave it out"):
            finetune(model_of(tiny_directory), tokenizer, TEXT, method, eval_data=[OTHER], **JUDGED, **setting)


def test_which_methods_have_an_end_to_come_to():
    assert {m.name for m in METHODS.values() if ends_of(m, m.defaults)} == {"pst", "qvgen", "acm", "nm-gradient-flow"}
    assert not Structure.of("bitnet-1.58").ends and Structure.of("bitnet-1.58", given=True).ends == "whole rounding"
    assert ends_of(GRAFTS["quantizable-attention"], {}) == ""


def test_an_interrupted_run_ends_as_early_as_a_whole_one(tiny_directory, tokenizer, tmp_path):
    settings = {**JUDGED, "lr": 0.3, "schedule": "constant", "steps": 20, "eval_every": 1, "save_every": 1}
    settings |= {"early_stopping": 4, "eval_data": [OTHER]}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == cut

    cut = -1
    whole = finetune(model_of(tiny_directory), tokenizer, TEXT, "full", directory=tmp_path / "whole", **settings)
    assert 4 < whole["steps"] < 20
    cut = whole["steps"] - 1  # in the middle of what does not improve
    how = {"directory": tmp_path / "cut", "callbacks": [Stop()]}
    assert finetune(model_of(tiny_directory), tokenizer, TEXT, "full", **how, **settings)["steps"] == cut
    again = finetune(model_of(tiny_directory), tokenizer, TEXT, "full", directory=tmp_path / "cut", **settings)
    assert again["steps"] == whole["steps"]


def test_callbacks_of_ones_own_are_called_and_epochs_count_every_process(tiny_directory, tokenizer, monkeypatch):
    seen = []

    class Mine(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(state.global_step)

    result = finetune(model_of(tiny_directory), tokenizer, TEXT, "full", callbacks=[Mine()], **SHORT)
    assert set(seen) == {1, 2, 3, 4} and result["processes"] == 1
    rows = type("Rows", (), {"__len__": lambda self: 4, "examples": 1, "dropped": 0, "shortened": 0, "tokens": 9})()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert verb.summary(model_of(tiny_directory), rows, Recipe(steps=2, batch=2), [])["epochs"] == 3


def test_a_log_file_shows_the_loss(tiny_directory, tokenizer, capsys):
    finetune(model_of(tiny_directory), tokenizer, TEXT, "full", **SHORT, evaluation=TEXT, eval_windows=2, eval_every=2)
    said = capsys.readouterr().err
    assert "Training 4 steps, 2 rows a step, in one process." in said
    assert "step 2: perplexity" in said and "train 4/4, loss" in said


def test_a_rehearsal_says_what_the_run_takes_and_writes_nothing(tiny_directory, data, tmp_path):
    out = tmp_path / "out"
    settings = {**SETTINGS, "steps": 50, "accumulate": 3, "warmup": 10}
    told = run(str(tiny_directory), out, method="lora", rank=2, data=data, dry_run=True, **settings)
    assert told["dry_run"] and not out.exists() and not (tmp_path / "out.partial").exists()
    assert told["rows_a_step"] == 6 and told["tokens_a_step"] == 192 and told["steps"] == 50
    assert told["optimizer_bytes"] >= 2 * 4 * told["trainable_parameters"] > 0
    assert told["trainable_share"] == pytest.approx(told["trainable_parameters"] / told["parameters"])
    assert told["epochs"] == pytest.approx(300 / told["rows"]) and told["seconds"] > told["seconds_a_step"] > 0


def test_logs_for_tensorboard_lie_beside_the_output(tiny_directory, data, tmp_path):
    pytest.importorskip("tensorboard")
    run(str(tiny_directory), tmp_path / "out", method="full", data=data, report_to="tensorboard", **SETTINGS)
    assert list((tmp_path / "out" / "runs").rglob("events.out.*"))


def test_a_tool_to_report_to_must_be_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeftError, match="--report-to wandb needs its package: pip install wandb"):
        Recipe(report_to="wandb")
    with pytest.raises(WeftError, match="no tool to report to called 'wandd'; the nearest are: wandb"):
        Recipe(report_to="wandd")
