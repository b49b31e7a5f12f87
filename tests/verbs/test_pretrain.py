"""Pre-training: every optimizer through the real Trainer, interrupted runs that end in the same bytes, and mistakes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import weft
from tests.processes import launched
from weft.cli import app
from weft.errors import WeftError
from weft.optim import OPTIMIZERS
from weft.rules.refactorise import Refactorise
from weft.rules.reset_moments import ResetMoments
from weft.runs.loading import load_tokenizer
from weft.terms import LowRank
from weft.train.optimizers import chosen_options, default_options, default_rate, make_optimizer
from weft.train.recipe import Recipe
from weft.train.sizes import SIZES
from weft.train.trainer import Seeds
from weft.verbs import pretrain as verb
from weft.verbs.pretrain import build, pretrain, run

TEXT = "".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(150))
OPTIONS = {
    "adamw": {}, "adamw_8bit": {}, "adamw_fp8": {},
    "galore": {"rank": 4, "refresh": 3}, "galore_8bit": {"rank": 4, "refresh": 3},
    "fira": {"rank": 4, "refresh": 3}, "frugal": {"rank": 0.25, "refresh": 3}, "apollo": {"rank": 4, "refresh": 3},
    "apollo_mini": {"refresh": 3}, "dct_adamw": {"rank": 4}, "gradnormlorp": {"rank": 4, "refresh": 3},
    "muon": {}, "spectron": {}, "scale": {}, "sinkgd": {}, "sign": {},
    "adagrad": {}, "adagrad_norm": {"lr": 0.1}, "mfac": {"gradients": 4, "lr": 0.1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", (32, 48, 2, 2))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def go(tmp_path, text):
    """Run the verb on the tiny size: a name for the output, and what differs from the usual arguments."""

    def going(name="out", **arguments):
        usual = {
            "size": "nano", "text": text, "eval_text": text, "eval_windows": 2, "steps": 8, "window": 32, "batch": 2,
            "save_every": 100, "log_every": 1, "device": "cpu", "lr": 1e-2, "warmup": 0,
        }  # fmt: skip
        return run(tmp_path / name, **{**usual, **arguments})

    return going


@pytest.fixture
def interrupted(monkeypatch):
    """Send SIGINT in the midst of a step, as Ctrl-C does."""

    def at(step, call):
        begin = Seeds.on_step_begin

        def stopping(self, args, state, control, **kwargs):
            begin(self, args, state, control, **kwargs)
            if state.global_step == step - 1:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Seeds, "on_step_begin", stopping)
            default = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
            with pytest.raises(KeyboardInterrupt):
                call()
            signal.signal(signal.SIGINT, default)

    return at


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_every_optimizer_that_takes_gradients_is_tried():
    assert set(OPTIONS) == {name for name, record in OPTIMIZERS.items() if not record.loop}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns_and_an_interrupted_run_ends_in_the_same_bytes(name, go, interrupted, tmp_path):
    arguments = {"optimizer": name, **OPTIONS[name]}
    result = go("whole", **arguments)
    assert result["loss_last"] < result["loss_first"] - 0.1 and 1 < result["perplexity"] < 8192
    assert result["optimizer_bytes"] > 0 and result["tokens"] == 8 * 2 * 32

    interrupted(5, lambda: go("broken", **arguments))
    assert not (tmp_path / "broken").exists()
    assert [p.name for p in (tmp_path / "broken.partial" / "progress").glob("checkpoint-*")] == ["checkpoint-5"]
    again = go("broken", **arguments)
    whole, broken = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "broken"))
    assert whole == broken and losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert again["perplexity"] == result["perplexity"] and again["optimizer_bytes"] == result["optimizer_bytes"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    fresh, _ = build("nano", load_tokenizer("pico"), 32, 0)
    assert type(model) is LlamaForCausalLM and set(model.state_dict()) == set(fresh.state_dict())
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]


def test_factors_with_restarts_resume_and_are_saved_as_factors(go, interrupted, tmp_path):
    arguments = {"low_rank": 4, "refactorise": 3, "reset_moments": 3, "restart": 2}
    result = go("whole", **arguments)
    interrupted(4, lambda: go("broken", **arguments))
    go("broken", **arguments)
    whole, broken = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "broken"))
    assert whole == broken and result["loss_last"] < result["loss_first"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    terms = [m for m in model.modules() if isinstance(m, LowRank)]
    assert len(terms) == 14 and all(t.B.shape[1] == 4 for t in terms)


def test_the_short_flag_is_the_method(go, tmp_path):
    """Same bytes; with --method the rank is the method's, and its quarter of the width is the default."""
    short = go("short", low_rank=8, steps=2)
    asked = go("asked", method="low-rank", rank=8, steps=2)
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("short", "asked")]
    assert found[0] == found[1] and short["perplexity"] == asked["perplexity"]
    assert short["method"] == asked["method"] == "low-rank" and short["rank"] == asked["rank"] == 8
    go("quarter", method="low-rank", steps=2)
    assert (tmp_path / "quarter" / "model.safetensors").read_bytes() == found[0]


def test_options_go_to_the_method_that_has_them_and_else_to_the_optimizer(go, tmp_path):
    go(method="low-rank", rank=4, std=0.5, betas=[0.5, 0.6], steps=1)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["method_options"] == {"std": 0.5}
    assert record["metrics"]["optimizer_options"] == {"betas": [0.5, 0.6]}


def test_half_precision_weights_are_trained_as_they_are(go, tmp_path):
    result = go(optimizer="galore", rank=4, rounding="stochastic", dtype="bfloat16", steps=2)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16} and result["loss_last"] < 10


@pytest.mark.parametrize("optimizer", ["galore", "gradnormlorp"])
def test_a_subspace_optimizer_trains_factors_too(go, optimizer, tmp_path):
    result = go(low_rank=8, optimizer=optimizer, rank=4, refresh=3)
    assert result["loss_last"] < result["loss_first"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(m, LowRank) for m in model.modules()) == 14


def test_the_rules_are_called_with_the_optimizer_that_steps(go, monkeypatch):
    seen = []
    for rule in (Refactorise, ResetMoments):
        after = rule.after_step
        monkeypatch.setattr(
            rule, "after_step", lambda self, m, s, a=after, r=rule: (a(self, m, s), seen.append((r, s, self)))
        )
    go(low_rank=4, refactorise=2, reset_moments=3, steps=4)
    resets = [rule for kind, step, rule in seen if kind is ResetMoments and step == 4]
    assert len(seen) == 8 and [step for _, step, _ in seen] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert sum(float(s["step"]) == 1 for _, s in named_states(resets[0].optimizer)) == 28


def named_states(optimizer):
    return [(i, s) for i, s in enumerate(optimizer.state.values())]


def test_the_rate_warms_up_again_after_each_refresh(go, tmp_path):
    go(optimizer="galore", rank=4, refresh=3, restart=2, schedule="constant", steps=7)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.01, 0.01, 0.005])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["arguments"]["schedule"] == "constant" and record["arguments"]["lr"] == 0.01


def test_the_published_rate_and_a_tenth_of_warm_up_are_the_defaults(go, tmp_path):
    assert default_rate("adamw") == 1e-3 and default_rate("galore") == 1e-2
    go(optimizer="galore", rank=4, lr=None, warmup=None, steps=10, schedule="wsd")
    record = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]
    assert (record["lr"], record["warmup"], record["schedule"]) == (1e-2, 1, "wsd")


def test_width_scaling_is_nothing_at_base_width_and_scales_a_wider_model(go, tmp_path):
    go("plain", steps=4, weight_decay=0.1)
    go("base", steps=4, weight_decay=0.1, mup=32)
    plain, base = (load_file(tmp_path / d / "model.safetensors") for d in ("plain", "base"))
    assert all(torch.equal(plain[name], base[name]) for name in plain)
    model, narrow = build("nano", load_tokenizer("pico"), 32, 0, mup=16)
    standard, _ = build("nano", load_tokenizer("pico"), 32, 0)
    hidden, head = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    assert narrow is not None and all(p.is_meta for p in narrow.parameters())
    for name, factor in ((hidden, 0.5**0.5), (head, 0.5), ("model.embed_tokens.weight", 1.0)):
        torch.testing.assert_close(model.state_dict()[name], standard.state_dict()[name] * factor)
    optimizer = make_optimizer("adamw", model, 1e-2, 0.1, 0, {}, narrow, "sqrt")
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found[hidden] == pytest.approx((5e-3, 0.1 * 2**0.5)) and found[head] == pytest.approx((5e-3, 0.0))
    assert go("wide", steps=8, mup=16)["loss_last"] < losses(tmp_path / "plain")[0]


def test_adamw_decays_matrices_alone_and_its_state_is_counted(go):
    model, _ = build("nano", load_tokenizer("pico"), 32, 0)
    optimizer = make_optimizer("adamw", model, 1e-2, 0.1, 0, {"betas": [0.8, 0.9], "eps": 1e-6})
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in decayed} == {
        n for n, _ in model.named_parameters() if "proj" in n
    }
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in optimizer.param_groups)
    tensors = len(list(model.parameters()))
    result = go(steps=2)
    assert result["optimizer_bytes"] == 8 * result["parameters"] + 4 * tensors


def test_moments_that_a_rule_holds_are_counted(go):
    model, _ = build("nano", load_tokenizer("pico"), 32, 0)
    coded = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    rest = sum(p.numel() for p in model.parameters()) - coded
    assert go(method="dqt", steps=2)["optimizer_bytes"] > 8 * rest + 2 * coded


def test_options_reach_the_optimizer():
    model, _ = build("nano", load_tokenizer("pico"), 32, 0)
    options = {"rank": 4, "projection": "svd", "state_dtype": "float64", "exclude": "q_proj", "betas": [0.5, 0.6]}
    optimizer = make_optimizer("galore", model, 1e-2, 0.0, 0, options)
    recipe = optimizer.param_groups[0]["recipe"]
    assert "SVD(rank=4)" in recipe and "betas=(0.5, 0.6)" in recipe
    assert not any("q_proj" in name for name in optimizer.param_groups[0]["param_names"])
    assert {"rank", "refresh", "moments", "rounding"} <= set(default_options("galore"))


def test_rank_and_scale_follow_the_published_tables_by_size():
    """As the papers have them for LLaMA 60M to 1B, and a quarter of a side below."""
    with torch.device("meta"):
        models = {size: build(size, load_tokenizer("pico"), 32, 0)[0] for size in ("9m", "60m", "130m", "350m", "1b")}
    ranks = {name: [OPTIMIZERS[name].for_size(model).get("rank") for model in models.values()] for name in OPTIMIZERS}
    assert ranks["galore"] == ranks["fira"] == [0.25, 128, 256, 256, 512]
    assert ranks["apollo"] == [0.25, 128, 192, 256, 256] and ranks["adamw"] == [None] * 5
    assert [OPTIMIZERS["fira"].for_size(model).get("scale", 0.25) for model in models.values()] == [0.25] * 4 + [0.0625]


def test_subspaces_are_chosen_anew_within_a_short_run():
    """A twentieth of the run, and at most the published number of steps."""
    found = {steps: chosen_options("galore", {}, steps)["refresh"] for steps in (8, 40, 200, 4000, 60_000)}
    assert found == {8: 1, 40: 2, 200: 10, 4000: 200, 60_000: 200}
    assert (
        chosen_options("galore", {"refresh": 7}, 200) == {"refresh": 7} and chosen_options("dct_adamw", {}, 200) == {}
    )


def test_what_is_chosen_is_said(go, tmp_path):
    go(optimizer="galore", optimizer_options={"scale": 0.5}, steps=40, batch=1)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["optimizer_options"] == {"refresh": 2, "rank": 0.25, "scale": 0.5}


MISTAKES = [
    ({"optimizer": "galor"}, "no optimizer called 'galor'; the nearest are: galore"),
    ({"optimizer": "mezo"}, "mezo cannot be used here. It asks for a loss and no gradient"),
    ({"rank": 4}, "adamw has none; choose galore"),
    ({"optimizer": "sinkgd", "rank": 4}, "sinkgd has none"),
    ({"optimizer": "galore", "rank": 0}, "--rank is 0: give a whole number from 1"),
    ({"optimizer": "galore", "rank": 2.5}, "--rank is 2.5"),
    ({"optimizer": "galore", "rank": 4096}, "q_proj.weight has shape .*32, 32.*use a rank of at most 32"),
    ({"optimizer": "galore", "foo": 1}, "'galore' has no option 'foo'; it has: .*projection, rank, refresh"),
    ({"foo": 1}, "'adamw' has no option 'foo'; it has: betas, eps"),
    (
        {"optimizer": "galore", "rank": 4, "moments": "rotat"},
        "moments is 'rotat' for galore, which takes keep, rotate, reset",
    ),
    ({"optimizer": "apollo", "rank": 4, "moments": "rotate"}, "no orthonormal basis to rotate moments into"),
    ({"optimizer": "galore", "rank": 4, "projection": "svdd"}, "no projection called 'svdd'; the nearest are: svd"),
    ({"optimizer": "galore", "rank": 4, "refresh": 0}, "refresh is 0"),
    (
        {"optimizer": "galore", "rank": 4, "refresh": "often"},
        "refresh is 'often' for galore, which takes int or .*Refresh",
    ),
    ({"optimizer": "galore", "rank": 4, "inner": "lion"}, "inner is 'lion' for galore, which takes .*Inner or None"),
    ({"optimizer": "galore", "rank": 4, "betas": 0.9}, "betas is 0.9 for galore, which takes tuple.float, float"),
    ({"betas": [0.9, 1.0]}, "betas is .* for adamw: give numbers from 0 to below 1"),
    ({"optimizer": "galore", "rank": 4, "state_dtype": "int4"}, "state_dtype is 'int4'"),
    ({"optimizer": "frugal", "rank": 4, "residual": "none"}, "which takes sign, sgd or None"),
    ({"size": "9mm"}, "no model size called '9mm'; the nearest are: 9m"),
    ({"schedule": "cosinus"}, "no learning-rate schedule called 'cosinus'; the nearest are: cosine"),
    ({"schedule": "wsd", "warmup": 8}, "8 steps of warm-up and 1 of decay do not fit into 8 steps"),
    ({"restart": 2}, "--restart warms up after each new subspace, and this optimizer has none"),
    ({"optimizer": "galore", "rank": 4, "refresh": 3, "restart": 4}, "A restart every 3 steps with 4"),
    ({"warmup": 9}, "--warmup is 9"),
    ({"steps": 0}, "--steps is 0"),
    ({"lr": -1.0}, "--lr is -1.0"),
    ({"window": 1}, "--window is 1"),
    ({"seed": -1}, "--seed is -1"),
    ({"low_rank": 64}, "Rank 64 is not possible for low-rank: .*give 1 to 32"),
    ({"refactorise": 8, "low_rank": 2}, "--refactorise is 8 steps and the run has 8, so that it never takes effect"),
    ({"reset_moments": 9}, "--reset-moments is 9 steps and the run has 8"),
    ({"optimizer": "galore", "rank": 4, "refresh": 8, "restart": 2}, "that --restart follows, is 8 steps"),
    ({"refactorise": 2}, "give --low-rank RANK too"),
    ({"refactorise": 0, "low_rank": 2}, "--refactorise is 0"),
    ({"reset_moments": 0}, "--reset-moments is 0"),
    ({"mup": 16, "optimizer": "galore", "rank": 4}, "--mup sets learning rates by width for AdamW"),
    ({"mup": 16, "low_rank": 4}, "give it without --low-rank"),
    ({"mup": 16, "method": "low-rank"}, "give it without --low-rank or --method"),
    ({"method": "low-rnk"}, "no method to pretrain called 'low-rnk'; the nearest are: low-rank"),
    ({"method": "lora"}, "no method to pretrain called 'lora'"),
    ({"method": "low-rank", "low_rank": 4}, "--low-rank R is short for --method low-rank --rank R: give one"),
    ({"method": "low-rank", "rank": 0.25}, "--rank is 0.25: with --method low-rank give a whole number from 1"),
    ({"method": "low-rank", "rank": 33}, "Rank 33 is not possible for low-rank: .*give 1 to 32"),
    ({"method": "low-rank", "foo": 1}, "'adamw' has no option 'foo', nor has 'low-rank'; they have: betas, eps.*: s"),
    ({"method": "sltrain", "density": "abc"}, "The option density of 'sltrain' is 'abc': give a number, such as 0.03"),
    ({"mup": 20}, "A base width of 20 does not fit nano: give a multiple of 16"),
    ({"mup": 16, "decay": "square"}, "width rule of weight decay called 'square'"),
    ({"text": "nowhere.txt"}, "no data at nowhere.txt"),
    ({"eval_text": "nowhere.txt"}, "no data at nowhere.txt"),
    ({"eval_windows": 10_000}, "The text is too short: it holds .* windows"),
    ({"tokenizer": "./missing"}, "There is no directory './missing'"),
    ({"device": "cuda:77"}, "There is no device 'cuda:77'"),
    ({"dtype": "int4"}, "There is no dtype 'int4'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_mistakes_are_sentences_before_any_work(go, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setattr(verb, "pretrain", lambda *a, **k: pytest.fail("training began"))
    monkeypatch.setattr(verb, "open_output", lambda *a, **k: pytest.fail("the output was opened"))
    with pytest.raises(WeftError, match=sentence):
        go(**arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_a_text_that_is_too_short_leaves_nothing_behind(go, tmp_path):
    (tmp_path / "short.txt").write_text("x = 1\n")
    with pytest.raises(WeftError, match="The text is too short: .* fewer than one window of 32"):
        go(text=tmp_path / "short.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt", "text.txt"]


def test_the_exact_call(text, tmp_path):
    out = tmp_path / "OUT"
    line = f"--size 9m --optimizer galore --rank 64 --text {text} --steps 2 -o {out} --lr 1e-2 --window 32 --batch 2"
    result = CliRunner().invoke(app, ["pretrain", *line.split(), "--eval-text", str(text), "--seed", "0", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["steps"] == 2 and answer["output"] == str(out) and answer["perplexity"] > 1
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json", "metrics.jsonl"} <= {
        p.name for p in out.iterdir()
    }
    assert answer["parameters"] == 2 * 8192 * 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--optimizer galore --option foo=1", "has no option 'foo'"),
        ("--optimizer galore --optimizer-option foo=1", "has no option 'foo'"),
        ("--optimizer galore --optimizer-option scale", "is no NAME=VALUE"),
        ("--optimizer galore --option rank=4", "give it as --rank 4"),
        ("--optimizer frugal --rank 1.5", "--rank is 1.5"),
    ],
)
def test_mistakes_on_the_command_line(line, sentence, tmp_path):
    result = CliRunner().invoke(app, ["pretrain", *line.split(), "-o", str(tmp_path / "O")])
    assert result.exit_code == 2 and sentence in result.stderr and not list(tmp_path.iterdir())


def process(rank, directory):
    torch.save(trained(Path(directory), "two", batch=2), Path(directory) / f"{rank}.pt")


def trained(directory, name, batch):
    SIZES["nano"] = (32, 48, 2, 2)
    tokenizer = load_tokenizer("pico")
    model, _ = build("nano", tokenizer, 32, 0)
    (directory / name).mkdir(exist_ok=True)
    recipe = Recipe(steps=4, lr=1e-2, window=32, batch=batch, clip=0.0, save_every=2)
    options = {"optimizer": "galore", "rank": 4, "refresh": 3, "reset_moments": 2}
    pretrain(model, tokenizer, [directory / "text.txt"], recipe, directory / name, **options)
    return model.state_dict()


@pytest.mark.distributed
def test_two_processes_train_what_one_does_with_both_batches(text, tmp_path):
    launched(process, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, weight in trained(tmp_path, "one", batch=4).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, atol=1e-5, rtol=1e-4)


def test_texts_held_out_decide_which_weights_are_kept_and_when_it_ends(go, tmp_path):
    """At a rate so high that the loss on other text soon rises."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"class Other{i}:\n    pass\n\n" for i in range(60)))
    judged = {"eval_data": other, "eval_every": 2, "save_every": 2, "lr": 0.1, "schedule": "constant"}
    result = go(load_best=True, early_stopping=2, steps=60, **judged)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == list(range(2, result["steps"] + 1, 2)) and result["steps"] < 60
    assert result["eval_loss"] == min(losses.values()) < losses[result["steps"]]
    assert result["tokens"] == result["steps"] * 2 * 32
    kept = weft.evaluate(
        LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16), load_tokenizer("pico"),
        other.read_text(), 32,
    )  # fmt: skip
    assert kept["loss"] == pytest.approx(result["eval_loss"], rel=0.1) and kept["loss"] < losses[result["steps"]]
    with pytest.raises(WeftError, match="--early-stopping goes by the loss on data held out"):
        go("refused", early_stopping=2)
    with pytest.raises(WeftError, match="--load-best may leave a model .* the pattern comes only there"):
        go("refused", method="nm-gradient-flow", load_best=True, **judged)
    assert go("rehearsed", dry_run=True, load_best=True, steps=60, **judged)["dry_run"]
