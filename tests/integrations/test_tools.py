"""The tools around weft, each with its real package where it is installed: `pip install 'weft[integrations]'`."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from weft.errors import WeftError
from weft.terms import SumLinear
from weft.verbs import evaluate, merge

TASK = """task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} and {i} is", "choices": [f" {2 * i}", f" {2 * i + 1}"], "answer": 0} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=tmp_path / "sums.jsonl"))
    return tmp_path / "sums.yaml"


@pytest.fixture
def smaller(tiny_directory: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    weft.compress(model, "svd", budget=0.7)
    model.save_pretrained(tmp_path / "smaller")
    AutoTokenizer.from_pretrained(tiny_directory).save_pretrained(tmp_path / "smaller")
    return tmp_path / "smaller"


def test_tasks_of_the_harness(smaller: Path, task_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = weft.adapt(AutoModelForCausalLM.from_pretrained(smaller), "lora", 2)
    for parameter in weft.trainable(model).parameters.values():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    weft.save_adapter(model, tmp_path / "adapter")
    plain = evaluate.run(str(smaller), tasks=[str(task_file)], device="cpu")
    moved = evaluate.run(str(smaller), tasks=[str(task_file)], adapter=tmp_path / "adapter", limit=4, device="cpu")
    assert 0 <= plain["tasks"]["sums"]["acc"] <= 1 and set(moved["tasks"]["sums"]) >= {"acc", "acc_stderr"}
    with pytest.raises(WeftError, match="no task file"):
        evaluate.run(str(smaller), tasks=[str(tmp_path / "absent.yaml")])


def test_the_harness_own_command_opens_a_weft_directory(smaller: Path, task_file: Path) -> None:
    pytest.importorskip("lm_eval")
    words = ["--model", "hf", "--model_args", f"pretrained={smaller}", "--tasks", str(task_file), "--device", "cpu"]
    command = [str(Path(sys.executable).with_name("lm_eval")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "sums" in done.stdout, done.stderr[-2000:]


def test_programs_that_know_nothing_of_weft_open_its_directories(smaller: Path) -> None:
    """Where weft is installed, Python's start has it imported before transformers, and imports nothing else."""
    files = {str(file) for file in importlib.metadata.files("weft") or ()}
    assert {"weft_startup.pth", "_weft_startup.py"} <= files
    code = (
        "import sys; assert 'weft' not in sys.modules and 'torch' not in sys.modules; import transformers as hf;"
        f"print(hf.AutoConfig.from_pretrained({str(smaller)!r}).quantization_config['quant_method']);"
        "from transformers.quantizers import AutoQuantizationConfig as A; print(A.from_dict({'quant_method': 'weft'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("weft"), done.stderr[-2000:]


def test_mergekit_averages_what_weft_merged(tiny_directory: Path, tmp_path: Path) -> None:
    """Two adapters merged by weft are plain models, and mergekit's linear mean of them is the mean of their weights."""
    pytest.importorskip("mergekit")
    weights = []
    for seed in range(2):
        model = weft.adapt(AutoModelForCausalLM.from_pretrained(tiny_directory), "lora", 2)
        for parameter in weft.trainable(model).parameters.values():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
        weft.save_adapter(model, tmp_path / f"adapter{seed}")
        merge.run(str(tiny_directory), tmp_path / f"model{seed}", adapter=tmp_path / f"adapter{seed}", device="cpu")
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"model{seed}").state_dict())
    models = [{"model": str(tmp_path / f"model{seed}"), "parameters": {"weight": 0.5}} for seed in range(2)]
    (tmp_path / "mean.yaml").write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": models}))
    command = [
        str(Path(sys.executable).with_name("mergekit-yaml")),
        str(tmp_path / "mean.yaml"),
        str(tmp_path / "mean"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "mean").state_dict()
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (weights[0][name] + weights[1][name]) / 2, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in mean)


def test_without_the_harness_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeftError, match=r"pip install 'weft\[eval\]'"):
        evaluate.run("pico", tasks=["hellaswag"])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("who", ["weft", "peft"])
def test_trl_trains(kind: str, who: str, smaller: Path, tmp_path: Path) -> None:
    """A compressed model, by weft's adapter or through TRL's `peft_config`; two steps move what is trained alone."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smaller), AutoTokenizer.from_pretrained(smaller)
    if who == "weft":
        weft.adapt(model, "lora", 2)
    config = None if who == "weft" else peft.LoraConfig(r=2, target_modules="all-linear")
    common: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    if kind == "sft":
        rows = datasets.Dataset.from_list([{"text": f"{i} and {i} is {2 * i}"} for i in range(8)])
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(max_length=32, **common), train_dataset=rows, processing_class=tokenizer,
            peft_config=config,
        )  # fmt: skip
    else:
        rows = datasets.Dataset.from_list(
            [{"prompt": f"{i} and {i} is", "chosen": f" {2 * i}", "rejected": f" {3 * i}"} for i in range(8)]
        )
        trainer = trl.DPOTrainer(
            model, args=trl.DPOConfig(max_length=32, **common), train_dataset=rows, processing_class=tokenizer,
            peft_config=config,
        )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(weft.trainable(trainer.model).parameters)
    assert any(isinstance(module, SumLinear) for module in trainer.model.modules())


def test_sentence_transformers_opens_a_compressed_encoder(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from weft.embedded import model_path

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = BertModel(config)
    weft.compress(model, "svd", budget=0.7)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    tokenizer.save_pretrained(tmp_path / "encoder")
    encoder = st.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert any(isinstance(module, SumLinear) for module in encoder.modules())
    assert encoder.encode(["a sentence", "another"]).shape == (2, 32)


@pytest.mark.parametrize("kind", ["low rank", "nf4 and low rank", "integers", "int8"])
def test_onnx_of_sums_of_terms(kind: str, tmp_path: Path) -> None:
    """Codes are decoded in the graph, by arithmetic that ONNX has; onnxruntime computes what the layer does."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from weft.terms import Int8, IntegerCode, LowRank, NormalFloat

    generator = torch.Generator().manual_seed(0)
    W, B, A = (torch.randn(*shape, generator=generator) for shape in ((48, 64), (48, 3), (3, 64)))
    made = {"nf4 and low rank": NormalFloat, "int8": Int8}
    terms: dict[str, Any] = {"code": made[kind].from_matrix(W)} if kind in made else {}
    terms |= {"code": IntegerCode.from_matrix(W, 3, 32)} if kind == "integers" else {}
    terms |= {"low_rank": LowRank.from_factors(B, A)} if "low rank" in kind else {}
    layer = SumLinear(terms, torch.randn(48, generator=generator)).eval()
    x = torch.randn(2, 5, 64, generator=generator)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, input_names=["x"])
    (found,) = runtime.InferenceSession(tmp_path / "layer.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), atol=1e-5, rtol=1e-5)
