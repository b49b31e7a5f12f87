"""The invariants of the adapters of other structures than low rank: bone, soka, compacter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.io.adapters import save_adapter
from weft.linalg.kronecker import balanced_divisor, kronecker_sum, kronecker_svd, rearrange
from weft.methods import METHODS, soka
from weft.terms import BlockAffine, Kronecker, ShardSum, Shifted
from weft.terms.adapters import find_adapter
from weft.terms.factors import exact_factors
from weft.testing_adapters import PROPERTIES, adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, trainable

OUT, IN, R = 24, 20, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    a, b = a.detach().double(), b.detach().double()
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max().clamp(min=1e-30)), rtol=0)


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.layer.weight = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def one(method: str, W: Tensor, rank: int = R, **options: Any) -> One:
    return adapt(One(W), method, rank, **options)  # type: ignore[return-value]


@pytest.fixture
def with_options(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run conformance properties on a method whose defaults are others."""

    def run(name: str, properties: str, **options: Any) -> None:
        method = METHODS[name]
        monkeypatch.setitem(METHODS, name, replace(method, defaults={**method.defaults, **options}))
        for prop in properties.split():
            PROPERTIES[prop](METHODS[name])

    return run


# ---- bone

VARIANTS = [("balance", {}), ("mini", {"mini_r": 6}), ("bat", {})]


@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_bone_starts_on_the_weight_exactly(variant: str, options: dict[str, int]) -> None:
    W, x = drawn(OUT, IN), drawn(7, IN, seed=1)
    model = one("bone", W, variant=variant, **options)
    assert torch.equal(model(x), One(W)(x))
    assert trainable(model).count == R * options.get("mini_r", OUT)


@pytest.mark.parametrize("rank", [4, 7, 20])
def test_bone_balance_is_lora_with_a_binary_A(rank: int) -> None:
    """Also where the last shard is shorter than the others."""
    W, x = drawn(OUT, IN), drawn(3, 7, IN, seed=1)
    model = one("bone", W, rank)
    term = model.layer.terms["default"]
    assert isinstance(term, ShardSum) and term.num_params == rank * OUT
    term.D.data = drawn(rank, OUT, seed=2)
    A = torch.zeros(rank, IN)
    for c in range(IN):
        A[c % rank, c] = 1
    close(model(x), x @ (W + term.D.mT @ A).mT, 1e-6)
    assert int(torch.linalg.matrix_rank(term.dense(), rtol=1e-5)) == rank
    B, binary = exact_factors(term)
    assert torch.equal(binary, A) and torch.equal(B, term.D.mT)


def test_bone_mini_repeats_its_columns() -> None:
    model = one("bone", drawn(OUT, IN), variant="mini", mini_r=6)
    term = model.layer.terms["default"]
    term.D.data = drawn(R, 6, seed=2)
    y = term(drawn(7, IN, seed=1))
    for turn in range(1, OUT // 6):
        assert torch.equal(y[:, :6], y[:, 6 * turn : 6 * turn + 6])
    loop = torch.tensor([[float(term.D[c % R, o % 6].detach()) for c in range(IN)] for o in range(OUT)])
    close(term.dense(), loop)


def bat(W: Tensor) -> tuple[One, BlockAffine]:
    model = one("bone", W, variant="bat")
    term = model.layer.terms["default"]
    assert isinstance(term, BlockAffine)
    term.D.data = 0.5 * drawn(OUT // R, R, R, seed=2)
    return model, term


def test_bone_bat_is_the_closed_form_and_can_be_undone() -> None:
    W, x = drawn(OUT, IN), drawn(7, IN, seed=1)
    model, term = bat(W)
    eye, changed, back = torch.eye(R), torch.empty(OUT, IN), torch.empty(OUT, IN)
    for i in range(OUT // R):
        for j in range(IN // R):
            block = slice(R * i, R * i + R), slice(R * j, R * j + R)
            changed[block] = (W[block] + eye) @ (eye + term.D[i].detach()) - eye
            back[block] = (changed[block] - term.D[i].detach()) @ torch.linalg.inv(eye + term.D[i].detach())
    close(model(x), x @ changed.mT)
    close(model.layer.dense(), changed, 1e-6)
    close(back, W)
    assert int(torch.linalg.matrix_rank(changed - W)) == IN
    assert torch.equal(weft.remove_adapter(model).layer.weight, W)


def test_bone_bat_cannot_stand_beside_another_transformation() -> None:
    model, _ = bat(drawn(OUT, IN))
    with pytest.raises(WeftError, match="one at a time"):
        adapt(model, "dora", R, name="second")
    W, x = model.layer.dense().detach(), drawn(7, IN, seed=1)
    adapt(model, "lora", R, name="second")
    close(model(x), x @ W.mT)


@pytest.mark.parametrize(("variant", "init", "mini_r"), [("balance", True, 1), ("mini", "mini", 8), ("bat", "bat", 1)])
def test_bone_agrees_with_pefts_miss(variant: str, init: Any, mini_r: int) -> None:
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "up_proj", "down_proj"]
    config = peft.MissConfig(r=R, mini_r=mini_r, init_weights=init, target_modules=modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), config).eval()
    ours = adapt(tiny_llama(), "bone", R, targets=modules, variant=variant, mini_r=mini_r)
    for layer, terms in find_adapter(ours).terms.items():
        block = theirs.get_base_model().get_submodule(layer).miss_block["default"]
        block.data = 0.1 * drawn(*block.shape, seed=len(layer))
        assert terms["default"].D.shape == block.shape
        terms["default"].D.data = block.data.clone()
    for model in (ours, theirs):
        model(**task()[0]).loss.backward()
    for layer, terms in find_adapter(ours).terms.items():
        close(terms["default"].D.grad, theirs.get_base_model().get_submodule(layer).miss_block["default"].grad, 1e-4)
    ids = task()[0]["input_ids"]
    close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("options", [{}, {"variant": "mini", "mini_r": 8}])
def test_bone_is_a_lora_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(METHODS["bone"], **options)
    train(model, 3)
    save_adapter(model, tmp_path / "adapter", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    ids = task()[0]["input_ids"]
    close(theirs(ids).logits, model(ids).logits)
    assert (model(ids).logits - tiny_llama()(ids).logits).abs().max() > 1e-3


def test_bone_bat_has_no_peft_form(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="no product of two thin matrices"):
        save_adapter(adapted(METHODS["bone"], variant="bat"), tmp_path / "adapter", format="peft")


@pytest.mark.parametrize("options", [{"variant": "bat"}, {"variant": "mini", "mini_r": 8}])
def test_bone_variants_have_every_property(options: dict[str, Any], with_options: Callable[..., None]) -> None:
    with_options("bone", " ".join(PROPERTIES), **options)


def test_bone_refuses_blocks_that_do_not_fit() -> None:
    W = drawn(OUT, IN)
    with pytest.raises(WeftError, match="do not divide the in side of layer"):
        one("bone", W, 8, variant="bat")
    with pytest.raises(WeftError, match="do not divide the out side of layer"):
        one("bone", W, variant="mini", mini_r=7)
    with pytest.raises(WeftError, match="from 1 to 20"):
        one("bone", W, 21)
    with pytest.raises(WeftError, match="nearest are: mini"):
        one("bone", W, variant="miny")


# ---- soka

SPLITS = [((6, 5), (4, 4)), ((4, 3), (6, 7)), ((3, 8), (5, 2)), ((1, 4), (9, 5))]  # of U and of V


@pytest.mark.parametrize(("left", "right"), SPLITS)
def test_a_sum_of_kronecker_products_is_found_again(left: tuple[int, int], right: tuple[int, int]) -> None:
    U, V = drawn(3, *left), drawn(3, *right, seed=1)
    W = sum(torch.kron(u, v) for u, v in zip(U, V, strict=True))
    close(kronecker_sum(U, V), W)
    A, s, B = kronecker_svd(W, left)
    assert int((s > 1e-5 * s[0]).sum()) == 3
    close(kronecker_sum(s[:3].view(-1, 1, 1) * A[:3], B[:3]), W)
    # U[i, j] V[k, l] stands at row i m2 + k and column j n2 + l
    R = rearrange(W, left)
    i, j, k, m = left[0] - 1, 1, right[0] - 2, 1
    assert R[i * left[1] + j, k * right[1] + m] == W[i * right[0] + k, j * right[1] + m]


@pytest.mark.parametrize("count", [1, 5])
def test_kronecker_svd_is_optimal(count: int) -> None:
    W = drawn(OUT, IN)
    U, s, V = kronecker_svd(W, (6, 5))
    cut = kronecker_sum(s[:count].view(-1, 1, 1) * U[:count], V[:count])
    close((W - cut).square().sum(), s[count:].square().sum(), 1e-4)
    for factors in (U, V):
        close(factors.flatten(1) @ factors.flatten(1).mT, torch.eye(len(s)))
    if count == 1:  # alternating least squares finds no nearer product
        u, v = drawn(6, 5, seed=2), drawn(4, 4, seed=3)
        blocks = W.view(6, 4, 5, 4)
        for _ in range(200):
            v = torch.einsum("ikjl,ij->kl", blocks, u) / u.square().sum()
            u = torch.einsum("ikjl,kl->ij", blocks, v) / v.square().sum()
        close(torch.kron(u, v), cut, 1e-3)


def test_kronecker_svd_of_columns_and_rows_is_the_svd() -> None:
    W = drawn(OUT, IN)
    U, s, V = kronecker_svd(W, (OUT, 1))
    close(s, torch.linalg.svdvals(W))
    close((U[:, :, 0].mT * s) @ V[:, 0], W)


@pytest.mark.parametrize(("left", "right"), SPLITS)
def test_the_fast_product_is_the_slow_one(left: tuple[int, int], right: tuple[int, int]) -> None:
    U, V = drawn(3, *left), drawn(3, *right, seed=1)
    term = Kronecker.from_factors(U, V)
    x = drawn(2, 7, left[1] * right[1], seed=2)
    close(term(x), x @ sum(torch.kron(u, v) for u, v in zip(U, V, strict=True)).mT)


@pytest.mark.parametrize("options", [{}, {"block": (6, 4)}])
def test_soka_starts_on_the_principal_products(options: dict[str, Any]) -> None:
    W, x = drawn(OUT, IN), drawn(7, IN, seed=1)
    model = one("soka", W, energy=None, elbow=False, **options)
    term = model.layer.terms["default"]
    assert isinstance(term, Shifted) and isinstance(term.now, Kronecker)
    assert torch.equal(model(x), One(W)(x))
    m1, n1 = soka.blocks(OUT, IN, options.get("block"))
    assert (m1, n1) == ((4, 5) if options else (4, 4))
    assert trainable(model).count == R * (m1 * n1 + OUT * IN // (m1 * n1))
    s = kronecker_svd(W, (m1, n1))[1]
    close((W - term.now.dense()).square().sum(), s[R:].square().sum(), 1e-4)
    for factors in (term.now.U, term.now.V):
        close(factors.flatten(1) @ factors.flatten(1).mT, torch.diag(s[:R]))
    assert int(torch.linalg.matrix_rank(term.now.dense()[:, :IN], rtol=1e-5)) > R
    term.now.U.data += 0.1
    close(model(x), x @ model.layer.dense().mT)


def spread_out(values: list[float]) -> Tensor:
    """A 16 x 16 weight of these Kronecker singular values."""
    Q, P = (torch.linalg.qr(drawn(16, 16, seed=seed))[0] for seed in (0, 1))
    s = torch.tensor(values + [0.0] * (16 - len(values)))
    return kronecker_sum((s.unsqueeze(1) * Q).view(16, 4, 4), P.view(16, 4, 4))


def test_soka_keeps_what_the_spectrum_asks_for() -> None:
    W = spread_out([3.0, 2.0, 1.0, 0.5])  # 9 + 4 + 1 + 0.25 of 14.25
    for energy, count in ((0.5, 1), (0.9, 2), (0.98, 3), (0.999, 4)):
        model = one("soka", W, 8, energy=energy, elbow=False)
        assert model.layer.terms["default"].now.count == count
        assert trainable(model).count == count * 32
    assert one("soka", W, 2, energy=0.999).layer.terms["default"].now.count == 2  # the cap
    steep = [8.0, 7.0, 6.0] + [0.1 * 0.97**i for i in range(13)]
    assert one("soka", spread_out(steep), 16, energy=1.0).layer.terms["default"].now.count == 3
    for smooth in ([2.0**-i for i in range(16)], [1.0] * 16, [2.0, 1.0], []):
        assert soka.elbow_of(torch.tensor(smooth)) == len(smooth)
    assert one("soka", torch.zeros(16, 16)).layer.terms["default"].now.count == 1


def test_soka_refuses_what_does_not_fit() -> None:
    with pytest.raises(WeftError, match="do not divide"):
        one("soka", drawn(OUT, IN), block=(7, 4))
    with pytest.raises(WeftError, match="share"):
        one("soka", drawn(OUT, IN), energy=90.0)
    with pytest.raises(WeftError, match="from 1 to 16"):
        one("soka", drawn(OUT, IN), 17)


def test_balanced_divisors() -> None:
    assert [balanced_divisor(n) for n in (4096, 11008, 7, 1, 12)] == [64, 86, 1, 1, 3]
