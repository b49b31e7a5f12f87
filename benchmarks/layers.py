"""Codes and low-rank layers against a dense one, by tokens, without gradients; `gpu.py` runs them.

A layer of a model that answers finds its weights in main memory, not in a cache: each pass goes through as many copies
of the layer as exceed `COLD` bytes, and the time is that of one. On a GPU the same is measured as a CUDA graph, which
leaves out what the CPU takes to start kernels.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.terms import Int8, IntegerCode, LowRank, NormalFloat, SumLinear

COLD = 256 * 10**6
SHAPES = {
    "tiny": [(48, 64, 8)],
    "large": [(4096, 4096, 1024), (11008, 4096, 1472), (4096, 11008, 1472)],  # out, in, rank of half the numbers
}
TOKENS = (1, 16, 256, 8192)


def build(kind: str, out: int, inn: int, rank: int, dtype: torch.dtype, device: str) -> nn.Module:
    """One layer of random weights."""
    W = torch.randn(out, inn, dtype=dtype, device=device) / inn**0.5
    B, A = (torch.randn(*shape, dtype=dtype, device=device) / shape[1] ** 0.5 for shape in ((out, rank), (rank, inn)))
    if kind == "dense":
        layer: nn.Module = nn.Linear(inn, out, bias=False, dtype=dtype, device="meta")
        layer.weight = nn.Parameter(W)
        return layer
    terms = {
        "low rank": lambda: {"low_rank": LowRank.from_factors(B, A)},
        "int8": lambda: {"base": Int8.from_matrix(W)},
        "int4": lambda: {"base": IntegerCode.from_matrix(W, bits=4, group=min(128, inn))},
        "nf4": lambda: {"base": NormalFloat.from_matrix(W)},
        "nf4 + low rank": lambda: {"base": NormalFloat.from_matrix(W), "low_rank": LowRank.from_factors(B, A)},
    }
    return SumLinear(terms[kind]())


KINDS = ("dense", "low rank", "int8", "int4", "nf4", "nf4 + low rank")


@torch.no_grad()
def measure(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, cold: int = COLD
) -> dict[str, Any]:
    """Bytes, and microseconds by tokens, of one layer. Codes have low rank 64 beside them, others the shape's rank.

    A graph that cannot be captured is said so, with the reason, under `graph_error`.
    """
    out, inn, rank = shape
    layer = build(kind, out, inn, min(rank, 64) if kind.startswith("nf4") else rank, dtype, device).eval()
    stored = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    layers = [layer, *(copy.deepcopy(layer) for _ in range(cold // stored))]
    row: dict[str, Any] = {"bytes": stored, "copies": len(layers), "us": {}}
    passes: dict[int, Callable[[], None]] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, inn, dtype=dtype, device=device)
        passes[tokens] = lambda x=x: through(layers, x)
        row["us"][tokens] = microseconds(passes[tokens], device) / len(layers)
    if device == "cuda":
        row["graph_us"] = {}
        for tokens, work in passes.items():
            try:
                row["graph_us"][tokens] = microseconds(graphed(work), device) / len(layers)
            except RuntimeError as error:
                row["graph_error"] = str(error).splitlines()[0]
                break
    return row


def through(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def microseconds(work: Callable[[], None], device: str, rounds: int = 7) -> float:
    """The median of `rounds` calls after two that are not timed."""
    times = []
    for _ in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def graphed(work: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of `work`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
