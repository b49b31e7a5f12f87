"""Step time, refresh time, work and state of subspace optimizers, weft's and the released packages', in turn.

    python benchmarks/optim_step.py                          # LLaMA-60M shapes on a CPU
    python benchmarks/optim_step.py --device cuda --size 1b --dtype bfloat16

Every optimizer gets its own copy of the weights and the same gradients. In each round every optimizer takes one step,
so that drift of the machine falls on all alike; the median over rounds is reported. On a CPU one thread runs.
A refresh is the extra time of a step that chooses all subspaces anew.
Writes benchmarks/results/optim_step_<device>_<size>.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from operations import Operations
from shapes import SIZES, Shape, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import weft.optim as wo

Maker = Callable[[nn.Module, int, int], Any]  # (model, rank, refresh) -> optimizer


def peer_groups(model: nn.Module, **projected: Any) -> list[dict[str, Any]]:
    matrices, others = wo.split_parameters(model)
    return [{"params": [p for _, p in matrices], **projected}, {"params": [p for _, p in others]}]


def adamw(model: nn.Module, rank: int, refresh: int) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def galore_torch(model: nn.Module, rank: int, refresh: int) -> Any:
    from galore_torch import GaLoreAdamW

    groups = peer_groups(model, rank=rank, update_proj_gap=refresh, scale=0.25, proj_type="std")
    return GaLoreAdamW(groups, lr=1e-2, no_deprecation_warning=True)


def apollo_torch(model: nn.Module, rank: int, refresh: int) -> Any:
    from apollo_torch import APOLLOAdamW

    settings = {"proj": "random", "proj_type": "std", "scale": 1.0, "scale_type": "channel"}
    return APOLLOAdamW(peer_groups(model, rank=rank, update_proj_gap=refresh, **settings), lr=1e-2)


def ours(name: str, **options: Any) -> Maker:
    return lambda model, rank, refresh: wo.OPTIMIZERS[name](model, rank=rank, refresh=refresh, **options)


def frugal(model: nn.Module, rank: int, refresh: int, **options: Any) -> Any:
    return wo.frugal(model, 0.25, projection="columns", side="short", refresh=refresh, **options)


OPTIMIZERS: dict[str, tuple[Maker, str | None]] = {
    "AdamW (torch, fused)": (adamw, None),
    "galore-torch": (galore_torch, None),
    "weft galore": (ours("galore"), "galore-torch"),
    "weft galore, exact SVD": (ours("galore", projection="svd"), "galore-torch"),
    "weft galore, compiled": (ours("galore", compiled=True), "galore-torch"),
    "weft galore_8bit": (ours("galore_8bit"), None),
    "weft fira": (ours("fira"), None),
    "weft fira, compiled": (ours("fira", compiled=True), None),
    "weft frugal": (frugal, None),
    "weft frugal, compiled": (functools.partial(frugal, compiled=True), None),
    "apollo-torch": (apollo_torch, None),
    "weft apollo": (ours("apollo"), "apollo-torch"),
    "weft apollo, compiled": (ours("apollo", compiled=True), "apollo-torch"),
    "weft apollo_mini": (lambda model, rank, refresh: wo.apollo_mini(model, refresh=refresh), None),
    "weft dct_adamw": (lambda model, rank, refresh: wo.dct_adamw(model, rank), None),
}


def seconds(step: Callable[[], Any], device: str) -> float:
    """On a GPU wall time; on a CPU the time of the one thread that is used, which other processes do not disturb."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def with_gradients(model: nn.Module, gradients: list[torch.Tensor]) -> nn.Module:
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    return model


def state_bytes(optimizer: Any) -> int:
    """Tensors held in the state, those inside a peer's projector objects included."""
    found: dict[int, torch.Tensor] = {}
    for state in optimizer.state.values():
        values = [*state.values(), *(v for s in state.values() for v in getattr(s, "__dict__", {}).values())]
        found |= {id(t): t for t in values if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in found.values())


def measure(
    shape: Shape, rank: int, dtype: torch.dtype, device: str, rounds: int, names: list[str], refreshes: int = 2
) -> dict[str, Any]:
    """By optimizer, their steps in turn. A cold refresh is what the very first step takes beyond the others, a warm one
    what a later step does; like is compared with like, and without `refreshes` there are cold ones alone.
    """
    generator = torch.Generator(device).manual_seed(0)
    gradients = [
        torch.randn(p.shape, generator=generator, dtype=dtype, device=device)
        for p in build(shape, dtype, device).parameters()
    ]
    built = {}
    for name in names:
        model = with_gradients(build(shape, dtype, device), gradients)
        built[name] = OPTIMIZERS[name][0](model, rank, 10**9)
    results: dict[str, Any] = {name: {"first_step_s": seconds(o.step, device)} for name, o in built.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, optimizer in built.items():
            times[name].append(seconds(optimizer.step, device))
    for name, optimizer in built.items():
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        results[name] |= {
            "step_ms": 1e3 * statistics.median(times[name]),
            "matmul_gflop": counter.get_total_flops() / 1e9,
            "state_mb": state_bytes(optimizer) / 1e6,
        }
        if "compiled" not in name:  # whose operations are fused out of sight
            with Operations() as operations:
                optimizer.step()
            results[name] |= {"operations": operations.total, "moved_gb": sum(operations.bytes.values()) / 1e9}
    built.clear()
    for name in names:
        if name.startswith("AdamW"):
            continue
        step_ms = results[name]["step_ms"]
        results[name]["refresh_cold_ms"] = max(0.0, 1e3 * results[name]["first_step_s"] - step_ms)
        if refreshes:
            model = with_gradients(build(shape, dtype, device), gradients)
            optimizer = OPTIMIZERS[name][0](model, rank, 1)
            optimizer.step()
            refreshing = statistics.median(seconds(optimizer.step, device) for _ in range(refreshes))
            results[name]["refresh_ms"] = max(0.0, 1e3 * refreshing - step_ms)
    return results


def print_table(results: dict[str, Any]) -> None:
    work = f"{'GFLOP':>9}{'operations':>12}{'moved GB':>10}{'state MB':>10}"
    print(f"{'optimizer':<26}{'step ms':>10}{'refresh ms':>12}{work}   against its peer")
    for name, row in results.items():
        peer = results.get(OPTIMIZERS[name][1] or "")
        ratio = ""
        if peer:
            kind = "refresh_ms" if "refresh_ms" in row else "refresh_cold_ms"
            refresh = peer[kind] / max(row[kind], 1e-3)
            ratio = f"step {peer['step_ms'] / row['step_ms']:.2f}x, refresh {refresh:.1f}x faster"
        refresh_ms = f"{row['refresh_ms']:.1f}" if "refresh_ms" in row else "-"
        counted = f"{row['operations']:>12}{row['moved_gb']:>10.1f}" if "operations" in row else f"{'-':>12}{'-':>10}"
        numbers = f"{row['step_ms']:>10.1f}{refresh_ms:>12}{row['matmul_gflop']:>9.1f}{counted}{row['state_mb']:>10.1f}"
        print(f"{name:<26}{numbers}   {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, help="default: the published one of the size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="parts of names", default=[])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    shape = SIZES[arguments.size]
    names = [n for n in OPTIMIZERS if not arguments.only or any(part in n for part in arguments.only)]
    rank = arguments.rank or shape.rank
    results = measure(shape, rank, getattr(torch, arguments.dtype), arguments.device, arguments.rounds, names)
    print_table(results)
    record = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "galore-torch", "apollo-torch")},
        "size": arguments.size,
        "parameters": shape.parameters(),
        "rank": rank,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "optimizers": results,
    }
    arguments.output.mkdir(exist_ok=True)
    path = arguments.output / f"optim_step_{arguments.device}_{arguments.size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
