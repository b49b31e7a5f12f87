"""Generation at batch 1 with packed codes beside dense weights: milliseconds a token, and bytes of the linear layers.

    python benchmarks/generation.py MODEL [--bits 2 3 4 8] [--dtype bfloat16] [--tokens 16] [--rounds 5] [--json FILE]

Every model makes the same number of tokens in turn, round after round, and the least time of each counts: a machine
that others use slows all of them, not always at once. Codes are decoded for each product, and kept by nobody.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from weft.kernels.codebooks import kmeans, nearest
from weft.methods.yaqa import TABLES
from weft.runs.loading import load_model
from weft.terms import Codebook
from weft.terms.layers import linear_layers
from weft.terms.put import put
from weft.verbs.quantize import quantize


@torch.no_grad()
def seconds(model: Any, tokens: int) -> float:
    """Of a token, generated greedily after a prompt of 8."""
    prompt = torch.arange(2, 10).unsqueeze(0)
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return (time.perf_counter() - began) / tokens


def by_table(model: Any, bits: int) -> Any:
    """The model in codes for a table a matrix, a scale a row, as `auto` has them; rounded to what is nearest."""
    for name in linear_layers(model):
        W = model.get_submodule(name).weight.detach().float()
        scale = W.abs().amax(1, keepdim=True)
        book = kmeans((W / scale).view(1, -1), torch.ones(1, 1), 2**bits)
        codes = nearest((W / scale).view(1, -1), book).view_as(W)
        put(model, name, {"code": Codebook.from_codes(codes, book.half(), None, model.dtype, scale.half(), W.shape[1])})
    return model


def stored(model: Any) -> int:
    """Bytes of the linear layers."""
    layers = linear_layers(model).values()
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    return sum(t.nbytes for t in tensors)


def main() -> None:
    args = arguments()
    dense = load_model(args.model, dtype=args.dtype)
    models = {"dense": dense} | {f"rtn, {b} bits": quantize(copy.deepcopy(dense), "rtn", bits=b) for b in args.bits}
    models |= {f"tables, {b} bits": by_table(copy.deepcopy(dense), b) for b in args.bits if b in TABLES}
    models |= {"nf4": quantize(copy.deepcopy(dense), "nf4")}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            times[name].append(seconds(model, args.tokens))
    rows = [
        {"what": name, "ms_a_token": round(1e3 * min(times[name]), 1), "bytes": stored(model)}
        for name, model in models.items()
    ]
    for row in rows:
        print(row)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "model")}
        settings |= {"model": Path(args.model).name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        settings |= {"processor": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
