"""LST: a thin side network that reads the frozen backbone's layer outputs and makes the prediction (Ladder Side-Tuning,
2022, arXiv 2206.06522).

    z = D_0 h_0;   for every kept block i:  z = mu_i z + (1 - mu_i) D_i h_i,  mu_i = sigmoid(a_i / T),  z = side_i(z)
    logits = lm_head(U norm(z))

h_0 the embeddings (..., d), h_i the output of the backbone's block i; side blocks are the backbone's own class with
hidden size, head size and feed-forward size divided by `reduction`, heads unchanged; D_i: d -> d / r and U: d / r -> d
with bias. The backbone runs without a graph, in eval mode: no gradient, no activation of it is kept but the h_i, which
D_i's weights need. It may be quantised.

Side blocks start as the rows and columns of the backbone's blocks with the largest Fisher information (squared
gradients of the loss, a sequence at a time): residual places are one choice for all blocks, head places and neurons are
each block's own. Matrices that share places multiply their importances.
Deviations: made for T5, here for decoders with rotary embeddings: head places are kept in the pairs that are rotated
together; importances are multiplied after summing over the matrices' other side, for q and k differ in shape; the
output head is applied as it is (T5's factor belongs to its tied one). Generation re-reads the whole text.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from weft.errors import WeftError
from weft.io.checkpoint import Checkpoint
from weft.linalg.svd import widen
from weft.runs.output import open_output
from weft.seeds import check_seed
from weft.stats.calibrate import Batch, frozen
from weft.terms.layers import block_stacks
from weft.verbs.lst_start import LAYERS, cut_out, fisher, stack_of

__all__ = ["Ladder", "ladder", "load_ladder"]

_CONFIG = "weft_ladder.json"


class Ladder(nn.Module):
    """The side network over its backbone, called as the backbone is; only the side network has gradients.

    Args:
        backbone: a causal language model.
        side: the shrunk base model, with a block for each kept one.
        kept: the numbers of the backbone's blocks that have a side block.
        temperature: T of the gates.
        dropout: on the embeddings.
    """

    def __init__(
        self, backbone: PreTrainedModel, side: PreTrainedModel, kept: Sequence[int], temperature: float, dropout: float
    ) -> None:
        super().__init__()
        wide, thin = backbone.config.hidden_size, side.config.hidden_size
        self.side, self.kept, self.temperature, self.dropout = side, list(kept), temperature, dropout
        self.downs = nn.ModuleList(nn.Linear(wide, thin) for _ in range(len(self.kept) + 1))
        self.gates = nn.Parameter(torch.zeros(len(self.kept)))
        self.up = nn.Linear(thin, wide)
        self._backbone = [backbone]  # in a list: no part of this module's parameters and state

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen model."""
        return self._backbone[0]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        """Logits (..., tokens, vocabulary), and the mean loss where labels are given."""
        first, *rungs = self._hidden(input_ids, attention_mask)
        z = self.downs[0](F.dropout(first, self.dropout, self.training))
        blocks = stack_of(self.side)
        handles = [
            block.register_forward_pre_hook(self._mix(i, rungs[i]), with_kwargs=True) for i, block in enumerate(blocks)
        ]
        try:
            z = self.side(inputs_embeds=z, attention_mask=attention_mask, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        head: nn.Module = self.backbone.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits = widen(head(self.up(z).to(head.weight.dtype)))  # type: ignore[arg-type]
        loss = None
        if labels is not None:
            loss = self.backbone.loss_function(logits, labels, self.backbone.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def _mix(self, i: int, rung: Tensor) -> Any:
        """The hook that mixes D_i h_i into what side block i is given."""
        mu = torch.sigmoid(self.gates[i] / self.temperature)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            below = self.downs[i + 1](rung)
            if args:
                return (mu * args[0] + (1 - mu) * below, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": mu * kwargs["hidden_states"] + (1 - mu) * below}

        return hook

    @torch.no_grad()
    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
        """h_0 and the h_i of the kept blocks, (..., tokens, d), in the side network's dtype."""
        base, blocks = self.backbone.base_model, stack_of(self.backbone)
        seen: dict[int, Tensor] = {}

        def keep(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[number] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [blocks[number].register_forward_hook(keep(number)) for number in self.kept]
        handles.append(base.get_input_embeddings().register_forward_hook(keep(-1)))  # type: ignore[operator, union-attr]
        try:
            with frozen(self.backbone):
                base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [seen[number].to(self.gates.dtype) for number in (-1, *self.kept)]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the side network: weft_ladder.safetensors and weft_ladder.json. Raises WeftError where something is."""
        with open_output(directory, {}) as place:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_file(state, place.path / "weft_ladder.safetensors")
            thin, wide = self.side.config.hidden_size, self.backbone.config.hidden_size
            said = {
                "format": 1,
                "base": self.backbone.config.name_or_path or None,
                "reduction": wide // thin,
                "kept": self.kept,
                "temperature": self.temperature,
                "dropout": self.dropout,
            }
            (place.path / _CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def ladder(
    model: PreTrainedModel,
    reduction: int = 8,
    batches: Iterable[Batch] | None = None,
    *,
    drop: Sequence[int] = (),
    temperature: float = 0.1,
    dropout: float = 0.0,
    seed: int = 0,
) -> Ladder:
    """A side network over the model, which is frozen; train what the result's parameters() gives (published rate 3e-3).

    Args:
        reduction: r, the paper's 8.
        batches: whose Fisher information chooses the start of the side blocks (the paper's: 1024 samples of the task);
            None starts them at random.
        drop: blocks of the backbone without a side block (the paper drops 3 of 12).
        temperature: T of the gates.
        dropout: on the embeddings.
        seed: of the random parts.

    Raises:
        WeftError: a model that is no decoder of q, k, v, o, gate, up, down projections with rotary embeddings, sizes
            that the reduction does not divide, or no block that is left.
    """
    check_seed(seed)
    depth = _depth(model)
    strange = [i for i in drop if not 0 <= i < depth]
    if strange:
        raise WeftError(f"There is no block {strange[0]} to drop; the blocks are 0 to {depth - 1}.")
    kept = [i for i in range(depth) if i not in set(drop)]
    made = _build(model, reduction, kept, temperature, dropout, seed)
    if batches is not None:
        cut_out(made.side, model, kept, fisher(model, list(batches)))
    model.requires_grad_(False)
    return made


def load_ladder(model: PreTrainedModel, directory: str | os.PathLike[str]) -> Ladder:
    """The side network that `Ladder.save` wrote, over the model. Raises WeftError where there is none that fits."""
    try:
        said = json.loads((Path(directory) / _CONFIG).read_text(encoding="utf-8"))
        if max(said["kept"]) >= _depth(model):
            raise ValueError(f"it has a side block for block {max(said['kept'])}, which the model lacks")
        made = _build(model, said["reduction"], said["kept"], said["temperature"], said["dropout"], 0)
        made.load_state_dict(dict(Checkpoint(directory)))
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WeftError(f"The side network in {directory} does not fit this model: {reason}.") from error
    model.requires_grad_(False)
    return made


def _build(
    model: PreTrainedModel, reduction: int, kept: Sequence[int], temperature: float, dropout: float, seed: int
) -> Ladder:
    config = copy.deepcopy(model.config)
    head = model.config.hidden_size // model.config.num_attention_heads
    head = getattr(config, "head_dim", None) or head
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "head_dim": head}
    for name, size in sizes.items():
        if size % reduction or not kept or (name == "head_dim" and size // reduction % 2):
            raise WeftError(
                f"A reduction by {reduction} is not possible: {name} is {size}, its share must be whole (and even for "
                f"heads), and {len(kept)} blocks are kept; give another reduction= or drop=."
            )
        setattr(config, name, size // reduction)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    config.__dict__.pop("quantization_config", None)
    config.vocab_size, config.pad_token_id = 1, None  # its embedding is thrown away
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        side = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        side.set_input_embeddings(nn.Identity())
        made = Ladder(model, side, kept, temperature, dropout)
    return made.to(model.device)


def _depth(model: PreTrainedModel) -> int:
    """The number of blocks. Raises WeftError where they are not of the kind that can be shrunk."""
    stacks = block_stacks(model)
    names = {name for name, _ in model.named_modules()}
    for path, stack in stacks.items():
        missing = [n for i in range(len(stack)) for n in LAYERS if f"{path}.{i}.{n}" not in names]
        if not missing and len(stacks) == 1 and getattr(model.config, "rope_parameters", None):
            return len(stack)
    raise WeftError(
        f"{type(model).__name__} cannot have a side network: it is made for decoders of {', '.join(LAYERS)} "
        "with rotary embeddings."
    )
