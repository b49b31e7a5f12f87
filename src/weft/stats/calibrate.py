"""One streaming pass over calibration batches: every layer's statistics, with a bounded memory, resumable, cached on
disk.

Peak memory is the moments of the layers that are collected together: all of them in one pass, or, called with the
layers of one group of `layers_by_block` after another, one block's. The sequential form, which feeds each block the
outputs of the blocks already changed, is in `weft.stats.walk`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weft.errors import WeftError
from weft.memory.lean import without_logits
from weft.signals import finishing, requested, stop_here
from weft.stats.cache import Snapshots, fingerprint
from weft.stats.collect import GRADIENT_NEEDS, Collector, check_needs
from weft.stats.relevance import relevance_rules, score
from weft.stats.streams import is_encoder_decoder
from weft.terms.experts import expert_layers, within_experts
from weft.terms.layers import block_stacks, linear_layers

__all__ = [
    "Batch",
    "Stats",
    "calibrate",
    "first_block",
    "forward_inputs",
    "frozen",
    "layers_by_block",
    "mean_loss",
    "to_device",
]

Batch = Mapping[str, Tensor]
"""What the model's forward takes: input_ids, attention_mask, labels ..."""
Stats = dict[str, dict[str, Tensor]]
"""layer -> {statistic: tensor}; see `weft.stats.collect` for names and shapes."""
Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]
TOKENS_AT_ONCE = 512
"""In a backward pass."""
_OWN = "input_relevance"
"""What takes a pass of its own, whose gradients are others."""


@within_experts
def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    needs: Iterable[str],
    *,
    layers: str | Sequence[str] | None = None,
    cache: str | Path | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> Stats:
    """The statistics of every linear layer over the batches, in fp64 (mean_grad: fp32). An expert's are those of the
    tokens that were routed to it; one that none was routed to is left out.

    All of them are in memory together: 8 in^2 bytes a layer for an input moment (once for layers that share their
    input), 8 out^2 for that of output gradients, 4 out in for mean_grad. Where that does not fit, give `layers` of one
    block after another, as the verbs do by themselves (`weft.stats.groups`).

    Args:
        model: any transformers model; run in eval mode, its parameters frozen and restored afterwards.
        batches: mappings for the model's forward. Tokens with attention_mask 0 are left out. For gradient statistics a
            batch needs `labels`, or, for a causal model, its input_ids are the labels.
        needs: statistic names, see `weft.stats.collect`; `weft.needs("svd-llm")` gives a method's.
        layers: shell patterns of layer names, "!" before those to leave out; None for all.
        cache: a directory: finished statistics are kept there under a key of model, data and needs, and an interrupted
            pass resumes from its last snapshot.
        track: (batches, description) -> the same batches, for a progress bar.

    Raises:
        WeftError: no batches, an unknown statistic, a layer that saw nothing, only zeros, or NaN.

    Example:
        >>> stats = weft.calibrate(model, batches, weft.needs("svd-llm"))
        >>> stats["model.layers.0.self_attn.q_proj"]["input_moment"].shape
        torch.Size([32, 32])
    """
    needs = check_needs(needs)
    found = linear_layers(model, layers)
    batches = list(batches)
    if not batches:
        raise WeftError("Calibration needs at least one batch of text.")
    if not needs:
        return {name: {} for name in found}
    stats, shown = Stats(), track or (lambda items, what: items)
    passes = [tuple(need for need in needs if need != _OWN), tuple(need for need in needs if need == _OWN)]
    for part in (part for part in passes if part):
        snapshots = None if cache is None else Snapshots(Path(cache) / fingerprint(model, batches, part, found))
        for name, moments in _collect(model, batches, part, found, snapshots, shown).items():
            stats.setdefault(name, {}).update(moments)
    return stats


def layers_by_block(model: nn.Module, layers: Iterable[str]) -> list[list[str]]:
    """The layer names grouped by the block they lie in, in the model's order; those outside blocks come last."""
    prefixes = [f"{path}.{i}." for path, stack in block_stacks(model).items() for i in range(len(stack))]
    groups: dict[str, list[str]] = {prefix: [] for prefix in [*prefixes, ""]}
    for name in layers:
        groups[next((p for p in prefixes if name.startswith(p)), "")].append(name)
    return [names for names in groups.values() if names]


def _collect(
    model: nn.Module,
    batches: list[Batch],
    needs: tuple[str, ...],
    layers: Mapping[str, nn.Module],
    snapshots: Snapshots | None,
    track: Callable[[Iterable[Any], str], Iterable[Any]],
) -> Stats:
    collector = Collector(layers, needs, expert_layers(model, layers))
    start = collector.restore(*snapshots.restore()) if snapshots else 0
    backward, rules = (
        any(need in GRADIENT_NEEDS for need in needs),
        relevance_rules(model) if _OWN in needs else nullcontext(),
    )
    hold = finishing() if snapshots else nullcontext()
    following = collector.streams.following(model)
    with hold, frozen(model), rules, collector, following, differentiable_inputs(model, backward, layers):
        for i, batch in enumerate(track(batches[start:], "calibrating"), start):
            run_batch(model, batch, collector, backward, score if _OWN in needs else token_loss)
            if i == start:
                collector.check(complete=False)  # a dead or NaN layer is reported after the first batch, not the last
            if snapshots:
                words = {**collector.words(), "batches": i + 1}
                snapshots.after_batch(collector.named_sums(), words, last=requested() or i + 1 == len(batches))
            stop_here()
    return collector.moments()


def run_batch(
    model: nn.Module, batch: Batch, collector: Collector, backward: bool, loss_of: Loss | None = None
) -> None:
    """One forward pass, and the backward pass of the summed token loss (or of what `loss_of` gives the mean of) when
    gradients are asked for: then of few sequences at a time, since what a backward pass keeps of a whole batch is many
    times a small model's weights.
    """
    batch = to_device(batch, model)
    if not backward:
        collector.begin(batch)
        model(**forward_inputs(model, batch))
        return
    for part in _parts(batch):
        collector.begin(part)
        loss, count = (loss_of or token_loss)(model, part)
        if not loss.requires_grad:
            raise WeftError(
                f"The loss of {type(model).__name__} does not depend on its embeddings: "
                "there are no gradients to collect."
            )
        (loss * count).backward()  # type: ignore[no-untyped-call]


def _parts(batch: Batch) -> list[Batch]:
    """The batch in parts of at most TOKENS_AT_ONCE tokens, or one sequence; whole, where its tensors do not share
    their first dimension or a sequence has nothing to predict.
    """
    first = next(iter(batch.values()))
    rows = max(1, TOKENS_AT_ONCE // first[0].numel())
    if any(tensor.dim() == 0 or len(tensor) != len(first) for tensor in batch.values()):
        return [batch]
    counted = batch["labels"] != -100 if "labels" in batch else batch.get("attention_mask")
    if counted is not None and counted.dim() > 1 and not bool((counted[:, 1:] != 0).any(1).all()):
        return [batch]
    return [{key: t[i : i + rows] for key, t in batch.items()} for i in range(0, len(first), rows)]


def token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The model's own mean loss on a batch, and over how many predictions it is a mean.

    Labels default to the input ids of a causal model.
    """
    batch = dict(batch)
    causal = not is_encoder_decoder(model) and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if "labels" not in batch:
        if not causal:
            raise WeftError(
                f"{type(model).__name__} is not a causal language model: its calibration batches need labels."
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        batch["labels"] = ids if mask is None else ids.masked_fill(mask == 0, -100)
    labels = batch["labels"]
    count = int(((labels[:, 1:] if causal else labels) != -100).sum())
    if not count:
        raise WeftError("A calibration batch has nothing to predict: every label of it is -100; leave that batch out.")
    with without_logits(model):
        return model(**batch, **_no_cache(model)).loss, count


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss of a prediction over all batches, in nats."""
    total, predictions = 0.0, 0
    for batch in batches:
        loss, count = token_loss(model, to_device(batch, model))
        total, predictions = total + float(loss) * count, predictions + count
    return total / predictions


def forward_inputs(model: nn.Module, batch: Batch, logits: bool = False) -> dict[str, Any]:
    """The arguments of a forward pass that needs no loss, and of its logits, unless they are asked for, those of the
    last token alone, where the model can leave out the rest and nobody watches its head.

    Labels stay only where an encoder-decoder model derives its decoder's input from them.
    """
    given = {k: v for k, v in batch.items() if k != "labels" or is_encoder_decoder(model)} | _no_cache(model)
    return given if logits or not _can_leave_logits(model) else {"logits_to_keep": 1, **given}


def _can_leave_logits(model: nn.Module) -> bool:
    head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    watched = head is None or head._forward_hooks or head._forward_pre_hooks
    return not watched and "logits_to_keep" in inspect.signature(type(model).forward).parameters


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients; what was before comes back at the end."""
    modes = {module: module.training for module in model.modules()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def differentiable_inputs(model: nn.Module, backward: bool = True, layers: Iterable[str] = ()) -> Iterator[None]:
    """Make the embeddings' output the leaf of the backward pass, so that no weight gradient is ever computed; of
    gradients in some `layers` alone, what the first of their blocks is given. Where there is no backward pass, compute
    no gradient at all.
    """
    if not backward:
        with torch.no_grad():
            yield
        return

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    block = first_block(model, layers)
    if block is None:
        # an encoder-decoder model has its own embedding module in each half, sharing one weight
        halves = [m for m in model.modules() if callable(getattr(m, "get_input_embeddings", None))]
        embeddings: set[nn.Module] = {half.get_input_embeddings() for half in halves}  # type: ignore[operator]
        handles = [module.register_forward_hook(hook) for module in embeddings]
    else:
        handles = [block.register_forward_pre_hook(_leaf, with_kwargs=True)]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def first_block(model: nn.Module, layers: Iterable[str]) -> nn.Module | None:
    """The block that the layers begin in, where nothing but their stack leads from the embeddings to them."""
    stacks, names = block_stacks(model), list(layers)
    if len(stacks) != 1 or is_encoder_decoder(model) or not names:
        return None
    ((path, stack),) = stacks.items()
    inside = [next((i for i in range(len(stack)) if name.startswith(f"{path}.{i}.")), None) for name in names]
    found = [i for i in inside if i is not None]
    return stack[min(found)] if len(found) == len(names) else None


def _leaf(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a block is given as a leaf, unless they come from an earlier use of it."""

    def leaf(value: Any) -> Any:
        differs = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_(True) if differs else value

    if args:
        return (leaf(args[0]), *args[1:]), kwargs
    return args, {name: leaf(value) if name == "hidden_states" else value for name, value in kwargs.items()}


def to_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """use_cache=False for models that would otherwise build a key-value cache."""
    config = getattr(model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
