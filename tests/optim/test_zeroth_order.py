"""Zeroth-order training: exact restoring, the estimator's laws, the rules, the log and its replay, and resuming."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.directions import Directions, Estimator
from weft.optim.inner import SGD, Adafactor, Adam, AdamW
from weft.optim.perturb import Edit, InPlace
from weft.optim.seed_log import SeedLog
from weft.optim.sinkgd import Sign
from weft.optim.zeroth_order import ZerothOrder, mezo, replay
from weft.testing_adapters import tiny_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Tied(nn.Module):
    """Blocks with dropout between an embedding and a head that share one matrix, like a small language model."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 8, vocabulary: int = 40) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, 16), nn.Linear(16, width))])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = self.drop(h + block(h).tanh())
        return F.cross_entropy(self.head(h).float(), (x + 1) % self.embed.num_embeddings)


class Quadratic(nn.Module):
    """f(w) = b . w + w . H w / 2, in fp64."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.H, self.b = root @ root.mT, torch.randn(size, generator=generator, dtype=torch.float64)

    def forward(self) -> Tensor:
        return self.b @ self.w + 0.5 * self.w @ self.H @ self.w

    def gradient(self) -> Tensor:
        return (self.b + self.H @ self.w).detach()


BATCH = torch.arange(12)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(model: nn.Module, kept: list[Tensor]) -> bool:
    return all(
        torch.equal(p.detach().view(torch.uint8), old.view(torch.uint8))
        for p, old in zip(model.parameters(), kept, strict=True)
    )


# --- restoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_steps_without_learning_leave_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 20).to(dtype)
    with torch.no_grad():
        model.weight[0, :3] = torch.tensor([0.0, 1e-7, 3e4])
        model.weight[1].zero_()
    kept, x = weights(model), torch.randn(5, 20, dtype=dtype)
    opt = mezo(model, lr=0.0, eps=1e-2)
    losses = {opt.step(lambda: model(x).float().tanh().square().mean()).item() for _ in range(1000)}
    assert same_bits(model, kept)
    assert len(losses) > 100  # the weights did move in between


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_the_sparse_undo_is_exact_and_small(dtype: torch.dtype, eps: float) -> None:
    """A parameter without a model is perturbed around the closure, keeping only what subtraction does not give back."""
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter((torch.randn(300_000, generator=generator) * 0.02).to(dtype))
    with torch.no_grad():
        p[:4] = torch.tensor([0.0, -0.0, math.inf, 6e-8])
    kept = [p.detach().clone()]
    directions, in_place = Directions(Estimator(), [p]), InPlace([p])

    def deltas(i: int) -> Any:
        return ((a, b, u * eps) for a, b, u in directions.runs(7, 0, 0, i, (0,)))

    seen = in_place.evaluate(lambda: p.detach().clone(), Edit((0,), deltas))
    assert same_bits(nn.ParameterList([p]), kept)
    expected = torch.cat([kept[0][a:b].float() + d for a, b, d in deltas(0)]).to(dtype)
    assert torch.equal(seen[4:], expected[4:])
    if eps == 1e-3:
        held = 0
        with in_place._at(Edit((0,), deltas)):
            held = sum(t.nbytes for pieces in in_place._undo[0]._kept for t in pieces)
        assert held < 0.2 * p.nbytes


def test_usual_perturb_and_undo_drifts() -> None:
    """Why the module exists: the textbook's three additions a step."""
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    moved = w.clone()
    for step in range(100):
        u = torch.randn(w.shape, generator=torch.Generator().manual_seed(step)).bfloat16() * 1e-3
        moved += u
        moved -= 2 * u
        moved += u
    assert (moved - w).float().norm() > 0.01 * w.float().norm()


def test_an_error_in_the_closure_restores_the_weights_and_the_training_flags() -> None:
    model = Tied().train()
    kept = weights(model)
    opt = mezo(model)

    def fails() -> Tensor:
        model(BATCH)
        raise KeyError("data")

    with pytest.raises(KeyError):
        opt.step(fails)
    model.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: model(BATCH))
    assert same_bits(model, kept)
    assert all(module.training for module in model.modules())
    assert not model.embed._forward_hooks and not model.embed._forward_pre_hooks


def dense_loss(model: nn.Module, direction: dict[int, Tensor], side: float, closure: Callable[[], Tensor]) -> float:
    """The truth: a whole copy of the model's weights."""
    kept = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in direction:
                p.add_(direction[id(p)], alpha=side)
        loss = closure().item()
        for p, old in zip(model.parameters(), kept, strict=True):
            p.copy_(old)
    return loss


def directions_of(opt: ZerothOrder, step: int, k: int = 0) -> dict[int, Tensor]:
    return {
        id(p): torch.cat(
            [u for *_, u in opt._directions.runs(opt.seed, step, k, i, range(len(opt._parameters)))]
        ).view_as(p)
        for i, p in enumerate(opt._parameters)
    }


class Fused(nn.Module):
    """A parent that never calls its child, as a fused kernel would, and a parameter read outside of any forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner["b"](x), self.inner["a"].weight)


@pytest.mark.parametrize("make", ["tied", "fused"])
def test_the_losses_are_those_of_the_whole_perturbed_model(make: str) -> None:
    if make == "tied":
        model: nn.Module = Tied().eval()
        closure: Callable[[], Tensor] = lambda: model(BATCH)  # noqa: E731
    else:
        model = Fused()
        closure = lambda: F.linear(model(torch.eye(4)), model.head.weight).square().sum()  # noqa: E731
    opt = mezo(model, lr=0.0, eps=0.05, seed=4)
    opt.step(closure)
    opt.step(closure)
    direction = directions_of(opt, 1)
    pair = [dense_loss(model, direction, side * 0.05, closure) for side in (1.0, -1.0)]
    assert opt.log().differences[1].item() == pytest.approx((pair[0] - pair[1]) / 2, rel=1e-4)


def test_dropout_and_other_randomness_are_the_same_in_all_passes() -> None:
    model = Tied(torch.float64).train()
    opt = mezo(model, lr=0.0, eps=1e-3)
    assert opt.step(lambda: model(BATCH)).item() == pytest.approx(model.eval()(BATCH).item(), rel=1e-3)
    model.train()
    gap = torch.stack([model(BATCH).detach() for _ in range(10)]).std().item()
    bare = mezo(model.parameters(), lr=0.0, eps=1e-8)
    bare.step(lambda: model(BATCH))
    assert abs(bare.log().differences.item()) < 1e-3 * gap


# --- the estimator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher", "sphere"])
def test_differences_on_a_quadratic_are_exact(direction: str, two_sided: bool) -> None:
    model = Quadratic()
    eps = 0.5
    opt = mezo(model, lr=0.0, eps=eps, direction=direction, two_sided=two_sided, samples=3)
    opt.step(model)
    for k in range(3):
        u = directions_of(opt, 0, k)[id(model.w)]
        expected = eps * (model.gradient() @ u)
        if not two_sided:
            expected = expected + 0.5 * eps**2 * u @ model.H @ u
        assert opt.log().differences[0, 0, k].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("direction", "factor"), [("gaussian", 22.0), ("rademacher", 20.0), ("sphere", 20.0)])
def test_mean_and_second_moment_of_the_estimate(direction: str, factor: float) -> None:
    """E g = grad; E ||g||^2 = (d + 2) ||grad||^2 for Gaussian directions and d ||grad||^2 for the others."""
    p = nn.Parameter(torch.zeros(20))
    directions = Directions(Estimator(direction=direction), [p])
    U = torch.stack([next(iter(directions.runs(0, step, 0, 0, (0,))))[2] for step in range(20_000)])
    gradient = torch.linspace(-1, 1, 20)
    g = (U @ gradient).unsqueeze(1) * U
    assert (g.mean(0) - gradient).norm() < 0.05 * gradient.norm()
    assert g.square().sum(1).mean().item() == pytest.approx(factor * gradient.square().sum().item(), rel=0.03)
    if direction == "sphere":
        torch.testing.assert_close(U.norm(dim=1), torch.full((20_000,), math.sqrt(20)))


def test_masks_keep_their_share_and_stay_until_redrawn() -> None:
    p = nn.Parameter(torch.zeros(50_000))
    directions = Directions(Estimator(density=0.1, redraw=5), [p])
    supports = [torch.cat([u for *_, u in directions.runs(0, step, 0, 0, (0,))]).ne(0) for step in range(10)]
    assert supports[0].float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert all(torch.equal(supports[0], s) for s in supports[:5])
    assert (supports[0] & supports[5]).float().mean().item() == pytest.approx(0.01, abs=0.005)
    fixed = Directions(Estimator(density=0.1), [p])
    first, last = (torch.cat([u for *_, u in fixed.runs(0, step, 0, 0, (0,))]).ne(0) for step in (0, 10**6))
    assert torch.equal(first, last)


def test_parameters_steps_samples_and_chunks_have_unrelated_directions() -> None:
    ps = [nn.Parameter(torch.zeros(70_000)), nn.Parameter(torch.zeros(70_000))]
    directions = Directions(Estimator(samples=2), ps)
    draws = [
        torch.cat([u for *_, u in directions.runs(seed, step, k, i, (0, 1))])
        for seed in (0, 1)
        for step in (0, 1)
        for k in (0, 1)
        for i in (0, 1)
    ]
    draws += [draws[0].roll(directions.chunk)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.02


def test_blocks_are_perturbed_and_moved_one_after_the_other() -> None:
    model = Tied().eval()
    groups = [{"params": [model.embed.weight]}, {"params": list(model.blocks.parameters()), "lr": 0.0}]
    opt = mezo(groups, lr=1e-2, model=model, blockwise=True)
    kept = weights(model)
    calls = []
    opt.step(lambda: (calls.append(1), model(BATCH))[1])
    assert len(calls) == 4
    assert opt.log().differences.shape == (1, 2, 1)
    assert not torch.equal(model.embed.weight, kept[0])
    assert all(torch.equal(p, q) for p, q in zip(list(model.parameters())[1:], kept[1:], strict=True))


def test_of_a_model_the_blocks_are_its_own() -> None:
    model = tiny_llama()
    opt = mezo(model, lr=1e-2, blockwise=True)
    sizes = [sum(p.numel() for p in group["params"]) for group in opt.param_groups]
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    assert sizes == [sum(p.numel() for p in part.parameters()) for part in parts]
    ids = torch.arange(8)[None]
    calls = []
    opt.step(lambda: (calls.append(1), model(input_ids=ids, labels=ids).loss)[1])
    assert len(calls) == 2 * len(parts)


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [SGD(0.0), SGD(0.9), Adam((0.9, 0.99), 1e-6, "torch"), Sign()])
def test_rules_take_the_estimate_as_torch_optimizers_take_a_gradient(inner: Any) -> None:
    model, twin = Quadratic(), Quadratic()
    opt = ZerothOrder(model.parameters(), 0.01, model=model, inner=inner, estimator=Estimator(samples=2), seed=5)
    reference: torch.optim.Optimizer = torch.optim.SGD(
        twin.parameters(), lr=0.01, momentum=getattr(inner, "momentum", 0.0)
    )
    if isinstance(inner, Adam):
        reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=inner.betas, eps=inner.eps, weight_decay=0.0)
    for step in range(10):
        us = [directions_of(opt, step, k)[id(model.w)] for k in range(2)]
        g = sum((twin.gradient() @ u) * u for u in us) / 2
        twin.w.grad = g.sign() if isinstance(inner, Sign) else g
        reference.step()
        opt.step(model)
        torch.testing.assert_close(model.w, twin.w, rtol=1e-5, atol=1e-5)


def test_it_trains() -> None:
    model = Quadratic()
    opt = mezo(model, lr=4e-3, direction="rademacher")
    best = model.b @ torch.linalg.solve(model.H, model.b) / -2
    first = model().item() - best
    for _ in range(600):
        opt.step(model)
    assert model().item() - best < 0.4 * first


def test_conservative_steps_never_raise_the_batch_loss() -> None:
    model = Tied().eval()
    opt = mezo(model, lr=0.3, eps=1e-3, conservative=True)
    previous = model(BATCH).item()
    chosen = set()
    for _ in range(40):
        opt.step(lambda: model(BATCH))
        now = model(BATCH).item()
        assert now <= previous + 1e-7
        chosen.add(now == previous)
        previous = now
    assert chosen == {True, False}


def test_small_bf16_updates_are_kept_on_average() -> None:
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    opt = mezo([p], lr=2e-5, eps=0.25, direction="rademacher")
    for _ in range(400):
        opt.step(lambda: p.float().sum() / 64)
    # g = (sum u / 64) u has mean 1/64 an entry; nearest rounding of 1 - 3e-7 would never move
    assert p.float().mean().item() == pytest.approx(1 - 400 * 2e-5 / 64, abs=3e-4)
    assert p.unique().numel() > 1


# --- log, replay, resume --------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "momentum": {"inner": SGD(0.9)},
    "adamw": {"inner": AdamW()},
    "sphere": {"direction": "sphere", "samples": 2},
    "masked": {"density": 0.3, "redraw": 3, "two_sided": False},
    "blocks": {"blockwise": True},
    "conservative": {"conservative": True},
}


def build(model: Tied, variant: str, seed: int = 2) -> ZerothOrder:
    groups = [{"params": list(model.embed.parameters()), "eps": 1e-2}, {"params": list(model.blocks.parameters())}]
    return mezo(groups, lr=1e-3, model=model, seed=seed, **VARIANTS[variant])


def train(model: Tied, opt: ZerothOrder, steps: range) -> None:
    for step in steps:
        opt.param_groups[0]["lr"] = 1e-3 * (1 + step % 3)
        opt.step(lambda step=step: model((BATCH * (step + 1)) % 40))


@pytest.mark.parametrize(("variant", "dtype"), [(v, d) for v in VARIANTS for d in DTYPES[: 3 if v == "mezo" else 2]])
def test_resume_and_replay_are_exact(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    start = Tied(dtype)
    whole, stopped, replayed = (copy.deepcopy(start) for _ in range(3))
    opt = build(whole, variant)
    train(whole, opt, range(40))

    first = build(stopped, variant)
    train(stopped, first, range(20))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build(stopped, variant, seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(stopped, second, range(20, 40))
    assert same_bits(stopped, weights(whole))
    assert second.state_bytes() == opt.state_bytes()

    second.log().save(tmp_path / "run.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["run.safetensors"]
    replayed.requires_grad_(False)
    replay(replayed, SeedLog.load(tmp_path / "run.safetensors"))
    assert same_bits(replayed, weights(whole))
    assert not same_bits(start, weights(whole))
    assert not any(p.requires_grad for p in replayed.parameters())


def test_the_log_is_a_few_bytes_a_step() -> None:
    model = Tied()
    opt = mezo(model)
    for _ in range(5):
        opt.step(lambda: model(BATCH))
    assert opt.log().nbytes == 5 * 12
    assert opt.state_bytes() == 5 * 12


def test_only_what_requires_a_gradient_moves() -> None:
    model = Tied()
    model.embed.requires_grad_(False)
    kept = weights(model)
    opt = mezo(model, lr=1e-2)
    opt.step(lambda: model(BATCH))
    assert torch.equal(model.embed.weight, kept[0])
    assert not torch.equal(model.blocks[0][0].weight, kept[1])
    assert len(opt.log().config["parameters"]) == 4


def test_skipped_steps_leave_weights_and_moments_and_replay() -> None:
    model = Tied().eval()
    start = copy.deepcopy(model)
    opt = mezo(model, lr=1e-2, inner=AdamW(), nonfinite="skip")
    for step in range(6):
        kept = weights(model)
        opt.step(lambda step=step: model(BATCH) * (math.nan if step in (0, 3) else 1.0))
        assert same_bits(model, kept) is (step in (0, 3))
    replay(start, opt.log())
    assert same_bits(start, weights(model))


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, r"call step\(closure\)"),
        (lambda model: model(BATCH) * math.nan, "not finite"),
        (lambda model: model(BATCH).expand(2), "one loss"),
        (lambda model: model(BATCH).bfloat16(), "too coarse"),
        (lambda model: None, "must return the loss"),
        (lambda model: model(BATCH).backward(), "calls backward"),
    ],
)
def test_bad_closures_are_answered_and_leave_the_weights(closure: Any, message: str) -> None:
    model = Tied()
    kept = weights(model)
    opt = mezo(model)
    with pytest.raises(WeftError, match=message):
        opt.step(None if closure is None else lambda: closure(model))
    assert same_bits(model, kept)


def test_other_mistakes_are_answered_in_a_sentence(tmp_path: Path) -> None:
    model = Tied()
    with pytest.raises(WeftError, match="in \\(0, 1\\]"):
        mezo(model, density=0.0)
    with pytest.raises(WeftError, match="neither a rank nor weight decay"):
        mezo(model, weight_decay=0.1)
    with pytest.raises(WeftError, match="direction is one of"):
        mezo(model, direction="cauchy")  # type: ignore[arg-type]
    with pytest.raises(WeftError, match="not entry by entry"):
        mezo(model, inner=Adafactor())
    with pytest.raises(WeftError, match="compares plain steps"):
        mezo(model, inner=AdamW(), conservative=True)
    with pytest.raises(WeftError, match="not a contiguous"):
        mezo([nn.Parameter(torch.zeros(3, 4).mT)])
    with pytest.raises(WeftError, match="nothing to train"):
        mezo(Tied().requires_grad_(False))
    opt = mezo(model)
    with pytest.raises(WeftError, match="another optimizer"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(WeftError, match="differs in its estimator"):
        opt.load_state_dict(mezo(model, samples=2).state_dict())
    with pytest.raises(WeftError, match="differs in its parameters"):
        replay(Tied(torch.bfloat16), opt.log())
    with pytest.raises(WeftError, match="is not here"):
        replay(nn.Linear(2, 2), opt.log())
    with pytest.raises(WeftError, match="cannot be read"):
        SeedLog.load(tmp_path / "missing.safetensors")
