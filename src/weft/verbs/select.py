"""Choose data: embed every record with a model, choose by a method, write the chosen records as they were.

OUT.partial/   what is embedded so far; the same command goes on from it, and it is removed when OUT is there
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.allocate import Budget
from weft.errors import WeftError
from weft.files import replacing, write_json, write_text
from weft.progress import track
from weft.runs.inputs import contents
from weft.runs.loading import load_model, load_tokenizer, resolve_device
from weft.runs.report.pages import page, report_path, section, table
from weft.seeds import check_seed
from weft.select import SELECTIONS, Chosen, Duplicates, Selection
from weft.signals import finishing
from weft.tensors import read_tensors
from weft.train.sources import Fields, Skipped, plain_text, read_documents, recorded
from weft.verbs.embedding import embedded

__all__ = ["run", "select"]

_STEP = 64
"""Records between two that are kept on the disk."""
_SHOWN = 200
"""Rows of a page's table, of each kind."""


def select(
    E: Tensor, method: str | Selection, keep: int, *, query: Tensor | None = None, seed: int = 0, **options: Any
) -> Chosen:
    """Which of the examples to keep, best first.

    Args:
        E: (n, d) embeddings of unit length.
        method: a name or record of `weft.select`.
        keep: how many.
        query: (q, d) of examples of what the data is for, for methods that ask for them.

    Raises:
        WeftError: an unknown method or option, no query where one is needed, or more to keep than there is.
    """
    chosen = SELECTIONS.find(method)
    if not 1 <= keep <= len(E):
        raise WeftError(f"{keep} of {len(E)} examples cannot be kept; give from 1 to all.")
    if chosen.query and query is None:
        raise WeftError(f"{chosen.name} chooses what is like a task's own examples: give them by --query FILE.")
    return chosen.choose(E, keep, query=query, seed=seed, **chosen.options(options))


def run(
    data: str | Path,
    out: str | Path,
    *,
    model: str,
    method: str = "rds-plus",
    keep: str = "20%",
    query: str | Path | None = None,
    report: Path | None = None,
    window: int = 512,
    batch: int = 8,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`weft select`: write the chosen records of a file, in the order of the file, and say what repeats in it.

    Args:
        data: records (.jsonl, .csv, .parquet ...), as `weft finetune --data` reads them.
        out: a .jsonl file that is not there yet.
        keep: a share (20%, 0.2, 1.0) or a number of records (1, 20).
        query: records or texts of the task, for methods that ask for some.
        report: a page (.html) of what was kept and what not.
        window: tokens of a text that are read.

    Raises:
        WeftError: any argument that cannot work, before the model is loaded; a record that cannot be read, with its
            line.
        KeyboardInterrupt: a signal came; the same call goes on from what was embedded.
    """
    arguments = {k: str(v) for k, v in locals().items() if k not in ("device", "report", "options", "method", "keep")}
    check_seed(seed)
    for name, value in (("window", window), ("batch", batch)):
        if value < 1:
            raise WeftError(f"--{name} is {value}: give at least 1.")
    chosen, place = SELECTIONS.find(method), Path(out).expanduser()
    chosen.options(options)
    _check_output(place)
    if report is not None:
        report_path(report, {".html": "a page"})
    if chosen.query and query is None:
        raise WeftError(f"{chosen.name} chooses what is like a task's own examples: give them by --query FILE.")
    seen = _seen(Path(data), chosen, previews=report is not None)
    asked = [] if query is None else [plain_text(d) for d in read_documents(query, Fields(), "train", Skipped(0))]
    count = _count(keep, seen.records)
    work: Path | None = None
    if chosen.figures is not None:
        found = select(torch.tensor(seen.figures, dtype=torch.float64), chosen, count, seed=seed, **options)
    else:
        inputs = contents(model=model, data=data)
        target = resolve_device(device)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        source = load_model(model, device=target, dtype=dtype, trust_remote_code=trust_remote_code)
        decisive = {"arguments": {k: arguments[k] for k in ("model", "window", "dtype")}, "inputs": inputs}
        work = _workplace(place, decisive)
        texts = (text for _, text in recorded(Path(data)))
        E = _embedded(source, tokenizer, texts, seen.records, window, batch, work)
        Q = torch.cat([*embedded(source, tokenizer, asked, window, batch)]) if asked else None
        found = select(E, chosen, count, query=Q, seed=seed, **options)
    kept = set(found.order.tolist())
    figures = {"records": seen.records, "kept": len(kept), "method": chosen.name, **_figures(seen.repeats, kept)}
    if report is not None:
        write_text(report, _page(figures, chosen, found, seen.previews, seen.repeats))
    with replacing(place) as beside, Path(beside).open("w", encoding="utf-8") as file:
        for i, (record, _) in enumerate(recorded(Path(data))):
            if i in kept:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if work is not None:
        shutil.rmtree(work)
    return {"output": str(out), **figures}


@dataclass
class _Seen:
    """What a first pass over the records leaves: none of their texts."""

    records: int = 0
    repeats: dict[int, tuple[int, bool]] = field(default_factory=dict)  # record -> an earlier one, and whether exactly
    figures: list[list[float]] = field(default_factory=list)  # what the method reads of each
    previews: list[str] = field(default_factory=list)  # the beginnings of the texts, for a page


def _seen(path: Path, method: Selection, *, previews: bool) -> _Seen:
    """Raises WeftError for what is no file of records, or a record that cannot be read, or lacks what is read of it."""
    if not path.is_file():
        raise WeftError(f"There is no file of records {path}.")
    found, known = _Seen(), Duplicates()
    for i, (record, text) in enumerate(recorded(path)):
        found.records = i + 1
        repeat = known.of(text, i)
        if repeat is not None:
            found.repeats[i] = repeat
        if method.figures is not None:
            found.figures.append(_read(method, record, i + 1, len(found.figures[0]) if i else 0))
        if previews:
            found.previews.append(" ".join(text.split())[:160])
    if not found.records:
        raise WeftError(f"{path} holds no record.")
    return found


def _read(method: Selection, record: Any, number: int, width: int) -> list[float]:
    """What a method reads of a record, as many figures as of the first."""
    assert method.figures is not None
    try:
        row = method.figures(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        row = []
    if not row or len(row) != (width or len(row)) or not all(map(math.isfinite, row)):
        raise WeftError(f"{method.name} reads {method.asks} of every record, which record {number} lacks.")
    return row


def _check_output(place: Path) -> None:
    if place.suffix != ".jsonl":
        raise WeftError(f"The output {place} must end in .jsonl: it gets a record a line.")
    if place.exists():
        raise WeftError(f"The output {place} exists; choose another -o, or remove it first.")
    if not place.absolute().parent.is_dir():
        raise WeftError(f"There is no directory {place.parent} to write {place.name} to.")


def _count(keep: str, records: int) -> int:
    """How many records a share or a number means."""
    text = str(keep).strip()
    count = int(text) if text.isdigit() and int(text) else None
    if count is None:
        share = Budget.read(text, "share")
        if share is None:
            raise WeftError(f"--keep {keep!r} is neither a share, such as 20%, nor a number of records.")
        count = max(1, round(share * records))
    if count > records:
        raise WeftError(f"--keep {keep}: there are only {records} records.")
    return count


def _workplace(out: Path, decisive: Mapping[str, Any]) -> Path:
    """The directory of what is embedded so far. Raises WeftError where it is another command's."""
    work = out.with_name(out.name + ".partial")
    file = work / "arguments.json"
    said = json.loads(json.dumps(decisive))
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != said:
        raise WeftError(
            f"{work} holds the unfinished work of another command, or of other files; repeat that command to finish, "
            "or remove it to start over."
        )
    work.mkdir(exist_ok=True)
    write_json(file, said)
    return work


def _embedded(
    model: Any, tokenizer: Any, texts: Iterator[str], count: int, window: int, batch: int, work: Path
) -> Tensor:
    """(count, d) of all texts, of which finished parts are read from the disk."""
    parts = []
    with finishing():
        for start in track(range(0, count, _STEP), "texts"):
            some = list(islice(texts, _STEP))
            file = work / f"{start}.safetensors"
            if not file.is_file():
                E = torch.cat([*embedded(model, tokenizer, some, window, batch)])
                with replacing(file) as temporary:
                    save_file({"E": E}, temporary)
            parts.append(read_tensors(file)["E"])
    return torch.cat(parts)


def _figures(repeats: Mapping[int, tuple[int, bool]], inside: set[int]) -> dict[str, int]:
    exact = sum(same for _, same in repeats.values())
    both = sum(i in inside and other in inside for i, (other, _) in repeats.items())
    return {"duplicates": exact, "near_duplicates": len(repeats) - exact, "repeats_among_kept": both}


def _page(
    figures: Mapping[str, Any], method: Selection, found: Chosen, texts: Sequence[str], repeats: Mapping[int, Any]
) -> str:
    """What was kept and what not, best first."""
    kept = found.order.tolist()
    inside = set(kept)
    left = [i for i in found.scores.argsort(descending=True, stable=True).tolist() if i not in inside]
    headings = ("record", "score", "text", "repeats")

    def row(i: int) -> list[Any]:
        again = repeats[i][0] + 1 if i in repeats else ""
        return [i + 1, float(found.scores[i]), texts[i], again]

    def rows(chosen: Sequence[int]) -> list[list[Any]]:
        return [row(i) for i in chosen[:_SHOWN]]

    line = f"{figures['kept']} of {figures['records']} records kept by {method.name}; {figures['duplicates']} repeat "
    line += f"another exactly, {figures['near_duplicates']} nearly. The score is {method.reads}."
    shown = f"The first {_SHOWN}, best first; a record that repeats an earlier one names it."
    return page(
        "What was selected", line,
        [
            section(f"Kept ({len(kept)})", shown, table(headings, rows(kept))),
            section(f"Not kept ({len(left)})", shown, table(headings, rows(left))),
        ],
    )  # fmt: skip
