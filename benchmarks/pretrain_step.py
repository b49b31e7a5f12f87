"""A training step of every structure of `weft pretrain --method`, against the dense one and plain low rank, in turn.

    python benchmarks/pretrain_step.py                        # LLaMA-60M shapes, one thread of a CPU, some 10 minutes
    python benchmarks/pretrain_step.py --only dense low-rank sltrain --rounds 9
    python benchmarks/pretrain_step.py --device cuda --batch 32

A step is forward, backward and AdamW of a whole model with a head of 32,000 words, lean. Time is processor time, its
median over rounds in which every structure takes one step. Beside it: the operations that a step dispatches, the
floating-point operations of its products, and the bytes that are alive at most: in the step, and in one layer (the
first block's down projection) beyond its weights, its input and its output's gradient. On a GPU, where weights are in
bf16, time is the wall's and the peak the allocator's. "low rank + sparse, by autograd" is SLTrain's layer
written as a formula, W = s B A + S and x W^T: what a fused form is to save.
Writes benchmarks/results/pretrain_step_<device>_<size>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from operations import Operations
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from weft.kernels import sparse_linear
from weft.memory import lean
from weft.memory.live import Live
from weft.terms import SumLinear
from weft.train.sizes import SIZES
from weft.verbs.fresh import Structure, restructure

DENSE, PLAIN, NAIVE = "dense", "low-rank", "low rank + sparse, by autograd"
NOT_LEAN = f"{NAIVE}, not lean"
METHODS = (
    DENSE, PLAIN, "sltrain", NAIVE, NOT_LEAN, "lost", "cola", "sst", "maestro", "monarch", "spdf", "nm-gradient-flow",
    "trp", "weight-compander", "bitnet-1.58",
)  # fmt: skip
WORDS = 32000


class ByAutograd(nn.Module):
    """SLTrain's layer as its formula says, of the same factors and entries."""

    def __init__(self, layer: SumLinear) -> None:
        super().__init__()
        low, sparse = layer.terms.values()
        self.B, self.A, self.scale = low.B, low.A, low.scale
        self.values = sparse.values
        self.register_buffer("positions", sparse.positions.long(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        W = self.scale * (self.B @ self.A)
        return F.linear(x, W.flatten().index_add(0, self.positions, self.values).view_as(W))


def made(method: str, size: str, rank: int, window: int, device: str = "cpu") -> nn.Module:
    """A model of a size in training, with what stands in the place of its matrices; on a GPU in bf16."""
    hidden, inner, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=window, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if method != DENSE:
        structure = Structure.of("sltrain" if method.startswith(NAIVE) else method)
        restructure(model, Structure.of(structure.method, rank if structure.method.ranked else None))
    if method.startswith(NAIVE):
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, SumLinear)]:
            model.set_submodule(name, ByAutograd(layer))
    model.to(device, torch.float32 if device == "cpu" else torch.bfloat16).train()
    return model if method == NOT_LEAN else lean(model)


def stepper(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def counted(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict[str, Any]:
    """What does not depend on the machine: operations, products, bytes alive at most."""
    with Live() as live:
        live.count([*model.parameters(), *model.buffers()])
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        held = live.now + sum(t.nbytes for t in state)
        live.count(state)
        step(model, optimizer, ids)
    with Operations() as operations:
        step(model, optimizer, ids)
    with FlopCounterMode(display=False) as flops:
        step(model, optimizer, ids)
    entries = sum(  # multiplied alone, by a call that the counter does not know
        m.values.numel() for m in model.modules() if getattr(m, "kind", "") == "sparse" and on_entries(m)
    )  # fmt: skip
    of_entries = 6 * entries * ids.numel()  # forward, and both gradients
    return {
        "operations": operations.total, "flops": flops.get_total_flops() + of_entries, "peak_bytes": live.peak,
        "held_bytes": held, "layer_bytes": layer_bytes(model, ids.numel()),
    }  # fmt: skip


def layer_bytes(model: nn.Module, tokens: int) -> int:
    """What one layer's forward and backward pass hold at most beyond weights, input and the output's gradient."""
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    like = next(model.parameters())
    x, g = like.new_empty(tokens, inner).normal_().requires_grad_(), like.new_empty(tokens, hidden).normal_()
    with Live() as live:
        before = live.count([x, g, *layer.parameters(), *layer.buffers()])
        layer(x).backward(g)
    model.zero_grad()
    return live.peak - before


def on_entries(term: Any) -> bool:
    return sparse_linear.entries_alone(term.values, term.out_features, term.in_features)


def measure(names: Sequence[str], size: str, rank: int, ids: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Name -> what was counted and the seconds of every round, in each of which every structure takes one step."""
    device = ids.device.type
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    models, optimizers = {}, {}
    for name in names:
        models[name] = made(name, size, rank, ids.shape[1], device)
        optimizers[name] = stepper(models[name])
        step(models[name], optimizers[name], ids)
        rows[name] |= counted(models[name], optimizers[name], ids)
        if device != "cpu":
            rows[name] |= allocated(models[name], optimizers[name], ids)
    for _ in range(rounds):
        for name in names:
            began = now(device)
            step(models[name], optimizers[name], ids)
            rows[name]["seconds"].append(now(device) - began)
    return rows


def now(device: str) -> float:
    """Processor time; on a GPU the wall's, once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def allocated(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict[str, int]:
    """The allocator's peak in a step beyond what was there before it, and that with the model and its moments."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, ids)
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held += sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return {"peak_bytes": beside + held, "held_bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=METHODS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(WORDS, (args.batch, args.window), generator=torch.Generator().manual_seed(0)).to(args.device)
    rows = measure(args.only, args.size, args.rank, ids, args.rounds)
    show(rows)
    name = platform.processor() or platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    record = {
        "date": date.today().isoformat(), "device": name,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}, "threads": 1,
        **{key: getattr(args, key) for key in ("size", "rank", "window", "batch", "rounds")}, "rows": rows,
    }  # fmt: skip
    args.output.mkdir(exist_ok=True)
    path = args.output / f"pretrain_step_{args.device}_{args.size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


def show(rows: dict[str, dict[str, Any]]) -> None:
    heads = [("s", 7), ("/dense", 8), ("/plain", 8), ("ops", 8), ("GFLOP", 8), ("peak MB", 9), ("beside", 8)]
    print(f"{'structure':<42}" + "".join(f"{word:>{width}}" for word, width in [*heads, ("layer", 7)]))
    for row in rows.values():
        row["median"] = statistics.median(row["seconds"])
        row["workspace"] = row["peak_bytes"] - row["held_bytes"]
    for name, row in rows.items():
        for other in (DENSE, PLAIN):
            row[f"against_{other}"] = row["median"] / rows[other]["median"] if other in rows else None
        ratios = "".join(f"{row[f'against_{o}'] or float('nan'):>8.3f}" for o in (DENSE, PLAIN))
        print(
            f"{name:<42}{row['median']:>7.2f}{ratios}{row['operations']:>8}{row['flops'] / 1e9:>8.0f}"
            f"{row['peak_bytes'] / 1e6:>9.0f}{row['workspace'] / 1e6:>8.0f}"
            f"{row['layer_bytes'] / 1e6:>7.1f}"
        )


if __name__ == "__main__":
    main()
