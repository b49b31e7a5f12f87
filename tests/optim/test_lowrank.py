"""What every subspace optimizer keeps: resume, batching, dtypes, schedulers, groups, refusals."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft.optim as wo
from benchmarks.operations import Operations
from weft.errors import WeftError
from weft.optim.adagrad import AdaGrad, AdaGradNorm
from weft.optim.base import Rows
from weft.optim.inner import SGD, Adafactor, Adam, Adam8bit, AdamW, Lion
from weft.optim.limiter import NormGrowth
from weft.optim.projections import (
    DCT,
    SVD,
    Blocks,
    Columns,
    Gaussian,
    Orthogonal,
    RandomizedSVD,
    Sparse,
    Subspace,
    Whole,
)
from weft.optim.residual import NormScaled, Plain, Sign

PRESETS = ["galore", "galore_8bit", "fira", "frugal", "apollo", "apollo_mini", "dct_adamw", "gradnormlorp"]
PROJECTIONS = [
    SVD(3),
    RandomizedSVD(3),
    Subspace(3),
    Orthogonal(3),
    Gaussian(3),
    Sparse(3),
    DCT(3),
    Columns(0.5),
    Whole(),
]
INNERS = [
    Adam(), AdamW(), Adam8bit(threshold=16), Adam8bit(threshold=16, code="float8"), SGD(0.9), SGD(0.0), Lion(),
    Adafactor(), AdaGrad(), AdaGradNorm(),
]  # fmt: skip


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tiny(nn.Module):
    """An embedding, two blocks of linear layers with norms, and a head tied to the embedding."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 24), "down": nn.Linear(24, width), "norm": nn.LayerNorm(width)})
            for _ in range(2)
        )
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        g = rng(0)
        for p in self.parameters():
            p.data = (0.3 * torch.randn(p.shape, generator=g)).to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer["norm"](x + layer["down"](torch.relu(layer["up"](x))))
        return self.head(x)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(0, 11, (4, 6), generator=rng(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten().roll(1))


def run(model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()


def make(name: str, model: nn.Module, **options: Any) -> Any:
    rank = {"frugal": 0.25, "apollo_mini": 1}.get(name, 4)
    columns = {"projection": "columns"} if name == "frugal" else {}
    options = {"refresh": 7, "lr": 1e-3} | columns | options
    return wo.OPTIMIZERS[name](model, rank=rank, **options)


def saved(optimizer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PRESETS)
def test_resume_is_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    options = {"rounding": "stochastic"} if dtype == torch.bfloat16 else {}
    through, halfway = Tiny(dtype=dtype), Tiny(dtype=dtype)
    optimizer = make(name, through, **options)
    run(through, optimizer, range(40))
    first = make(name, halfway, **options)
    run(halfway, first, range(20))
    resumed = Tiny(dtype=dtype)
    second = make(name, resumed, **options)
    resumed.load_state_dict(copy.deepcopy(halfway.state_dict()))
    second.load_state_dict(saved(first))
    assert second.state_bytes() == first.state_bytes() > 0
    run(resumed, second, range(20, 40))
    for a, b in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == dtype
    for a, b in zip(optimizer.state.values(), second.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", PRESETS)
def test_a_compiled_step_is_the_plain_one_in_one_graph_that_serves_every_step(name: str, monkeypatch: Any) -> None:
    plain, compiled = Tiny(dtype=torch.float64), Tiny(dtype=torch.float64)
    expected = make(name, plain)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    optimizer = make(name, compiled, compiled=True)
    torch.compiler.reset()
    run(plain, expected, range(20))
    run(compiled, optimizer, range(8))  # the second shape of a kind, the first limited step and the first refresh
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled, optimizer, range(8, 20))
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    assert pickle.loads(pickle.dumps(optimizer)).compiled


def test_identity_is_the_inner_rule_in_full() -> None:
    ours, theirs = Tiny(dtype=torch.float64), Tiny(dtype=torch.float64)
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    run(ours, wo.galore(ours, 4, 1e-2, projection="identity", scale=1.0, inner=AdamW()), range(10))
    run(theirs, torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, **settings), range(10))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("master", [False, True])
def test_every_preset_learns(master: bool) -> None:
    for name in PRESETS:
        model = Tiny(dtype=torch.bfloat16 if master else torch.float32)
        optimizer = make(name, model, lr=1e-2, rounding="master" if master else "nearest")
        before = loss_of(model, 3).item()
        for _ in range(30):
            run(model, optimizer, range(3, 4))
        assert loss_of(model, 3).item() < 0.7 * before, name


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("inner", INNERS, ids=repr)
def test_pieces_combine_and_batching_changes_nothing(inner: Any, moments: Any, monkeypatch: Any) -> None:
    """Every projection x inner x residual x limiter gives the same weights stepped together or one by one."""
    residuals = [None, Plain(0.1), Sign(0.1), NormScaled(0.25), NormScaled(0.0, "tensor")]
    for i, projection in enumerate(PROJECTIONS):
        if moments == "rotate" and not projection.orthonormal:
            continue
        residual = residuals[i % len(residuals)]
        limiter = NormGrowth() if residual else None
        ends = []
        for alone in (False, True):
            with monkeypatch.context() as patch:
                if alone:
                    patch.setattr("weft.optim.lowrank._BATCH", {"cpu": 1})
                    patch.setattr("weft.optim.lowrank._SLICE", {"cpu": 1})
                g = rng(1)
                params = [nn.Parameter(torch.randn(8, 6, generator=g, dtype=torch.float64)) for _ in range(3)]
                params += [nn.Parameter(torch.randn(6, 8, generator=g, dtype=torch.float64)) for _ in range(2)]
                optimizer = wo.LowRank(
                    params, 1e-2, projection=projection, inner=inner, residual=residual, limiter=limiter,
                    moments=moments, refresh=wo.Refresh(4, stagger=True), weight_decay=0.1,
                )  # fmt: skip
                for _ in range(9):
                    for p in params:
                        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
                    optimizer.step()
                assert len(optimizer._batches) == (5 if alone else 2)
                ends.append(torch.cat([p.detach().flatten() for p in params]))
        assert ends[0].isfinite().all()
        assert (ends[0] - ends[1]).abs().max() < 1e-6, projection


@pytest.mark.parametrize(("name", "each"), [("galore", 2), ("apollo", 4)])
def test_a_step_copies_no_gradient_and_starts_few_operations(name: str, each: int) -> None:
    """A weight more costs its two products (galore), or a draw, a product, a norm and an addition (apollo)."""
    totals = []
    for count in (4, 8):
        params = [nn.Parameter(torch.randn(48, 32, generator=rng(i))) for i in range(count)]
        optimizer = wo.OPTIMIZERS[name]([{"params": params, "rank": 4}], lr=1e-2, refresh=100)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with Operations() as work:
            optimizer.step()
        assert max(work.bytes[copy] for copy in ("stack", "cat", "clone", "copy_", "_to_copy")) < 48 * 32 * 4
        totals.append(work.total)
    assert totals[1] - totals[0] == 4 * each


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_subspaces_are_chosen_from_few_gradients_at_a_time(moments: Any, monkeypatch: Any) -> None:
    ends = []
    for stacked in (1, 100):
        with monkeypatch.context() as patch:
            patch.setattr("weft.optim.lowrank._BATCH", {"cpu": 2 * 24 * 32} if stacked == 1 else {"cpu": 100 * 24 * 32})
            params = [nn.Parameter(torch.randn(32, 24, generator=rng(i), dtype=torch.float64)) for i in range(7)]
            optimizer = wo.LowRank(params, 1e-2, projection=Subspace(3), moments=moments, refresh=2)
            for step in range(5):
                for i, p in enumerate(params):
                    p.grad = torch.randn(p.shape, generator=rng(10 * step + i), dtype=torch.float64)
                optimizer.step()
            assert len(optimizer._batches) == 1 and optimizer._batches[0].limit == (2 if stacked == 1 else 100)
            ends.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-10)


def test_transposing_weight_and_gradient_transposes_the_update() -> None:
    for projection in PROJECTIONS:
        a, b = nn.Parameter(torch.zeros(9, 6)), nn.Parameter(torch.zeros(6, 9))
        for p in (a, b):
            optimizer = wo.LowRank([p], 1.0, projection=projection, residual=Plain(0.5), refresh=2)
            g = rng(2)
            for _ in range(5):
                grad = torch.randn(9, 6, generator=g)
                p.grad = grad if p is a else grad.T.contiguous()
                optimizer.step()
        assert torch.allclose(a, b.T, atol=1e-5), projection


@pytest.mark.parametrize(
    "projection", [SVD(6), Subspace(6), RandomizedSVD(6), DCT(6), Columns(6), Orthogonal(6)], ids=repr
)
def test_at_full_rank_sgd_is_sgd(projection: Any) -> None:
    g = rng(0)
    start = torch.randn(9, 6, generator=g, dtype=torch.float64)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = wo.LowRank([a], 0.1, projection=projection, inner=SGD(0.9), moments="rotate", refresh=3)
    theirs = torch.optim.SGD([b], 0.1, momentum=0.9)
    for _ in range(8):
        a.grad = torch.randn(9, 6, generator=g, dtype=torch.float64)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert (a - b).abs().max() < 1e-9


def test_whole_parameters_follow_torch() -> None:
    cases = [
        (AdamW(), torch.optim.AdamW, {}),
        (SGD(0.9), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0}),
        (AdaGrad(), torch.optim.Adagrad, {"weight_decay": 0}),
        (Adafactor(), torch.optim.Adafactor, {"eps": (1e-15, 0.0), "d": 1.0}),
    ]
    for inner, peer, extra in cases:
        g = rng(0)
        start = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((7,), (4, 5), (), (2, 3, 4))]
        if peer is torch.optim.Adafactor:
            start = start[1:2]
        ours, theirs = [nn.Parameter(p.clone()) for p in start], [nn.Parameter(p.clone()) for p in start]
        decay = 0.0 if "weight_decay" in extra or peer is torch.optim.Adafactor else 0.1
        a = wo.LowRank(ours, 1e-2, projection=Whole(), inner=inner, weight_decay=decay)
        b = peer(theirs, **({"lr": 1e-2, "weight_decay": decay} | extra))
        for _ in range(6):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
                q.grad = p.grad.clone()
            a.step()
            b.step()
        if peer is not torch.optim.Adafactor:
            assert all((p - q).abs().max() < 1e-9 for p, q in zip(ours, theirs, strict=True)), peer
        else:  # torch scales its step by the weight's size: only the direction is comparable
            p, q = (ours[0] - start[0]).flatten(), (theirs[0] - start[0]).flatten()
            assert torch.cosine_similarity(p, q, dim=0) > 0.999


def test_adagrad_norm_divides_by_the_length_of_all_gradients_so_far() -> None:
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    optimizer = wo.LowRank([p], 1.0, projection=Whole(), inner=AdaGradNorm(), rounding="master")
    w, total, g = torch.zeros(4, 3), torch.zeros(()), rng(0)
    for _ in range(5):
        p.grad = torch.randn(4, 3, generator=g).bfloat16()
        total = total + p.grad.float().square().sum()
        w = w - p.grad.float() / total.sqrt()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master"], w)
    assert optimizer.state[p]["sum"].shape == (1, 1) and optimizer.state[p]["sum"].dtype == torch.float32


def test_blocks_frees_released_moments_and_covers_all() -> None:
    params = [nn.Parameter(torch.zeros(6, 6)) for _ in range(4)]
    optimizer = wo.LowRank(
        params, 1e-2, projection=Blocks(0.5, "descending"), residual=Sign(), moments="reset", refresh=2
    )
    seen = []
    for _ in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append([i for i, p in enumerate(params) if optimizer.state[p]["exp_avg"].numel()])
    assert seen == [[2, 3], [2, 3], [0, 1], [0, 1], [2, 3], [2, 3]]


def test_frugal_is_the_published_one_unless_asked_otherwise() -> None:
    """Blocks from the last to the first, as in the pre-training scripts; columns are columns whatever the shape."""
    params = [nn.Parameter(torch.zeros(4, 12)) for _ in range(8)]

    def stepped(**options: Any) -> Any:
        optimizer = wo.frugal([{"params": params, "rank": 0.25}], refresh=1, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    def active(optimizer: Any) -> list[int]:
        return [i for i, p in enumerate(params) if optimizer.state[p]["exp_avg"].numel()]

    published = stepped()
    assert "Blocks(density=0.25, order='descending')" in published.param_groups[0]["recipe"]
    assert active(published) == [6, 7]
    published.step()
    assert active(published) == [4, 5]
    mirror = stepped(order="mirror")
    assert active(mirror) == [0, 7]
    mirror.step()
    assert active(mirror) == [1, 6]
    assert active(stepped(order="ascending")) == [0, 1]
    for projection, chosen in (("columns", 3), ("rows", 1)):
        assert stepped(projection=projection).state[params[0]]["index"].numel() == chosen
    with pytest.raises(WeftError, match="give their share, from 0.0 to 1.0"):
        wo.frugal(params, 4)
    with pytest.raises(WeftError, match="3 of 12 are odd"):
        wo.frugal(
            [{"params": [nn.Parameter(torch.zeros(4, 4)) for _ in range(12)], "rank": 0.25}], order="mirror"
        ).planned_bytes()


def test_blocks_with_everything_active_is_adamw() -> None:
    ends = []
    for active in (1.0, None):
        model = Tiny()
        if active:
            optimizer = wo.frugal(model, 1.0, lr=1e-3, projection="blocks", refresh=1000)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
        run(model, optimizer, range(5))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_rotated_indexed_moments_follow_their_column() -> None:
    p = nn.Parameter(torch.zeros(4, 6))
    optimizer = wo.LowRank([p], 0.1, projection=DCT(2), inner=AdamW(), side="right", moments="rotate", refresh=1)
    from weft.linalg.dct import dct_basis

    C = dct_basis(6).T
    for mix in ([3, 2, 0, 0, 0, 0], [3, 0, 0, 2, 0, 0], [3, 2, 0, 0, 0, 0]):
        p.grad = torch.outer(torch.ones(4), torch.tensor(mix, dtype=torch.float32) @ C)
        optimizer.step()
    state = optimizer.state[p]
    assert state["index"].tolist() == [0, 1] and state["age"].tolist() == [3, 1]
    assert torch.allclose(state["exp_avg"][:, 1], torch.full((4,), 0.2), atol=1e-6)


def test_refresh_by_energy_and_stagger() -> None:
    g = rng(0)
    p = nn.Parameter(torch.zeros(12, 8))
    optimizer = wo.LowRank([p], 1e-3, projection=SVD(2), refresh=wo.Refresh(1000, energy=0.5))
    u, v = torch.randn(12, 2, generator=g), torch.randn(2, 8, generator=g)
    rounds = []
    for t in range(6):
        p.grad = u @ v if t < 3 else (torch.randn(12, 2, generator=rng(5)) @ torch.randn(2, 8, generator=rng(6)))
        optimizer.step()
        rounds.append(int(optimizer.state[p]["round"]))
    assert rounds == [1, 1, 1, 2, 2, 2]
    params = [nn.Parameter(torch.zeros(12, 8)) for _ in range(4)]
    spread = wo.LowRank(params, 1e-3, projection=SVD(2), refresh=wo.Refresh(4, stagger=True))
    rounds = []
    for _ in range(9):
        for q in params:
            q.grad = torch.randn(12, 8, generator=g)
        spread.step()
        rounds.append(sum(int(spread.state[q]["round"]) for q in params))
    assert rounds[0] == 4 and max(b - a for a, b in itertools.pairwise(rounds)) == 1 and rounds[-1] == 12


def test_a_zero_first_gradient_waits_for_its_subspace() -> None:
    p, q = nn.Parameter(torch.zeros(6, 5)), nn.Parameter(torch.zeros(6, 5))
    optimizer = wo.fira([{"params": [p, q], "rank": 2}], lr=0.1, projection="svd")
    for t in range(3):
        p.grad = torch.randn(6, 5, generator=rng(t)) * (t > 0)
        q.grad = torch.randn(6, 5, generator=rng(t + 9))
        optimizer.step()
    assert optimizer.state[p]["round"] == 1 and optimizer.state[p]["norm"] > 0
    assert p.detach().abs().max() > 0.01


def test_missing_gradients_leave_a_parameter_alone() -> None:
    params = [nn.Parameter(torch.ones(6, 5)) for _ in range(3)]
    optimizer = wo.galore([{"params": params, "rank": 2}], projection="svd")
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = None if i == 1 else torch.randn(6, 5, generator=rng(t))
        optimizer.step()
    assert torch.equal(params[1], torch.ones(6, 5)) and optimizer.state[params[1]]["count"] == 0
    assert torch.equal(params[0], params[2]) and not torch.equal(params[0], params[1])


def test_a_step_leaves_gradients_as_they_were() -> None:
    for name in PRESETS:
        model = Tiny()
        optimizer = make(name, model)
        loss_of(model, 0).backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)), name


def test_models_are_split_and_frozen_parameters_left_alone() -> None:
    model = Tiny()
    model.layers[0]["up"].weight.requires_grad_(False)
    frozen = model.layers[0]["up"].weight.clone()
    optimizer = make("galore", model)
    projected, whole = optimizer.param_groups
    assert projected["param_names"] == [
        "layers.0.down.weight", "layers.1.up.weight", "layers.1.down.weight",
    ]  # fmt: skip
    assert sum("embed" in n or "head" in n for n in whole["param_names"]) == 1  # tied: once, and whole
    run(model, optimizer, range(2))
    assert torch.equal(model.layers[0]["up"].weight, frozen)
    excluded = wo.galore(model, rank=4, exclude=["down"])
    assert excluded.param_groups[0]["param_names"] == ["layers.1.up.weight"]


def test_gpt2_conv1d_and_llama_from_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    groups = wo.fira(transformers.GPT2LMHeadModel(config), rank=4).param_groups
    assert len(groups[0]["params"]) == 8 and all("h." in n for n in groups[0]["param_names"])


def test_schedulers_new_groups_and_differing_groups() -> None:
    model = Tiny()
    optimizer = make("fira", model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    run(model, optimizer, range(3))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    extra = nn.Parameter(torch.zeros(10, 6))
    optimizer.add_param_group(
        {"params": [("extra", extra)], "projection": SVD(2), "residual": None, "limiter": None, "lr": 0.1}
    )
    before = {k: v.clone() for k, v in optimizer.state[model.layers[0]["up"].weight].items()}
    extra.grad = torch.ones(10, 6)
    optimizer.zero_grad(set_to_none=True)
    extra.grad = torch.ones(10, 6)
    optimizer.step()
    after = optimizer.state[model.layers[0]["up"].weight]
    assert all(torch.equal(before[k], after[k]) for k in before) and extra.abs().max() > 0
    assert optimizer.state[extra]["basis"].shape == (6, 2)


def test_closure_and_deepcopy() -> None:
    model = Tiny()
    optimizer = make("galore", model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    twin_model, twin = copy.deepcopy((model, optimizer))
    twin.step(lambda: (twin.zero_grad(), loss_of(twin_model, 1).backward())[1])
    assert not torch.equal(twin_model.embed.weight, model.embed.weight)


def test_stochastic_rounding_keeps_small_updates() -> None:
    ends = {}
    for rounding in ("nearest", "stochastic", "master"):
        p = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer = wo.LowRank([p], 1e-4, projection=Whole(), inner=SGD(0.0), rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[rounding] = p.detach().float().mean().item()
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.99, abs=1e-3)
    assert ends["master"] == pytest.approx(0.99, abs=4e-3)


@pytest.mark.parametrize("laid", ["channels_last", "transposed"])
def test_weights_that_lie_in_another_order_are_stepped(laid: str) -> None:
    whole = torch.randn(8, 4, 3, 3, generator=rng(0))
    ends = []
    for inner in (AdamW(), None):
        p = nn.Parameter(whole.to(memory_format=torch.channels_last) if laid == "channels_last" else whole.clone().mT)
        optimizer: Any = torch.optim.AdamW([p], 0.1, eps=1e-8, weight_decay=0.1)
        if inner is not None:
            optimizer = wo.LowRank([p], 0.1, projection=Whole(), inner=AdamW(eps=1e-8), weight_decay=0.1)
        for t in range(5):
            p.grad = torch.randn(p.shape, generator=rng(t))
            optimizer.step()
        assert not p.is_contiguous()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, atol=2e-6, rtol=1e-5)


def test_weights_that_are_no_rows_in_memory_are_refused() -> None:
    with pytest.raises(WeftError, match=r"lies in memory .*contiguous"):
        wo.LowRank([nn.Parameter(torch.zeros(6, 4, 5).transpose(0, 1))], 0.1, projection=Whole(), inner=AdamW())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
def test_a_weight_changed_between_steps_goes_on_from_there(rounding: Any) -> None:
    p = nn.Parameter(torch.full((8, 8), 2.0, dtype=torch.bfloat16))
    optimizer = wo.LowRank([p], 1e-3, projection=Whole(), inner=AdamW(), rounding=rounding)
    for change in (None, slice(0, 4)):
        if change is not None:
            with torch.no_grad():
                p[change] = 0.0
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p[:4].abs().max() < 0.01 and (p[4:] - 2).abs().max() < 0.02


def test_equal_weights_are_rounded_by_draws_of_their_own(monkeypatch: Any) -> None:
    for layers in (False, True):
        params = [nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = wo.LowRank(params, 1e-3, projection=Whole(), inner=AdamW(), rounding="stochastic")
        if layers:
            wo.PerLayer(optimizer)
        torch.stack([p.float().sum() for p in params]).sum().backward()
        optimizer.step()
        moved = [p.detach() != 1 for p in params]
        assert all(0 < m.float().mean() < 1 for m in moved) and not torch.equal(*moved)


def test_state_bytes_count_the_published_elements() -> None:
    model = Tiny(width=16)
    optimizer = wo.galore(model, rank=4)
    run(model, optimizer, range(1))
    matrices = [(24, 16), (16, 24)] * 2
    counted = sum(4 * min(s) + 2 * 4 * max(s) for s in matrices)
    projected = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    assert sum(t.numel() for s in projected for t in s.values() if t.is_floating_point()) == counted
    gaussian = wo.apollo(model, rank=4)
    run(model, gaussian, range(1))
    projected = [gaussian.state[p] for p in gaussian.param_groups[0]["params"]]
    floats = sum(t.numel() for s in projected for t in s.values() if t.is_floating_point())
    assert floats == sum(2 * 4 * max(s) + 1 for s in matrices)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: wo.galore([{"params": [nn.Parameter(torch.zeros(8, 6))], "rank": 9}]), "rank of at most 6"),
        (lambda: wo.galore([{"params": [nn.Parameter(torch.zeros(8))], "rank": 2}]), "matrices only"),
        (lambda: wo.galore([{"params": [nn.Parameter(torch.zeros(8, 6))]}]), "nothing would be projected"),
        (lambda: wo.galore(nn.Linear(4, 4)), "take one for every weight, such as adamw"),
        (lambda: wo.galore(Tiny().requires_grad_(False)), "nothing to train"),
        (lambda: wo.galore(Tiny(), projection="svdd"), "nearest are: svd"),
        (lambda: wo.LowRank([nn.Parameter(torch.zeros(8, 6))], projection=Gaussian(2), moments="rotate"), "rotate"),
        (lambda: wo.LowRank([nn.Parameter(torch.zeros(8, 6))], limiter=NormGrowth()), "limiter"),
        (lambda: wo.LowRank([nn.Parameter(torch.zeros(8, 6))], projection=Blocks(0.5)), "reset"),
        (lambda: wo.galore(Tiny(), rank=4, refresh=0), "1 or more"),
        (lambda: wo.PerLayer(wo.galore(Tiny(), rank=4), clip=1.0), "global norm"),
        (lambda: wo.PerLayer(wo.galore(Tiny(), rank=4, nonfinite="skip")), "skip"),
    ],
)
def test_mistakes_get_a_sentence(build: Any, words: str) -> None:
    with pytest.raises(WeftError, match=words):
        build()


def test_tied_parameters_given_twice_are_refused() -> None:
    p = nn.Parameter(torch.zeros(8, 6))
    with pytest.raises(WeftError, match="twice"):
        wo.galore([{"params": [p], "rank": 2}, {"params": [p]}])


def test_another_presets_state_is_refused() -> None:
    model = Tiny()
    fira, galore = make("fira", model), make("galore", model)
    run(model, fira, range(1))
    with pytest.raises(WeftError, match="another optimizer"):
        galore.load_state_dict(fira.state_dict())
    with pytest.raises(WeftError, match="another optimizer"):
        galore.load_state_dict(wo.galore(model, rank=5).state_dict())


def test_nonfinite_gradients_skip_or_raise() -> None:
    for mode in ("skip", "raise", None):
        model = Tiny()
        optimizer = make("galore", model, nonfinite=mode)
        run(model, optimizer, range(2))
        before = copy.deepcopy(model.state_dict())
        loss_of(model, 0).backward()
        model.layers[1]["down"].weight.grad[0, 0] = float("nan")
        if mode == "skip":
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        elif mode == "raise":
            with pytest.raises(WeftError, match="layers.1.down.weight is not finite"):
                optimizer.step()
    first = make("galore", Tiny())
    for group in first.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(WeftError, match="no subspace"):
        first.step()


@pytest.mark.parametrize("name", PRESETS)
def test_per_layer_updates_match_ordinary_steps(name: str) -> None:
    ends = []
    for per_layer in (False, True):
        model = Tiny(dtype=torch.float64)
        optimizer = make(name, model)
        layers = wo.PerLayer(optimizer, accumulate=2) if per_layer else None
        for t in range(10):
            for micro in range(2):
                (loss_of(model, 2 * t + micro) / 2).backward()
            if layers is not None:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).abs().max() < 1e-9


def test_per_layer_updates_refuse_unannounced_accumulation_and_can_be_removed() -> None:
    model = Tiny()
    optimizer = make("galore", model)
    layers = wo.PerLayer(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(WeftError, match="accumulate=1"):
        loss_of(model, 1).backward()
    with pytest.raises(WeftError, match="no closure"):
        optimizer.step(lambda: loss_of(model, 0))
    layers.remove()
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    assert model.embed.weight.grad is not None
    optimizer.step()


def test_a_norm_of_zero_is_forgotten_and_the_last_one_limits() -> None:
    limiter, state = NormGrowth(), {"norm": torch.zeros(1)}
    rows = Rows(2)
    norms = []
    for size in (0.0, 1.0, 0.0, 100.0):
        E = torch.full((1, 2, 2), size / 2)
        factor = limiter.factor(E, torch.ones(1, 1, 1), state, rows)
        norms.append(float((E * factor).norm()))
    assert norms == pytest.approx([0, 1, 0, 1.01], rel=1e-4)
