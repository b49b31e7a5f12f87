"""Does choosing data pay? A fifth of a task's examples chosen by RDS+, against a random fifth.

    python benchmarks/selection.py MODEL --data QUESTIONS.jsonl --json benchmarks/results/selection_pico.json

QUESTIONS.jsonl has a `text` and a `label` a line. Examples are drawn apart: queries that RDS+ chooses by, a pool that
is chosen from, and a test. LoRA is trained on the chosen fifth for as many steps as on the random one, and the loss of
the label's tokens, and how often the right label is the likeliest, are measured on the test. Each seed draws its own
parts, and trains its own run. The interval of the mean difference is Student's, of 95 per cent.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student

import weft
from weft.runs.loading import load_model, load_tokenizer
from weft.verbs.embedding import embedded
from weft.verbs.finetune import finetune
from weft.verbs.select import select


def prompt(record: dict[str, str]) -> str:
    """What the model is asked."""
    return f"Question: {record['text']}\nKind:"


def parts(records: list[dict[str, str]], seed: int, args: argparse.Namespace) -> list[list[dict[str, str]]]:
    """Queries, pool and test, drawn apart."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [records[i] for i in order]
    ends = (0, args.queries, args.queries + args.pool, args.queries + args.pool + args.test)
    return [drawn[a:b] for a, b in itertools.pairwise(ends)]


def tuned(model: Any, tokenizer: Any, chosen: list[dict[str, str]], seed: int, args: argparse.Namespace) -> Any:
    """A copy of the model, trained on the chosen examples."""
    other = copy.deepcopy(model)
    texts = [f"{prompt(record)} {record['label']}" for record in chosen]
    how = {"steps": args.steps, "lr": args.lr, "window": 64, "batch": 8, "seed": seed, "log_every": 10**6}
    finetune(other, tokenizer, texts, "lora", rank=8, **how)
    return other.eval()


@torch.no_grad()
def judged(model: Any, tokenizer: Any, test: list[dict[str, str]]) -> dict[str, float]:
    """The mean loss of the right label's tokens, and the share of examples whose right label is the likeliest."""
    labels = sorted({record["label"] for record in test})
    total, right = 0.0, 0
    for record in test:
        start = tokenizer(prompt(record))["input_ids"]
        rows = [start + tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in labels]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logs = F.log_softmax(model(input_ids=ids).logits[:, len(start) - 1 : -1].float(), dim=-1)
        given = logs.gather(2, ids[:, len(start) :, None]).squeeze(2)
        scores = [float(line[: len(row) - len(start)].sum()) for line, row in zip(given, rows, strict=True)]
        total -= scores[labels.index(record["label"])]
        right += labels[max(range(len(labels)), key=scores.__getitem__)] == record["label"]
    return {"loss": total / len(test), "accuracy": right / len(test)}


def interval(differences: list[float]) -> dict[str, float]:
    """The mean with Student's interval."""
    n, mean = len(differences), math.fsum(differences) / len(differences)
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    wide = float(student.ppf(0.975, n - 1)) * spread
    return {"mean": mean, "low": mean - wide, "high": mean + wide, "n": n}


def compared(
    model: Any, tokenizer: Any, records: list[dict[str, str]], seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One seed: both fifths, and the model as it was."""
    queries, pool, test = parts(records, seed, args)
    E, Q = (
        torch.cat([*embedded(model, tokenizer, [f"{prompt(r)} {r['label']}" for r in some], 128, 16)])
        for some in (pool, queries)
    )
    keep = len(pool) // 5
    near = select(E, "rds-plus", keep, query=Q).order.tolist()
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + 1000))[:keep].tolist()
    row: dict[str, Any] = {"seed": seed, "kept": keep, "in_both": len(set(near) & set(drawn))}
    row["untrained"] = judged(model, tokenizer, test)
    for name, places in (("rds-plus", near), ("random", drawn)):
        row[name] = judged(tuned(model, tokenizer, [pool[i] for i in places], seed, args), tokenizer, test)
    print(row, flush=True)
    return row


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, dtype="float32"), load_tokenizer(args.model)
    records = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    rows = [compared(model, tokenizer, records, seed, args) for seed in range(args.seeds)]
    found = {key: interval([row["rds-plus"][key] - row["random"][key] for row in rows]) for key in ("loss", "accuracy")}
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "model", "data")}
    settings |= {"model": Path(args.model).name, "data": Path(args.data).name, "torch": torch.__version__}
    settings |= {"weft": weft.__version__, "device": platform.processor() or platform.machine()}
    settings |= {"date": datetime.date.today().isoformat()}
    print(found)
    if args.json:
        args.json.write_text(json.dumps({"settings": settings, "differences": found, "rows": rows}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--pool", type=int, default=1500)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
