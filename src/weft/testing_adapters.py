"""The conformance suite of adapter methods, for ours and for those of others: `check_adapter("pissa")` runs every
property.

    start         the function is unchanged at the start, or deviates as the method says
    count         trainable numbers equal the paper's formula
    learns        30 steps lower the loss on a small task
    merges        merged equals unmerged to 1e-5
    saves         save and load are bit-exact
    bf16          on a bf16 model the trained tensors stay fp32 and the start holds
    conv1d        GPT-2's Conv1D layers with their biases
    checkpoints   gradient checkpointing gives the same gradients
    compiles      torch.compile without a graph break gives the same layer
    resumes       an interrupted run with its rules' state ends on the same bytes
    removal       removing restores the base: the same parameters and bytes
    switches      put aside it is the base, taken up again itself, and a copy of the model is independent

A method that lacks a property says why in `Method.exempt`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weft.io.adapters import load_adapter, save_adapter
from weft.methods import METHODS, Method
from weft.rules import Rule, Rules
from weft.stats.calibrate import Stats, calibrate
from weft.terms import SumLinear, Wrapper
from weft.terms.adapters import adapters_of, disable, find_adapter
from weft.terms.layers import linear_layers, shape_of
from weft.verbs.adapt import adapt, make_optimizer, merge_adapter, remove_adapter, rules, trainable

__all__ = ["PROPERTIES", "RANK", "adapted", "check_adapter", "task", "tiny_gpt2", "tiny_llama", "train"]

RANK = 4
RUN = 20  # steps of the shortest run that is begun
Make = Callable[[], nn.Module]


def check_adapter(method: str | Method) -> None:
    """Run every property on a method.

    Raises:
        AssertionError: a property does not hold; its name is in the message.
    """
    chosen = METHODS.find(method)
    for name, check in PROPERTIES.items():
        if name in chosen.exempt:
            continue
        try:
            check(chosen)
        except AssertionError as error:
            raise AssertionError(f"{chosen.name}: the property {name!r} does not hold: {error}") from error


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One block of width 16, in eval mode; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            # weights of the size that a trained model has, so that starts taken from them matter
            initializer_range=0.2,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model.eval().to(dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One block of Conv1D layers of width 16, with random biases, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.2,
        )
        model: nn.Module = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model.eval().to(dtype)


@cache
def task() -> tuple[dict[str, Tensor], ...]:
    """Four batches to learn: sequences that count upwards by a step of their own."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        first, step = torch.randint(32, (4, 1), generator=generator), torch.randint(1, 4, (4, 1), generator=generator)
        ids = (first + step * torch.arange(16)) % 32
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return tuple(batches)


def adapted(method: Method, make: Make = tiny_llama, *, name: str = "default", **options: Any) -> nn.Module:
    """A fresh tiny model with the method's adapter on all its linear layers."""
    model = make()
    return adapt(
        model, method, RANK, name=name, stats=_stats(method, make) if method.needs else None, seed=3, **options
    )


@cache
def _collected(needs: tuple[str, ...], make: Make) -> Stats:
    return calibrate(make().float(), task(), needs)


def _stats(method: Method, make: Make) -> Stats:
    return _collected(tuple(method.needs), make)


def train(
    model: nn.Module, steps: int, *, lr: float = 5e-3, start: int = 0, state: Any = None, rule: Rule | None = None
) -> tuple[list[float], Any]:
    """Take some steps of a run of 20, or more, by the methods' own optimizer (AdamW by default) with their rules.

    Returns the losses, and (optimizer, rule) to go on from.
    """
    rule = rule or Rules(rules(model))
    optimizer = make_optimizer(model, lr)
    rule.bind(optimizer)
    rule.start(model, steps=max(RUN, start + steps))
    if state is not None:
        optimizer.load_state_dict(state[0])
        rule.load_state_dict(state[1])
    model.train()
    losses = []
    for step in range(start + 1, start + steps + 1):
        torch.manual_seed(step)
        loss = model(**task()[step % len(task())]).loss
        rule.update(model, optimizer, loss, step)
        losses.append(float(loss.detach()))
    model.eval()
    return losses, (optimizer.state_dict(), rule.state_dict())


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(task()[0]["input_ids"]).logits
    return logits


@torch.no_grad()
def _mean_loss(model: nn.Module) -> float:
    return sum(float(model(**batch).loss) for batch in task()) / len(task())


def _unchanged(method: Method, make: Make, tolerance: float) -> None:
    difference = float((_logits(adapted(method, make)) - _logits(make())).abs().max())
    assert method.deviates or difference <= tolerance, f"the logits differ by {difference:.2e} at the start"
    visible = tolerance < 1e-3  # not below one rounding of bf16
    assert difference > 0 or not method.deviates or not visible, "the method says that its start deviates; it does not"


def _start(method: Method) -> None:
    _unchanged(method, tiny_llama, 1e-5)


def _count(method: Method) -> None:
    assert method.count is not None, "the method has no formula for its trained numbers"
    model = adapted(method)
    options = method.options({})
    shapes = {name: shape_of(layer) for name, layer in linear_layers(model).items()}
    (adapter,) = adapters_of(model).values()
    ranks = adapter.settings["ranks"]
    expected = sum(method.count(*shapes[name], rank, options) for name, rank in ranks.items())
    if method.count_shared is not None:
        expected += method.count_shared({name: shapes[name] for name in ranks}, RANK, options)
    expected += sum(tensor.numel() for tensor in adapter.extras.values())
    assert trainable(model).count == expected, (
        f"{trainable(model).count} trainable numbers, the formula says {expected}"
    )


def _learns(method: Method) -> None:
    model = adapted(method)
    before = _mean_loss(model)
    train(model, 30)
    after = _mean_loss(model)
    assert after < before - 0.01, f"the loss went from {before:.4f} to {after:.4f}"


def _merges(method: Method) -> None:
    model = adapted(method)
    train(model, 3)
    unmerged = _logits(model)
    lost = merge_adapter(model)
    difference = (_logits(model) - unmerged).abs().max()
    assert difference <= 1e-5 * unmerged.abs().max(), f"merging changes the logits by {float(difference):.2e}"
    assert max(lost.values()) < 1e-3, "merging in fp32 loses a part of the update"
    assert not any(isinstance(module, SumLinear) for module in model.modules()), "a merged layer is not plain"


def _saves(method: Method) -> None:
    model = adapted(method)
    train(model, 3)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, Path(directory) / "adapter")
        other = load_adapter(tiny_llama(), Path(directory) / "adapter")
    assert torch.equal(_logits(other), _logits(model)), "the loaded adapter computes something else"
    mine, theirs = find_adapter(model), find_adapter(other)
    assert (mine.name, mine.method, mine.settings) == (theirs.name, theirs.method, theirs.settings)
    assert _trained(model).keys() == _trained(other).keys(), "other parameters are trainable after loading"
    _assert_same(_own(model), _own(other), "after saving and loading")


def _bf16(method: Method) -> None:
    model = adapted(method, _bf16_llama)
    assert all(p.dtype == torch.float32 for _, p in find_adapter(model).named_parameters()), (
        "a trained tensor is not fp32"
    )  # one rounding of bf16 in each of the layers
    _unchanged(method, _bf16_llama, 0.05 * float(_logits(_bf16_llama()).abs().max()))
    losses, _ = train(model, 2)
    assert all(torch.isfinite(torch.tensor(losses))) and _logits(model).dtype == torch.bfloat16


def _bf16_llama() -> nn.Module:
    return tiny_llama(torch.bfloat16)


def _conv1d(method: Method) -> None:
    _unchanged(method, tiny_gpt2, 1e-5)
    model = adapted(method, tiny_gpt2)
    train(model, 3)
    unmerged = _logits(model)
    if "merges" not in method.exempt:
        merge_adapter(model)
        assert torch.allclose(_logits(model), unmerged, atol=1e-5 * float(unmerged.abs().max())), (
            "merging a Conv1D changes the logits"
        )
    plain, merged = tiny_gpt2(), model if "merges" not in method.exempt else remove_adapter(model)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()], (
        "the Conv1D layers do not come back"
    )


def _checkpoints(method: Method) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        torch.manual_seed(0)
        model(**task()[0]).loss.backward()
        gradients.append({name: p.grad for name, p in trainable(model).parameters.items() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and plain, "checkpointing loses gradients"
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-7), (
            f"checkpointing changes the gradient of {name}"
        )


def _compiles(method: Method) -> None:
    model = adapted(method)
    train(model, 1)
    layer = next(m for m in model.modules() if isinstance(m, SumLinear) and len(m.terms) + _wraps(m) > 1)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6), "the compiled layer computes something else"


def _wraps(layer: SumLinear) -> int:
    return sum(isinstance(term, Wrapper) for term in layer.terms.values())


def _resumes(method: Method) -> None:
    straight = adapted(method)
    train(straight, 4)
    halfway = adapted(method)
    _, state = train(halfway, 2)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(halfway, Path(directory) / "adapter", format="weft")
        resumed = load_adapter(tiny_llama(), Path(directory) / "adapter")
    train(resumed, 2, start=2, state=copy.deepcopy(state))
    _assert_same(_own(straight), _own(resumed), "after an interruption")


def _removal(method: Method) -> None:
    model = tiny_llama()
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    modules = [type(m) for m in model.modules()]
    adapt(model, method, RANK, stats=_stats(method, tiny_llama) if method.needs else None)
    train(model, 2)
    remove_adapter(model)
    _assert_same(before, model.state_dict(), "after removal")
    assert [type(m) for m in model.modules()] == modules, "other modules than before are left"
    assert all(parameters[name] is p for name, p in model.named_parameters()), "a parameter is a new object"
    assert all(p.requires_grad for p in model.parameters()), "a parameter stays frozen"


def _switches(method: Method) -> None:
    model = adapted(method)
    train(model, 2)
    adapter_logits, base = _logits(model), _logits(tiny_llama())
    twin = copy.deepcopy(model)
    with disable(model):
        assert torch.equal(_logits(model), base), "put aside, the adapter still acts"
    assert torch.equal(_logits(model), adapter_logits), "taken up again, the adapter is another"
    remove_adapter(model)
    assert torch.equal(_logits(twin), adapter_logits), "a copy of the model changes with the original"
    assert torch.equal(_logits(remove_adapter(twin)), base), "the copy's base is another"


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainable(model).parameters.items()}


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model's adapters, and what is trained along."""
    found = {
        f"{layer}.{key}.{name}": tensor.detach()
        for adapter in adapters_of(model).values()
        for layer, terms in adapter.terms.items()
        for key, term in terms.items()
        for name, tensor in term.own_state().items()
    }
    return found | _trained(model)


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor], when: str) -> None:
    assert first.keys() == second.keys(), f"there are other tensors {when}: {sorted(first.keys() ^ second.keys())[:3]}"
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"the tensor {different[0]} differs {when}"


PROPERTIES: dict[str, Callable[[Method], None]] = {
    "start": _start,
    "count": _count,
    "learns": _learns,
    "merges": _merges,
    "saves": _saves,
    "bf16": _bf16,
    "conv1d": _conv1d,
    "checkpoints": _checkpoints,
    "compiles": _compiles,
    "resumes": _resumes,
    "removal": _removal,
    "switches": _switches,
}
"""Property -> check; `Method.exempt` names those that a method does not have."""
