"""Perplexity against bits a weight: methods alone, codes with factors beside them, and `auto`, on two kinds of text.

    python benchmarks/frontier.py MODEL --text wikitext=FILE [--calibrate python|wikitext|python+wikitext]
        [--rows auto gptq ...] [--budgets 2 2.5 3 3.5 4] [--windows 32] [--judged 24] [--seed 0] [--device cuda]
        --json benchmarks/results/frontier_ref.jsonl
    python benchmarks/frontier.py --plot FILE       # what FILE holds, a chart a text beside it

MODEL is a directory, a Hub id or `pico`. Calibration is on the first half of a text, judging on its second half;
`python` is weft's own split, the standard library's files without those held out, and these; `python+wikitext` takes
half of the windows from each. Beside the perplexity stands the divergence from the dense model's predictions. Bits
count everything that is stored for the replaced matrices: codes, scales, zero points, factors. Every row at every
budget is a line of the file; those that are there already are not measured again, so that an interrupted run goes on,
and `python docs/generate.py` makes tables of the files in benchmarks/results. Peak memory is the process' resident
high-water mark from the row's beginning on, or the device's, the model and a dense one to compare with included. Rows
of one run share the moments that they read: the seconds of collecting them are the first one's.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llm_compressor
import torch
from torch.utils.flop_counter import FlopCounterMode

from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.runs.loading import load_model, load_tokenizer
from weft.runs.report.plots import Series, line_chart
from weft.terms import Masked
from weft.terms.layers import linear_layers, shape_of
from weft.train.windows import calibration_batches
from weft.verbs.compress import compress
from weft.verbs.evaluate import evaluate

PEER = "llm-compressor"
TABLE = {"clip": True, "table": True, "group": 128}

ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rtn": ("rtn", {"allocate": "equal"}),
    "nf": ("nf", {"allocate": "equal"}),
    "nf, widths by layer": ("nf", {"allocate": "best"}),
    "gptq": ("gptq", {"allocate": "equal"}),
    "gptq, widths by layer": ("gptq", {"allocate": "best"}),
    "gptq, clipped, widths by layer": ([("gptq", {"clip": True})], {"allocate": "best"}),
    "gptq, clipped": ([("gptq", {"clip": True})], {"allocate": "equal"}),
    "yaqa, clipped": ([("yaqa", {"clip": True})], {"allocate": "equal"}),
    "yaqa, clipped, G damped by 0.01": ([("yaqa", {"clip": True, "output_damping": 0.01})], {"allocate": "equal"}),
    "yaqa, clipped, widths by layer": ([("yaqa", {"clip": True})], {"allocate": "best"}),
    "yaqa, by table, widths by layer": ([("yaqa", {**TABLE, "group": None})], {"allocate": "best"}),
    "awq": ("awq", {"allocate": "equal"}),
    "baq": ("baq", {"allocate": "equal"}),
    "kfac-svd": ("kfac-svd", {}),
    "pifa": ("pifa", {}),
    "modegpt": ("modegpt", {}),
    "wanda 2:4": ([("wanda", {"pattern": "2:4"})], {}),
    "sparsegpt 2:4": ([("sparsegpt", {"pattern": "2:4"})], {}),
    "sparsegpt 2:4 + eora": ([("sparsegpt", {"pattern": "2:4"}), "eora"], {"allocate": "equal"}),
    "gptq2 + eora": ([("gptq", {"bits": 2, "group": 128}), "eora"], {"allocate": "equal"}),
    "gptq2 + eora, allocated": ([("gptq", {"bits": 2, "group": 128}), "eora"], {"allocate": "best"}),
    "gptq3 + eora": ([("gptq", {"bits": 3, "group": 128}), "eora"], {"allocate": "equal"}),
    "gptq3 + eora, allocated": ([("gptq", {"bits": 3, "group": 128}), "eora"], {"allocate": "best"}),
    "gptq2, clipped + eora": ([("gptq", {"bits": 2, "group": 128, "clip": True}), "eora"], {"allocate": "equal"}),
    "gptq2, clipped + eora, allocated": (
        [("gptq", {"bits": 2, "group": 128, "clip": True}), "eora"],
        {"allocate": "best"},
    ),
    "gptq3, clipped + eora": ([("gptq", {"bits": 3, "group": 128, "clip": True}), "eora"], {"allocate": "equal"}),
    "gptq3, clipped + eora, allocated": (
        [("gptq", {"bits": 3, "group": 128, "clip": True}), "eora"],
        {"allocate": "best"},
    ),
    "yaqa1, by table + eora": ([("yaqa", {**TABLE, "bits": 1}), "eora"], {"allocate": "equal"}),
    "yaqa1, by table + eora, allocated": ([("yaqa", {**TABLE, "bits": 1}), "eora"], {"allocate": "best"}),
    "nf2 + lorc": (["nf2", "lorc"], {"allocate": "equal"}),
    "nf2 + eora": (["nf2", "eora"], {"allocate": "equal"}),
    "nf2 + eora, allocated": (["nf2", "eora"], {"allocate": "best"}),
    "nf3 + lorc": (["nf3", "lorc"], {"allocate": "equal"}),
    "nf3 + eora": (["nf3", "eora"], {"allocate": "equal"}),
    "nf3 + eora, allocated": (["nf3", "eora"], {"allocate": "best"}),
    "nf2 + eora, by auto": ("auto", {"methods": "nf2+eora"}),
    "nf3 + eora, by auto": ("auto", {"methods": "nf3+eora"}),
    "llm-compressor, gptq": (PEER, {}),
    "auto": ("auto", {}),
    "auto, of codes alone": (
        "auto",
        {
            "methods": "yaqa:group=null:clip=true:table=true, yaqa:group=128:clip=true:table=true, "
            "yaqa:group=128:clip=true"
        },
    ),
    "auto, of grids": (
        "auto",
        {"methods": "yaqa:clip=true,yaqa:group=128:clip=true,kfac-svd,yaqa:group=128:clip=true+eora"},
    ),
    "auto, of gptq": (
        "auto",
        {"methods": "gptq:clip=true,gptq:group=128:clip=true,kfac-svd,gptq:group=128:clip=true+eora"},
    ),
    "auto, unclipped": ("auto", {"methods": "gptq,gptq:group=128,kfac-svd,gptq:group=128+eora"}),
    "auto, lems": ("auto", {"allocate": "lems"}),
}
"""What is measured: methods and how they are called. What is "allocated" takes no more bytes than the row without."""

BUDGETS = [2.0, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.25]

_TOKENS = 64  # that multiplications are counted with


def main() -> None:
    args = arguments()
    if args.plot:
        plot(args.plot)
        return
    found = lines(args.json)
    done = {key(line) for line in found}
    texts = dict(pair.split("=", 1) for pair in args.text)
    tokenizer = load_tokenizer(args.model)
    judges = {"python": default_text("evaluation"), **{name: half(path, 1) for name, path in texts.items()}}
    data = calibration(args, tokenizer, texts)

    dense, drawn = loaded(args), {"windows": args.judged, "window": args.window, "seed": 0}
    windows = {name: list(calibration_batches(tokenizer, [text], **drawn)) for name, text in judges.items()}

    def judged(model: Any) -> dict[str, Any]:
        perplexity = {
            name: evaluate(model, tokenizer, text, window=args.window, windows=args.judged)["perplexity"]
            for name, text in judges.items()
        }
        return {
            "perplexity": perplexity,
            "divergence": {name: divergence(dense, model, batches) for name, batches in windows.items()},
            "operations": operations(dense, model),
            "model_bytes": sum(p.nbytes for p in dense.parameters()),
        }

    head = {"model": Path(args.model).name, "calibrate": args.calibrate, "seed": args.seed, **environment(args)}
    if key({**head, "row": "dense", "budget": 16.0}) not in done:
        write(args.json, {**head, "row": "dense", "budget": 16.0, **judged(dense)})
    with tempfile.TemporaryDirectory() as pieces:  # of all rows: those that read the same moments collect them once
        for line in ({**head, "row": name, "budget": budget} for name in args.rows for budget in args.budgets):
            if key(line) not in done:
                most = bits_beside(found, line)
                found.append({**line, **measured(args, line["row"], most, data, judged, Path(pieces))})
                write(args.json, found[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--calibrate", default="python")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--judged", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def calibration(args: argparse.Namespace, tokenizer: Any, texts: dict[str, str]) -> list[Any]:
    """Batches of the texts that --calibrate names, the same number of windows from each."""
    names = args.calibrate.split("+")
    sources = [default_text("calibration") if name == "python" else half(texts[name], 0) for name in names]
    drawn = {"windows": args.windows // len(names), "window": args.window, "seed": args.seed}
    return [batch for source in sources for batch in calibration_batches(tokenizer, [source], **drawn)]


@torch.no_grad()
def divergence(dense: Any, model: Any, batches: list[Any]) -> float:
    """Mean over positions of KL(dense || model), in nats, which moves far less by chance than a loss of the same."""
    found = []
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        p, q = (one(input_ids=ids).logits.float().log_softmax(-1) for one in (dense, model))
        found.append((p.exp() * (p - q)).sum(-1).mean().item())
    return sum(found) / len(found)


@torch.no_grad()
def operations(dense: Any, model: Any) -> float:
    """Multiplications of a token in the linear layers, relative to the dense model's; of a mask, what it leaves."""
    count = whole = 0.0
    for name in linear_layers(dense):
        module, (out, inn) = model.get_submodule(name), shape_of(dense.get_submodule(name))
        x = torch.zeros(_TOKENS, inn, device=model.device, dtype=dense.dtype)
        with FlopCounterMode(display=False) as counter:
            module(x)
        kept = [part.values.numel() / (out * inn) for part in module.modules() if isinstance(part, Masked)]
        count += counter.get_total_flops() / (2 * _TOKENS) * (kept[0] if kept else 1.0)
        whole += out * inn
    return count / whole


def loaded(args: argparse.Namespace) -> Any:
    """The model in fp32, of which bytes count as the checkpoint has them, on the device."""
    return load_model(args.model, device="cpu").to(args.device)


def half(path: str, which: int) -> str:
    """The first or second half of a text."""
    text = Path(path).read_text(encoding="utf-8")
    return text[len(text) // 2 :] if which else text[: len(text) // 2]


def bits_beside(found: list[dict[str, Any]], line: dict[str, Any]) -> float:
    """The bits that a row may take: its budget, or what the row that is not allocated took of it."""
    beside = key({**line, "row": line["row"].removesuffix(", allocated")})
    bits: float = next((other["bits"] for other in found if key(other) == beside and "bits" in other), line["budget"])
    return bits


def measured(args: argparse.Namespace, row: str, budget: float, data: Any, judged: Any, pieces: Path) -> dict[str, Any]:
    """What a row gives at a budget, or why it gives nothing."""
    method, given = ROWS[row]
    model, began = loaded(args), time.perf_counter()
    forget_peak(args.device)
    try:
        if method == PEER:
            bits, choices = llm_compressor.gptq(model, budget, data), []
        else:
            wanted = {"budget": f"{budget} bits", "batches": data, "seed": args.seed, **given}
            allocation = compress(model, method, progress=pieces, **wanted).allocation
            bits, choices = allocation.bits_per_weight, list(allocation.choices.values())
    except WeftError as error:
        return {"error": str(error)}
    seconds, peak = time.perf_counter() - began, peak_bytes(args.device)
    return {
        "bits": bits,
        **judged(model),
        "predicted": sum(choice.loss for choice in choices) / 2,
        "methods": {name: sum(c.method == name for c in choices) for name in {c.method for c in choices}},
        "seconds": seconds,
        "peak_memory_bytes": peak,
    }


def forget_peak(device: str) -> None:
    """Start the high-water mark anew, where the system can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def peak_bytes(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "windows": args.windows,
        "window": args.window,
        "judged": args.judged,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),  # whose standard library is the text
    }


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a line another measurement."""
    return tuple(line[name] for name in ("model", "calibrate", "seed", "windows", "window", "judged", "row", "budget"))


def lines(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path and path.is_file() else []


def write(path: Path | None, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    if path:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def plot(path: Path) -> None:
    """One chart a text, one line a row."""
    found = [line for line in lines(path) if "bits" in line]
    colors = ["#0c3470", "#5b9bd5", "#c26a2e", "#3f8f6b", "#8a5aa8", "#b8963e", "#8a94a3", "#b3261e", "#2aa1a1"]
    rows = list(dict.fromkeys(line["row"] for line in found))
    for text in found[0]["perplexity"]:
        series = []
        for i, row in enumerate(rows):
            points = sorted((line["bits"], line["perplexity"][text]) for line in found if line["row"] == row)
            xs, ys = [x for x, _ in points], [y for _, y in points]
            series.append(Series(row, xs, ys, colors[i % len(colors)], marked=True, dash=i))
        chart = line_chart(f"perplexity, {text}", series, "bits a weight", "perplexity", log=True, legend=True)
        alone = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        path.with_name(f"{path.stem}_{text}.svg").write_text(alone)


if __name__ == "__main__":
    main()
