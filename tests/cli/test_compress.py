"""`weft compress` on a tiny model: its JSON, and the sentence for each of the likeliest mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as hf
from typer.testing import CliRunner, Result

from weft.cli import app


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["compress", *map(str, arguments)])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.py"
    path.write_text(Path(json.__file__).read_text() * 4)
    return path


def test_json_on_stdout_and_a_model_on_disk(weft: Callable[..., Result], tiny_directory: Path, text: Path) -> None:
    small = ("--calibration", text, "--windows", 4, "--window", 32)
    result = weft(tiny_directory, "-o", "out", "--method", "svd-llm", "--budget", "60%", "--round", 2, *small, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["output"] == "out" and answer["share_kept"] <= 0.6
    assert {"parameters_before", "parameters", "bytes_before", "bytes", "matrices", "matrices_dense"} <= answer.keys()
    ranks = [layer["size"] for layer in json.loads(Path("out/allocation.json").read_text())["layers"].values()]
    assert all(rank == "dense" or rank % 2 == 0 for rank in ranks)
    assert hf.AutoModelForCausalLM.from_pretrained("out").config.quantization_config.method == "svd-llm"

    again = weft(tiny_directory, "-o", "again", "--allocate", "out/allocation.json", "--method", "svd", *small)
    assert again.exit_code == 0 and "matrix bytes" in again.stdout
    given = [layer["size"] for layer in json.loads(Path("again/allocation.json").read_text())["layers"].values()]
    assert given == ranks


MISTAKES = {
    "--method svdllm": "There is no method to compress, quantize or prune called 'svdllm'; the nearest are: svd-llm",
    "--budget 1.5": "The budget '1.5' is out of range: it is the share of parameters kept, above 0 and at most 1.",
    "--budget 40percent": "The budget '40percent' is no share and no size; give what to keep, as 0.6, 60%",
    "--budget 1kB": "The budget of 0.001MB is below what cannot be compressed: embeddings, norms and head take "
    "1.049MB; give a larger size.",
    "--budget 0.01": "The budget keeps 0.0100 of the matrices' bytes (0.320 bits a weight), but the smallest sizes "
    "take 0.0604 (",
    "--round 512": "The budget keeps 0.6000 of the matrices' bytes (19.200 bits a weight), but the smallest "
    "sizes take 1.0000 (",
    "--round 0": "--round is 0: ranks are multiples of a whole number from 1 on.",
    "--allocate bets": "There is no allocation called 'bets'; the nearest are: best",
    "--layers *q_prj*": "The layer pattern '*q_prj*' matches no linear layer; the nearest names are: ",
    "--option rank=8": "The method 'kfac-svd' has no option 'rank'; its options are: ridge.",
    "--option ridge": "--option 'ridge' is no NAME=VALUE, such as --option ridge=1e-3.",
    "--calibration none.txt": "none.txt",
    "--window 4096": "The window is 4096 tokens and the model's context 128: give a smaller --window.",
    "--windows 0": "Calibration takes --windows of at least 1 and --window of at least 2, not 0 and 32.",
    "--device tpu9": "There is no device 'tpu9' on this machine; it has: cpu",
    "--dtype int4": "There is no dtype 'int4'; choose one of: auto, float32, ",
    "--allocate none.json": "none.json is not an allocation file ([Errno 2] No such file or directory: 'none.json'); "
    "weft compress writes one beside its output.",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_sentence(
    weft: Callable[..., Result], tiny_directory: Path, text: Path, arguments: str
) -> None:
    common = ("--calibration", text, "--window", 32, "--windows", 4)
    result = weft(tiny_directory, "-o", "out", *common, *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    line = result.stderr.strip().splitlines()[-1]  # after the loading of the model, where that is needed to tell
    assert line.startswith("weft: ") and MISTAKES[arguments] in line
    assert not list(Path().iterdir())


def test_the_default_text_is_worth_a_word_where_it_is_read(tiny_directory: Path, tmp_path: Path) -> None:
    for method, said in (("svd", False), ("svd-llm", True)):
        short = ["--budget", "0.9", "--windows", "2", "--window", "32"]
        words = ["compress", str(tiny_directory), "-o", str(tmp_path / method), "--method", method, *short]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0 and ("No --calibration was given" in done.output) is said, done.output


def test_a_model_that_is_not_there(weft: Callable[..., Result], text: Path) -> None:
    result = weft("./nothing", "-o", "out", "--calibration", text)
    assert result.exit_code == 2 and result.stderr.startswith("weft: There is no directory './nothing'")


def test_an_output_that_is_taken(weft: Callable[..., Result], tiny_directory: Path, text: Path) -> None:
    Path("out").mkdir()
    Path("out/mine").write_text("")
    result = weft(tiny_directory, "-o", "out", "--calibration", text)
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "weft: The output directory out exists and is not empty; choose another -o, or remove it first."
    )
