"""Inference in pieces (flashsvd) against the whole: peak bytes and time of a forward pass, factors and dense, in turn.

    python benchmarks/streaming.py                      # two blocks of LLaMA-130M, one thread of a CPU
    python benchmarks/streaming.py --device cuda --size 1b

A pass makes hidden states, no logits. Peak: all that is alive beyond weights and input at the same time (on a GPU the
allocator's). Time: processor time, on a GPU the wall's; the median of rounds in which every way runs once. Writes
benchmarks/results/streaming_<device>_<size>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import weft
from weft.memory import streamed
from weft.memory.live import Live
from weft.train.sizes import SIZES

SHARES = (None, 0.5, 0.25)  # of the matrices' numbers that factors keep; None is the dense model


def made(size: str, share: float | None, device: str) -> nn.Module:
    hidden, inner, _, heads = SIZES[size]
    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=8192,
        )
    ).eval()
    if share is not None:
        weft.compress(model, "svd", budget=share)
    return model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def timed(model: nn.Module, ids: torch.Tensor, pieces: bool) -> tuple[float, int]:
    """Seconds, and the most bytes beyond what was there."""
    gpu = ids.device.type == "cuda"
    with torch.no_grad(), streamed(model) if pieces else nullcontext():
        if gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter if gpu else time.process_time
        began = clock()
        model(input_ids=ids, use_cache=False)
        if gpu:
            torch.cuda.synchronize()
            return clock() - began, torch.cuda.max_memory_allocated() - before
        seconds = clock() - began
        with Live() as live:
            held = live.count([*model.parameters(), *model.buffers(), ids])
            model(input_ids=ids, use_cache=False)
        return seconds, live.peak - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {share: made(args.size, share, args.device) for share in SHARES}
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        ids = torch.arange(tokens, device=args.device)[None] % 64
        found: dict[tuple[float | None, bool], list[tuple[float, int]]] = {}
        for _ in range(args.rounds):
            for share, model in models.items():
                for pieces in (False, True):
                    found.setdefault((share, pieces), []).append(timed(model, ids, pieces))
        for (share, pieces), runs in found.items():
            seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
            rows.append({"tokens": tokens, "share": share, "pieces": pieces, "seconds": seconds, "peak_bytes": peak})
            name = f"{'dense' if share is None else f'factors, {share:g}'}, {'in pieces' if pieces else 'whole'}"
            print(f"{tokens:>6} {name:<26} {seconds:>8.3f} s {peak / 1e6:>9.1f} MB")
    gpu = args.device == "cuda"
    record = {
        "date": date.today().isoformat(), "size": args.size,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}, "rows": rows,
    }  # fmt: skip
    path = args.output / f"streaming_{args.device}_{args.size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
