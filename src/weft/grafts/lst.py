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
output head is applied as it is (T5's factor belongs to its tied one). Generation re-reads the whole text: there is no
key-value cache. The side's own rotary frequencies are those of its smaller heads, so that a pair that is kept turns by
the angle of its new place.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.grafts.base import Graft
from weft.grafts.lst_start import LAYERS, cut_out, fisher, stack_of
from weft.stats.calibrate import Batch, frozen
from weft.terms.layers import block_stacks

__all__ = ["GRAFT", "Ladder", "ladder_of"]

PLACE = "weft_ladder"


class Ladder(nn.Module):
    """The side network: (h_0, the h_i of the kept blocks) -> U z.

    Args:
        wide: hidden size of the backbone.
        side: the shrunk base model, with a block for each kept one.
        kept: the numbers of the backbone's blocks that have a side block.
        temperature: T of the gates.
        dropout: on the embeddings.
    """

    def __init__(self, wide: int, side: nn.Module, kept: Sequence[int], temperature: float, dropout: float) -> None:
        super().__init__()
        thin: int = side.config.hidden_size  # type: ignore[assignment, union-attr]
        self.side, self.kept, self.temperature, self.dropout = side, list(kept), temperature, dropout
        self.downs = nn.ModuleList(nn.Linear(wide, thin) for _ in range(len(self.kept) + 1))
        self.gates = nn.Parameter(torch.zeros(len(self.kept)))
        self.up = nn.Linear(thin, wide)

    def forward(self, first: Tensor, rungs: Sequence[Tensor], **inputs: Any) -> Tensor:
        """first, rungs: (..., tokens, d); inputs: what the base model is given beside the tokens: (..., tokens, d)."""
        first, *rungs = (h.to(self.gates.dtype) for h in (first, *rungs))
        z = self.downs[0](F.dropout(first, self.dropout, self.training))
        mixes = [(block, self._mix(i, rungs[i])) for i, block in enumerate(stack_of(self.side))]
        handles = [block.register_forward_pre_hook(mix, with_kwargs=True) for block, mix in mixes]
        try:
            z = self.side(inputs_embeds=z, use_cache=False, **inputs).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        found: Tensor = self.up(z)
        return found

    def _mix(self, i: int, rung: Tensor) -> Any:
        """The hook that mixes D_i h_i into what side block i is given."""
        mu = torch.sigmoid(self.gates[i] / self.temperature)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            below = self.downs[i + 1](rung)
            if args:
                return (mu * args[0] + (1 - mu) * below, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": mu * kwargs["hidden_states"] + (1 - mu) * below}

        return hook


class _Beside:
    """The `forward` of the base model's instance: the blocks run frozen, and the side network gives what they gave."""

    def __init__(self, base: nn.Module, ladder: Ladder) -> None:
        self.base, self.ladder, self.before = base, ladder, base.__dict__.get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.base).forward.__get__(self.base))

    def __call__(
        self, input_ids: Tensor | None = None, past_key_values: Any = None, use_cache: bool | None = None, **inputs: Any
    ) -> Any:
        from transformers.cache_utils import Cache
        from transformers.modeling_outputs import BaseModelOutputWithPast

        cached = any(isinstance(value, Cache) for value in inputs.values())  # whose name differs by version
        if past_key_values is not None or cached or use_cache:
            raise WeftError("A side network has no key-value cache: it re-reads the whole text; give use_cache=False.")
        embeds = inputs.pop("inputs_embeds", None)
        seen: dict[int, Tensor] = {}
        with torch.no_grad(), frozen(self.base), _watched(self.base, self.ladder.kept, seen):
            run = self.before or type(self.base).forward.__get__(self.base)
            run(input_ids=input_ids, inputs_embeds=embeds, use_cache=False, **inputs)
        first = seen[-1] if embeds is None else embeds.detach()
        hidden = self.ladder(first, [seen[number] for number in self.ladder.kept], **inputs)
        return BaseModelOutputWithPast(last_hidden_state=hidden.to(first.dtype))  # type: ignore[arg-type]


@contextmanager
def _watched(base: nn.Module, kept: Sequence[int], seen: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, the outputs of these blocks, and of the embeddings at -1, are put into `seen`."""

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = stack_of(base)
    handles = [blocks[number].register_forward_hook(keep(number)) for number in kept]
    handles.append(base.get_input_embeddings().register_forward_hook(keep(-1)))  # type: ignore[operator]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ladder_of(model: nn.Module) -> Ladder:
    """The side network on the model."""
    found = model.get_submodule(PLACE)
    assert isinstance(found, Ladder)
    return found


def build(
    model: Any, seed: int, *, reduction: int, drop: Sequence[int], temperature: float, dropout: float
) -> dict[str, nn.Module]:
    """The side network, all of it drawn.

    Raises:
        WeftError: a model that is no decoder of q, k, v, o, gate, up, down projections with rotary embeddings, sizes
            that the reduction does not divide, or no block that is left.
    """
    from transformers import AutoModel

    depth = _depth(model)
    strange = [i for i in drop if not 0 <= i < depth]
    if strange:
        raise WeftError(f"There is no block {strange[0]} to drop; the blocks are 0 to {depth - 1}.")
    kept = [i for i in range(depth) if i not in set(drop)]
    config = _shrunk(model.config, reduction, kept)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        side = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        side.set_input_embeddings(nn.Identity())
        made = Ladder(model.config.hidden_size, side, kept, temperature, dropout)
    return {PLACE: made if side.device == model.device else made.to(model.device)}


def connect(model: Any, modules: Mapping[str, nn.Module]) -> bool | None:
    """The base model's instance gets a forward of its own; a cache, which it does not fill, is switched off."""
    (ladder,) = modules.values()
    assert isinstance(ladder, Ladder)
    model.base_model.forward = _Beside(model.base_model, ladder)
    before: bool | None = model.generation_config.use_cache
    model.generation_config.use_cache = False
    return before


def disconnect(model: Any, remembered: bool | None) -> None:
    """The forward and the cache of before."""
    before = model.base_model.forward.before
    del model.base_model.forward
    if before is not None:
        model.base_model.forward = before
    model.generation_config.use_cache = remembered


def start(model: Any, modules: Mapping[str, nn.Module], batches: list[Batch]) -> None:
    """The rows and columns of largest Fisher information (the paper's data: 1024 samples of the task)."""
    (ladder,) = modules.values()
    assert isinstance(ladder, Ladder)
    cut_out(ladder.side, model, ladder.kept, fisher(model, batches))


def count(model: Any, options: Mapping[str, Any]) -> int:
    """A side block has numel / r^2 of every matrix and numel / r of every vector of a block; beside them a gate each,
    the last norm, D_0 ... D_L and U: with s = d / r, n blocks (block + 1) + s + (n + 1) (d + 1) s + (s + 1) d.
    """
    r, d = options["reduction"], model.config.hidden_size
    s, n = d // r, model.config.num_hidden_layers - len(set(options["drop"]))
    block = sum(p.numel() // r ** p.dim() for p in stack_of(model)[0].parameters())
    return int(n * (block + 1) + s + (n + 1) * (d + 1) * s + (s + 1) * d)


def _shrunk(config: Any, reduction: int, kept: Sequence[int]) -> Any:
    """The configuration of the side network."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "head_dim": head}
    config = copy.deepcopy(config)
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
    return config


def _depth(model: Any) -> int:
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


GRAFT = Graft(
    name="lst",
    summary="a thin side network reads the frozen blocks' outputs and makes the prediction; no activation is kept",
    paper="Sung et al., 2022, arXiv 2206.06522",
    defaults={"reduction": 8, "drop": (), "temperature": 0.1, "dropout": 0.0},
    build=build,
    start=start,
    connect=connect,
    disconnect=disconnect,
    count=count,
    deviates="the prediction is the side network's",
)
