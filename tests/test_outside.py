"""A package outside of the repository adds a term, a quantiser, a splitter and a rule by entry points alone."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weft
from weft import records
from weft.embedded.text import default_text
from weft.errors import WeftError

ROOT = Path(__file__).parent.parent

ENTRY_POINTS = """[weft.terms]
signs = outside:Ternary

[weft.methods]
signs = outside:TERNARY
sparse-low-rank = outside:SPARSE_LOW_RANK
capped = outside:CAPPED
"""


def install(place: Path, points: str = ENTRY_POINTS, name: str = "outside") -> Path:
    """What an installer leaves: the module, and a dist-info that names its entry points."""
    info = place / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "outside" / "outside.py", place)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    return place


WORK = """
import json
import torch, weft
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from weft.cli import app
from weft.testing import check_term
from weft.testing_adapters import check_adapter

def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise AssertionError(f"weft {' '.join(arguments)}: {result.output}") from result.exception
    return json.loads(result.stdout)

def opened(place):
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

ids = torch.arange(64)[None] + 100
batches = [{"input_ids": ids}]
kinds = {record["name"]: record["kind"] for record in run("methods", "--json")}
assert (kinds["signs"], kinds["sparse-low-rank"], kinds["capped"]) == ("quantize", "compress", "adapt")

calibration = "--calibration notes.txt --windows 4 --window 64 --device cpu --json".split()
run("compress", "model", "-o", "coded", "--method", "signs", *calibration)
kept = run("compress", "model", "-o", "split", "--method", "sparse-low-rank", "--budget", "0.5", *calibration)
sizes = {entry["size"][0] for entry in json.load(open("split/allocation.json"))["layers"].values()}
assert len(sizes) > 1, "the sizes are not chosen by the budget"
one, other = opened("model"), opened("split")
done = weft.compress(one, "sparse-low-rank", budget=0.5)
assert done.allocation.spent <= 0.5 * done.allocation.total
with torch.no_grad():
    assert torch.equal(one(ids).logits, other(ids).logits), "in Python and on the command line"
train = "--rank 2 --option cap=0.01 --data notes.txt --steps 3 --lr 0.1 --window 32 --batch 1 --device cpu --json"
run("finetune", "model", "-o", "tuned", "--method", "capped", *train.split())
factors = weft.trainable(weft.load_adapter(opened("model"), "tuned")).parameters.values()
assert max(float(p.detach().abs().max()) for p in factors) <= 0.0101, "the rule did not act"

def stopped(items, description):
    for number, item in enumerate(items):
        if number == 1:
            raise KeyboardInterrupt
        yield item

from pathlib import Path
for method in (["signs", "eora"], "sparse-low-rank"):
    budget = "9 bits" if method != "sparse-low-rank" else 0.5
    settings = {"budget": budget, "batches": batches}
    straight, resumed = opened("model"), opened("model")
    weft.compress(straight, method, **settings)
    place = Path("progress") / str(len(method))
    place.mkdir(parents=True)
    try:
        weft.compress(opened("model"), method, progress=place, track=stopped, **settings)
        raise AssertionError("it was not interrupted")
    except KeyboardInterrupt:
        assert list(place.iterdir()), "nothing is kept"
    weft.compress(resumed, method, progress=place, **settings)
    with torch.no_grad():
        assert torch.equal(straight(ids).logits, resumed(ids).logits), f"{method} resumes on other numbers"

outside = __import__("outside")
W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
scale = W.abs().mean(1, keepdim=True)
check_term(lambda: outside.Ternary.from_matrix(W), (W / scale).round().clamp(-1, 1) * scale)
check_adapter("capped")
with torch.no_grad():
    torch.save(opened("coded")(ids).logits, "logits.pt")
"""

OPEN = """
import sys
import torch, weft
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("coded", dtype=torch.float32)
assert "outside" in sys.modules and any(type(m).__name__ == "Ternary" for m in model.modules())
with torch.no_grad():
    assert torch.equal(model(torch.arange(64)[None] + 100).logits, torch.load("logits.pt", weights_only=True))
"""


@pytest.fixture
def desk(tiny_directory: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_directory, tmp_path / "model")
    (tmp_path / "notes.txt").write_text(default_text("evaluation")[:60_000])
    return tmp_path


@pytest.mark.slow
def test_an_outside_package_needs_entry_points_alone(desk: Path) -> None:
    """Listed, compressing, quantising, in a chain, training, resuming, written and opened, and held by the suites."""
    site = install(desk / "site")
    path = os.pathsep.join([str(ROOT / "src"), str(site)])
    environment = {"PYTHONPATH": path, "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for script in (WORK, OPEN):  # another process opens what the first one wrote
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=desk, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for installed packages; what this process learns of them is forgotten afterwards."""
    monkeypatch.setattr(records, "_asked", set(records._asked))
    monkeypatch.setattr(records, "_broken", {})
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    sys.modules.pop("outside", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("point", "cause"),
    [
        ("outside:MISSING", "has no attribute 'MISSING'"),
        ("nowhere:METHOD", "No module named 'nowhere'"),
        ("outside:BROKEN", "None is nothing that weft can register; give a record"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_and_stops_nothing(point: str, cause: str, site: Path) -> None:
    install(site, f"[weft.methods]\nbroken = {point}\nsigns = outside:TERNARY\n", "stranger")
    with pytest.warns(UserWarning, match=f"The package stranger offers {point} to weft, .*{cause}"):
        names = [record["name"] for record in weft.methods()]
    assert "signs" in names and "svd" in names, "what else is installed works on"
    with pytest.raises(WeftError, match=f"The package stranger offers {point} to weft"):
        weft.methods.find("broken")


def test_a_taken_name_is_refused(site: Path) -> None:
    install(site, "[weft.methods]\nx = weft.methods.svd:METHOD\ny = outside:SVD\n")
    (site / "outside.py").write_text(
        "from dataclasses import replace\nfrom weft.methods.svd import METHOD\nSVD = replace(METHOD, summary='mine')\n"
    )
    with pytest.warns(UserWarning, match="There is a compress method called 'svd' already; choose another"):
        weft.methods()
    assert weft.methods.METHODS["svd"].summary != "mine"


def test_register(site: Path) -> None:
    """In Python: a record, a class, and nothing else; a record that is used is registered by that."""
    install(site, "")
    outside = importlib.import_module("outside")
    assert weft.register(outside.Ternary) is outside.Ternary
    assert weft.register(outside.TERNARY) is outside.TERNARY and weft.register(outside.TERNARY) is outside.TERNARY
    assert {"signs"} <= {record["name"] for record in weft.methods()}
    for strange in (3, int, outside.Cap):
        with pytest.raises(WeftError, match="is no term|is nothing that weft can register"):
            weft.register(strange)
    from weft.terms.adapters import find_adapter
    from weft.testing_adapters import tiny_llama
    from weft.verbs.adapt import rules

    model = weft.adapt(tiny_llama(), outside.CAPPED, 2, cap=0.25)
    assert find_adapter(model).method == "capped" and [rule.cap for rule in rules(model)] == [0.25]
