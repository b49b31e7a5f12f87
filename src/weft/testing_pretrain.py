"""The conformance suite of what makes fresh layers (kind "pretrain"), for our methods and those of others:
`check_structure("low-rank")`, `check_structure(my_method)` run every property.

    start       layers follow the seed alone, and are finite
    count       the numbers that are trained are those of the method's own formula
    empty       built without storage, the model has the same shapes, and its rules begin
    gradients   every layer's gradients are those of differences, and a linear layer's those of its matrix
    learns      a short run with the method's rules lowers the loss
    resumes     an interrupted run ends on the same bytes
    saves       the trained model's directory opens to the same logits
    merges      a plain dense model of it gives the same logits to 1e-5; one that is not linear says so
    finishes    what the layers become in the end is the same function, of no more numbers, and can be saved
    closes      a run that ends early leaves no hook of the method's rules on the model
    lean        the memory saver changes no gradient beyond rounding, and keeps no more
    half        bf16 weights stay bf16 and finite through a run
    refuses     an unknown option, and a rank above the matrix or where there is none, are refused by sentences
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainerControl

from weft.errors import WeftError
from weft.memory import lean, unlean
from weft.memory.measure import saved_bytes
from weft.methods import METHODS, Method
from weft.plan.supposed import Supposed
from weft.rules import Rules
from weft.runs.loading import load_tokenizer
from weft.terms import SumLinear, Term
from weft.terms.layers import shape_of
from weft.testing_rules import hooks_of
from weft.train.recipe import Recipe
from weft.verbs.fresh import Structure, finish, restructure
from weft.verbs.merge import merge
from weft.verbs.pretrain import pretrain

__all__ = ["PROPERTIES", "check_structure"]

TEXT = "\n".join(f"def f{i}(a):\n    return a + {i}\n" for i in range(200))
STEPS = 12


def check_structure(method: str | Method, *properties: str) -> None:
    """Run every property on a method, or some.

    Raises:
        AssertionError: a property does not hold; its name is in the message.
    """
    found = METHODS.find(method, "pretrain")
    for name in properties or PROPERTIES:
        if name in found.exempt:
            continue
        try:
            PROPERTIES[name](found)
        except AssertionError as error:
            raise AssertionError(f"{found.name}: the property {name!r} does not hold: {error}") from error


def _plain(words: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """One block with matrices of 64 x 64 and 64 x 96; the same weights every time."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]


def _structure(method: Method, **options: Any) -> Structure:
    return Structure.of(method, 8 if method.ranked else None, options)


def _made(method: Method, words: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = _plain(words, dtype)
    restructure(model, _structure(method))
    return model


def _original(method: Method, words: int = 64, dtype: torch.dtype = torch.float32) -> nn.Module | None:
    return _structure(method).original(_plain(words, dtype))


def _layers(model: nn.Module) -> dict[str, SumLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SumLinear)}


def _ids(rows: int = 4, length: int = 32, words: int = 64) -> Tensor:
    return torch.randint(words, (rows, length), generator=torch.Generator().manual_seed(1))


def _start(method: Method) -> None:
    torch.manual_seed(1)
    one = _made(method).state_dict()
    torch.manual_seed(2)
    again = _made(method).state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name]), f"{name} follows more than the seed"
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} is not finite"


def _count(method: Method) -> None:
    assert method.count is not None, "it says no number"
    structure, model = _structure(method), _made(method)
    shapes = {name: shape_of(layer) for name, layer in _layers(model).items()}
    rank = structure.sized(shapes) or 0
    for name, (out, inn) in shapes.items():
        said = method.count(out, inn, rank, structure.options)
        trained = sum(p.numel() for p in _layers(model)[name].terms.parameters() if p.requires_grad)
        assert trained == said, f"{name} trains {trained} numbers, {said} are said"


def _empty(method: Method) -> None:
    config = _plain().config
    with torch.device("meta"), Supposed():
        model = LlamaForCausalLM(config)
        restructure(model, _structure(method))
        for width in (64, 512):  # large ones are factorised in other ways
            wide = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "hidden_size": width, "vocab_size": 64}))
            structure = Structure.of(method)
            original = structure.original(wide)
            restructure(wide, structure)
            Rules(structure.rules(wide, 0, original)).start(wide, steps=2 * STEPS)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in _made(method).state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert all(tensor.is_meta for tensor in model.state_dict().values()), "a tensor has storage"


def _gradients(method: Method) -> None:
    """In fp64, by differences along a random direction; for as many rows as make a built sum worth while."""
    model = _made(method, dtype=torch.float64).train()
    draw = torch.Generator().manual_seed(2)
    for name, layer in _layers(model).items():
        x = torch.randn(40, layer.in_features, generator=draw, dtype=torch.float64).requires_grad_(True)
        g = torch.randn(40, layer.out_features, generator=draw, dtype=torch.float64)
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        with torch.no_grad():
            for parameter in inputs[1:]:  # off what starts as zero
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.05)
        found = torch.autograd.grad((layer(x) * g).sum(), inputs)
        ways = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in inputs]
        slope = sum(float((a * b).sum()) for a, b in zip(found, ways, strict=True))
        ends = [_moved(layer, inputs, ways, size, g) for size in (1e-5, -1e-5)]
        measured = (ends[0] - ends[1]) / 2e-5
        assert abs(slope - measured) <= 1e-6 * abs(measured) + 1e-6, f"{name}: {slope} is {measured} by differences"
        if all(term.linear for term in layer._terms()):
            by_matrix = torch.autograd.grad((x @ layer.dense(torch.float64).mT * g).sum(), inputs)
            for one, other in zip(found, by_matrix, strict=True):
                assert torch.allclose(one, other, rtol=1e-8, atol=1e-9), f"{name}: other gradients by its matrix"


@torch.no_grad()
def _moved(layer: SumLinear, inputs: list[Tensor], ways: list[Tensor], size: float, g: Tensor) -> float:
    for tensor, way in zip(inputs, ways, strict=True):
        tensor.add_(way, alpha=size)
    value = float((layer(inputs[0]) * g).sum())
    for tensor, way in zip(inputs, ways, strict=True):
        tensor.sub_(way, alpha=size)
    return value


def _steps(method: Method, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, list[float]]:
    """A fresh model after a run with the method's rules, and the losses of its steps."""
    model = _made(method, dtype=dtype).train()
    rule = Rules(_structure(method).rules(model, 0, _original(method, dtype=dtype)))
    return model, _run(rule, model, 2 * STEPS)


def _run(rule: Rules, model: LlamaForCausalLM, steps: int) -> list[float]:
    """The losses of the first steps of a run of 2 STEPS."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    rule.bind(optimizer)
    rule.start(model, steps=2 * STEPS)
    ids, losses = (_ids()[:, :1] + torch.arange(32)) % 64, []
    for step in range(1, steps + 1):
        loss = model(input_ids=ids, labels=ids).loss
        rule.update(model, optimizer, loss, step)
        losses.append(float(loss.detach()))
    return losses


def _closes(method: Method) -> None:
    model, original = _made(method).train(), _original(method)
    both = [one for one in (model, original) if one is not None]
    before = [hooks_of(one) for one in both]
    rule = Rules(_structure(method).rules(model, 0, original))
    _run(rule, model, 2)
    rule.close()
    assert [hooks_of(one) for one in both] == before, f"hooks are left: {[hooks_of(one) for one in both]}"


_LAST: list[tuple[Method, LlamaForCausalLM, list[float]]] = []


def _ran(method: Method) -> tuple[LlamaForCausalLM, list[float]]:
    """A copy of what `_steps` gives in fp32: several properties in a row begin with the same run."""
    if not _LAST or _LAST[0][0] is not method:
        _LAST[:] = [(method, *_steps(method))]
    _, model, losses = _LAST[0]
    return copy.deepcopy(model), losses


def _learns(method: Method) -> None:
    _, losses = _ran(method)
    assert losses[-1] < losses[0] - 1, f"from {losses[0]} to {losses[-1]}"


class _Stop(TrainerCallback):
    """Saves after a step, and stops as a crash right behind it would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step == self.step

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def _resumes(method: Method) -> None:
    tokenizer, half = load_tokenizer("pico"), STEPS // 2 + 1
    recipe = Recipe(steps=STEPS, lr=5e-3, window=24, batch=4, warmup=2, clip=0.0, save_every=1000, log_every=1)

    def train(model: LlamaForCausalLM, directory: str, *callbacks: TrainerCallback) -> None:
        text = Path(directory) / "text.txt"
        text.write_text(TEXT)
        structure = _structure(method)
        original = _original(method, len(tokenizer))
        chosen: dict[str, Any] = {"structure": structure, "original": original, "callbacks": callbacks}
        pretrain(model, tokenizer, [text], recipe, Path(directory), **chosen)

    whole, broken, again = (_made(method, len(tokenizer)) for _ in range(3))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        train(whole, one)
        train(broken, other, _Stop(half))
        assert any(Path(other).glob(f"checkpoint-{half}")), "the run was not interrupted"
        train(again, other)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name} differs after an interruption"


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(input_ids=_ids()).logits
    return logits


def _saves(method: Method) -> None:
    model, _ = _ran(method)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(_logits(again), _logits(model)), "the logits are others"


def _merges(method: Method) -> None:
    model, _ = _ran(method)
    before = _logits(model)
    if not all(term.linear for layer in _layers(model).values() for term in layer._terms()):
        try:
            merge(model)
        except WeftError:
            return
        raise AssertionError("what is no matrix was merged")
    if _layers(model):
        merge(model)
    assert not any(isinstance(module, SumLinear | Term) for module in model.modules())
    assert torch.allclose(_logits(model), before, rtol=1e-5, atol=1e-5), "the dense model is another function"


def _finishes(method: Method) -> None:
    model, _ = _ran(method)
    before, held = _logits(model), sum(t.numel() for t in model.state_dict().values())
    finish(model, _structure(method))
    assert torch.allclose(_logits(model), before, rtol=1e-4, atol=1e-4), "what is left is another function"
    assert sum(t.numel() for t in model.state_dict().values()) <= held, "there are more numbers than were held"
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(_logits(again), _logits(model)), "it opens to others"


def _lean(method: Method) -> None:
    model = _made(method).train()
    ids = _ids()

    def backward() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def kept() -> int:
        return saved_bytes(lambda: model(input_ids=ids, labels=ids).loss, model.state_dict().values())

    plain, before = backward(), kept()
    lean(model)
    mine, after = backward(), kept()
    unlean(model)
    assert plain.keys() == mine.keys() and after <= before, f"{after} bytes are kept, {before} without the saver"
    for name, gradient in plain.items():
        near = torch.allclose(gradient, mine[name], rtol=1e-3, atol=1e-6)
        assert near, f"the gradient of {name} is another"


def _half(method: Method) -> None:
    model, losses = _steps(method, torch.bfloat16)
    assert losses[-1] < losses[0], f"from {losses[0]} to {losses[-1]}"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()), f"{name} is {tensor.dtype}"


def _refuses(method: Method) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [(None, {"no_such_option": 1}, "no_such_option")]
    wrong.append((65, {}, "give 1 to" if method.ranked else "--rank has no meaning"))
    for rank, options, sentence in wrong:
        model = _plain()
        before = copy.deepcopy(model.state_dict())
        try:
            restructure(model, Structure.of(method, rank, options))
        except WeftError as error:
            assert sentence in str(error), f"rank {rank}, {options} is refused by another sentence: {error}"
        else:
            raise AssertionError(f"rank {rank}, {options} is taken")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


PROPERTIES: dict[str, Callable[[Method], None]] = {
    "start": _start,
    "count": _count,
    "empty": _empty,
    "gradients": _gradients,
    "learns": _learns,
    "resumes": _resumes,
    "saves": _saves,
    "merges": _merges,
    "finishes": _finishes,
    "closes": _closes,
    "lean": _lean,
    "half": _half,
    "refuses": _refuses,
}
"""Property -> its check; also for parametrised tests."""
