"""Each preset follows its plain reference; the references follow the released packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft.optim as wo
from tests.optim import reference
from weft.optim.projections import DCT, SVD, Blocks, Gaussian
from weft.seeds import mix

SHAPES = [(12, 8), (8, 12), (12, 8), (8, 8), (9, 20)]
STEPS, EVERY, WD = 30, 12, 0.1


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights of several shapes, and gradients with a drifting dominant direction."""
    g = rng(seed)
    weights = [torch.randn(*s, generator=g, dtype=dtype) for s in SHAPES]
    grads = []
    for s in SHAPES:
        u, v = torch.randn(s[0], 1, generator=g, dtype=dtype), torch.randn(1, s[1], generator=g, dtype=dtype)
        grads.append([2 * u @ v + torch.randn(*s, generator=g, dtype=dtype) for _ in range(STEPS)])
    return weights, grads


def train(make: Callable[[list[dict[str, Any]]], Any], rank: int | float, dtype: torch.dtype = torch.float64) -> Any:
    weights, grads = problem(dtype)
    params = [nn.Parameter(w.clone()) for w in weights]
    extra = nn.Parameter(weights[0].clone())  # an unprojected matrix, given the gradients of the first
    optimizer = make([{"params": params, "rank": rank}, {"params": [extra]}])
    for t in range(STEPS):
        for p, g in zip([*params, extra], [*grads, grads[0]], strict=True):
            p.grad = g[t].clone()
        optimizer.step()
    return params, extra, optimizer


def close(params: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for p, e in zip(params, expected, strict=True):
        assert (p - e).abs().max() < tolerance


def test_galore() -> None:
    weights, grads = problem()
    settings = {"rank": 3, "lr": 1e-2, "refresh": EVERY, "scale": 0.25}
    params, extra, _ = train(
        lambda g: wo.galore(g, lr=1e-2, refresh=EVERY, scale=0.25, projection="svd", weight_decay=WD), 3
    )
    close(params, [reference.galore(w, g, **settings, wd=WD) for w, g in zip(weights, grads, strict=True)])
    close([extra], [reference.adam_whole(weights[0], grads[0], 1e-2, (0.9, 0.999), 1e-6, WD)])


@pytest.mark.parametrize("residual", ["official", "paper"])
def test_fira(residual: Any) -> None:
    weights, grads = problem()
    params, extra, _ = train(
        lambda g: wo.fira(g, lr=1e-2, refresh=EVERY, projection="svd", residual=residual, weight_decay=WD), 3
    )
    settings = {"rank": 3, "lr": 1e-2, "refresh": EVERY, "scale": 0.25, "residual": residual, "wd": WD}
    close(params, [reference.fira(w, g, **settings) for w, g in zip(weights, grads, strict=True)])
    close([extra], [reference.adam_whole(weights[0], grads[0], 1e-2, (0.9, 0.999), 1e-6, WD)])


def gaussian_of(index: int, seed: int = 0) -> reference.Basis:
    def basis(G: Tensor, r: int, side: str, old: Tensor | None, t: int) -> Tensor:
        s = min(G.shape)
        draw = torch.randn(s, r, generator=rng(mix(seed, 0, index, t // EVERY + 1)))
        return (draw * r**-0.5).to(G.dtype)

    return basis


@pytest.mark.parametrize("mini", [False, True])
def test_apollo(mini: bool) -> None:
    weights, grads = problem()
    rank, scale, preset = (1, 128.0, wo.apollo_mini) if mini else (4, 1.0, wo.apollo)
    params, _, optimizer = train(lambda g: preset(g, lr=1e-2, refresh=EVERY, weight_decay=WD), rank)
    settings = {"rank": rank, "lr": 1e-2, "refresh": EVERY, "scale": scale, "wd": WD}
    expected = [
        reference.apollo(w, g, **settings, granularity="tensor" if mini else "channel", basis=gaussian_of(i))
        for i, (w, g) in enumerate(zip(weights, grads, strict=True))
    ]
    close(params, expected)
    assert not any("basis" in s for s in optimizer.state.values())


@pytest.mark.parametrize("projection", ["columns", "svd"])
def test_frugal(projection: str) -> None:
    weights, grads = problem()
    rank = 0.25 if projection == "columns" else 3
    params, _, _ = train(
        lambda g: wo.frugal(
            g,
            lr=1e-3,
            refresh=EVERY,
            projection=projection,
            side="short",
            scale=0.5,
            residual_scale=0.1,
            weight_decay=WD,
        ),
        rank,
    )
    expected = []
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):

        def columns(period: int, i: int = i, k: int = min(w.shape)) -> Tensor:
            return torch.randperm(k, generator=rng(mix(0, 0, i, period + 1)))[: round(0.25 * k)]

        settings = {"lr": 1e-3, "refresh": EVERY, "scale": 0.5, "residual_scale": 0.1, "wd": WD}
        expected.append(
            reference.frugal(w, g, rank=3, columns=columns if projection == "columns" else None, **settings)
        )
    close(params, expected)


@pytest.mark.parametrize("refresh", [1, EVERY])
def test_dct_adamw(refresh: int) -> None:
    weights, grads = problem()
    params, _, _ = train(lambda g: wo.dct_adamw(g, lr=1e-3, refresh=refresh, weight_decay=WD), 3)
    settings = {"rank": 3, "lr": 1e-3, "refresh": refresh, "wd": WD}
    close(params, [reference.dct_adamw(w, g, **settings) for w, g in zip(weights, grads, strict=True)])


def test_gradnormlorp() -> None:
    """V follows GaLore and g follows Adam, on the analytic gradients of W = g V / ||V||."""
    (weight, *_), (grads, *_) = problem()
    model = nn.Sequential(nn.Linear(8, 12, bias=False, dtype=torch.float64))
    model[0].weight.data.copy_(weight)
    optimizer = wo.gradnormlorp(model, rank=3, refresh=EVERY, projection="svd")
    assert torch.allclose(model[0].weight, weight)
    g, V = weight.norm(dim=1, keepdim=True), weight.clone()
    seen_g: list[Tensor] = []
    seen_V: list[Tensor] = []
    for t in range(STEPS):
        optimizer.zero_grad()
        (model[0].weight * grads[t]).sum().backward()
        optimizer.step()
        dg, dV = reference.weight_norm_gradients(V, g, grads[t])
        seen_g, seen_V = [*seen_g, dg], [*seen_V, dV]
        g = reference.adam_whole(weight.norm(dim=1, keepdim=True), seen_g, 1e-2, (0.9, 0.999), 1e-6)
        V = reference.galore(weight, seen_V, rank=3, lr=1e-2, refresh=EVERY, scale=0.25)
    assert (model[0].weight - g * V / V.norm(dim=1, keepdim=True)).abs().max() < 1e-6
    value = model[0].weight.detach().clone()
    wo.fold_weights(model)
    assert isinstance(model[0].weight, nn.Parameter) and torch.equal(model[0].weight, value)


def test_galore_8bit_stays_near_galore() -> None:
    """8 bits are not exact; the trajectory stays close to the fp32 one, and the state shrinks."""
    g = rng(0)
    start = torch.randn(128, 96, generator=g)
    grads = [torch.randn(128, 96, generator=g) for _ in range(STEPS)]
    finals, sizes = [], []
    for inner in (None, "8bit"):
        p = nn.Parameter(start.clone())
        groups = [{"params": [p], "rank": 64}]
        optimizer = wo.galore_8bit(groups) if inner else wo.galore(groups, eps=1e-8)
        for grad in grads:
            p.grad = grad
            optimizer.step()
        finals.append(p.detach() - start)
        sizes.append(sum(v.numel() * v.element_size() for k, v in optimizer.state[p].items() if k.startswith("exp")))
    assert (finals[0] - finals[1]).norm() < 0.1 * finals[0].norm()
    assert sizes[1] < 0.3 * sizes[0]


# --- the references against the released packages ---------------------------------------------------------------------


def peer_step(optimizer: Any, params: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for t in range(STEPS):
        for p, g in zip(params, grads, strict=True):
            p.grad = g[t].clone()
        optimizer.step()


def test_reference_galore_is_galore_torch() -> None:
    galore_torch = pytest.importorskip("galore_torch")
    weights, grads = problem(torch.float32)
    params = [nn.Parameter(w.clone()) for w in weights]
    group = {"params": params, "rank": 3, "update_proj_gap": EVERY, "scale": 0.25, "proj_type": "std"}
    peer = galore_torch.GaLoreAdamW([group], lr=1e-2, weight_decay=WD, no_deprecation_warning=True)
    peer_step(peer, params, grads)
    settings = {"rank": 3, "lr": 1e-2, "refresh": EVERY, "scale": 0.25, "wd": WD, "basis": reference.svd_raw}
    close(params, [reference.galore(w, g, **settings) for w, g in zip(weights, grads, strict=True)], 1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_reference_apollo_is_apollo_torch(granularity: str) -> None:
    apollo_torch = pytest.importorskip("apollo_torch")
    weights, grads = problem(torch.float32)
    params = [nn.Parameter(w.clone()) for w in weights]
    group = {"params": params, "rank": 3, "proj": "svd", "update_proj_gap": EVERY, "scale": 4.0, "proj_type": "std"}
    peer = apollo_torch.APOLLOAdamW([group | {"scale_type": granularity}], lr=1e-2, weight_decay=WD)
    peer_step(peer, params, grads)
    settings = {"rank": 3, "lr": 1e-2, "refresh": EVERY, "scale": 4.0, "wd": WD, "granularity": granularity}
    expected = [
        reference.apollo(w, g, **settings, basis=reference.svd_raw) for w, g in zip(weights, grads, strict=True)
    ]
    close(params, expected, 1e-4)


def test_names_of_the_pieces_in_use() -> None:
    """The presets are made of the projections they claim."""
    kinds = {"galore": SVD, "frugal": Blocks, "apollo": Gaussian, "dct_adamw": DCT}
    for name, kind in kinds.items():
        p = nn.Parameter(torch.zeros(8, 8))
        extra = {"projection": "svd"} if name == "galore" else {}
        optimizer = wo.OPTIMIZERS[name]([{"params": [p], "rank": 2 if name != "frugal" else 0.25}], **extra)
        assert f"projection={kind.__name__}(" in optimizer.param_groups[0]["recipe"]
