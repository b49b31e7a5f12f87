"""The chunked loss against F.cross_entropy of all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft.memory import cross_entropy, linear_cross_entropy
from weft.memory.logits import Logits

TOKENS, WIDTH, VOCABULARY = 23, 6, 17


def problem(dtype=torch.float64, seed=0, ignored=4):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    targets[:ignored] = -100
    return hidden, weight, bias, targets


def reference(hidden, weight, bias, targets, softcap, reduction):
    z = hidden @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_loss_and_gradients_are_exact(reduction, softcap, chunk):
    hidden, weight, bias, targets = problem()
    upstream = (
        torch.rand(TOKENS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        if reduction == "none"
        else 3.0
    )

    def gradients(loss):
        return loss, *torch.autograd.grad((loss * upstream).sum(), (hidden, weight, bias))

    expected = gradients(reference(hidden, weight, bias, targets, softcap, reduction))
    found = gradients(
        linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap, reduction=reduction, chunk=chunk)
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(ignored=st.integers(0, TOKENS - 1), chunk=st.integers(1, 30), seed=st.integers(0, 99))
def test_any_number_of_ignored_tokens(ignored, chunk, seed):
    hidden, weight, bias, targets = problem(seed=seed, ignored=ignored)
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk), (hidden, weight))
    expected = torch.autograd.grad(reference(hidden, weight, bias, targets, None, "mean"), (hidden, weight))
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_no_token_that_counts():
    hidden, weight, bias, targets = problem(ignored=TOKENS)
    assert (
        linear_cross_entropy(hidden, weight, targets).isnan()
        and reference(hidden, weight, bias, targets, None, "mean").isnan()
    )
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum") == 0


def test_permuting_the_vocabulary_permutes_the_gradient():
    hidden, weight, _, targets = problem(ignored=0)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    there = torch.empty_like(order).scatter_(0, order, torch.arange(VOCABULARY))
    (plain,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk=5), weight)
    (moved,) = torch.autograd.grad(linear_cross_entropy(hidden, weight[order], there[targets], chunk=5), weight)
    torch.testing.assert_close(moved, plain, rtol=1e-10, atol=1e-12)


def test_head_of_two_terms_is_one_head_on_wider_states():
    hidden, weight, _, targets = problem()
    g = torch.Generator().manual_seed(9)
    B, A = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((VOCABULARY, 2), (2, WIDTH)))
    wide = linear_cross_entropy(torch.cat([hidden, hidden @ A.T], 1), torch.cat([weight, B], 1), targets, chunk=4)
    summed = linear_cross_entropy(hidden, weight + B @ A, targets, chunk=4)
    for left, right in zip(*(torch.autograd.grad(loss, (hidden, A, B)) for loss in (wide, summed)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-10)


def test_bf16_weight_gradient_does_not_drift_with_the_number_of_chunks():
    hidden, weight, _, targets = problem()
    (exact,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    h, w = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))

    def error(chunk):
        (grad,) = torch.autograd.grad(linear_cross_entropy(h, w, targets, chunk=chunk), w)
        return (grad - exact).norm() / exact.norm()

    assert error(1) < 1.2 * error(TOKENS) < 0.02


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**16])
def test_half_precision_gradients_survive_a_loss_scale(frozen, scale):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=g).half().requires_grad_()
    weight = (0.02 * torch.randn(4000, 32, generator=g)).half().requires_grad_(not frozen)
    targets = torch.randint(0, 400, (512,), generator=g)
    wanted = [hidden] if frozen else [hidden, weight]
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk=100) * scale, wanted)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    loss = F.cross_entropy(exact[0] @ exact[1].T, targets) * scale
    for left, right in zip(found, torch.autograd.grad(loss, exact[: len(wanted)]), strict=True):
        smallest = 2.0**-24  # of fp16: what is below it is lost whoever computes it
        assert (left.double() - right).norm() < 0.005 * right.norm() + smallest * right.numel() ** 0.5


def test_frozen_head_has_no_gradient_and_no_buffer(monkeypatch):
    hidden, weight, _, targets = problem()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, chunk=5).backward()
    assert weight.grad is None and hidden.grad is not None


def test_largest_tensor_is_a_chunk_of_logits():
    hidden, weight, _, targets = problem(torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple) else (result,):
                largest = max(largest, t.numel()) if isinstance(t, torch.Tensor) else largest
            return result

    with Watch():
        linear_cross_entropy(hidden, weight.detach(), targets, chunk=2).backward()
    assert largest <= max(TOKENS * WIDTH, 2 * VOCABULARY, VOCABULARY * WIDTH) < TOKENS * VOCABULARY


def test_kernel_is_used_only_where_it_fits(monkeypatch):
    hidden, weight, _, _ = problem(torch.bfloat16)
    assert cross_entropy.cut_cross_entropy(hidden, weight) is None  # no GPU tensor


class TestLogits:
    """Every step that transformers' models take keeps the promise; all else makes the logits, and is right."""

    def promise(self, dtype=torch.float32):
        head = nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype)
        hidden = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        return Logits(hidden, head, list(head.parameters()), VOCABULARY, head.weight), head(hidden), hidden

    def test_steps_stay_a_promise(self):
        promise, z, hidden = self.promise()
        targets = torch.randint(0, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(1)).view(-1)

        def loss(logits):
            logits = torch.tanh(logits.contiguous() / 2.0) * 2.0
            shifted = logits[..., :-1, :].float().contiguous()
            assert shifted.shape == (2, 4, VOCABULARY) and shifted.size(-1) == VOCABULARY
            return nn.CrossEntropyLoss(label_smoothing=0.1)(
                shifted.view(-1, VOCABULARY), targets.to(shifted.device)
            ), shifted

        (found, kept), (expected, _) = loss(promise), loss(z)
        assert isinstance(kept, Logits) and kept._made is None
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, hidden)[0])

    @pytest.mark.parametrize(
        "use",
        [
            lambda z: torch.softmax(z, -1),
            lambda z: z.argmax(-1),
            lambda z: z[0, 1, 3],
            lambda z: z[..., 2:5],
            lambda z: z * torch.arange(VOCABULARY),
            lambda z: z.to("cpu", torch.float64),
            lambda z: torch.cat([z, z]),
            lambda z: 1 - z + z,
            lambda z: torch.stack(list(z)),
            lambda z: z.reshape(-1),
            lambda z: F.cross_entropy(
                z.view(-1, VOCABULARY), torch.zeros(10, dtype=torch.long), weight=torch.ones(VOCABULARY)
            ),
        ],
    )
    def test_any_other_use_makes_them(self, use):
        promise, z, _ = self.promise()
        found = use(promise)
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, use(z))
