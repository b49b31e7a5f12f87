"""The main job on the embedded model: inspect, compress, recover, evaluate, reload in a new process, and one page
about it.

Everything is what the other verbs do, called in a row with the arguments that the page names; nothing is special to
the demonstration but the curve of quality against budget. A demonstration that was interrupted, or run before, keeps
the directories it finished.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.files import jsonable, write_text
from weft.progress import say
from weft.runs.loading import load_model, load_tokenizer, resolve_device
from weft.runs.record import begin
from weft.train.windows import calibration_batches
from weft.verbs import compress, evaluate, finetune
from weft.verbs.demo_page import Curves, demo_page
from weft.verbs.inspect import inspect

__all__ = ["run"]

MODEL = "pico"
COMPRESS: Mapping[str, Any] = {"method": "kfac-svd", "budget": 0.6, "allocate": "best", "windows": 32, "window": 512}
FINETUNE: Mapping[str, Any] = {"method": "welore", "steps": 40, "lr": 1e-4, "window": 512, "batch": 2, "warmup": 5}
EVALUATE: Mapping[str, Any] = {"window": 512, "windows": 24}
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
CURVES = {
    "svd, uniform ranks": ("svd", "uniform"),
    "svd-llm, uniform ranks": ("svd-llm", "uniform"),
    "kfac-svd, best": ("kfac-svd", "best"),
}
CURVE_WINDOWS = 8  # of calibration and of evaluation: enough to see the order, and a third of the time
PASSES = 1100  # over a window, forward: what all of it takes as long as, measured on one thread of a CPU
PROMPT = "def read_lines(path):\n    "

_FILES = frozenset({"compressed", "compressed.partial", "recovered", "recovered.partial", "report.html", "run.json"})

_NEW_PROCESS = """
import json, sys
import weft
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(json.dumps({"class": type(model).__name__, "text": tokenizer.decode(out[0], skip_special_tokens=True)}))
"""


def run(out: str | Path = "demo", *, seed: int = 0, device: str | None = None) -> dict[str, Any]:
    """`weft demo`: do the main job under `out`, and return its table.

    Returns: JSON-able: stages (name, perplexity, parameters, bytes, tokens_per_second of the dense, the compressed and
    the recovered model), curves (perplexity by budget), generated (what a new process made of the saved model), report.

    Raises:
        WeftError: `out` holds something else than an earlier demonstration.
    """
    out = Path(out)
    _check_directory(out)
    target = resolve_device(device)
    record = begin("demo", {"out": out, "seed": seed}, seed=seed, device=target)
    out.mkdir(parents=True, exist_ok=True)
    compressed, recovered = out / "compressed", out / "recovered"

    say(f"\n1/6  weft inspect {MODEL}")
    model = load_model(MODEL, device=device)
    say(
        f"     {MODEL}, a model of {model.num_parameters() / 1e6:.1f} million numbers, is cut to "
        f"{COMPRESS['budget']:.0%} of its matrices, trained for {FINETUNE['steps']} steps, judged on text that it has "
        f"not seen, and opened in a new process. The six steps take about {_minutes(model)} on this machine; after an "
        "interruption the same command goes on."
    )
    spectra = inspect(model, name=MODEL)
    say(f"\n2/6  weft compress {MODEL} -o {compressed} {_options(COMPRESS)}")
    _stage(compress, MODEL, compressed, {**COMPRESS, "seed": seed}, device)
    say(f"\n3/6  weft finetune {compressed} -o {recovered} {_options(FINETUNE)}")
    _stage(finetune, str(compressed), recovered, {**FINETUNE, "seed": seed}, device)
    say(f"\n4/6  weft eval {_options(EVALUATE)}, on text that no step has seen: dense, compressed, recovered")
    stages = _evaluations({"dense": MODEL, "compressed": str(compressed), "recovered": str(recovered)}, device)
    say(f"\n5/6  Quality against budget: {', '.join(CURVES)}")
    curves = _curves(model, seed)
    say("\n6/6  A new process: import weft, then AutoModelForCausalLM.from_pretrained")
    generated = _reload(recovered)

    allocation = json.loads((compressed / "allocation.json").read_text(encoding="utf-8"))
    report = out / "report.html"
    write_text(report, demo_page(spectra, stages, allocation, curves, generated, _commands(compressed, recovered)))
    result = {"stages": stages, "curves": curves, "generated": generated, "report": str(report)}
    record.write(out, result)
    return dict(jsonable(result))


@torch.no_grad()
def _minutes(model: PreTrainedModel) -> str:
    """How long everything will take, in words, told from a pass over one window."""
    ids = torch.zeros(1, EVALUATE["window"], dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        model(input_ids=ids)
        seconds.append(time.perf_counter() - began)
    minutes = round(min(seconds) * PASSES / 60)
    return f"{minutes} minutes" if minutes > 1 else "a minute"


def _check_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise WeftError(f"{out} exists and is not a directory; choose another -o.")
    strange = sorted({path.name for path in out.iterdir()} - _FILES) if out.is_dir() else []
    if strange:
        raise WeftError(f"{out} holds {strange[0]}, which no demonstration made; choose another -o.")


def _stage(verb: Any, source: str, out: Path, arguments: Mapping[str, Any], device: str | None) -> None:
    """Run a verb, or keep the finished directory of an earlier run of it with the same arguments."""
    if not (out / "run.json").is_file():
        verb.run(source, out, device=device, **arguments)
        return
    earlier = json.loads((out / "run.json").read_text(encoding="utf-8"))["arguments"]
    changed = [key for key, value in arguments.items() if earlier.get(key) != value]
    if changed:
        raise WeftError(f"{out} was made with another {changed[0]}; remove it, or choose another -o.")
    say(f"     kept from an earlier run: {out}")


def _evaluations(models: Mapping[str, str], device: str | None) -> list[dict[str, Any]]:
    keys = ("perplexity", "parameters", "bytes", "tokens_per_second")
    found = []
    for name, model in models.items():
        measured = evaluate.run(model, device=device, **EVALUATE)
        found.append({"name": name, **{key: measured[key] for key in keys}})
        say(f"     {name:<12} perplexity {measured['perplexity']:.2f}")
    return found


def _curves(model: nn.Module, seed: int) -> Curves:
    """Held-out perplexity by method and budget, on fewer windows than the table; one survey a method."""
    tokenizer = load_tokenizer(MODEL)
    window = EVALUATE["window"]
    batches = calibration_batches(
        tokenizer, default_text("calibration"), windows=CURVE_WINDOWS, window=window, seed=seed
    )
    stats = compress.calibrate(model, batches, compress.needs("kfac-svd", allocate="best"))
    text = default_text("evaluation")

    def perplexity(of: Any) -> float:
        return float(evaluate.evaluate(of, tokenizer, text, window=window, windows=CURVE_WINDOWS)["perplexity"])

    curves: Curves = {name: {} for name in CURVES}
    dense = perplexity(model)
    for name, (method, allocate) in CURVES.items():
        with tempfile.TemporaryDirectory() as survey:  # what one budget found out serves the next
            for budget in BUDGETS:
                smaller = copy.deepcopy(model)
                compress.compress(
                    smaller,
                    method,
                    budget=budget,
                    allocate=allocate,
                    stats=stats,
                    sequential=False,
                    progress=Path(survey),
                )
                curves[name][budget] = perplexity(smaller)
        curves[name] = {1.0: dense, **curves[name]}
        say(f"     {name:<24} " + "  ".join(f"{b:g}: {p:.2f}" for b, p in curves[name].items()))
    return curves


def _reload(directory: Path) -> str:
    """What a new process that knows nothing but `import weft` generates from a saved model."""
    command: Sequence[str] = [sys.executable, "-c", _NEW_PROCESS, str(directory), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WeftError(f"{directory} does not open in a new process: {done.stderr.strip().splitlines()[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    say(f"     {answer['class']} opened {directory} and continued the prompt")
    return str(answer["text"])


def _commands(compressed: Path, recovered: Path) -> list[str]:
    """What a user types for the same."""
    return [
        f"weft inspect  {MODEL} --report spectra.html",
        f"weft compress {MODEL} -o {compressed} {_options(COMPRESS)}",
        f"weft finetune {compressed} -o {recovered} {_options(FINETUNE)}",
        f"weft eval     {recovered} {_options(EVALUATE)}",
    ]


def _options(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in arguments.items())
