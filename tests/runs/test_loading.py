"""From a name to a model: what is found, and what every likely mistake is answered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from weft.embedded import model_path
from weft.errors import WeftError
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve, resolve_device, resolve_dtype


@pytest.fixture
def copy(tiny_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


def test_names(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tiny_directory) == str(tiny_directory)
    assert resolve("pico") == str(model_path())
    assert resolve("organisation/model") == "organisation/model"
    assert resolve("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_directory, "pico")
    assert resolve("pico") == "pico", "a directory here comes before the embedded model"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nowhere", "There is no directory './nowhere'"),
        ("/nowhere/at/all", "There is no directory"),
        ("a/b/c", "There is no directory 'a/b/c'"),
        ("", "name is empty"),
    ],
)
def test_missing_directories(name: str, sentence: str) -> None:
    with pytest.raises(WeftError, match=sentence):
        resolve(name)


def test_a_missing_directory_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "smaller").mkdir()
    with pytest.raises(WeftError, match="beside it there are: smaller"):
        resolve(tmp_path / "smalle")


def test_a_directory_without_configuration_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=r"holds no config\.json"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(WeftError, match="is a file; give the directory"):
        resolve(tmp_path / "model.safetensors")


def test_the_class_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is BertForSequenceClassification


def test_dtype_defaults_and_choices(copy: Path) -> None:
    load_model(copy, dtype="bfloat16").save_pretrained(copy)
    assert load_model(copy, device="cpu").dtype == torch.float32, "half precision is slow on a CPU"
    assert load_model(copy, dtype="auto").dtype == torch.bfloat16
    assert load_model(copy, dtype=torch.float64).dtype == torch.float64
    assert resolve_dtype(None, torch.device("cuda")) is None
    assert not load_model(copy).training


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(WeftError, match="no dtype 'int8'; choose one of: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))
    with pytest.raises(WeftError, match=r"no device 'tpu' on this machine; it has: cpu"):
        resolve_device("tpu")
    with pytest.raises(WeftError, match="no device 'cuda:99'"):
        resolve_device("cuda:99")


def test_a_truncated_weight_file(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeftError, match="weight file of .* damaged or cut short"):
        load_model(copy)


def test_missing_tensors_are_not_filled_with_noise(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeftError, match=r"lacks 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(copy)


def test_no_weights_unknown_architecture_and_broken_configuration(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(WeftError, match="cannot be loaded: .*safetensors"):
        load_model(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "warp"}))
    with pytest.raises(WeftError, match="cannot be loaded: .*warp"):
        load_config(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(WeftError, match="cannot be loaded"):
        load_config(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(WeftError, match="cannot be loaded"):
        load_model(copy)


def test_the_tokenizer_comes_along(tiny_directory: Path) -> None:
    assert load_tokenizer(tiny_directory).eos_token_id == 0
