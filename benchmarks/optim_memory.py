"""Where the memory of training goes: weights, gradients, optimizer state, activations, workspace, each by itself.

    python benchmarks/optim_memory.py                         # 60M to 7B counted, 60M measured on a CPU
    python benchmarks/optim_memory.py --device cuda           # the measured part on a GPU, peak allocation included

Counted: weights and gradients from the shapes; optimizer state from the very fields the optimizers declare (on the meta
device, nothing is allocated); activations of a LLaMA block in training, bf16, by the formula in `activations`.
Measured: an optimizer's state after a step, and its workspace: the largest amount by which a step, refreshes included,
exceeds what is alive before and after it. Writes benchmarks/results/optim_memory_<device>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from shapes import SIZES, Shape, build
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weft.optim as wo

MAKERS: dict[str, Callable[[Any, int], Any]] = {
    "galore": lambda model, rank: wo.galore(model, rank),
    "galore_8bit": lambda model, rank: wo.galore_8bit(model, rank),
    "fira": lambda model, rank: wo.fira(model, rank),
    "frugal": lambda model, rank: wo.frugal(model, 0.25, projection="columns", side="short"),
    "apollo": lambda model, rank: wo.apollo(model, rank),
    "apollo_mini": lambda model, rank: wo.apollo_mini(model),
    "dct_adamw": lambda model, rank: wo.dct_adamw(model, rank),
}


def activations(shape: Shape, sequences: int, length: int, checkpointed: bool) -> int:
    """Bytes kept for the backward pass, bf16, with a fused attention that keeps no score matrix.

    A block of hidden h and ffn f keeps, a token: two normalised inputs and their sums (4 h), q, k, v, the attention
    output (4 h) and its log-sum-exp, and gate, up, silu(gate), the product (4 f). Checkpointing keeps the block inputs
    (h) and one block's worth while it is recomputed. The logits and their fp32 softmax are counted: 2 + 4 bytes a token
    and vocabulary entry.
    """
    tokens = sequences * length
    block = 2 * (8 * shape.hidden + 4 * shape.ffn) + 4 * shape.heads
    kept = 2 * shape.hidden * shape.layers + block if checkpointed else block * shape.layers
    return tokens * (kept + 6 * shape.vocabulary)


def adam_state(shape: Shape, eight_bit: bool) -> int:
    """AdamW's two moments in the weights' bf16, or block-wise 8-bit (a byte and 4 / 256 bytes of scale an entry)."""
    return round(2 * shape.parameters() * (1 + 4 / 256 if eight_bit else 2))


def counted(shape: Shape, sequences: int, length: int) -> dict[str, Any]:
    state = {"AdamW": adam_state(shape, False), "AdamW 8-bit": adam_state(shape, True)}
    for name, make in MAKERS.items():
        state[name] = make(build(shape, torch.bfloat16, "meta"), shape.rank).planned_bytes()
    weights = 2 * shape.parameters()
    largest = 2 * shape.vocabulary * shape.hidden
    return {
        "weights": weights,
        "gradients": weights,
        "gradients, per-layer updates": largest,
        "activations": activations(shape, sequences, length, False),
        "activations, checkpointed": activations(shape, sequences, length, True),
        "state": state,
    }


class Peak(TorchDispatchMode):
    """Counts the bytes of storages created inside it that are alive at once (for devices that keep no statistics)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in before:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def workspace(optimizer: Any, device: str) -> int:
    """Peak extra bytes of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return int(torch.cuda.max_memory_allocated() - start)
    with Peak() as peak:
        optimizer.step()
    return peak.peak


def measured(shape: Shape, device: str) -> dict[str, Any]:
    results = {}
    makers: dict[str, Any] = {"AdamW": lambda model, rank: torch.optim.AdamW(model.parameters())} | MAKERS
    for name, make in makers.items():
        model = build(shape, torch.bfloat16, device)
        optimizer = make(model, shape.rank)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
        row = {"state": held, "workspace of a step": workspace(optimizer, device)}
        if name != "AdamW":
            for state in optimizer.state.values():
                state["count"].fill_(200)  # views of what the optimizer holds: the next step refreshes
            row["workspace of a refresh"] = workspace(optimizer, device)
        results[name] = row
    return results


def markdown(table: dict[str, Any]) -> str:
    """The counted part as it stands in docs/optim.md, in GB."""
    states = list(next(iter(table.values()))["state"])
    lines = ["| | " + " | ".join(table) + " |", "|---" * (1 + len(table)) + "|"]

    def line(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    def gb(size: int) -> str:
        return f"{size / 1e9:.2f}"

    line("weights", [gb(row["weights"]) for row in table.values()])
    line(
        "gradients (per-layer updates)",
        [f"{gb(r['gradients'])} ({gb(r['gradients, per-layer updates'])})" for r in table.values()],
    )
    line(
        "activations (checkpointed)",
        [f"{gb(r['activations'])} ({gb(r['activations, checkpointed'])})" for r in table.values()],
    )
    for name in states:
        line(f"state: {name}", [gb(row["state"][name]) for row in table.values()])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--measure", default="60m", choices=SIZES)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    table = {
        name: counted(shape, arguments.sequences, arguments.length) for name, shape in SIZES.items() if name != "tiny"
    }
    print(markdown(table))
    live = measured(SIZES[arguments.measure], arguments.device)
    for name, row in live.items():
        print(f"measured {arguments.measure} {name:<12} " + ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in row.items()))
    record = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "versions": {"torch": importlib.metadata.version("torch")},
        "batch": {"sequences": arguments.sequences, "length": arguments.length},
        "counted_bytes": table,
        "measured_size": arguments.measure,
        "measured_bytes": live,
    }
    arguments.output.mkdir(exist_ok=True)
    path = arguments.output / f"optim_memory_{arguments.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
