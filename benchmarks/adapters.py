"""Every adapter method on one footing: one model, one budget of trainable numbers, the same data and steps, each at its
own learning rate, several seeds.

    python benchmarks/adapters.py                                # pico on Python's own sources, a CPU
    python benchmarks/adapters.py --model MODEL --data DIRECTORY [--device cuda] [--tasks shakespeare questions]
    python benchmarks/adapters.py ... --report                   # the table and the plot of what has been run so far

DIRECTORY holds shakespeare.txt (language modelling), trec-questions-train.jsonl and movie-sentences-train.jsonl (label,
text): the class is the likeliest of the class words after a prompt. Held out are a tenth of the text, of which 32
windows are measured, 400 questions and 200 sentences.

- Budget: the count of LoRA at --rank. Every other method gets the rank (or what counts in its place) whose trainable
  number comes nearest; some cannot come near, and the table says how many they have.
- Learning rate: 1e-3 * 3^k, by the held-out loss of seed 0: first k = -2, 0, 2, 4, because some methods have a false
  optimum at small rates, or next to where the method was best on the task before or in the results --start; then
  uphill until both neighbours are worse (at most --tries runs). The best rate is then run with the other seeds, which
  change the data order and the random starts.
- Interval: 95 %, Student's t over seeds, of the difference to LoRA with the same seed. A method beats LoRA where all of
  it lies below zero. The rate was chosen on the held-out data, for all methods alike.
- Memory: what a lean step keeps for its backward pass (on a GPU the peak allocation), and the trained state: weights,
  gradients and two moments. Time: median of the steps, without the first.

Every run is a line of benchmarks/results/adapters_<model>_<device>.jsonl and is not repeated; --part 1/2 and --part 2/2
share the methods between two processes. --report writes adapters_<model>_<device>.json and .svg beside it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from search import tuned
from torch import Tensor, nn

import weft
from weft.embedded.text import calibration_files, default_text
from weft.errors import WeftError
from weft.memory import lean, saved_bytes
from weft.methods import METHODS, Method
from weft.optim.schedules import cosine
from weft.rules import Rules
from weft.runs.loading import load_model, load_tokenizer
from weft.terms.layers import linear_layers, shape_of
from weft.train.sources import read_texts
from weft.train.windows import token_stream
from weft.verbs.adapt import adapt, make_optimizer, rules, trainable

Batch = dict[str, Tensor]
RESULTS = Path(__file__).parent / "results"
CENTRE, FACTOR, COARSE = 1e-3, 3.0, (0, 2, 4, -2)
BASELINE, UNTRAINED = "lora", "untrained"
HELD_OUT, HELD_OUT_WINDOWS = {"questions": 400, "sentences": 200}, 32
COSTLY = ("nola", "said")
"""Methods that compute their matrices at every call, and so are measured merged."""
CLASSES = {
    "questions": {
        "ABBR": " short", "DESC": " description", "ENTY": " thing", "HUM": " person", "LOC": " place", "NUM": " number",
    },
    "sentences": {"negative": " bad", "positive": " great"},
}  # fmt: skip
PROMPTS = {"questions": "{} The answer is a", "sentences": "{} It was"}
FILES = {"questions": "trec-questions-train.jsonl", "sentences": "movie-sentences-train.jsonl"}


@dataclass(frozen=True)
class Task:
    """Batches to learn from, and how well a model does on what is held out."""

    batch: Callable[[random.Random], Batch]
    measure: Callable[[nn.Module], dict[str, float]]


# --- data ---------------------------------------------------------------------------------------------------------


def language(ids: Tensor, held_out: Tensor, window: int, batch: int, device: str) -> Task:
    """Windows of a text; the loss over windows of its held-out part."""
    test = [held_out[i * window : (i + 1) * window] for i in range(min(HELD_OUT_WINDOWS, len(held_out) // window))]

    def draw(rng: random.Random) -> Batch:
        starts = [rng.randrange(len(ids) - window) for _ in range(batch)]
        rows = torch.stack([ids[start : start + window] for start in starts]).to(device)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        losses = []
        for part in _batched(test, 16):
            rows = torch.stack(list(part)).to(device)
            losses += [float(model(input_ids=rows, labels=rows).loss)] * len(rows)
        return {"loss": statistics.fmean(losses)}

    return Task(draw, measure)


def classes(rows: list[dict[str, str]], name: str, tokenizer: Any, batch: int, device: str) -> Task:
    """Rows of label and text; the loss and the share of right answers among the class words."""
    words = {label: tokenizer(word, add_special_tokens=False)["input_ids"] for label, word in CLASSES[name].items()}
    if any(len(word) != 1 for word in words.values()):
        raise SystemExit(f"{list(CLASSES[name].values())} are not single tokens of this model's tokenizer.")
    order, choices = list(words), torch.tensor([word[0] for word in words.values()])
    random.Random(0).shuffle(rows)
    prompts = tokenizer([PROMPTS[name].format(row["text"].strip()) for row in rows])["input_ids"]
    examples = [(ids[-127:], order.index(row["label"])) for ids, row in zip(prompts, rows, strict=True)]
    held_out, training = (
        examples[: HELD_OUT[name]],
        sorted(examples[HELD_OUT[name] :], key=lambda example: len(example[0])),
    )

    def collate(some: Sequence[tuple[list[int], int]]) -> Batch:
        longest = max(len(ids) for ids, _ in some) + 1
        rows_, labels = torch.zeros(len(some), longest, dtype=torch.int64), torch.full((len(some), longest), -100)
        mask = torch.zeros_like(rows_)
        for i, (ids, answer) in enumerate(some):  # padded on the left: the answer is the last token
            row = torch.tensor([*ids, int(choices[answer])])
            rows_[i, -len(row) :], mask[i, -len(row) :], labels[i, -1] = row, 1, row[-1]
        return {"input_ids": rows_.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}

    def draw(rng: random.Random) -> Batch:
        start = rng.randrange(len(training) - batch)
        return collate(training[start : start + batch])

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        losses, right = [], 0
        for part in _batched(sorted(held_out, key=lambda example: len(example[0])), 32):
            given = collate(part)
            inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
            scores = model(**inputs, logits_to_keep=2).logits[:, 0]
            answers = torch.tensor([answer for _, answer in part], device=device)
            logits = scores[:, choices.to(device)].float()
            losses += nn.functional.cross_entropy(logits, answers, reduction="none").tolist()
            right += int((logits.argmax(1) == answers).sum())
        return {"loss": statistics.fmean(losses), "accuracy": right / len(held_out)}

    return Task(draw, measure)


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def tasks(args: argparse.Namespace, tokenizer: Any) -> dict[str, Callable[[], Task]]:
    """Name -> what makes it."""

    def python() -> Task:
        ids = token_stream(tokenizer, read_texts(calibration_files()))
        return language(
            ids, token_stream(tokenizer, [default_text("evaluation")]), args.window, args.batch, args.device
        )

    def shakespeare() -> Task:
        ids = token_stream(tokenizer, [(args.data / "shakespeare.txt").read_text(encoding="utf-8")])
        cut = len(ids) * 9 // 10
        return language(ids[:cut], ids[cut:], args.window, args.batch, args.device)

    def labelled(name: str) -> Callable[[], Task]:
        def make() -> Task:
            lines = (args.data / FILES[name]).read_text(encoding="utf-8").splitlines()
            return classes([json.loads(line) for line in lines], name, tokenizer, 4 * args.batch, args.device)

        return make

    if args.data is None:
        return {"python": python}
    return {"shakespeare": shakespeare, **{name: labelled(name) for name in CLASSES}}


# --- one run ------------------------------------------------------------------------------------------------------


def fitted(method: Method, shapes: Mapping[str, tuple[int, int]], rank: int) -> tuple[int, dict[str, Any]]:
    """The rank and the options with which the method trains nearest to the count of LoRA at `rank`."""
    budget = rank * sum(sum(shape) for shape in shapes.values())
    if method.name == "nola":  # its count does not depend on the rank: LoRA's
        return rank, {"num_basis": max(1, round(budget / (2 * len(shapes))))}
    options = method.options({})
    largest = min(method.limit(*shape, options) for shape in shapes.values())
    assert method.count is not None
    count = method.count

    def numbers(rank: int) -> int:
        try:
            own = sum(count(*shape, rank, options) for shape in shapes.values())
            return own + (method.count_shared(shapes, rank, options) if method.count_shared else 0)
        except WeftError:  # a rank that this method cannot have, by a rule of its own
            return 0

    ranks = itertools.chain(range(1, min(largest, 1024) + 1), (2**k for k in range(11, 40) if 2**k <= largest))
    return min(ranks, key=lambda rank: abs(numbers(rank) - budget)), {}


def put_on(model: nn.Module, name: str, task: Task, args: argparse.Namespace, lr: float, seed: int) -> None:
    """Make the model what the method trains."""
    if name == "full":
        METHODS["full"].freeze(model)
        return
    method = METHODS[name]
    shapes = {layer: shape_of(module) for layer, module in linear_layers(model).items()}
    rank, options = fitted(method, shapes, args.rank)
    options |= {"lr": lr} if "lr" in method.defaults else {}
    rng = random.Random(1000 + seed)
    batches = [task.batch(rng) for _ in range(8)] if method.needs else None
    adapt(model, name, rank, batches=batches, seed=seed, **options)


def train(model: nn.Module, task: Task, args: argparse.Namespace, lr: float, seed: int) -> dict[str, float]:
    """Warm-up and cosine, the method's own optimizer and rules; seconds a step and what a step keeps."""
    rule, optimizer = Rules(rules(model)), make_optimizer(model, lr)
    rule.bind(optimizer)
    rule.start(model, steps=args.steps)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(args.steps, max(1, args.steps // 10)))
    rng, seconds, kept = random.Random(seed), [], 0
    model.train()
    for step in range(1, args.steps + 1):
        batch = task.batch(rng)
        torch.manual_seed(1000 * seed + step)
        if step == 1 and args.device == "cpu":
            kept = saved_bytes(lambda batch=batch: model(**batch).loss, [*model.parameters(), *model.buffers()])
            torch.manual_seed(1000 * seed + step)
        began = time.process_time() if args.device == "cpu" else synchronised()
        loss = model(**batch).loss
        penalty = rule.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        rule.before_step(model, step)
        optimizer.step()
        rule.after_step(model, step)
        plan.step()
        optimizer.zero_grad()
        seconds.append((time.process_time() if args.device == "cpu" else synchronised()) - began)
        if not math.isfinite(float(loss.detach())):
            break
    model.eval()
    memory = kept if args.device == "cpu" else torch.cuda.max_memory_allocated()
    return {"step_ms": 1e3 * statistics.median(seconds[1:] or seconds), "step_bytes": memory}


def synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def one(name: str, task: Task, args: argparse.Namespace, lr: float, seed: int, model: nn.Module) -> dict[str, Any]:
    """A model at its start, trained and measured; a run that diverges has an infinite loss."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    lean(model)
    trained = trainable(model)
    held = sum(p.numel() for p in trained.parameters.values())
    figures = train(model, task, args, lr, seed)
    found = task.measure(weft.merge(model) if name in COSTLY else model)
    if not math.isfinite(found["loss"]):
        found = {"loss": math.inf}
    return {"trainable": trained.count, "state_bytes": 8 * (held + trained.count), **figures, **found}


# --- the table ----------------------------------------------------------------------------------------------------


SETTINGS = ("rank", "steps", "batch", "window")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in SETTINGS}


def runner(args: argparse.Namespace, path: Path) -> Callable[..., dict[str, Any]]:
    """Runs what is not in the file yet, and writes it there."""
    done = {_key(line): line for line in read(path)}

    @functools.lru_cache(maxsize=1)
    def start(name: str, task: Task, seed: int, lr: float) -> nn.Module:
        model = load_model(args.model, device=torch.device(args.device))
        put_on(model, name, task, args, lr, seed)
        return model

    def figures(name: str, task: Task, lr: float, seed: int) -> dict[str, Any]:
        if name == UNTRAINED:
            return task.measure(load_model(args.model, device=torch.device(args.device)))
        starts_alike = name not in METHODS or "lr" not in METHODS[name].defaults
        gc.collect()  # hooks and modules of the run before refer to each other
        return one(name, task, args, lr, seed, copy.deepcopy(start(name, task, seed, 0.0 if starts_alike else lr)))

    def run(task_name: str, name: str, task: Task, lr: float, *, seed: int) -> dict[str, Any]:
        line = {"task": task_name, "method": name, "lr": lr, "seed": seed, **settings(args)}
        if _key(line) not in done:
            line |= figures(name, task, lr, seed)
            done[_key(line)] = line
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{task_name:<12}{name:<18}lr {lr:<9.3g} seed {seed}  loss {line['loss']:.4f}", flush=True)
        return done[_key(line)]

    return run


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return (f"{line['lr']:.3e}", *(line[name] for name in ("task", "method", "seed", *SETTINGS)))


def first_rates(name: str, task: str, path: Path, start: Path | None) -> tuple[int, ...]:
    """The k around the method's best on the last other task of this file, or else in `start`; or the coarse grid."""
    own = [line for line in read(path) if line["task"] != task]
    for lines in (own, read(start) if start else []):
        mine = [line for line in lines if line["method"] == name and line["seed"] == 0]
        if mine:
            best = min((line for line in mine if line["task"] == mine[-1]["task"]), key=lambda line: line["loss"])
            k = round(math.log(best["lr"] / CENTRE, FACTOR))
            return k, k + 1, k - 1
    return COARSE


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def of_last_settings(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """task -> its runs with the settings of its last run."""
    last = {line["task"]: line for line in lines}
    alike = [line for line in lines if all(line[key] == last[line["task"]][key] for key in SETTINGS)]
    return {task: [line for line in alike if line["task"] == task] for task in last}


def rows_of(lines: list[dict[str, Any]], enough: int) -> list[dict[str, Any]]:
    """The methods with `enough` seeds, best first: means over seeds at the best rate, difference to LoRA."""
    names = dict.fromkeys(line["method"] for line in lines)
    seeds = {name: _best_rate([line for line in lines if line["method"] == name]) for name in names}
    through = {name: found for name, found in seeds.items() if len(found) >= enough}
    rows = [_row(name, found, seeds.get(BASELINE, {})) for name, found in through.items()]
    return sorted(rows, key=lambda row: row["loss"])


def _best_rate(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """seed -> the run at the rate that is best for seed 0."""
    first = min((line for line in lines if line["seed"] == 0), key=lambda line: line["loss"])
    return {line["seed"]: line for line in lines if line["lr"] == first["lr"]}


def _row(name: str, seeds: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Any]:
    losses = [line["loss"] for line in seeds.values()]
    row: dict[str, Any] = {"method": name, "lr": seeds[0]["lr"], "seeds": len(seeds), "loss": statistics.fmean(losses)}
    row |= {key: seeds[0][key] for key in ("trainable", "state_bytes", "step_bytes")}
    row["step_ms"] = statistics.median(line["step_ms"] for line in seeds.values())
    if "accuracy" in seeds[0]:
        row["accuracy"] = statistics.fmean(line.get("accuracy", 0.0) for line in seeds.values())
    differences = [seeds[seed]["loss"] - baseline[seed]["loss"] for seed in seeds if seed in baseline]
    if name != BASELINE and len(differences) > 1 and all(map(math.isfinite, differences)):
        half = float(student.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences)
        row |= {"difference": statistics.fmean(differences), "half_width": half / math.sqrt(len(differences))}
        row["verdict"] = _verdict(row["difference"], row["half_width"])
    return row


def _verdict(difference: float, half: float) -> str:
    return "beats LoRA" if difference + half < 0 else "worse than LoRA" if difference - half > 0 else "no difference"


def show(tables: dict[str, list[dict[str, Any]]]) -> None:
    for task, rows in tables.items():
        print(
            f"\n{task}\n{'method':<18}{'lr':>9}{'loss':>9}{'acc.':>7}  {'minus LoRA (95 %)':<22}{'trainable':>11}",
            end="",
        )
        print(f"{'kept MB':>9}{'state MB':>10}{'step ms':>9}")
        for row in rows:
            accuracy = f"{row['accuracy']:.3f}" if "accuracy" in row else ""
            against = f"{row['difference']:+.4f} ± {row['half_width']:.4f}" if "difference" in row else ""
            print(
                f"{row['method']:<18}{row['lr']:>9.2g}{row['loss']:>9.4f}{accuracy:>7}  {against:<22}"
                f"{row['trainable']:>11,}{row['step_bytes'] / 1e6:>9.1f}{row['state_bytes'] / 1e6:>10.2f}"
                f"{row['step_ms']:>9.1f}  {row.get('verdict', '')}"
            )


def plot(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Held-out loss against trainable numbers, memory and time of a step: a row of panels a task, as SVG."""
    axes = {
        "trainable": ("thousand trained numbers", 1e3),
        "step_bytes": ("MB a step keeps", 1e6),
        "step_ms": ("ms a step", 1),
    }
    width, height, body = 400, 380, []
    for i, (task, rows) in enumerate(tables.items()):
        finite = [row for row in rows if math.isfinite(row["loss"])]
        for j, (key, (label, unit)) in enumerate(axes.items()):
            points = [(row[key] / unit, row["loss"], row["method"], row.get("verdict", "")) for row in finite]
            inner = _panel(f"{task}: loss against {label}", points, width, height)
            body.append(f'<g transform="translate({j * width} {i * height})">{inner}</g>')
    size = f'width="{3 * width}" height="{height * len(tables)}"'
    style = "text{font:10px sans-serif;fill:#333}.t{font-weight:600;font-size:12px}.n{font-size:8px}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style><rect {size} fill="#fff"/>'
    return head + "".join(body) + "</svg>\n"


def _panel(title: str, points: list[tuple[float, float, str, str]], width: int, height: int) -> str:
    """A scatter plot, logarithmic across; green beats LoRA, red is beaten by it, blue is neither."""
    xs, ys = [math.log10(x) for x, *_ in points], [y for _, y, *_ in points]
    left, right, top, bottom = 48, width - 70, 34, height - 34
    span_x, span_y = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    frame = f'width="{right - left}" height="{bottom - top}" fill="none" stroke="#ccc"'
    parts = [f'<text class="t" x="10" y="18">{escape(title)}</text><rect x="{left}" y="{top}" {frame}/>']
    for share in (0.0, 0.5, 1.0):
        x, y = left + share * (right - left), bottom - share * (bottom - top)
        tick = f"{10 ** (min(xs) + share * span_x):,.4g}"
        parts.append(f'<text x="{x:.0f}" y="{bottom + 14}" text-anchor="middle">{tick}</text>')
        parts.append(f'<text x="{left - 4}" y="{y + 3:.0f}" text-anchor="end">{min(ys) + share * span_y:.2f}</text>')
    labels: list[tuple[float, float]] = []
    for (_, loss, name, verdict), x in sorted(zip(points, xs, strict=True), key=lambda pair: pair[0][1]):
        px, py = left + (x - min(xs)) / span_x * (right - left), bottom - (loss - min(ys)) / span_y * (bottom - top)
        colour = {"beats LoRA": "#1a7f37", "worse than LoRA": "#c1432e"}.get(verdict, "#1f5fae")
        at = _free(px + 6, py + 3, labels)
        parts.append(f'<path d="M{px:.1f} {py:.1f}L{px + 5:.1f} {at - 3:.1f}" stroke="#bbb" stroke-width=".6"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>')
        parts.append(f'<text class="n" x="{px + 6:.1f}" y="{at:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return "".join(parts)


def _free(x: float, y: float, labels: list[tuple[float, float]]) -> float:
    """The height, at or above y, at which a label covers no other."""
    while any(abs(x - other_x) < 62 and abs(y - other_y) < 8 for other_x, other_y in labels):
        y -= 2
    labels.append((x, y))
    return y


def report(args: argparse.Namespace, path: Path) -> None:
    every = read(path)
    runs = of_last_settings([line for line in every if line["method"] != UNTRAINED])
    tables = {task: rows for task, lines in runs.items() if (rows := rows_of(lines, args.seeds))}
    if not tables:
        raise SystemExit(f"No method is through in {path} yet; run without --report first.")
    show(tables)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    record = {
        "date": date.today().isoformat(),
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "model": Path(args.model).name,
        "settings": {task: {key: runs[task][-1][key] for key in SETTINGS} for task in tables},
        "untrained": {
            line["task"]: {key: line[key] for key in ("loss", "accuracy") if key in line}
            for line in every
            if line["method"] == UNTRAINED
        },
        "tasks": tables,
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".svg").write_text(plot(tables), encoding="utf-8")
    print(f"\nwritten to {path.with_suffix('.json')} and .svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--only", nargs="*", default=[], help="methods; all of kind adapt, and full")
    parser.add_argument("--rank", type=int, default=4, help="LoRA's, whose count is the budget")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="windows; four times as many sentences")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--start", type=Path, help="the .jsonl of another model, to start the search from its rates")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"adapters_{Path(args.model).name}_{args.device}.jsonl"
    if args.report:
        report(args, path)
        return
    part, parts = map(int, args.part.split("/"))
    names = [BASELINE, "full", *(n for n, m in METHODS.items() if m.kind == "adapt" and n != BASELINE)]
    names = [name for name in names if not args.only or name in args.only][part - 1 :: parts]
    run = runner(args, path)
    for task_name, make in tasks(args, load_tokenizer(args.model)).items():
        if args.tasks and task_name not in args.tasks:
            continue
        task = make()
        run(task_name, UNTRAINED, task, 0.0, seed=0)
        for name in names:
            at = functools.partial(run, task_name, name, task, seed=0)
            first = first_rates(name, task_name, path, args.start)
            best = tuned(CENTRE, FACTOR, args.tries, at, first)
            for seed in range(1, args.seeds):
                run(task_name, name, task, best["lr"], seed=seed)
    report(args, path)


if __name__ == "__main__":
    main()
