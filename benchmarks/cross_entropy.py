"""Losses of a linear head in chunks: ours beside torch's own, in time, peak memory and error.

    python benchmarks/cross_entropy.py

One loss with its gradients on a CPU, a third of the targets ignored. Time is the least of three, in seconds of the
processor; the peak is what the profiler of torch counts as allocated beyond the inputs; errors are relative to fp64, of
the loss and of the gradients of the hidden states and the head. Writes benchmarks/results/cross_entropy_cpu.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from weft.memory.cross_entropy import linear_cross_entropy

RESULT = Path(__file__).parent / "results" / "cross_entropy_cpu.json"
TOKENS, WIDTH, VOCABULARY, CHUNK = 512, 128, 8192, 32

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def theirs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, as it is."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
    return F.linear_cross_entropy(hidden, weight, targets, ignore_index=-100, options=options)


def theirs_filtered(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, on the tokens that count."""
    counted = targets != -100
    return theirs(hidden[counted], weight, targets[counted])


WAYS: dict[str, Loss] = {
    "whole": lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t),
    "weft": lambda h, w, t: linear_cross_entropy(h, w, t, chunk=CHUNK),
    "torch": theirs,
    "torch, filtered": theirs_filtered,
}


def inputs(dtype: torch.dtype, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head, and targets of which a third is ignored."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=draw) * 0.05).to(dtype).requires_grad_(trained)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    targets[::3] = -100
    return hidden, weight, targets


def peak(step: Callable[[], object]) -> int:
    """The most bytes that are allocated at once within a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(loss: Loss, dtype: torch.dtype, trained: bool) -> dict[str, Any]:
    """Seconds, bytes and errors of one way."""
    hidden, weight, targets = inputs(dtype, trained)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    reference = F.cross_entropy(F.linear(*exact), targets)
    reference.backward()

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        found = loss(hidden, weight, targets)
        found.backward()
        return found.detach()

    step()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        value = step()
        seconds.append(time.process_time() - began)
    errors = [float(abs(value - reference) / reference)]
    for mine, theirs_ in zip((hidden, weight), exact, strict=True):
        if mine.grad is not None and theirs_.grad is not None:
            errors.append(float((mine.grad.double() - theirs_.grad).norm() / theirs_.grad.norm()))
    return {"seconds": min(seconds), "peak_bytes": peak(step), "errors": errors}


def main() -> None:
    """Every way, dtype and head."""
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for trained in (False, True):
            print(f"{str(dtype)[6:]}, {'trained' if trained else 'frozen'} head")
            for name, loss in WAYS.items():
                row = measure(loss, dtype, trained)
                words = " ".join(f"{error:.1e}" for error in row["errors"])
                print(f"    {name:16} {row['seconds']:8.3f} s {row['peak_bytes'] / 1e6:8.1f} MB   {words}", flush=True)
                rows.append({"way": name, "dtype": str(dtype)[6:], "trained": trained, **row})
    settings = {"tokens": TOKENS, "width": WIDTH, "vocabulary": VOCABULARY, "chunk": CHUNK}
    record = {"date": str(date.today()), "torch": torch.__version__, **settings, "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
