"""The conformance suite of grafts, for ours and for those of others: `check_graft("lst")` or `check_graft(GRAFT)` runs
every property on a tiny Llama.

    start         the function is unchanged at the start, or deviates as the graft says
    count         trained numbers equal the paper's formula
    learns        30 steps lower the loss on a small task
    saves         save and load are bit-exact, trained parameters included
    opens         save_pretrained and from_pretrained are bit-exact; the tensors keep their dtype on a bf16 model
    packs         documents packed in one row do not see each other, padding is not seen
    generates     greedy generation is that of a loop over whole texts
    checkpoints   gradient checkpointing gives the same gradients
    lean          so does weft.lean
    removal       removing restores the model: the same parameters and bytes, trained as before
    switches      put aside it is the base, taken up again itself, and a copy of the model is independent
    alone         neither an adapter nor a second graft can be put beside it
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.grafts import GRAFTS, Graft
from weft.memory import lean
from weft.methods import lora
from weft.testing_adapters import task, train
from weft.verbs.adapt import adapt, trainable
from weft.verbs.adapters import disable, load_adapter, remove_adapter, save_adapter

__all__ = ["PROPERTIES", "check_graft", "tiny_decoder"]

Options = Mapping[str, Any]


def check_graft(graft: str | Graft, **options: Any) -> None:
    """Run every property on a graft.

    Args:
        **options: the graft's own, where its defaults do not fit a width of 32 in heads of 8.

    Raises:
        AssertionError: a property does not hold; its name is in the message.
    """
    chosen = GRAFTS.find(graft)
    for name, check in PROPERTIES.items():
        if name in chosen.exempt:
            continue
        try:
            check(chosen, MappingProxyType(options))
        except AssertionError as error:
            raise AssertionError(f"{chosen.name}: the property {name!r} does not hold: {error}") from error


def tiny_decoder(dtype: torch.dtype = torch.float32, blocks: int = 2) -> nn.Module:
    """Four query heads on two key-value heads of 8, in eval mode; the same weights every time."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
    for parameter in model.parameters():  # alone, as from_pretrained does: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _grafted(graft: Graft, options: Options, model: nn.Module | None = None) -> nn.Module:
    """A tiny model with the graft on it, moved away from its start."""
    model = adapt(tiny_decoder() if model is None else model, graft, seed=3, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def _logits(model: nn.Module, **inputs: Any) -> Tensor:
    found: Tensor = model(**({"input_ids": task()[0]["input_ids"]} | inputs)).logits
    return found


def _start(graft: Graft, options: Options) -> None:
    difference = float((_logits(adapt(tiny_decoder(), graft, **options)) - _logits(tiny_decoder())).abs().max())
    assert graft.deviates or difference <= 1e-5, f"the logits differ by {difference:.2e} at the start"
    assert difference > 0 or not graft.deviates, "the graft says that its start deviates; it does not"


def _count(graft: Graft, options: Options) -> None:
    found = trainable(adapt(tiny_decoder(), graft, **options)).count
    expected = graft.count(tiny_decoder(), graft.options(options))
    assert found == expected, f"{found} trained numbers, the formula says {expected}"


def _learns(graft: Graft, options: Options) -> None:
    model = adapt(tiny_decoder(), graft, batches=list(task()), **options)
    losses, _ = train(model, 30)
    first, last = (sum(part) / len(part) for part in (losses[:4], losses[-4:]))
    assert last < first - 0.01, f"the loss went from {first:.4f} to {last:.4f}"


def _saves(graft: Graft, options: Options) -> None:
    model = _grafted(graft, options)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, Path(directory) / "graft")
        other = load_adapter(tiny_decoder(), Path(directory) / "graft")
    _assert_same(model, other)


def _opens(graft: Graft, options: Options) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = _grafted(graft, options, tiny_decoder(dtype))
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)  # type: ignore[operator]
            other = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        _assert_same(model, other)
        _assert_bytes(remove_adapter(other), tiny_decoder(dtype))


def _assert_same(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = (trainable(m).parameters for m in (model, other))
    assert mine.keys() == theirs.keys(), f"other parameters are trained: {sorted(mine.keys() ^ theirs.keys())[:3]}"
    different = [n for n, p in mine.items() if p.dtype != theirs[n].dtype or not torch.equal(p, theirs[n])]
    assert not different, f"the tensor {different[0]} comes back as another"
    assert torch.equal(_logits(other), _logits(model)), "what is loaded computes something else"


def _packs(graft: Graft, options: Options) -> None:
    model, ids = _grafted(graft, options), task()[0]["input_ids"][:2, :8]
    apart, positions = _logits(model, input_ids=ids), torch.arange(8).repeat(2)[None]
    packed = _logits(model, input_ids=ids.reshape(1, 16), position_ids=positions, use_cache=False)
    assert torch.allclose(packed.view_as(apart), apart, atol=1e-4), "documents in one row see each other"
    padded = torch.cat([ids, torch.full((2, 3), 5)], dim=1)
    mask = (torch.arange(11) < 8).long().expand(2, 11)
    assert torch.allclose(_logits(model, input_ids=padded, attention_mask=mask)[:, :8], apart, atol=1e-4), (
        "padding is seen"
    )


@torch.no_grad()
def _generates(graft: Graft, options: Options) -> None:
    model, text = _grafted(graft, options), task()[0]["input_ids"][:1, :4]
    made = model.generate(text, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]
    for place in range(4, 10):
        logits = _logits(model, input_ids=made[:, :place])[0, -1]
        logits[1] = float("-inf")  # the end of the text, which min_new_tokens rules out
        chosen = logits[made[0, place]]
        assert chosen >= logits.max() - 1e-4, f"token {place} is not the likeliest after the whole text"


def _checkpoints(graft: Graft, options: Options) -> None:
    _assert_same_gradients(
        graft, options, lambda m: m.gradient_checkpointing_enable({"use_reentrant": False}), "checkpointing"
    )


def _lean(graft: Graft, options: Options) -> None:
    _assert_same_gradients(graft, options, lean, "weft.lean")


def _assert_same_gradients(graft: Graft, options: Options, change: Callable[[Any], Any], what: str) -> None:
    gradients = []
    for changed in (False, True):
        model = _grafted(graft, options).train()
        if changed:
            change(model)
        model(**task()[0]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, other = gradients
    assert plain.keys() == other.keys() == trainable(model).parameters.keys(), f"{what} loses or adds gradients"
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(other[name], gradient, rtol=1e-3, atol=1e-4 * scale), f"{what} changes that of {name}"


def _removal(graft: Graft, options: Options) -> None:
    model = tiny_decoder()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    parameters, modules = dict(model.named_parameters()), [type(m) for m in model.modules()]
    hidden = {name: set(module.__dict__) for name, module in model.named_modules()}
    settings = _settings(model)
    train(adapt(model, graft, **options), 2)
    remove_adapter(model)
    assert _settings(model) == settings, "the model's configuration is another than before"
    _assert_bytes(model, tiny_decoder())
    assert [type(m) for m in model.modules()] == modules, "other modules than before are left"
    assert all(parameters[name] is p for name, p in model.named_parameters()), "a parameter is a new object"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == parameters.keys() - {"lm_head.weight"}, "other parameters are trained than before"
    left = {name: set(module.__dict__) - hidden[name] for name, module in model.named_modules()}
    assert not any(left.values()), f"something is left behind: {left}"


def _settings(model: Any) -> list[dict[str, Any]]:
    return [copy.deepcopy(vars(config)) for config in (model.config, model.generation_config)]


def _assert_bytes(model: nn.Module, plain: nn.Module) -> None:
    mine, theirs = model.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys(), f"other tensors are left: {sorted(mine.keys() ^ theirs.keys())[:3]}"
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "a tensor is another than before"
    assert torch.equal(_logits(model), _logits(plain)), "the model without its graft computes something else"
    assert "quantization_config" not in model.config.to_dict(), "its config.json still speaks of weft"  # type: ignore[union-attr, operator]


def _switches(graft: Graft, options: Options) -> None:
    model = _grafted(graft, options)
    before, base = _logits(model), _logits(tiny_decoder())
    twin = copy.deepcopy(model)
    with disable(model):
        assert torch.equal(_logits(model), base), "put aside, the graft still acts"
    assert torch.equal(_logits(model), before), "taken up again, the graft is another"
    remove_adapter(model)
    assert torch.equal(_logits(twin), before), "a copy of the model changes with the original"
    _assert_bytes(remove_adapter(twin), tiny_decoder())


def _alone(graft: Graft, options: Options) -> None:
    model = _grafted(graft, options)
    before = _logits(model)
    for another, more in ((graft, options), (lora.METHOD, {})):
        try:
            adapt(model, another, **more)
        except WeftError:
            continue
        raise AssertionError(f"{another.name} is put beside it")
    assert torch.equal(_logits(model), before), "a refusal changes the model"


PROPERTIES: dict[str, Callable[[Graft, Options], None]] = {
    "start": _start,
    "count": _count,
    "learns": _learns,
    "saves": _saves,
    "opens": _opens,
    "packs": _packs,
    "generates": _generates,
    "checkpoints": _checkpoints,
    "lean": _lean,
    "removal": _removal,
    "switches": _switches,
    "alone": _alone,
}
"""Property -> check; `Graft.exempt` names those that a graft does not have."""
