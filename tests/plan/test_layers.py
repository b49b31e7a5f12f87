"""A plan made of two blocks is the plan of all; what a plan says is what the job holds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from weft.cli import app
from weft.errors import WeftError
from weft.kernels.normal_float import NF4, encode
from weft.memory import lean
from weft.plan import BLOCKS, Held, Supposed, held, stepped, unmasked
from weft.train.optimizers import make_optimizer
from weft.verbs.adapt import adapt
from weft.verbs.compress import run as compress
from weft.verbs.plan import run
from weft.verbs.plan_jobs import DEFAULTS, Job, jobs
from weft.verbs.quantize import run as quantize
from weft.verbs.sources import source_of

LAYERS = 4


def config(layers: int = LAYERS, vocab_size: int = 300) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    config().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]})
    )
    return str(tmp_path)


def facts(found: Held) -> tuple[object, ...]:
    return found.weights, found.activations, found.gradients, found.peak, found.work


def inputs() -> dict[str, object]:
    ids = torch.zeros(2, 32, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


@pytest.mark.parametrize(("method", "saved"), [(None, True), ("lora", False)])
def test_two_blocks_say_what_the_whole_holds(method, saved):
    found = []
    for layers, stands_for in ((BLOCKS["training"], LAYERS), (LAYERS, None)):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            model = LlamaForCausalLM(config(layers))
        with mode, Supposed(), unmasked():
            model.to_empty(device="cpu")
            if method is not None:
                adapt(model, method, 4)
        lean(model.train(), saved)
        with mode, Supposed(), unmasked():
            steps = stepped(model, lambda m: make_optimizer("adamw", m, 1e-3, 0.0, 0, {}), stands_for)
            found.append((held(model, inputs(), stands_for), steps))
    (few, step), (whole, same) = found
    assert facts(few) == facts(whole) and step == same
    # the last block's way forward and back, all other blocks' ways back, and the end
    *_, forward, back, others, end = few.peaks
    last = len(whole.peaks) - 1
    assert (forward, back, end) == (whole.peaks[last - LAYERS - 1], whole.peaks[last - LAYERS], whole.peaks[last])
    assert others == max(whole.peaks[last - LAYERS + 1 : last])


def test_an_optimizer_that_takes_matrices_together_is_stepped_with_all(monkeypatch):
    """Whose workspace grows with the blocks until a batch is full."""
    monkeypatch.setattr("weft.optim.lowrank._BATCH", {"cpu": 64 * 96})
    found = []
    for layers, stands_for in ((BLOCKS["training"], 9), (9, None)):
        with FakeTensorMode(allow_non_fake_inputs=True), Supposed():
            model = LlamaForCausalLM(config(layers, vocab_size=8))
            found.append(stepped(model, lambda m: make_optimizer("apollo", m, 1e-3, 0.0, 0, {"rank": 4}), stands_for))
        assert len(model.model.layers) == layers
    assert found[0] == found[1]


@pytest.mark.parametrize("passes", ["forward", "inference"])
def test_a_forward_pass_alone_stretches_too(passes):
    given = inputs() | {"use_cache": passes == "inference"}
    found = []
    for layers, stands_for in ((BLOCKS[passes], LAYERS), (LAYERS, None)):
        model = LlamaForCausalLM(config(layers)).train(passes == "forward")
        with Supposed(), unmasked():
            found.append(held(model, given, stands_for, passes))
    assert facts(found[0]) == facts(found[1])
    if passes == "inference":
        cache = 2 * LAYERS * 2 * 32 * 64 * 4
        assert found[0].activations == pytest.approx(cache + 2 * 32 * 300 * 4, rel=0.01)


@pytest.mark.parametrize("method", ["lora", "pissa"])  # of the latter, factors are views of larger ones
def test_a_plan_is_what_a_real_step_holds(directory, method):
    (said,) = run(directory, memory="1GB", methods=method, batch=2, window=32, rank=4, device="cpu")["methods"]
    model = adapt(LlamaForCausalLM(config()), method, 4).train()
    assert said["activations_plain"] == held(model, inputs(), passes="forward").activations
    lean(model)
    real = held(model, inputs())
    steps = stepped(model, lambda m: make_optimizer("adamw", m, 1e-3, 0.0, 0, {}))
    assert said["weights"] == real.weights
    assert said["gradients"] == pytest.approx(real.gradients, rel=0.02)
    assert said["optimizer"] == steps.state
    assert said["activations"] == pytest.approx(real.activations, rel=0.02)
    assert said["peak_bytes"] == pytest.approx(real.peak + steps.state, rel=0.02)


@pytest.mark.parametrize("task", ["finetune", "pretrain", "serve"])
def test_no_more_blocks_are_run_of_a_deeper_model(tmp_path, monkeypatch, task):
    """Nor any calls made but those that are made of each model."""
    passed, made = [], []
    block = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **rest: passed.append(1) or block(*args, **rest))
    dispatch = FakeTensorMode.dispatch
    monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *args, **rest: made.append(1) or dispatch(*args, **rest))
    method = {"finetune": "lora", "pretrain": "low-rank", "serve": "nf4"}[task]
    monkeypatch.setattr("weft.verbs.plan._Plan.largest", lambda plan: 1)
    counts = []
    for layers in (4, 5, 12):
        config(layers).save_pretrained(tmp_path)
        run(str(tmp_path), memory="1GB", task=task, methods=method, window=32, device="cpu", time=False)
        counts.append((len(passed), len(made)))
        passed.clear(), made.clear()
    (blocks, calls), *later = counts
    assert all(more == blocks and made <= calls for more, made in later)


def test_the_largest_batch_fits_and_one_more_does_not(directory):
    ask = {"methods": "full", "window": 32, "device": "cpu"}
    (one,) = run(directory, memory="1GB", **ask)["methods"]
    memory = 3 * one["peak_bytes"]
    (told,) = run(directory, memory=f"{memory}B", **ask)["methods"]
    peaks = [run(directory, memory="1GB", batch=told["batch"] + i, **ask)["methods"][0]["peak_bytes"] for i in (0, 1)]
    assert told["batch"] > 1 and peaks[0] <= memory < peaks[1]


def test_the_exact_call(directory):
    line = f"plan {directory} --memory 8GB --task finetune --methods lora,nf4+lora --window 32 --json"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["methods"]}
    parts = {"name", "fits", "peak_bytes", "weights", "gradients", "optimizer", "activations", "workspace", "batch"}
    assert all(parts <= row.keys() and row["fits"] for row in rows.values())
    assert rows["nf4+lora"]["weights"] < rows["lora"]["weights"]
    assert 0 < rows["lora"]["seconds"] < rows["nf4+lora"]["seconds"]
    table = CliRunner().invoke(app, f"plan {directory} --memory 8GB --methods lora --window 32 --no-time".split())
    assert table.exit_code == 0 and "largest batch" in table.stdout and "seconds" not in table.stdout


@pytest.mark.parametrize("made", ["nf4", "svd"])
def test_what_weft_made_is_planned(made, tmp_path):
    """Of pico's six blocks a plan makes a few, and the specs of the others stand for nothing in it."""
    if made == "nf4":
        quantize("pico", tmp_path / "made", bits=4)
    else:
        compress("pico", tmp_path / "made", method="svd", budget=0.5, allocate="uniform")
    for task, methods in (("finetune", "lora"), ("serve", "dense")):
        found = run(str(tmp_path / "made"), memory="8GB", task=task, methods=methods, window=32, device="cpu")
        (row,) = found["methods"]
        assert row["fits"] and "refused" not in row, row


@pytest.mark.parametrize("method", ["welore", "lst", "ntk-attention"])
def test_a_method_is_planned_by_itself(method):
    (row,) = run("pico", memory="8GB", task="finetune", methods=method, window=32, device="cpu")["methods"]
    if method == "welore":
        assert "finds nothing to train in this model; compress it first" in str(row)
    else:
        assert row["fits"] and row["optimizer"] > 0


@pytest.mark.parametrize("task", ["pretrain", "serve"])
def test_other_tasks(directory, task, monkeypatch):
    # with so few words the largest batch has a million tokens, which sltrain takes in pieces of 256
    monkeypatch.setattr("weft.kernels.sparse_linear.TOKENS", 2**20)
    names = {"pretrain": "adamw,sltrain", "serve": "dense,nf4"}[task]
    found = run(directory, memory="1GB", task=task, methods=names, window=32, device="cpu")
    assert [row["fits"] for row in found["methods"]] == [True, True], found
    assert found["parameters"] == LlamaForCausalLM(config()).num_parameters()


def test_a_model_whose_blocks_differ_is_planned_whole(tmp_path):
    from weft.verbs.quantize import quantize

    model = LlamaForCausalLM(config())
    quantize(model, "nf4", targets="*.0.*")
    model.save_pretrained(tmp_path)
    (said,) = run(str(tmp_path), memory="1GB", task="serve", methods="dense", window=32, device="cpu")["methods"]
    assert said["weights"] == pytest.approx(held(model, inputs(), passes="inference").weights, rel=0.01)


def test_bad_input_is_one_sentence(directory):
    for arguments, words in (
        ({"memory": "100KB"}, "100KB is too little for .*: finetune takes at least .* MB, by .*lora"),
        ({"memory": "8"}, "--memory '8' is no size"),
        ({"memory": "50%"}, "--memory '50%' is no size"),
        ({"memory": "lots"}, "--memory 'lots' is no size: give one such as 8GB"),
        ({"memory": "8GB", "task": "finetun"}, "no task to plan called 'finetun'; the nearest are: finetune"),
        ({"memory": "8GB", "methods": "lroa"}, "lora"),
        ({"memory": "8GB", "methods": "nf4+int8"}, "names two of a kind: nf4 and int8"),
        ({"memory": "8GB", "batch": 0}, "--batch is 0"),
        ({"memory": "8GB", "rank": 0}, "--rank is 0: give at least 1"),
        ({"memory": "8GB", "methods": ",,"}, "--methods ',,' names nothing"),
        ({"memory": "8GB", "window": 10**6}, "the model's context 2048: give a smaller --window"),
        ({"memory": "8GB", "size": "9m"}, "one of the two"),
        ({"memory": "8GB", "device": "cuda:99"}, "There is no device 'cuda:99'"),
    ):
        with pytest.raises(WeftError, match=words):
            run(directory, **{"methods": "nf4+lora", "window": 32, "device": "cpu", **arguments})


def test_every_code_is_planned_to_serve(directory):
    """Checks of values find nothing wrong with tensors that have none, and nobody asks where these begin."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = run(directory, memory="1GB", task="serve", methods="all", window=32, batch=1, device="cpu")["methods"]
    reasons = {row["name"]: row["reason"] for row in rows if "reason" in row}
    assert not reasons and len(rows) > 5
    weights = {row["name"]: row["weights"] for row in rows}
    assert weights["nf3"] < weights["nf4"] < weights["int8"] < weights["dense"]


def test_headers_say_the_dtype_where_the_configuration_does_not(directory):
    from safetensors.torch import save_file

    said = json.loads(Path(directory, "config.json").read_text())
    Path(directory, "config.json").write_text(json.dumps({k: v for k, v in said.items() if "dtype" not in k}))
    assert source_of(directory, None, 32).dtype == torch.float32
    tensors = {"a": torch.zeros(3, dtype=torch.long), "b": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, Path(directory, "model.safetensors"))
    assert source_of(directory, None, 32).dtype == torch.bfloat16


def test_a_repository_is_planned_by_its_configuration_and_the_headers_of_its_files(monkeypatch):
    """Without its weights, and without the network here."""
    from huggingface_hub.errors import NotASafetensorsRepoError
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    tensors = {"a": TensorInfo("I64", [3], (0, 24)), "b": TensorInfo("BF16", [3], (24, 30))}
    metadata = SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": SafetensorsFileMetadata({}, tensors)})
    monkeypatch.setattr("weft.runs.loading.AutoConfig.from_pretrained", lambda name, **_: config())
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda name: {"me/small": metadata}[name])
    ask = {"memory": "1GB", "methods": "dense", "task": "serve", "window": 32, "device": "cpu", "time": False}
    found = run("me/small", dtype="auto", **ask)
    wide = run("me/small", **ask)
    assert (found["dtype"], wide["dtype"]) == ("bfloat16", "float32")
    assert found["methods"][0]["weights"] < wide["methods"][0]["weights"]

    def fails(error):
        def ask_hub(name):
            raise error

        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", ask_hub)

    fails(NotASafetensorsRepoError("none"))
    assert source_of("me/small", None, 32).dtype == torch.float32
    fails(OSError("offline\nmode"))
    with pytest.raises(WeftError, match=r"me/small names no dtype .*\(offline mode\); give --dtype\.$"):
        run("me/small", dtype="auto", **ask)
    assert run("me/small", **ask)["dtype"] == "float32", "what nobody needs to know is not asked for"


def test_names_of_jobs():
    assert Job.parse("nf4+lora+muon", "finetune") == Job("nf4+lora+muon", "nf4", "lora", "muon")
    assert Job.parse("galore", "finetune") == Job("galore", None, "full", "galore")
    assert {job.name for job in jobs("serve")} == set(DEFAULTS["serve"])
    assert len(jobs("finetune", "all")) > 30 and [job.name for job in jobs("finetune", "lora,lora")] == ["lora"]


def test_tables_made_amid_tensors_without_values_have_theirs():
    with FakeTensorMode(allow_non_fake_inputs=True), Supposed():
        encode(torch.empty(64, 64), NF4)
    code = encode(torch.linspace(-1, 1, 64).view(1, 64), NF4)
    assert code.codes.float().sum() > 0
