"""Does a measure predict anything? Spearman's correlation of each figure with what happens.

    python benchmarks/measures.py MODEL --text FILE [--layers 24] [--tune FILE] [--data TASK --other FILE] [--json FILE]

layers      a layer alone is cut, by svd to a quarter of its bytes and by rtn to 2 bits, and the loss is measured
            again: the rise is what a figure of that layer should rank. Layers are drawn at random.
forgetting  (--tune) LoRA of several ranks and rates is trained on another text; the rise of the loss on the first is
            what a figure of the change, a mean over the layers, should rank.
usefulness  (--data, --other) sets of records are drawn, each with shares of its own: of a task's records, of the same
            with a label of another record, and of another task's. LoRA is trained on each set, and the fall of the
            loss of the task's labels on a test is what a figure of the set should rank. Records have `text`, `label`.

The first half of the text is what measures see, the second what losses are measured on. Intervals are of 95 per cent,
by 2,000 bootstrap draws of the layers (or runs). A figure whose interval holds 0 predicts nothing that can be told
from chance here. The number of a layer's parameters, its spectrum and weft's own predicted loss stand beside the
measures.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy.stats import spearmanr
from selection import judged as labelled
from selection import prompt
from torch import Tensor, nn

import weft
from weft.files import jsonable
from weft.linalg.weighted import WeightedLoss
from weft.measures import MEASURES
from weft.methods import METHODS
from weft.runs.loading import load_model, load_tokenizer
from weft.seeds import generator
from weft.stats.calibrate import calibrate, mean_loss
from weft.terms.dense import sum_dense
from weft.terms.layers import linear_layers
from weft.train.sources import read_texts
from weft.train.windows import calibration_batches
from weft.verbs.embedding import embedded
from weft.verbs.finetune import finetune
from weft.verbs.inspect import Report, inspect
from weft.verbs.select import select
from weft.verbs.survey import Plan, offered, site_of

DRAWS, LEAST = 2000, 8  # a bootstrap of fewer pairs finds any order certain that they happen to have
CUTS = {"svd": 0.25, "rtn": 2}  # a share of the bytes, a width
SPECTRUM = ("parameters", "stable_rank", "effective_rank", "rank_99", "nuclear_norm")
TUNINGS = tuple((rank, rate) for rank in (1, 4, 16) for rate in (3e-4, 3e-3, 1e-2))
SETS, RECORDS, QUERIES, TESTED = 20, 48, 48, 100
"""Of usefulness: sets, records in each, and of the task's records those that show what is wanted, and the test."""


def ranked(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Spearman's correlation with its interval, over the pairs that are numbers; none of fewer than `LEAST`."""
    pairs = torch.tensor([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]).double()
    if len(pairs) < LEAST or len(set(pairs[:, 0].tolist())) < 2:
        return {"n": len(pairs), "rho": math.nan, "low": math.nan, "high": math.nan}
    draws, own = torch.Generator().manual_seed(0), float(spearmanr(*pairs.mT).statistic)
    found = []
    for _ in range(DRAWS):
        sample = pairs[torch.randint(len(pairs), (len(pairs),), generator=draws)]
        varies = min(len(set(column.tolist())) for column in sample.mT) > 1
        found.append(float(spearmanr(*sample.mT).statistic) if varies else 0.0)  # what is the same for all ranks none
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"n": len(pairs), "rho": own, "low": low, "high": high}


def correlations(rows: Sequence[Mapping[str, Any]], what: str, figures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each figure with what happened."""
    return {
        key: ranked([float(row.get(key, math.nan)) for row in rows], [float(row[what]) for row in rows])
        for key in figures
    }


def by_layer(model: nn.Module, seen: list[Any], judged: list[Any], count: int) -> list[dict[str, Any]]:
    """Figures of some layers, and what each costs when it alone is cut."""
    names = list(linear_layers(model))
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:count]
    chosen = [names[i] for i in sorted(drawn.tolist())]
    measures = [m for m in MEASURES.values() if not m.pair and m.reads]
    report = inspect(model, chosen, measures=measures, batches=seen)
    whole = mean_loss(model, judged)
    moments = calibrate(model, seen, ("input_moment", "output_grad_moment"), layers=chosen)
    rows = []
    for matrix in report.matrices:
        row: dict[str, Any] = {"layer": matrix.name, **matrix.figures}
        row |= {key: getattr(matrix, key) for key in SPECTRUM}
        for method, how in CUTS.items():
            W, cut = cut_matrix(model, matrix.name, method, how)
            X, G = moments[matrix.name].values()
            loss = WeightedLoss(X, G, generator(0, "losses", matrix.name))(cut - W)
            row[f"predicted_{method}"] = float(loss) / 2
            row[f"error_{method}"] = float((cut - W).norm() / W.norm())
            with replaced(model.get_submodule(matrix.name), cut):
                row[f"rise_{method}"] = mean_loss(model, judged) - whole
        rows.append(row)
        print({k: round(v, 4) for k, v in row.items() if k.startswith(("rise", "pred"))}, matrix.name, flush=True)
    return rows


def cut_matrix(model: nn.Module, name: str, method: str, how: float) -> tuple[Tensor, Tensor]:
    """The weight (out, in) of a layer, and what is left of it."""
    plan = Plan(method=METHODS[method], options=METHODS[method].options({}), layers=(name,))
    info = offered(model, plan)[name]
    size = int(how) if how > 1 else info.within(how * info.shape.nbytes).size
    site = site_of(model, plan, name, {}, size)
    ((_, split),) = plan.method.each(site, [size], plan.options)
    return site.weight(), sum_dense(split.terms.values())


@contextmanager
def replaced(layer: Any, W: Tensor) -> Iterator[None]:
    """The layer with another weight."""
    before = layer.weight.data
    layer.weight.data = W.to(before.dtype)
    try:
        yield
    finally:
        layer.weight.data = before


def tuned(model: Any, tokenizer: Any, texts: Sequence[str], rank: int, rate: float, steps: int) -> nn.Module:
    """A copy of the model with a trained LoRA added to its weights."""
    other = copy.deepcopy(model)
    finetune(other, tokenizer, texts, "lora", rank=rank, steps=steps, lr=rate, window=128, batch=4, log_every=10**6)
    weft.merge_adapter(other)
    return other


def forgetting(model: Any, tokenizer: Any, texts: Sequence[str], judged: list[Any], steps: int) -> list[dict[str, Any]]:
    """Figures of the change by LoRA, and how much is forgotten."""
    whole, rows = mean_loss(model, judged), []
    for rank, rate in TUNINGS:
        other = tuned(model, tokenizer, texts, rank, rate, steps)
        report = inspect(other, "*layers*", against=model)
        rows.append({"rank": rank, "lr": rate, **means(report), **report.figures})
        rows[-1]["forgotten"] = mean_loss(other, judged) - whole
        print(rows[-1], flush=True)
    return rows


def usefulness(model: Any, tokenizer: Any, task: list[Any], others: list[Any], steps: int) -> list[dict[str, Any]]:
    """Figures of sets of records, and how far training on each lowers the loss of the task's labels."""
    draws = torch.Generator().manual_seed(0)
    drawn = [task[i] for i in torch.randperm(len(task), generator=draws).tolist()]
    queries, test, pool = drawn[:QUERIES], drawn[QUERIES : QUERIES + TESTED], drawn[QUERIES + TESTED :]
    kinds = [pool, [{**one, "label": other["label"]} for one, other in itertools.pairwise(pool)], others]
    Q = torch.cat([*embedded(model, tokenizer, [answered(one) for one in queries], 64, 16)])
    whole, rows = labelled(model, tokenizer, test)["loss"], []
    for _ in range(SETS):
        shares = -torch.rand(3, generator=draws).log()  # of a set, uniform over all that sum to one
        ends = (shares.cumsum(0) / shares.sum() * RECORDS).round().int().tolist()
        counts = [b - a for a, b in zip((0, *ends), ends, strict=False)]
        texts = [
            answered(kind[i])
            for kind, count in zip(kinds, counts, strict=True)
            for i in torch.randint(len(kind), (count,), generator=draws).tolist()
        ]
        row = dict(zip(("right", "wrong", "other"), counts, strict=True)) | of_texts(model, tokenizer, texts, Q)
        trained = copy.deepcopy(model)
        finetune(trained, tokenizer, texts, "lora", rank=8, steps=steps, lr=3e-3, window=64, batch=8, log_every=10**6)
        rows.append({**row, "useful": whole - labelled(trained.eval(), tokenizer, test)["loss"]})
        print(rows[-1], flush=True)
    return rows


def answered(record: Mapping[str, str]) -> str:
    """A record as a text to train on."""
    return f"{prompt(dict(record))} {record['label']}"


def of_texts(model: Any, tokenizer: Any, texts: Sequence[str], Q: Tensor) -> dict[str, float]:
    """Figures of a set of texts, in windows of one length: of every measure of texts or gradients, its loss, and the
    mean likeness to the queries, the score of rds-plus.
    """
    batches = calibration_batches(tokenizer, ["\n\n".join(texts)], windows=8, window=64, batch=1)
    of = [m for m in MEASURES.values() if m.of in ("gradient", "hidden")]
    E = torch.cat([*embedded(model, tokenizer, texts, 64, 16)])
    near = select(E, "rds-plus", len(E), query=Q).scores.mean()
    return {**inspect(model, "*layers*", measures=of, batches=batches).figures, "rds_plus": float(near)} | {
        "loss": mean_loss(model, batches)
    }


def means(report: Report) -> dict[str, float]:
    """The mean of each figure over the matrices."""
    keys = report.matrices[0].figures
    rows = [m.figures for m in report.matrices]
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in keys}


def main() -> None:
    args = arguments()

    model, tokenizer = load_model(args.model, dtype="float32"), load_tokenizer(args.model)
    text = "\n\n".join(read_texts(args.text))
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    cut: Callable[[str], list[Any]] = lambda half: calibration_batches(  # noqa: E731
        tokenizer, [half], windows=args.windows, window=args.window, batch=1
    )
    seen, judged = map(cut, halves)
    found: dict[str, Any] = {}
    rows = by_layer(model, seen, judged, args.layers)
    own = [key for m in MEASURES.values() if not m.pair for key in m.reads]
    for method in CUTS:
        figures = [*own, *SPECTRUM, f"error_{method}", f"predicted_{method}"]
        found[f"rise_{method}"] = correlations(rows, f"rise_{method}", figures)
    everything: dict[str, Any] = {"layers": rows}
    if args.tune:
        everything["forgetting"] = forgetting(model, tokenizer, read_texts(args.tune), judged, args.steps)
        changes = [key for m in MEASURES.values() if m.pair for key in (m.reads or m.reads_model)]
        changes = [key for key in dict.fromkeys(changes) if key in everything["forgetting"][0] and key != "floor"]
        found["forgotten"] = correlations(everything["forgetting"], "forgotten", changes)
    if args.data:
        task, others = (
            [json.loads(line) for line in path.read_text().splitlines()] for path in (args.data, args.other)
        )
        everything["usefulness"] = usefulness(model, tokenizer, task, others, args.steps)
        figures = [key for key in everything["usefulness"][0] if key not in ("right", "wrong", "other", "useful")]
        found["useful"] = correlations(everything["usefulness"], "useful", figures)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "model", "text", "tune", "data", "other")}
    settings |= {"model": Path(args.model).name, "text": Path(args.text).name, "cuts": CUTS, "draws": DRAWS}
    settings |= {key: getattr(args, key) and Path(getattr(args, key)).name for key in ("tune", "data", "other")}
    settings |= {"device": "cpu", "processor": platform.processor() or platform.machine()}
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__, "weft": weft.__version__}
    settings |= {"date": datetime.date.today().isoformat()}
    if args.json:
        result = jsonable({"settings": settings, "correlations": found, **everything})  # without NaN
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for what, by_figure in found.items():
        for key, one in sorted(by_figure.items(), key=lambda item: -abs(item[1]["rho"])):
            print(f"{what:12} {key:22} {one['rho']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}] of {one['n']}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--tune")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
