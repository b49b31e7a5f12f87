"""Grafts by the one verb: trained, written, opened, continued, evaluated, and refused where they have no meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import weft
from weft.errors import WeftError
from weft.grafts import GRAFTS
from weft.runs.loading import load_model
from weft.train.checkpoints import last_checkpoint
from weft.verbs import combine, evaluate, merge
from weft.verbs import finetune as verb

TEXT = "".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(120))
SETTINGS = {"steps": 4, "lr": 1e-2, "window": 32, "batch": 2, "log_every": 1, "device": "cpu", "save_every": 2}
OPTIONS = {"lst": {"reduction": 4}, "quantizable-attention": {"gate": "all"}}
STILL = {"quantizable-attention"}  # gates alone move a fresh model less than batches differ


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.txt").write_text(TEXT)
    return tmp_path / "data.txt"


@pytest.mark.parametrize("graft", GRAFTS)
def test_run_trains_the_graft_and_writes_a_directory_that_opens(
    graft: str, tiny_directory: Path, data: Path, tmp_path: Path
) -> None:
    options = OPTIONS.get(graft, {})
    result = verb.run(tiny_directory, tmp_path / "out", method=graft, data=data, **SETTINGS, **options)
    base = AutoModelForCausalLM.from_pretrained(tiny_directory)
    tuned = load_model(tmp_path / "out", device="cpu")
    assert result["trainable_parameters"] == weft.trainable(tuned).count
    assert result["trainable_parameters"] == GRAFTS[graft].count(base, GRAFTS[graft].options(options))
    assert graft in STILL or result["loss_last"] < result["loss_first"]
    evaluated = weft.evaluate(tuned, _tokenizer(tiny_directory), TEXT, 32)["perplexity"]
    with pytest.raises(WeftError, match="cannot be merged into weights"):
        merge.run(tmp_path / "out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.partial").exists()
    plain = weft.remove_adapter(tuned)
    assert all(torch.equal(p, base.get_parameter(name)) for name, p in plain.named_parameters()), "the base was trained"
    assert evaluated != weft.evaluate(plain, _tokenizer(tiny_directory), TEXT, 32)["perplexity"]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"weft_graft.json", "weft_graft.safetensors", "README.md", "run.json", "tokenizer.json"} <= files
    assert not {"config.json", "model.safetensors"} & files  # the base is not written again
    beside = evaluate.run(str(tiny_directory), text=data, window=32, adapter=tmp_path / "out", device="cpu")
    assert beside["perplexity"] == pytest.approx(evaluated, rel=1e-6)
    with pytest.raises(WeftError, match=f"holds the graft {graft!r}"):
        combine.run([tmp_path / "out", tmp_path / "out"], tmp_path / "both")


@pytest.mark.parametrize("graft", GRAFTS)
def test_it_goes_on_from_a_checkpoint_bit_for_bit(graft: str, tiny_directory: Path, data: Path, tmp_path: Path) -> None:
    tokenizer, settings = _tokenizer(tiny_directory), {k: v for k, v in SETTINGS.items() if k != "device"}
    ends = []
    for directory in ("straight", "stopped"):
        model = AutoModelForCausalLM.from_pretrained(tiny_directory)
        place = tmp_path / directory
        verb.finetune(model, tokenizer, TEXT, graft, directory=place, **settings, **OPTIONS.get(graft, {}))
        if directory == "stopped":  # as it is found after an interruption at step 2
            import shutil

            shutil.rmtree(last_checkpoint(place))
            model = AutoModelForCausalLM.from_pretrained(tiny_directory)
            verb.finetune(model, tokenizer, TEXT, graft, directory=place, **settings, **OPTIONS.get(graft, {}))
        ends.append(weft.trainable(model).parameters)
    straight, resumed = ends
    assert all(torch.equal(parameter, resumed[name]) for name, parameter in straight.items())


def _tokenizer(directory: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
