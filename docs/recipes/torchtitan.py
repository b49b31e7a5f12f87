"""A recipe for torchtitan: weft's terms, rules and optimizers in its training loop, as they are.

torchtitan asks a converter to change a model between its making on the meta device and its sharding (`convert`), and
tells it when the optimizer has stepped (`post_optimizer_hook`); optimizers are built from the sharded model. This file
has what goes there, with nothing of torchtitan imported, and a loop of its own that does the same in the same order:

    torchrun --nproc-per-node 2 docs/recipes/torchtitan.py          # two processes on CPUs; the same on GPUs

In torchtitan: list `Converter(...)` among the configuration's converters; call `fill` where weights are initialised,
after sharding; build the optimizer by `weft.optim.spectron(model, lr=...)` or any other. Losses that rules add
(`Rule.penalty`), and what they do before a step, want two calls in the loop, as here. Checked with the loop below;
torchtitan itself was not run.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from weft.optim import spectron
from weft.rules import Rules
from weft.rules.sharded import sharded_like
from weft.terms import SumLinear
from weft.verbs.fresh import Structure, restructure


class Converter:
    """Puts a method's terms in the place of the blocks' matrices, and runs its rules."""

    def __init__(self, structure: Structure, steps: int) -> None:
        self.structure, self.steps, self.step = structure, steps, 0

    def convert(self, model: nn.Module) -> None:
        """On the meta device: shapes alone."""
        restructure(model, self.structure)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """When model and optimizer are made."""
        self.rules = Rules(self.structure.rules(model, 0))
        self.rules.bind(optimizer)
        self.rules.start(model, steps=self.steps)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """After each step of the optimizer."""
        self.step += 1
        self.rules.after_step(model[0] if isinstance(model, list) else model, self.step)


@torch.no_grad()
def fill(model: nn.Module, structure: Structure, std: float = 0.02, seed: int = 0) -> None:
    """Give sharded terms the numbers that the method starts from: layer by layer, the same draw on every process."""
    for name, layer in model.named_modules():
        if isinstance(layer, SumLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            draw = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            nn.init.normal_(plain.weight, std=std, generator=draw)
            made = restructure(nn.ModuleDict({name.replace(".", "_"): plain}), structure, seed=seed)
            (whole,) = (module for module in made.modules() if isinstance(module, SumLinear))
            for own, value in zip(layer.terms.state_dict().values(), whole.terms.state_dict().values(), strict=True):
                own.copy_(sharded_like(value.to(own.dtype), own))


def train(steps: int = 4) -> list[float]:
    """The loop's order: make on meta, convert, shard, materialise, fill, optimize; then save, and read back."""
    structure = Structure.of("low-rank", 8)
    converter = Converter(structure, steps)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        converter.convert(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()  # type: ignore[no-untyped-call]
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    fill(model, structure)
    optimizer = spectron(model.train(), lr=1e-2)
    converter.start(model, optimizer)
    ids = torch.arange(96, device=device).view(4, 24) % 64
    losses = []
    for step in range(1, steps + 1):
        loss = model(input_ids=ids, labels=ids).loss
        penalty = converter.rules.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        converter.rules.before_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
        converter.post_optimizer_hook(model)
        losses.append(float(loss.detach()))
    _through_a_checkpoint(model)
    return losses


def _through_a_checkpoint(model: nn.Module) -> None:
    where: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(where)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model.state_dict(), checkpoint_id=where[0])
    for tensor in model.parameters():
        tensor.data.zero_()
    state = model.state_dict()
    load(state, checkpoint_id=where[0])
    model.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        local, kept = (getattr(t, "_local_tensor", t) for t in (tensor, before[name]))
        assert torch.equal(local, kept), name


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    found = train()
    if dist.get_rank() == 0:
        print("loss", " ".join(f"{loss:.3f}" for loss in found), flush=True)
    dist.destroy_process_group()
