"""Documentation is run: every Python block on a tiny model, every `weft` command through the parser."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.processes import script
from weft.cli import app
from weft.embedded.text import default_text
from weft.merging import MERGERS
from weft.methods import _PAGES, METHODS
from weft.select import SELECTIONS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def desk(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the pages speak of: model/, a small model, and notes.txt."""
    shutil.copytree(tiny_directory, tmp_path / "model")
    (tmp_path / "notes.txt").write_text(default_text("evaluation")[:60_000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def namespace() -> dict[str, Any]:
    """What a page may take for granted: a model wide enough for its ranks, and its parameters in two groups."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    others = [p for name, p in model.named_parameters() if "proj" not in name]
    return {"model": model, "matrices": matrices, "others": others}


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if blocks(page, "python")])
def test_python_blocks_run(name: str, desk: Path) -> None:
    names = {**namespace(), "__name__": "docs"}
    for block in blocks(ROOT / name, "python"):
        try:
            exec(compile(block, name, "exec", dont_inherit=True), names)
        except ModuleNotFoundError as error:
            if name != "docs/integrations.md":
                raise
            pytest.skip(f"{error.name} is not installed")


def commands(page: Path) -> list[list[str]]:
    """The `weft` commands of a page's bash blocks, as argument lists."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("weft ")]


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if commands(page)])
def test_weft_commands_parse(name: str) -> None:
    group = typer.main.get_command(app)
    for verb, *arguments in commands(ROOT / name):
        if verb.startswith("-"):
            continue
        command = group.commands[verb]  # type: ignore[attr-defined]
        context = command.make_context(verb, list(arguments))
        method = context.params.get("method")
        known = {"combine": [*MERGERS], "select": [*SELECTIONS]}.get(verb, [*METHODS, "rms-svd"])
        assert method is None or method in known, f"{name}: weft {verb} --method {method}"


def test_every_verb_has_a_page() -> None:
    group = typer.main.get_command(app)
    assert {p.stem for p in (ROOT / "docs" / "verbs").glob("*.md")} == set(group.commands)  # type: ignore[attr-defined]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


GENERATED = ("architectures.md", "cli.md", "deviations.md", "exports.md", "methods.md", "real-model.md", "results.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_can_be_read(page: Path) -> None:
    """At most 140 columns; only the rows of generated tables, which Markdown cannot break, may be longer."""
    rows = page.name in GENERATED and page.parent.name == "docs"
    long = [line for line in page.read_text().splitlines() if len(line) > 140 and not (rows and line.startswith("|"))]
    assert not long, "\n".join(long)


def test_generated_pages_are_current(tmp_path: Path) -> None:
    done = script(tmp_path, ROOT / "docs" / "generate.py", "--check")
    assert done.wait() == 0, done.stderr


def test_every_method_is_on_the_page_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    own = [method for page in _PAGES for method in vars(page).get("METHODS") or (page.METHOD,)]  # not those of tests
    assert len(own) > 40 and not [m.name for m in own if f"### {m.name}\n" not in text or m.paper not in text]


PROOF = """
import json, sys
import torch, weft
from pathlib import Path
from transformers import AutoModelForCausalLM
from tests.processes import script
from weft.cli import app
from typer.testing import CliRunner

assert Path(weft.__file__).is_relative_to(sys.argv[1]), weft.__file__

def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout

assert "rms-svd" in [record["name"] for record in json.loads(run("methods", "--json"))]
options = "--calibration notes.txt --windows 4 --window 64 --device cpu --json".split()
kept = json.loads(run("compress", "model", "-o", "half", "--method", "rms-svd", "--budget", "0.5", *options))
assert kept["share_kept"] <= 0.5
model = AutoModelForCausalLM.from_pretrained("half", dtype=torch.float32)
dense = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
assert any(isinstance(m, weft.terms.SumLinear) for m in model.modules())
trained = weft.methods.METHODS["rms-svd"].freeze(model)
assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())

# the other sorts
records = {record["name"]: record["kind"] for record in json.loads(run("methods", "--json"))}
sorts = {"capped": "adapt", "block-shift": "graft", "mean": "merge", "small-first": "allocate"}
assert {name: records[name] for name in sorts} == sorts
from weft.testing import check_term, example
from weft.testing_adapters import check_adapter, tiny_llama
from weft.testing_grafts import check_graft
check_term(lambda: example("rank_one"))
check_adapter("capped")
check_graft("block-shift")
weft.save_adapter(weft.adapt(tiny_llama(), "capped", 2), "a")
weft.save_adapter(weft.adapt(tiny_llama(), "capped", 2, seed=1), "b")
assert weft.combine(["a", "b"], "mean").rank == 4
small = weft.compress(tiny_llama(), "svd", budget=0.5, allocate="small-first").allocation
assert small.spent <= 0.5 * small.total

# the invariants: full rank gives W back, and the dropped values are the error in the method's own metric
generator = torch.Generator().manual_seed(0)
W, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 5), (40, 5)))
moment = x.T @ x / 40
B, A, s, _ = weft.methods.METHODS["rms-svd"].split.factorise(W, {"input_moment": moment}, ridge=0.0)
torch.testing.assert_close(B @ A, W)
error = (W - B[:, :2] @ A[:2]) * moment.diagonal().sqrt()
torch.testing.assert_close(error.square().sum(), s[2:].square().sum())

# the page of methods
import runpy
docs = f"{sys.argv[1]}/docs"
sys.path.insert(0, docs)
sys.argv[1:] = ["methods.md"]
runpy.run_path(f"{docs}/generate.py", run_name="__main__")
"""


GUIDE = (ROOT / "docs" / "add-a-method.md").read_text()
# the page's file -> where its line goes in the list of its room: a pattern, and what stands there then
LINES = {
    "src/weft/methods/rms_svd.py": {r"^( +)svd,$": r"\1svd,\n\1rms_svd,"},
    "src/weft/methods/capped.py": {r"^( +)svd,$": r"\1svd,\n\1capped,"},
    "src/weft/terms/rank_one.py": {
        r"^from weft.terms.removed": "from weft.terms.rank_one import RankOne\nfrom weft.terms.removed",
        r"^( +)Removed,$": r"\1Removed,\n\1RankOne,",
    },
    "src/weft/grafts/block_shift.py": {
        r"import lst": "import block_shift, lst",
        r"^( +)lst,$": r"\1lst,\n\1block_shift,",
    },
    "src/weft/merging/mean.py": {r"import cmlora": "import mean, cmlora", r"^( +)lego.M": r"\1mean.MERGER,\n\1lego.M"},
    "src/weft/allocate/small_first.py": {
        r"^    asvd,": "    asvd,\n    small_first,",
        r"\(uniform,": "(small_first, uniform,",
    },
}


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(desk: Path) -> None:
    """The page's own method, put into a copy of the sources, is found by the command line, saving and the docs."""
    tree = desk / "tree"
    shutil.copytree(ROOT / "src" / "weft", tree / "src" / "weft", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / part, tree / part)
    shutil.copy(ROOT / "README.md", tree)
    pages = re.findall(r"as `(src/weft/\S+\.py)`[^\n]*:\n\n```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert [file for file, _ in pages] == list(LINES)
    for file, text in pages:
        (tree / file).write_text(text)
        room = (tree / file).parent / "__init__.py"
        listed = room.read_text()
        for place, line in LINES[file].items():
            listed, changes = re.subn(place, line, listed, flags=re.MULTILINE)
            assert changes, f"{file}: {place}"
        room.write_text(listed)
    rooms = {str(Path(file).parent / "__init__.py") for file in LINES}
    assert _changed(tree) == {*LINES, *rooms}, "one file, and its line"

    environment = {
        "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{ROOT}",
        "PATH": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    proof = [sys.executable, "-c", PROOF, tree]
    done = subprocess.run(proof, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tree / "docs" / "methods.md").read_text()
    assert all(f"### {name}\n" in page for name in ("rms-svd", "capped", "block-shift", "mean", "small-first"))


def _changed(tree: Path) -> set[str]:
    """The source files that are not as in the repository."""
    found = {str(file.relative_to(tree)) for file in (tree / "src").rglob("*.py")}
    return {f for f in found if not (ROOT / f).is_file() or (ROOT / f).read_text() != (tree / f).read_text()}
