"""weft's GPTQ beside a plain one: perplexity, seconds and peak memory at the same settings.

    python benchmarks/gptq.py MODEL [--bits 3 4] [--group 64] [--windows 8] [--window 256] [--json FILE]
    python benchmarks/gptq.py --count 1376 512      # operations of all widths of one matrix, by method

The plain loop is the published algorithm written out for a Llama-like model: hooks collect H of q, k, v; then of o; of
gate and up; of down, each in the block quantised so far; columns are rounded one by one, and lazily in blocks of 128.
It shares no code with weft but the reading of model and text, and writes dense weights back. Calibration: windows of
the Python standard library; perplexity: the first 24 windows of its held-out files. What differs is known: the plain
loop fits a group that begins amid a block of columns before that block's errors are taken up, as the authors' does.

`--count` tells how many operations a method dispatches for one matrix, at every size that it offers, and how often a
processor would wait for a GPU: what bounds small models there.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from operations import Operations
from torch import Tensor, nn

from weft.embedded.text import default_text
from weft.methods import METHODS
from weft.methods.base import Shape, Site
from weft.runs.loading import load_model, load_tokenizer
from weft.terms import Dense
from weft.terms.layers import linear_layers
from weft.train.windows import calibration_batches
from weft.verbs.compress import compress
from weft.verbs.evaluate import evaluate

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers of a block that see the same input."""


def rounded(W: Tensor, H: Tensor, bits: int, group: int) -> Tensor:
    """GPTQ of one matrix (out, in), asymmetric, scales in 16 bits."""
    W, H, inn, last = W.clone(), H.clone(), W.shape[1], 2**bits - 1
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    for first in range(0, inn, 128):
        end = min(first + 128, inn)
        block, errors = W[:, first:end].clone(), torch.zeros(len(W), end - first)
        for i in range(end - first):
            if (first + i) % group == 0:
                members = W[:, first + i : first + i + group]
                low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
                scale = ((high - low) / last).half().float()
                zero = (-low / scale).round()
            column = block[:, i]
            Q[:, first + i] = (((column / scale).round() + zero).clamp(0, last) - zero) * scale
            errors[:, i] = (column - Q[:, first + i]) / U[first + i, first + i]
            block[:, i:] -= errors[:, i : i + 1] @ U[first + i, first + i : end].unsqueeze(0)
        W[:, end:] -= errors @ U[first:end, end:]
    return Q


@torch.no_grad()
def plain(model: Any, data: Sequence[Any], bits: int, group: int) -> None:
    """The sequential loop: one block after another, on what the blocks before it, quantised, put out."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    for batch in data:
        model(**batch, use_cache=False)
    first.remove()
    for block in model.model.layers:
        for names in GROUPS:
            chosen = {n: m for n, m in block.named_modules() if n.endswith(names) and isinstance(m, nn.Linear)}
            sums, handles = {name: [0, 0.0] for name in chosen}, []
            for name, layer in chosen.items():
                handles.append(layer.register_forward_pre_hook(_adding(sums[name])))
            for args, kwargs in inputs:
                block(*args, **kwargs)
            for handle in handles:
                handle.remove()
            for name, layer in chosen.items():
                layer.weight.copy_(rounded(layer.weight, sums[name][1] / sums[name][0], bits, group))
        inputs = [((block(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in inputs]


def _adding(total: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        total[0] += len(rows)
        total[1] = total[1] + rows.mT @ rows

    return hook


def ours(model: Any, data: Sequence[Any], bits: int, group: int) -> None:
    """The same by weft."""
    compress(model, "gptq", allocate=dict.fromkeys(linear_layers(model), bits), batches=data, group=group)


def restart() -> float:
    """Give freed memory back and begin the high-water mark anew (Linux); the time."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return time.perf_counter()


def most_resident() -> int:
    """Bytes that this process had in memory at most since then, weights and libraries included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def counted(out: int, inn: int) -> None:
    """A line a method: what all sizes of a random matrix (out, in) take."""
    draw = torch.Generator().manual_seed(0)
    W, x, g = (torch.randn(*shape, generator=draw) for shape in ((out, inn), (4 * inn, inn), (4 * out, out)))
    moments = {"input_moment": (x.mT @ x).double(), "output_grad_moment": (g.mT @ g).double()}
    site = Site("a matrix", {"base": Dense.from_matrix(W)}, None, None, moments, draw)
    for name, given in (("rtn", {}), ("rtn", {"clip": True}), ("gptq", {}), ("gptq", {"clip": True}), ("auto", {})):
        method = METHODS[name]
        options, shape = method.options(given), Shape(out, inn, 2)
        sizes = [size for size, nbytes in method.sizes(shape, options) if nbytes < shape.nbytes]
        with Operations() as operations:
            deque(method.each(site, sizes, options), maxlen=0)
        counts = {"operations": operations.total, "waits": operations.waits.total()}
        print({"method": name, **given, "sizes": len(sizes), **counts}, flush=True)


def main() -> None:
    args = arguments()
    if args.count:
        counted(*args.count)
        return
    model, tokenizer = load_model(args.model, dtype="float32"), load_tokenizer(args.model)
    held_out = default_text("evaluation")
    data = calibration_batches(tokenizer, [default_text("calibration")], windows=args.windows, window=args.window)

    def perplexity(changed: Any) -> float:
        return float(evaluate(changed, tokenizer, held_out, window=512, windows=24)["perplexity"])

    rows: list[dict[str, Any]] = [{"what": "dense", "perplexity": perplexity(model)}]
    print(rows[-1], flush=True)
    for bits in args.bits:
        for name, function in (("plain loop", plain), ("weft", ours)):
            changed = copy.deepcopy(model)
            began = restart()
            function(changed, data, bits, args.group)
            seconds, peak = time.perf_counter() - began, most_resident()
            row = {"what": name, "bits": bits, "perplexity": perplexity(changed), "seconds": round(seconds, 1)}
            rows.append(row | {"peak_mb": round(peak / 1e6)})
            print(rows[-1], flush=True)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "model")}
        settings |= {"model": Path(args.model).name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        settings |= {"processor": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pico")
    parser.add_argument("--count", type=int, nargs=2, metavar=("OUT", "IN"))
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
