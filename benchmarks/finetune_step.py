"""One LoRA fine-tuning step: PEFT's, weft's, and weft's with the memory saver, in one run.

    python benchmarks/finetune_step.py
    python benchmarks/finetune_step.py --shape small --layers 2 --repeats 3

On a GPU: the 1.3 B LLaMA shape in bf16, 4 x 1024 tokens, peak memory and step time, each variant alone. On a CPU: a
small LLaMA, bytes of the saved tensors a layer, and processor time of a step, the variants taking turns step by step,
so that a busy machine disturbs them alike. Weights are random; a step is forward, backward and AdamW on rank-16 factors
of every linear layer; times are medians after warm-up. Prints the ratios to PEFT and writes them as JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from weft.memory import lean, saved_bytes
from weft.verbs.adapt import adapt

Wrap = Callable[[nn.Module], nn.Module]
SHAPES: dict[str, dict[str, int]] = {
    "1.3b": {
        "hidden_size": 2048,
        "intermediate_size": 5461,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 8192,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 512,
    },
}
BATCHES = {"1.3b": (4, 1024), "small": (2, 256), "tiny": (2, 16)}
RANK = 16


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.3b" if gpu else "small")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 10)
    parser.add_argument("--warmup", type=int, default=5 if gpu else 2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], action="append", help="on a CPU default to both")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/finetune_step_{gpu,cpu}.json")
    given = parser.parse_args()
    shape = SHAPES[given.shape] | ({"num_hidden_layers": given.layers} if given.layers else {})
    device = torch.device("cuda" if gpu else "cpu")
    dtypes = given.dtype or (["bfloat16"] if gpu else ["bfloat16", "float32"])
    output = given.output or Path(__file__).parent / "results" / f"finetune_step_{'gpu' if gpu else 'cpu'}.json"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "shape": shape | {"rank": RANK, "batch": list(BATCHES[given.shape])},
        "repeats": given.repeats,
        "runs": {},
    }
    for name in dtypes:
        rows = measure(given.shape, shape, getattr(torch, name), device, given.warmup, given.repeats)
        result["runs"][name] = rows
        show(name, rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {output}")


def build(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(LlamaConfig(**shape, use_cache=False)).to(dtype)


def with_peft(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def with_weft(model: nn.Module) -> nn.Module:
    return adapt(model, "lora", rank=RANK)


def with_lean(model: nn.Module) -> nn.Module:
    return lean(with_weft(model))


def with_lean_and_checkpointing(model: nn.Module) -> nn.Module:
    model = with_lean(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


VARIANTS: dict[str, Wrap] = {
    "peft": with_peft,
    "weft": with_weft,
    "weft, lean": with_lean,
    "weft, lean, checkpointing": with_lean_and_checkpointing,
}


def measure(
    size: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
    warmup: int,
    repeats: int,
    variants: Mapping[str, Wrap] = VARIANTS,
) -> dict[str, dict[str, float]]:
    ids = torch.randint(0, shape["vocab_size"], BATCHES[size], generator=torch.Generator().manual_seed(0)).to(device)
    rows: dict[str, dict[str, float]] = {}
    for name, wrap in variants.items():
        rows[name] = {"layer_bytes": layer_bytes(shape, dtype, device, wrap, ids)}
    if device.type == "cuda":
        for name, wrap in variants.items():
            rows[name] |= alone(shape, dtype, device, wrap, ids, warmup, repeats)
            gc.collect()
    else:
        for name, value in by_turns(shape, dtype, device, ids, warmup, repeats, variants).items():
            rows[name]["step_ms"] = value
    return rows


def in_turn(size: str, dtype: torch.dtype, device: torch.device, warmup: int, repeats: int) -> dict[str, float]:
    """Median step times in ms of every variant, a step of each in turn."""
    shape = SHAPES[size]
    ids = torch.randint(0, shape["vocab_size"], BATCHES[size], generator=torch.Generator().manual_seed(0)).to(device)
    return by_turns(shape, dtype, device, ids, warmup, repeats, VARIANTS)


def layer_bytes(shape: dict[str, int], dtype: torch.dtype, device: torch.device, wrap: Wrap, ids: torch.Tensor) -> int:
    """What one more layer adds to the saved tensors."""
    found = []
    for layers in (1, 2):
        model = wrap(build(shape | {"num_hidden_layers": layers}, dtype, device)).train()
        own = [*model.parameters(), *model.buffers()]
        found.append(saved_bytes(lambda model=model: model(input_ids=ids, labels=ids).loss, own))
    return found[1] - found[0]


def alone(
    shape: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
    wrap: Wrap,
    ids: torch.Tensor,
    warmup: int,
    repeats: int,
) -> dict[str, float]:
    """A GPU's median step time and peak memory with nothing else on it; weights, gradients and optimizer included."""
    step = stepper(shape, dtype, device, wrap, ids)
    torch.cuda.reset_peak_memory_stats()
    times = [step() for _ in range(warmup + repeats)][warmup:]
    return {"step_ms": statistics.median(times), "peak_bytes": torch.cuda.max_memory_allocated()}


def by_turns(
    shape: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
    ids: torch.Tensor,
    warmup: int,
    repeats: int,
    variants: Mapping[str, Wrap],
) -> dict[str, float]:
    """Median step time of each variant, the variants in turn."""
    steps = {name: stepper(shape, dtype, device, wrap, ids) for name, wrap in variants.items()}
    rounds = [{name: step() for name, step in steps.items()} for _ in range(warmup + repeats)][warmup:]
    return {name: statistics.median(times[name] for times in rounds) for name in steps}


def stepper(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device, wrap: Wrap, ids: torch.Tensor
) -> Callable[[], float]:
    """A function that trains one step and returns its milliseconds: on a GPU by the clock, on a CPU of processor
    time.
    """
    model = wrap(build(shape, dtype, device)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def now() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> float:
        start = now()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (now() - start) * 1e3

    return step


def show(dtype: str, rows: dict[str, dict[str, float]]) -> None:
    """Each figure and, in brackets, its ratio to PEFT's."""
    peer = rows["peft"]
    columns = [key for key in ("layer_bytes", "peak_bytes", "step_ms") if key in peer]
    titles = {"layer_bytes": "saved a layer, MB", "peak_bytes": "peak, MB", "step_ms": "step, ms"}
    print(f"\n{dtype:28}" + "".join(f"{titles[key]:>24}" for key in columns))
    for name, row in rows.items():
        cells = [f"{row[key] / (1 if key == 'step_ms' else 1e6):.2f} ({row[key] / peer[key]:.2f}x)" for key in columns]
        print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
