"""The conformance suite of optimizers: what a published one owes to every loop, and to the verbs. For plug-ins too.

    from weft.testing_optim import check_optimizer
    check_optimizer(record)                    # an `Optimizer`, or a name of `weft.optim.OPTIMIZERS`

descends    it lowers the loss of a small regression at its published rate, in some steps
resumes     state_dict, written and read without pickle, goes on to the same bits
half        bf16 weights stay bf16 and finite, and move
gradients   a step leaves .grad as it found it
frozen      what does not require a gradient is left alone, and has no state
counted     `state_bytes` is the bytes of its tensors
options     an unknown option and a value of the wrong kind are refused, by sentences that say what there is
verbs       `weft.finetune` and pre-training run it for three steps; or, where it wants a loop of its own, say so
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weft.errors import WeftError
from weft.optim import OPTIMIZERS, Optimizer
from weft.optim.state import state_bytes
from weft.runs.loading import load_tokenizer
from weft.train.optimizers import check_options, find_optimizer
from weft.train.recipe import Recipe
from weft.verbs.finetune import finetune
from weft.verbs.pretrain import pretrain

__all__ = ["PROPERTIES", "check_optimizer"]

TEXT = "\n".join(f"def f{i}(a):\n    return a + {i}\n" for i in range(60))


def check_optimizer(record: Optimizer | str, *properties: str) -> None:
    """Run the suite on an optimizer, or some of its properties. Raises AssertionError naming the first that fails."""
    found = OPTIMIZERS.find(record)
    for name in properties or PROPERTIES:
        try:
            PROPERTIES[name](found)
        except AssertionError as error:
            raise AssertionError(f"{found.name} fails {name!r}: {error}") from error


class Regression(nn.Module):
    """A residual network of two matrices in a list, and a head, with a fixed target."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.head = nn.Linear(12, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.3).to(dtype)
        self.x, self.y = (torch.randn(64, n, generator=generator).to(dtype) for n in (12, 4))

    def loss(self) -> Any:
        """Mean squared error on all of the data, in fp32."""
        h = self.x
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return (self.head(h).float() - self.y.float()).square().mean()


def _made(record: Optimizer, model: nn.Module) -> Any:
    """The optimizer at its published rate; one without gradients, whose rate falls with the size, at one for this."""
    options: dict[str, Any] = {"rank": 0.25} if record.ranked and record.by_size else {}
    return record(model, lr=record.rate if record.backward else 1e-2, **options)


def _steps(model: Regression, optimizer: Any, backward: bool, count: int) -> None:
    for _ in range(count):
        if backward:
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
        else:
            optimizer.step(model.loss)


def _of_a_loop(check: Callable[[Optimizer], None]) -> Callable[[Optimizer], None]:
    """A check of optimizers that a model alone makes: others belong to a method, or beside an optimizer."""

    def checked(record: Optimizer) -> None:
        if not record.loop or not record.backward:
            check(record)

    return checked


def _descends(record: Optimizer) -> None:
    model = Regression()
    before = float(model.loss().detach())
    _steps(model, _made(record, model), record.backward, 60)
    after = float(model.loss().detach())
    assert after < 0.97 * before, f"the loss went from {before:.4f} to {after:.4f} in 60 steps"


def _resumes(record: Optimizer) -> None:
    straight, resumed = Regression(), Regression()
    first = _made(record, straight)
    _steps(straight, first, record.backward, 3)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": first.state_dict()}, file)
    _steps(straight, first, record.backward, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = _made(record, resumed)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    _steps(resumed, second, record.backward, 3)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), f"{name} differs after an interruption"


def _half(record: Optimizer) -> None:
    model = Regression(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    _steps(model, _made(record, model), record.backward, 3)
    after = list(model.parameters())
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in after), "a weight changed its dtype, or burst"
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=False)), "no weight moved"


def _gradients(record: Optimizer) -> None:
    model = Regression()
    optimizer = _made(record, model)
    if record.backward:
        model.loss().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, gradient in before.items():
            assert torch.equal(model.get_parameter(name).grad, gradient), f"the step changed the gradient of {name}"  # type: ignore[arg-type]
    else:
        optimizer.step(model.loss)
        assert all(p.grad is None for p in model.parameters()), "a gradient appeared without a backward pass"


def _frozen(record: Optimizer) -> None:
    model = Regression()
    frozen = [*model.layers[0].parameters(), model.head.bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.clone() for p in frozen]
    optimizer = _made(record, model)
    _steps(model, optimizer, record.backward, 3)
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True)), "a frozen parameter moved"
    assert not any(p in optimizer.state and optimizer.state[p] for p in frozen), "a frozen parameter has state"


def _counted(record: Optimizer) -> None:
    model = Regression()
    optimizer = _made(record, model)
    _steps(model, optimizer, record.backward, 2)
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    counted = sum(t.numel() * t.element_size() for t in tensors)
    assert state_bytes(optimizer) == counted, f"{state_bytes(optimizer)} bytes are counted of {counted}"


def _options(record: Optimizer) -> None:
    bad: list[tuple[dict[str, Any], str]] = [({"no_such_option": 1}, "has no option 'no_such_option'")]
    if "eps" in record.defaults:
        bad.append(({"eps": "small"}, "eps is 'small'"))
    for options, sentence in bad if not record.loop else ():
        try:
            check_options(record.name, options)
        except WeftError as error:
            assert sentence in str(error), f"{options} is refused by another sentence: {error}"
        else:
            raise AssertionError(f"{options} is not refused")


def _verbs(record: Optimizer) -> None:
    if record.loop:
        try:
            find_optimizer(record.name)
        except WeftError as error:
            assert record.loop in str(error), f"the sentence does not say why: {error}"
            return
        raise AssertionError("it wants a loop of its own, and the training loop takes it")
    tokenizer = load_tokenizer("pico")
    options: dict[str, Any] = {"gradients": 4} if "gradients" in record.defaults else {}
    model = _language_model(len(tokenizer))
    usual: dict[str, Any] = {"lr": 1e-3, "steps": 3, "window": 16, "batch": 2}
    result = finetune(
        model, tokenizer, TEXT, "full", optimizer=record.name, optimizer_options=options, schedule="constant", **usual
    )
    assert result["steps"] == 3 and result["loss_last"] < 20, "fine-tuning did not take its steps"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "text.txt").write_text(TEXT)
        recipe = Recipe(**usual, clip=0.0)
        made = pretrain(
            _language_model(len(tokenizer)), tokenizer, [Path(directory) / "text.txt"], recipe, Path(directory),
            optimizer=record.name, **options,
        )  # fmt: skip
    assert made["steps"] == 3 and made["loss_last"] < 20, "pre-training did not take its steps"


def _language_model(words: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


PROPERTIES: dict[str, Callable[[Optimizer], None]] = {
    "descends": _of_a_loop(_descends),
    "resumes": _of_a_loop(_resumes),
    "half": _of_a_loop(_half),
    "gradients": _of_a_loop(_gradients),
    "frozen": _of_a_loop(_frozen),
    "counted": _of_a_loop(_counted),
    "options": _options,
    "verbs": _verbs,
}
"""Property -> check."""
