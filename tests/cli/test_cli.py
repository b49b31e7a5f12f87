"""The command line's promises: instant help, one sentence for a mistake, clean JSON, the exact calls."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from weft.cli import app
from weft.errors import WeftError

VERBS = ("inspect", "compress", "finetune", "eval", "merge", "combine", "quantize", "pretrain", "methods", "demo")


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every call of a verb's `run`, recorded instead of done."""
    made: list[tuple[str, dict[str, Any]]] = []
    answer: dict[str, Any] = {"matrices": [], "parameters": 0, "stages": [], "generated": "", "report": ""}
    answer |= {"model": {"name": "m", "parameters": 0}, "commands": []}
    answer["predicted"] = {"by": "weights", "unit": "", "limit": 0.01}
    answer["outlook"] = []
    for verb in ("inspect", "compress", "finetune", "evaluate", "merge", "combine", "quantize", "pretrain", "demo"):
        module = __import__(f"weft.verbs.{verb}", fromlist=["run"])
        monkeypatch.setattr(module, "run", lambda _verb=verb, **kwargs: made.append((_verb, kwargs)) or answer)
    return made


def test_every_verb_has_help_and_no_verb_prints_the_list(weft: Callable[..., Result]) -> None:
    listing = weft("--help").stdout
    for verb in VERBS:
        assert verb in listing
        result = weft(verb, "--help")
        assert result.exit_code == 0 and "--json" in result.stdout


def test_version(weft: Callable[..., Result]) -> None:
    import weft as package

    assert weft("--version").stdout.split() == ["weft", package.__version__]


EXACT = [
    ("inspect M", "inspect", {"model": "M"}),
    (
        "inspect M --measures farms,ppl-sparsity --data FILE --json",
        "inspect",
        {"model": "M", "measures": "farms,ppl-sparsity", "data": Path("FILE"), "windows": 8, "window": 512},
    ),
    (
        "inspect M --against O --measures intruder-dimensions,weight-matching --report page.html",
        "inspect",
        {"model": "M", "against": "O", "measures": "intruder-dimensions,weight-matching", "report": Path("page.html")},
    ),
    (
        "compress M -o O --method svd-llm --budget 0.6 --allocate uniform --calibration F "
        "--windows 32 --window 512 --round 8 --seed 1",
        "compress",
        {
            "out": Path("O"),
            "method": "svd-llm",
            "budget": "0.6",
            "allocate": "uniform",
            "round": 8,
            "seed": 1,
            "windows": 32,
        },
    ),
    (
        "compress M -o O --budget 500MB",
        "compress",
        {"budget": "500MB", "method": "kfac-svd", "windows": 32, "window": 512, "seed": 0},
    ),
    (
        "finetune M -o O --method lora --data F --steps 200 --rank 16 --lr 1e-4 --window 512 --batch 4 --seed 0",
        "finetune",
        {"method": "lora", "data": [Path("F")], "steps": 200, "rank": 16, "lr": 1e-4, "window": 512, "batch": 4},
    ),
    (
        "eval M --text F --window 512 --windows 24 --json",
        "evaluate",
        {"text": [Path("F")], "window": 512, "windows": 24},
    ),
    ("merge M -o O", "merge", {"model": "M", "out": Path("O")}),
    (
        "combine A B -o O --method lego --rank 16 --weight 0.5 --weight 2 --option canonical=true",
        "combine",
        {
            "adapters": [Path("A"), Path("B")],
            "method": "lego",
            "rank": 16,
            "weights": [0.5, 2.0],
            "canonical": True,
        },
    ),
    (
        "quantize M -o O --bits 4 --targets q_proj --targets k_proj",
        "quantize",
        {"model": "M", "out": Path("O"), "bits": 4.0, "scheme": None, "targets": ["q_proj", "k_proj"], "rank": 64},
    ),
    (
        "pretrain --size 9m --optimizer galore --rank 64 --text FILE --steps 200 -o OUT --lr 1e-2 --window 256 "
        "--batch 16 --eval-text FILE --seed 0",
        "pretrain",
        {"size": "9m", "optimizer": "galore", "rank": 64.0, "text": [Path("FILE")], "steps": 200, "lr": 1e-2},
    ),
]


@pytest.mark.parametrize(("line", "verb", "expected"), EXACT)
def test_the_exact_calls(
    weft: Callable[..., Result], calls: list[Any], line: str, verb: str, expected: dict[str, Any]
) -> None:
    result = weft(*line.split())
    assert result.exit_code == 0, result.output
    ((called, arguments),) = calls
    assert called == verb and arguments | expected == arguments


def test_arguments_reach_a_run_that_takes_them() -> None:
    """Each command passes exactly what its verb's `run` accepts."""
    import inspect as signatures

    from weft.cli import combine, compress, demo, evaluate, export, finetune, inspect, merge, pretrain, quantize
    from weft.cli.common import COMMON, PUSH, with_common

    answered = {"json", "option", "gguf_file", PUSH, *COMMON}  # by the command itself
    for command in (combine, compress, demo, evaluate, export, finetune, inspect, merge, pretrain, quantize):
        name = command.__name__.rsplit(".", 1)[1]
        run = __import__(f"weft.verbs.{name}", fromlist=["run"]).run
        taken = signatures.signature(run).parameters
        given = set(with_common(command.command).parameters) - answered
        assert {"seed", "device"} <= given or name == "combine"
        if name in ("merge", "quantize", "export"):
            given -= {"seed"}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        assert open_ended or given <= set(taken), name


def test_method_options(weft: Callable[..., Result], calls: list[Any]) -> None:
    assert weft("compress", "M", "-o", "O", "--option", "ridge=1e-3", "--option", "side=in").exit_code == 0
    assert calls[0][1]["ridge"] == 1e-3 and calls[0][1]["side"] == "in"
    for bad, sentence in (("ridge", "NAME=VALUE"), ("seed=3", "give it as --seed 3")):
        result = weft("compress", "M", "-o", "O", "--option", bad)
        assert result.exit_code == 2 and sentence in result.stderr


MISTAKES = [
    (
        "compress pico -o O --method svd-lm",
        "There is no method to compress, quantize or prune called 'svd-lm'; the nearest",
    ),
    ("compress pico -o O --budget 1.5", "out of range: it is the share of parameters kept"),
    ("compress pico -o O --budget much", "is no share and no size; give what to keep, as 0.6, 60%"),
    ("compress pico -o O --allocate bets", "There is no allocation called 'bets'; the nearest are: best"),
    ("compress pico -o O --option rank=3", "has no option 'rank'"),
    ("compress pico -o O --seed -1", "--seed is -1"),
    ("compress pico -o O --calibration missing.txt", "missing.txt"),
    ("finetune pico -o O --method lorra", "the nearest are: lora"),
    ("finetune pico -o O --steps 0", "--steps is 0: give at least 1"),
    ("combine A B -o O", "A holds no adapter"),
    ("combine A B -o O --method leg", "the nearest are: lego"),
    ("combine A B -o O --option centre=1", "has no option 'centre'; its options are: none"),
    ("quantize pico -o O --bits 5", "5 bits are not possible; give 2, 3, 4 or 8"),
    ("quantize pico -o O --scheme nf5", "the nearest are: nf"),
    ("quantize pico -o O --scheme int8 --bits 4", "--scheme int8 has 8 bits, not 4"),
    ("eval pico --limit 3", "--limit counts questions of --tasks"),
    ("eval pico --tasks hellaswag --windows 3", "--tasks measures tasks instead of a text: leave --windows out"),
    ("quantize pico -o O --scheme nf4 --rank 8", "nf4 has no low-rank term for a rank or alpha: leave them out"),
    ("quantize pico -o O --scheme rtn --bits 9", "--scheme rtn has 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
    ("quantize ./missing -o O", "There is no directory './missing'"),
    ("quantize pico -o O --targets r_proj", "matches no linear layer; the nearest names are"),
    ("eval ./missing", "There is no directory './missing'"),
    ("eval pico --windows 0", "--windows is 0: give at least 1"),
    ("eval pico --window 1", "give at least 2"),
    ("eval pico --window 4096", "the model's context 1024"),
    ("inspect pico --layers *r_proj", "matches no linear layer; the nearest names are"),
    ("inspect pico --dtype int4", "There is no dtype 'int4'"),
    ("inspect pico --device cuda:77", "There is no device 'cuda:77'"),
    ("inspect pico --report r.pdf", "must end in .html"),
    ("inspect pico --measures farm", "There is no method to measure called 'farm'; the nearest are: farms"),
    ("inspect pico --measures ppl-sparsity", "looks at what a model makes of a text: give some, by --data FILE"),
    ("inspect pico --measures weight-matching", "compares two models: say which other one, by --against"),
    ("inspect pico --data ./missing.txt", "missing.txt"),
]


@pytest.mark.parametrize(("line", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(
    weft: Callable[..., Result], line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = weft(*line.split())
    said = [text for text in result.stderr.splitlines() if text.startswith("weft: ")]
    assert result.exit_code == 2 and len(said) == 1 and sentence in said[0], result.output
    assert not result.stdout and "Traceback" not in result.output
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_an_output_that_holds_something_is_refused(weft: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    for verb in ("compress", "finetune", "merge", "quantize"):
        result = weft(verb, "pico", "-o", tmp_path)
        assert result.exit_code == 2 and "exists and is not empty" in result.stderr
    assert weft("demo", "-o", tmp_path).exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def failing(error: BaseException) -> Callable[..., Any]:
    def run(**_: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (WeftError("two\nlines"), 2, "weft: two lines"),
        (KeyboardInterrupt(), 130, "the same command goes on from the last finished step"),
        (PermissionError(13, "Permission denied", "/etc/x"), 2, "Permission denied: '/etc/x'"),
    ],
)
def test_errors_of_the_work(
    weft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    monkeypatch.setattr("weft.verbs.compress.run", failing(error))
    result = weft("compress", "pico", "-o", "O")
    assert result.exit_code == code and sentence in result.stderr and result.stderr.count("\n") == 1


def test_a_defect_of_ours_keeps_its_traceback(weft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.verbs.compress.run", failing(RuntimeError("shape mismatch")))
    assert isinstance(weft("compress", "pico", "-o", "O").exception, RuntimeError)


def test_json_alone_stands_on_stdout(weft: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(**_: Any) -> dict[str, float]:
        print("a library says hello")
        return {"perplexity": 7.5}

    monkeypatch.setattr("weft.verbs.evaluate.run", noisy)
    result = weft("eval", "pico", "--json")
    assert json.loads(result.stdout) == {"perplexity": 7.5} and "hello" in result.stderr


def test_methods_lists_every_method_with_its_paper(weft: Callable[..., Result]) -> None:
    from weft.records import tables

    records = json.loads(weft("methods", "--json").stdout)
    listed = [record for table in tables() for record in table.values()]
    assert sorted((r["kind"], r["name"]) for r in records) == sorted((r.kind, r.name) for r in listed)
    assert all(r["summary"] and r["paper"] for r in records)
    table = weft("methods").stdout
    assert all(record.name in table for record in listed)


def test_inspect_prints_a_table_and_json(weft: Callable[..., Result], tiny_directory: Path) -> None:
    table = weft("inspect", tiny_directory)
    assert table.exit_code == 0 and "model.layers.1.mlp.down_proj" in table.stdout and "stable rank" in table.stdout
    assert len(json.loads(weft("inspect", tiny_directory, "--json").stdout)["matrices"]) == 15


@pytest.mark.slow
def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nsys.argv = ['weft', 'compress', '--help']\nfrom weft.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'scipy', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_python_m_weft_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "weft", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("weft ")


def test_verbs_say_what_they_cover_and_what_they_leave(tiny_directory: Path, tmp_path: Path) -> None:
    """Of the numbers in the model's matrices, with the reason: in words, in JSON and in the record."""
    codes, plain, served = (str(tmp_path / name) for name in ("codes", "plain", "served"))
    commands = {
        codes: ["quantize", str(tiny_directory), "-o", codes, "--scheme", "int8", "--targets", "*mlp*"],
        plain: ["merge", codes, "-o", plain],
        served: ["export", codes, "-o", served],
    }
    found = []
    for place, command in commands.items():
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 0, said.output
        assert "% of the numbers in the model's matrices" in said.output and "q_proj (it is not among" in said.output
        found.append(json.loads((Path(place) / "run.json").read_text())["metrics"])
    layers = CliRunner().invoke(app, ["inspect", str(tiny_directory), "--layers", "*mlp*", "--json"])
    found.append(json.loads(layers.stdout)["model"])
    assert 0 < found[0]["covered"] < 1 and all(one["covered"] == found[0]["covered"] for one in found)
    assert all(any("q_proj" in left for left in one["left"]) for one in found)
