"""What `weft inspect` holds of a model of seven billion parameters' shapes, read from disk a matrix at a time.

    python benchmarks/inspect_memory.py [--blocks 2] [--layers '*0.mlp.down_proj'] [--json FILE]

A directory of as many blocks is written (hidden 4096, intermediate 11008, bf16, random numbers), inspected in a process
of its own, and its anonymous memory sampled: pages of the files, which can leave the memory again, are not in it. The
largest matrix is 90 MB as stored and 361 MB in fp64, in which spectra are computed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def write(directory: Path, blocks: int) -> int:
    """A model in as many files as it has tensors of blocks; its bytes."""
    config = LlamaConfig(**WIDTHS, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(directory)
    index, total = {}, 0
    for i, (name, empty) in enumerate(model.state_dict().items()):
        tensor = torch.randn(empty.shape, generator=torch.Generator().manual_seed(i)).mul_(0.02).bfloat16()
        index[name], total = f"model-{i:05}.safetensors", total + tensor.nbytes
        save_file({name: tensor}, directory / index[name], {"format": "pt"})
    found = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(found))
    return total


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def inspected(directory: Path, layers: list[str] | None) -> dict[str, Any]:
    """Anonymous memory before and at most during the work."""
    from weft.verbs.inspect import run

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    matrices = run(str(directory), layers=layers, device="cpu")["matrices"]
    done.set()
    watcher.join()
    most = {"before": seen[0], "most": max(seen), "matrices": len(matrices), "seconds": time.process_time() - began}
    return most | {"largest": max(2 * m["shape"][0] * m["shape"][1] for m in matrices)}


def main() -> None:
    """Write, inspect, say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--layers", nargs="*")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/weft-inspect-7b"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    total = write(args.scratch, args.blocks)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(inspected, (args.scratch, args.layers))
    record = {"blocks": args.blocks, "layers": args.layers, "stored": total, **found}
    record |= {"beyond": (found["most"] - found["before"]) / found["largest"], "torch": torch.__version__}
    record |= {"device": platform.processor() or platform.machine()}
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
