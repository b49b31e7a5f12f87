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
    return [*_quality(table), "", *_longer(table), "", *_larger(table), "", *_steps(table), "", *_planned(table)]


def _longer(table: Any) -> list[str]:
    found = _results("pretrain_table_cpu_9m_500_structures.json")
    given, rows = found["arguments"], found["rows"]
    worse = max(rows["low rank, AdamW"]["tried"], key=lambda tried: tried["loss"])
    words = (
        f"Some of them after {given['steps']} steps, one seed, at the rates above, which need not be the best of so "
        f"many steps: plain low rank is at {worse['loss']:.3f} with {worse['lr']:g}, and its row has the lower rate."
    )
    cells = [
        [name, f"{row['lr']:.2g}", f"{row['loss']:.3f}", f"{row['bytes'] / 1e6:.1f} MB"] for name, row in rows.items()
    ]
    return [words, "", *table(["structure", "rate", "loss", "bytes"], cells)]


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
    beaten = [name for name, row in found["rows"].items() if _below(row["losses"], plain)]
    said = f"Below plain low rank of rank {found['rank']} in every one of the seeds: {', '.join(beaten) or 'none'}."
    return [words, "", *table(columns, rows), "", said]


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
