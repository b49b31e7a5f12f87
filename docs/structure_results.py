"""Tables of pre-training in structure: quality, the time and the memory of a step."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

__all__ = ["structure_tables"]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t of a 95 % interval, by the number of seeds."""


def structure_tables(table: Any) -> list[str]:
    """Held-out loss of every structure, and what its step takes; `table` makes a Markdown table."""
    parts = (_quality, _longer, _larger, _precision, _steps, _planned)
    return [line for part in parts for line in (*part(table), "")][:-1]


def _longer(table: Any) -> list[str]:
    found = _results("pretrain_table_cpu_9m_500_structures.json")
    given, rows = found["arguments"], found["rows"]
    alone = [name for name, row in rows.items() if len(row["tried"]) == 1]
    words = (
        f"The same after {given['steps']} steps, each at the best of rates of the same lattice around that of the "
        f"table above ({given['tries']} tried; {', '.join(alone)}: at that rate alone, where all of them are no better "
        "than dense AdamW in the table above)."
    )
    return [words, "", *_compared(table, found)]


def _precision(table: Any) -> list[str]:
    found = _results("pretrain_table_cpu_9m_100_precision.json")
    given, rows = found["arguments"], found["rows"]
    words = (
        f"Weights and moments in fewer bits (`python benchmarks/pretrain_table.py --precision --batch 4`): size "
        f"{given['size']}, {given['steps']} steps of {given['batch']} x {given['window']} tokens under AdamW at "
        f"{next(iter(rows.values()))['lr']:g}, {given['seeds']} seeds with the 95 % interval of the loss. Gradients "
        "have the dtype of the products: bf16 of bf16 weights, of `dqt`'s bytes that of all else. The time is one "
        "thread's of a whole run of one seed, with its evaluation."
    )
    cells = [
        [name, _interval(row["losses"]), f"{row['bytes'] / 1e6:.1f} MB", f"{row['processor_seconds']:.0f} s"]
        for name, row in rows.items()
    ]
    return [words, "", *table(["weights", "loss", "weights, gradients, moments", "processor time"], cells)]


def _larger(table: Any) -> list[str]:
    found = _results("pretrain_table_cuda_60m_100_structures.json")
    given, rows = found["arguments"], found["rows"]
    words = (
        f"The same at {given['size']} on one {found['device']}: {given['steps']} steps of {given['batch']} x "
        f"{given['window']} tokens, rank {found['rank']}, one seed, {given['tries']} rates of a lattice of factor "
        f"{given['grid']:g}, several rows side by side on the device. "
    )
    cells = [
        [
            name,
            f"{row['lr']:.2g}{' (edge)' if row['at_the_edge'] else ''}",
            f"{row['loss']:.3f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['bytes'] / 1e6:.0f} MB",
        ]
        for name, row in rows.items()
    ]
    beaten = [name for name, row in rows.items() if row["loss"] < rows["low rank, AdamW"]["loss"] - 0.1]
    said = f"More than 0.1 below plain low rank of rank {found['rank']}: {', '.join(beaten)}."
    return [words, "", *table(["structure", "rate", "loss", "trained", "bytes"], cells), "", said]


def _quality(table: Any) -> list[str]:
    found = _results("pretrain_table_cpu_9m_100_structures.json")
    given = found["arguments"]
    words = (
        f"A Llama of size {given['size']} on Python's own sources, {given['steps']} steps of {given['batch']} x "
        f"{given['window']} tokens, rank {found['rank']}, each at the best rate of a lattice of factor "
        f"{given['grid']:g} ({given['tries']} tried), held-out loss over {given['seeds']} seeds with its 95 % "
        "interval. "
        "Bytes are those of weights, gradients and the optimizer's state. Beside each: plain low rank under AdamW at "
        "the rank that takes the same bytes (at most where the factors have as many numbers as the matrix), at its own "
        "best rate. So few steps show how fast a model comes off the plateau of word frequencies, no more."
    )
    return [words, "", *_compared(table, found)]


def _compared(table: Any, found: dict[str, Any]) -> list[str]:
    """Losses over seeds, and those of plain low rank at the same bytes."""
    rows = [
        [
            name,
            f"{row['lr']:.2g}{' (edge)' if row['at_the_edge'] else ''}",
            _interval(row["losses"]),
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['plain']['rank']}" if row.get("plain") else "",
            _interval(row["plain"]["losses"]) if row.get("plain") else "",
        ]
        for name, row in found["rows"].items()
    ]
    columns = ["structure", "rate", "loss", "bytes", "plain low rank, its rank", "its loss"]
    plain = found["rows"]["low rank, AdamW"]["losses"]
    below = {name: _below(row["losses"], plain) for name, row in found["rows"].items() if name != "low rank, AdamW"}
    lists = [", ".join(name for name, beats in below.items() if beats is wanted) or "none" for wanted in (True, False)]
    said = f"Below plain low rank of rank {found['rank']} in every one of the seeds: {lists[0]}. Not so: {lists[1]}."
    return [*table(columns, rows), "", said]


def _below(losses: list[float], others: list[float]) -> bool:
    return all(loss < other for loss, other in zip(losses, others, strict=True))


def _interval(losses: list[float]) -> str:
    mean, count = statistics.fmean(losses), len(losses)
    return f"{mean:.3f} ± {T95[count] * statistics.stdev(losses) / math.sqrt(count):.3f}"


def _steps(table: Any) -> list[str]:
    found = _results("pretrain_step_cpu_60m.json")
    words = (
        f"One step (forward, backward, AdamW) at LLaMA-{found['size'].upper()} shapes with a head of 32,000 words, "
        f"{found['batch']} x {found['window']} tokens, rank {found['rank']}, one thread of a CPU, the structures in "
        f"turn (median of {found['rounds']} rounds; `python benchmarks/pretrain_step.py`). Peak: all that is alive; "
        "layer: what one layer holds beyond weights, input and the output's gradient."
    )
    rows = [
        [
            name, f"{row['median']:.2f} s", f"{row['against_dense']:.2f}", f"{row['against_low-rank']:.2f}",
            f"{row['operations']:,}", f"{row['flops'] / 1e9:.0f}", f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['layer_bytes'] / 1e6:.1f} MB",
        ]
        for name, row in found["rows"].items()
    ]  # fmt: skip
    columns = ["structure", "step", "of dense", "of low rank", "operations", "GFLOP", "peak", "layer"]
    return [words, "", *table(columns, rows)]


def _planned(table: Any) -> list[str]:
    found = _results("pretrain_memory_cpu_60m.json")
    words = (
        f"What `weft pretrain --plan` says of a step at {found['size']} ({found['batch']} x {found['window']} tokens, "
        "the embedded model's vocabulary), against a real one (`python benchmarks/pretrain_memory.py --size 60m`)."
    )
    rows = [
        [
            row["method"],
            f"{row['planned']['peak_bytes'] / 1e6:.1f} MB",
            f"{row['measured']['peak_bytes'] / 1e6:.1f} MB",
            f"{row['ratio']:.3f}",
        ]
        for row in found["rows"]
    ]
    return [words, "", *table(["structure", "planned peak", "measured peak", "ratio"], rows)]


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found
