"""Methods whose numbers are shared or recomputed: the invariants of their papers, against slow loops and other
libraries.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import weft
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.linalg import counter
from weft.linalg.fastfood import fastfood, fastfood_transposed, fwht
from weft.methods import METHODS, Site, mos
from weft.rules.replicated import shared_parameters
from weft.terms import Dense, PooledLowRank, RandomCombination, RandomProducts, RandomStore, random_combination
from weft.terms.adapters import find_adapter
from weft.terms.projected import project
from weft.testing_adapters import RANK, adapted, task, tiny_llama, train
from weft.verbs.adapt import adapt, trainable

IDS = task()[0]["input_ids"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance * float(b.abs().max().clamp(min=1e-30)), rtol=0)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(IDS).logits
    return out


def deep_llama(layers: int = 3) -> nn.Module:
    """Several blocks, so that something can be shared between them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model.eval()


def in_peft(make: Any, path: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: nn.Module = peft.PeftModel.from_pretrained(make(), path)
    return loaded


# ---- numbers that are computed


def slow_word(seed: int, row: int, column: int) -> int:
    """The definition, on Python's integers."""
    mask = 0xFFFFFFFF

    def hashed(x: int) -> int:
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & mask
        x = ((x ^ (x >> 12)) * 0x297A2D39) & mask
        return x ^ (x >> 15)

    low, high = seed & mask, seed >> 32 & mask
    down = hashed(hashed((row + high) & mask) ^ low)
    word = ((down ^ hashed((column + (low ^ 0x9E3779B9)) & mask)) * 0x2C1B3C6D) & mask
    return ((word ^ (word >> 15)) * 0x297A2D39) & mask


def slow_number(seed: int, row: int, column: int) -> float:
    top = slow_word(seed, row, column) >> 8
    return (top - (1 << 24) if top >> 23 else top) / 2**23


def slow_levels(word: int) -> list[float]:
    """The four bytes of a word, lowest first, each in -255/256 .. 255/256."""
    return [(2 * byte - 512 * (byte >> 7) + 1) / 256 for byte in (word ^ word >> 15).to_bytes(4, "little")]


def levels(seed: int, columns: int, rows: tuple[int, int]) -> Tensor:
    return torch.cat([block for *_, block in counter.levels(seed, columns, rows[1], chunk=3 * columns)])[rows[0] :]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_numbers_are_those_of_their_definition(seed: int, row: int) -> None:
    block = counter.symmetric(seed, 9, (row, row + 2))
    assert block.dtype == torch.float32 and block.abs().max() <= 1
    assert block.tolist() == [[slow_number(seed, row + i, j) for j in range(9)] for i in range(2)]
    assert torch.equal(counter.symmetric(seed, 9, (row + 1, row + 2)), block[1:]), "a part is not that of the whole"
    assert torch.equal(counter.uniform(seed, 9, (row, row + 2)) * 2 - 1, block)
    slow = [[x for j in range(3) for x in slow_levels(slow_word(seed, i, j))][:10] for i in range(2)]
    assert levels(seed, 10, (0, 2)).tolist() == slow


@pytest.mark.parametrize("law", [counter.symmetric, levels])
@pytest.mark.parametrize("seed", [0, 1, counter.subseed(5, 1)])
def test_numbers_look_random(seed: int, law: Callable[..., Tensor]) -> None:
    u = law(seed, 50_000, (0, 16)).double()
    n = u.numel()
    assert abs(float(u.mean())) < 5 / math.sqrt(3 * n) and abs(float(u.var() * 3) - 1) < 0.01
    correlation = torch.corrcoef(torch.cat([u, law(seed + 1, 50_000, (0, 4)).double()])) * math.sqrt(5e4)
    assert correlation.fill_diagonal_(0).abs().max() < 6
    flat = u.flatten()
    assert max(abs(float((flat[:-lag] * flat[lag:]).mean()) * 3 * math.sqrt(n)) for lag in (1, 2, 16, 256)) < 6
    counts = torch.histc(u.float(), 256, -1, 1)
    assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 255 + 6 * math.sqrt(510)


@pytest.mark.parametrize("seed", [0, 1, counter.subseed(5, 1)])
def test_normal_numbers_and_signs(seed: int) -> None:
    g = counter.normal(seed, 200_000).double()
    assert abs(float(g.mean())) < 0.012 and abs(float(g.std()) - 1) < 0.01 and abs(float((g**4).mean()) - 3) < 0.1
    assert set(counter.signs(seed, 100).tolist()) == {-1.0, 1.0}


@given(st.integers(0, 2**63 - 1), st.integers(0, 11))
def test_permutations_are_permutations(seed: int, bits: int) -> None:
    order = counter.permutation(seed, bits)
    assert torch.equal(order.sort().values, torch.arange(1 << bits))


def test_permutations_mix() -> None:
    order = counter.permutation(3, 14).double()
    place = torch.arange(1 << 14).double()
    for a, b in ((order, place), (order[1:], order[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / 128
    assert not torch.equal(order, counter.permutation(4, 14).double())


# ---- nola


def stored_basis(term: RandomCombination) -> tuple[Tensor, Tensor]:
    """P (k, r, in) and Q (k, out, r) as whole tensors."""
    k, r = term.num_basis, term.rank
    P, Q = (
        levels(counter.subseed(term.seed, part), size, (0, k)) / math.sqrt(k)
        for part, size in ((0, r * term.in_features), (1, term.out_features * r))
    )
    return P.view(k, r, term.in_features), Q.view(k, term.out_features, r)


def some_nola(num_basis: int = 6, *, out: int = 12, width: int = 8, rank: int = 3, seed: int = 5) -> RandomCombination:
    term = RandomCombination(width, out, rank, num_basis, seed, scale=0.5)
    term.c, term.d = nn.Parameter(drawn(num_basis, seed=1)), nn.Parameter(drawn(num_basis, seed=2))
    return term


def test_nola_starts_at_the_base_and_d_moves_first() -> None:
    model = adapted(METHODS["nola"], num_basis=16)
    assert torch.equal(logits(model), logits(tiny_llama()))
    model(**task()[0]).loss.backward()
    for term in find_adapter(model).all_terms():
        assert isinstance(term, RandomCombination)
        assert not term.c.grad.any() and term.d.grad.any()


def test_nola_backward_equals_autograd_through_a_stored_basis() -> None:
    term, x, g = some_nola(), drawn(5, 8, seed=3), drawn(5, 12, seed=4)
    (term(x) * g).sum().backward()
    P, Q = stored_basis(term)
    c, d = (p.detach().clone().requires_grad_() for p in (term.c, term.d))
    A = term.start() + torch.einsum("k,kri->ri", c, P)
    B = torch.einsum("k,kor->or", d, Q)
    y = 0.5 * x @ A.T @ B.T
    (y * g).sum().backward()
    close(term(x).detach(), y.detach(), 1e-6)
    close(term.c.grad, c.grad, 1e-6)
    close(term.d.grad, d.grad, 1e-6)


def test_nola_is_the_same_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def value_and_gradient() -> list[Tensor]:
        term = some_nola(num_basis=50)
        term(drawn(5, 8)).square().sum().backward()
        return [term.dense().detach(), term.c.grad, term.d.grad]

    whole = value_and_gradient()
    assert all(torch.equal(a, b) for a, b in zip(whole, value_and_gradient(), strict=True))
    monkeypatch.setattr(random_combination, "_CHUNK", 100)
    for a, b in zip(value_and_gradient(), whole, strict=True):
        close(a, b, 1e-6)


class Largest(TorchDispatchMode):
    """The most numbers that any one operation made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("num_basis", [200, 2000])
def test_nola_memory_does_not_grow_with_k(num_basis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_combination, "_CHUNK", 4096)
    term, kept = some_nola(num_basis), []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        term(drawn(5, 8)).square().sum().backward()
    assert largest.numbers <= max(4096, num_basis)
    assert sum(t.numel() for t in {id(t): t for t in kept}.values()) < 400, "the basis is kept for backward"


def test_nola_reaches_any_factor_and_projects_below() -> None:
    term = some_nola(num_basis=24)  # = r * in
    P, _ = stored_basis(term)
    wanted = drawn(3, 8, seed=9)
    basis = P.flatten(1).mT.double()
    solution = torch.linalg.lstsq(basis, (wanted - term.start()).flatten().double()).solution
    term.c = nn.Parameter(solution.float())
    close(term.factors()[1].detach(), wanted, 1e-4)
    big = some_nola(num_basis=300, width=100, rank=10)
    P, _ = stored_basis(big)
    basis, wanted = P.flatten(1).mT.double(), drawn(1000, seed=4).double()
    residual = wanted - basis @ torch.linalg.lstsq(basis, wanted).solution
    assert abs(float(residual.norm() / wanted.norm()) / math.sqrt(1 - 300 / 1000) - 1) < 0.05


@pytest.mark.parametrize("k", [16, 256])
def test_nola_spread_does_not_depend_on_k(k: int) -> None:
    several = [float(random_combination.combine(drawn(k, seed=s), s, (10, 20)).var()) for s in range(60)]
    assert abs(math.sqrt(sum(several) / 60) * math.sqrt(3) - 1) < 0.08


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_nola_counts_do_not_depend_on_rank(rank: int) -> None:
    model = adapt(tiny_llama(), "nola", rank, num_basis=10)
    assert trainable(model).count == 7 * 2 * 10


def test_nola_saves_coefficients_and_a_seed(tmp_path: Path) -> None:
    model = adapted(METHODS["nola"], num_basis=10)
    train(model, 2)
    save_adapter(model, tmp_path / "a", format="weft")
    state = load_file(tmp_path / "a" / "weft_adapter.safetensors")
    assert all(key.endswith((".main.c", ".main.d")) and t.shape == (10,) for key, t in state.items())
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "a")), logits(model))
    config = json.loads((tmp_path / "a" / "weft_adapter.json").read_text())
    next(iter(config["layers"].values()))["main"]["spec"]["check"][0] += 1e-3
    (tmp_path / "a" / "weft_adapter.json").write_text(json.dumps(config))
    with pytest.raises(WeftError, match="its random numbers are not those of this weft"):
        load_adapter(tiny_llama(), tmp_path / "a")


def test_nola_in_peft_gives_our_logits(tmp_path: Path) -> None:
    model = adapted(METHODS["nola"], num_basis=32, alpha=6.0)
    train(model, 5, lr=5e-2)
    save_adapter(model, tmp_path / "a", format="peft")
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-3
    close(logits(in_peft(tiny_llama, tmp_path / "a")), logits(model))


def test_nola_refuses_no_basis() -> None:
    with pytest.raises(WeftError, match="at least one random matrix"):
        adapt(tiny_llama(), "nola", RANK, num_basis=0)


def test_nola_lean_keeps_gradients() -> None:
    gradients = []
    for lean in (False, True):
        model = adapted(METHODS["nola"], num_basis=8)
        if lean:
            weft.lean(model)
        model.train()(**task()[0]).loss.backward()
        gradients.append({name: p.grad for name, p in trainable(model).parameters.items()})
    for name, grad in gradients[0].items():
        close(gradients[1][name], grad, 1e-4)


# ---- randlora


def some_randlora(out: int, width: int, rank: int = 3, *, seed: int = 5, law: str = "uniform") -> RandomProducts:
    short, long = sorted((out, width))
    store = RandomStore(seed, rank, -(-short // rank) + 2, long + 3, short + 4, law)
    term = RandomProducts(width, out, store, scale=0.5)
    term.Lambda = nn.Parameter(drawn(*term.Lambda.shape, seed=1))
    term.Gamma = nn.Parameter(drawn(*term.Gamma.shape, seed=2))
    return term


def grouped(term: RandomProducts) -> Tensor:
    """The formula, one product at a time, from the store itself."""
    B, A = term.store.on(torch.device("cpu"))
    B = B.view(term.store.long, term.store.products, term.store.rank)[: term.long]
    total = torch.zeros(term.long, term.short)
    for n in range(term.products):
        total = total + B[:, n] @ torch.diag(term.Lambda[:, n]) @ A[:, : term.short] @ torch.diag(term.Gamma[n])
    return 0.5 * (total if term.in_features == term.short else total.T)


SHAPES = [(14, 8), (8, 14), (8, 8)]


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_randlora_is_its_sum_of_products(out: int, width: int) -> None:
    term, x, g = some_randlora(out, width), drawn(5, width, seed=3).requires_grad_(), drawn(5, out, seed=4)
    close(term.dense().detach(), grouped(term).detach(), 1e-6)
    parameters = (x, term.Lambda, term.Gamma)
    expected = torch.autograd.grad((x @ grouped(term).T * g).sum(), parameters)
    found = torch.autograd.grad((term(x) * g).sum(), parameters)
    close(term(x).detach(), (x @ grouped(term).T).detach(), 1e-6)
    for mine, slow in zip(found, expected, strict=True):
        close(mine, slow, 1e-5)


@pytest.mark.parametrize(("out", "width", "rank"), [(32, 48, 5), (80, 32, 5), (16, 16, 16)])
def test_randlora_has_full_rank(out: int, width: int, rank: int) -> None:
    assert torch.linalg.matrix_rank(some_randlora(out, width, rank).dense().double()) == min(out, width)


def test_randlora_degenerate_scalings() -> None:
    one = some_randlora(20, 12)
    with torch.no_grad():
        one.Lambda[:, 1:] = 0
    assert torch.linalg.matrix_rank(one.dense().double(), rtol=1e-5) == 3
    constant = some_randlora(20, 12)
    constant.Gamma = nn.Parameter(torch.full_like(constant.Gamma, 0.5))
    assert torch.linalg.matrix_rank(constant.dense().double(), rtol=1e-5) == 3
    vera = some_randlora(20, 12, 12)  # N = 1: B diag(lambda) A diag(gamma)
    B, A = vera.bases(torch.device("cpu"))
    close(vera.dense().detach(), (0.5 * (B * vera.Lambda[:, 0]) @ A * vera.Gamma[0]).detach(), 1e-6)


def test_randlora_starts_at_the_base_and_lambda_moves_first() -> None:
    model = adapted(METHODS["randlora"])
    assert torch.equal(logits(model), logits(tiny_llama()))
    model(**task()[0]).loss.backward()
    for term in find_adapter(model).all_terms():
        assert isinstance(term, RandomProducts)
        assert not term.Gamma.grad.any() and term.Lambda.grad.any()
        assert term.Gamma.unique().tolist() == [1 / max(term.Gamma.shape)]
        assert math.isclose(term.scale, 2 / math.sqrt(term.products))


@pytest.mark.parametrize("rank", [2, 5, 16])
def test_randlora_counts(rank: int) -> None:
    model = adapt(tiny_llama(), "randlora", rank)
    products = math.ceil(16 / rank)
    assert trainable(model).count == 7 * products * (rank + 16)


def test_randlora_keeps_one_store_and_saves_none(tmp_path: Path) -> None:
    model = adapt(deep_llama(), "randlora", RANK)
    stores = {id(term.store): term.store for term in find_adapter(model).all_terms()}
    (store,) = stores.values()
    train(model, 2)
    assert (store.long, store.short, store.products) == (32, 16, 4) and store.nbytes == 4 * (32 * 16 + 4 * 16)
    save_adapter(model, tmp_path / "a")
    state = load_file(tmp_path / "a" / "weft_adapter.safetensors")
    assert all(key.endswith((".Lambda", ".Gamma")) for key in state)
    other = load_adapter(deep_llama(), tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert len({id(term.store) for term in find_adapter(other).all_terms()}) == 1
    twin = copy.deepcopy(other)
    assert len({id(term.store) for term in find_adapter(twin).all_terms()}) == 1
    assert len(pickle.dumps(store)) < 1000, "a pickle holds the matrices"


def test_randlora_saved_whole(tmp_path: Path) -> None:
    model = adapt(deep_llama(), "randlora", RANK)
    train(model, 2)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert len({id(m.store) for m in again.modules() if isinstance(m, RandomProducts)}) == 1


@pytest.mark.parametrize("law", ["uniform", "sparse", "very_sparse"])
def test_the_laws_of_a_store(law: str) -> None:
    store = RandomStore(3, 8, 50, 400, 100, law)
    B, A = store.on(torch.device("cpu"))
    for matrix in (B, A):
        assert abs(float(matrix.double().std()) - 1) < 1e-6
    if law == "uniform":
        assert abs(float(B.max()) - math.sqrt(3)) < 0.01
        return
    share = 1 / 3 if law == "sparse" else 1 / math.sqrt(100)
    assert len(B.unique()) == 3 and abs(float((B != 0).double().mean()) / share - 1) < 0.03
    assert abs(float((B > 0).double().mean()) * 2 / share - 1) < 0.05
    with pytest.raises(WeftError, match="law of a random store"):
        RandomStore(3, 8, 50, 400, 100, "gaussian")


def test_randlora_keeps_x_alone_for_backward() -> None:
    term, kept = some_randlora(40, 24), []
    x = drawn(5, 24).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        term(x)
    own = {t.data_ptr() for t in (x, term.Lambda, term.Gamma, *term.bases(x.device))}
    assert kept and all(t.data_ptr() in own for t in kept), "a scaled copy of A, or a slice of B, is kept"


def test_randlora_refuses_two_ranks() -> None:
    model = tiny_llama()
    layers = [f"model.layers.0.self_attn.{m}" for m in ("q_proj", "v_proj")]
    with pytest.raises(WeftError, match="give all layers one rank"):
        adapt(model, "randlora", 4, ranks={layers[0]: 4, layers[1]: 2}, targets=["q_proj", "v_proj"])


def test_randlora_agrees_with_peft_after_pairing() -> None:
    """PEFT's own tensors: its flattening pairs column (n, k) of B with another row of A; undone, nothing differs."""
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=RANK, randlora_alpha=8, target_modules="all-linear", projection_prng_key=3)
    theirs = peft.get_peft_model(tiny_llama(), config)
    ours = adapt(tiny_llama(), "randlora", RANK, alpha=16.0)  # N = 4: 8 / r = 16 / (r sqrt(N))
    core = theirs.base_model
    products = 16 // RANK  # PEFT's store is for 32 x 32, the largest out and the largest in
    A, B = core.randlora_A["default"].float()[:, 0], core.randlora_B["default"].float()[:, :products]
    for layer, terms in find_adapter(ours).terms.items():
        term, module = terms["default"], core.model.get_submodule(layer)
        with torch.no_grad():
            module.randlora_lambda["default"].copy_(drawn(*term.Lambda.shape, seed=len(layer)))
            module.randlora_gamma["default"].copy_(drawn(*term.Gamma.shape, seed=1) / 16)
            term.Lambda.copy_(module.randlora_lambda["default"])
            term.Gamma.copy_(module.randlora_gamma["default"])
    paired = B.flatten(1).view(-1, RANK, products).transpose(1, 2).flatten(1)
    store = find_adapter(ours).all_terms()[0].store
    store._kept = {torch.device("cpu"): (paired.contiguous(), A)}
    close(logits(ours), logits(theirs))
    store._kept = {torch.device("cpu"): (B.flatten(1), A)}
    assert (logits(ours) - logits(theirs)).abs().max() > 0.1 * logits(theirs).abs().max()


# ---- mos

MOS = {"equivalent_rank": 2, "private_rank": 1, "shards": 2, "alpha": 16, "dropout": 0.0}


def llama_shapes(layers: int, hidden: int, mlp: int) -> dict[str, tuple[int, int]]:
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    sizes = attention | {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in sizes.items()}


@pytest.mark.parametrize(("e", "count"), [(2, 4_997_120), (8, 19_988_480)])
def test_mos_counts_those_of_lora_at_the_equivalent_rank(e: int, count: int) -> None:
    shapes, method = llama_shapes(32, 4096, 11008), METHODS["mos"]
    assert method.count_shared is not None
    assert method.count_shared(shapes, 4 * e, method.options({"equivalent_rank": e})) == count
    assert method.count_shared(shapes, 4 * e, method.options({})) == count, "r / 4 is the default"
    model = adapt(deep_llama(), "mos", 4, **MOS)
    lora = adapt(deep_llama(), "lora", 2)
    assert trainable(model).count == trainable(lora).count


def test_mos_draws_as_the_paper_says() -> None:
    shapes = llama_shapes(5, 16, 24)
    options = METHODS["mos"].options({"equivalent_rank": 3, "private_rank": 1, "shards": 4})
    pools = mos.share(shapes, 6, torch.Generator().manual_seed(1), options)
    again = mos.share(shapes, 6, torch.Generator().manual_seed(1), options)
    assert len({id(pool) for pool in pools.values()}) == 7, "one pool for each kind of layer"
    for name in ("q_proj", "down_proj"):
        members = [layer for layer in shapes if layer.endswith(name)]
        pool = pools[members[0]]
        out, width = shapes[members[0]]
        pieces = pool.pieces.on(Site("", {"base": Dense(1, 1)}, 1, 1, {}, torch.Generator()))
        assert pieces["A"].shape == (3 * 5 * 4, width // 4) and pieces["B"].shape == (3 * 5 * 4, out // 4)
        largest = pieces["A"].abs().max()
        assert largest <= 1 / math.sqrt(width) < 1.1 * largest and not pieces["B"].any()
        public = 2 * 5 * 4
        owned: list[int] = []
        for layer in members:
            index_A, index_B = pools[layer].indices[layer]
            assert len(index_A) == len(index_B) == 6 * 4
            for index in (index_A, index_B):
                drawn_rows, own = index[:20], index[20:]
                assert len(drawn_rows.unique()) == 20 and drawn_rows.max() < public
                assert own.min() >= public
            assert torch.equal(index_A[20:], index_B[20:]), "private pairs are torn"
            assert not torch.equal(index_A, index_B), "the public pairs are not dissociated"
            owned += index_A[20:].tolist()
            assert all(
                torch.equal(a, b) for a, b in zip(pools[layer].indices[layer], again[layer].indices[layer], strict=True)
            )
        assert sorted(owned) == list(range(public, 3 * 5 * 4)), "private pieces are not each owned by one block"


def test_mos_assembles_pieces_bit_for_bit() -> None:
    model = adapt(deep_llama(), "mos", 4, **MOS)
    train(model, 1)
    for term in find_adapter(model).all_terms():
        assert isinstance(term, PooledLowRank)
        B, A = term.factors()
        assert A.shape == (4, term.in_features) and B.shape == (term.out_features, 4)
        wide, tall = term.in_features // 2, term.out_features // 2
        for j in range(4):
            for t in range(2):
                assert torch.equal(A[j, t * wide : (t + 1) * wide], term.pool_A[term.index_A[j * 2 + t]])
                assert torch.equal(B[t * tall : (t + 1) * tall, j], term.pool_B[term.index_B[j * 2 + t]])


def test_mos_with_everything_private_is_lora() -> None:
    model = adapt(tiny_llama(), "mos", 4, equivalent_rank=4, private_rank=4, shards=1, alpha=6, dropout=0.0)
    lora = adapt(tiny_llama(), "lora", 4, alpha=6.0)
    for layer, terms in find_adapter(model).terms.items():
        term, other = terms["default"], find_adapter(lora).terms[layer]["default"]
        with torch.no_grad():
            term.pool_B.copy_(drawn(*term.pool_B.shape, seed=1) / 10)
            other.A.copy_(term.pool_A)
            other.B.copy_(term.pool_B.T)
    close(logits(model), logits(lora), 1e-6)
    for each in (model, lora):
        each(**task()[0]).loss.backward()
    for layer, terms in find_adapter(model).terms.items():
        term, other = terms["default"], find_adapter(lora).terms[layer]["default"]
        close(term.pool_A.grad, other.A.grad, 1e-5)
        close(term.pool_B.grad, other.B.grad.T, 1e-5)


def test_mos_gradient_of_a_piece_sums_over_its_uses() -> None:
    model = adapt(deep_llama(), "mos", 3, equivalent_rank=3, private_rank=1, shards=2, dropout=0.0)
    train(model, 1)
    model.zero_grad()
    model(**task()[0]).loss.backward()
    term = find_adapter(model).terms["model.layers.0.self_attn.q_proj"]["default"]
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    used = torch.cat([find_adapter(model).terms[layer]["default"].index_A for layer in layers])
    unused = [row for row in range(len(term.pool_A)) if row not in used]
    assert unused and not term.pool_A.grad[unused].any(), "a piece that nobody drew has a gradient"
    uses = used.bincount(minlength=len(term.pool_A))
    assert (uses > 1).any() and term.pool_A.grad[uses > 0].any(1).all()
    terms = [find_adapter(model.double()).terms[layer]["default"] for layer in layers]
    x, g = drawn(5, 16).double(), drawn(3, 5, 16, seed=1).double()

    def loss() -> Tensor:
        return sum(((t(x) * g[i]).sum() for i, t in enumerate(terms)), start=torch.zeros(()))

    row, step = int(uses.argmax()), 1e-4
    gradient, ends = torch.autograd.grad(loss(), term.pool_A)[0][row, 0], []
    for change in (step, -2 * step):
        with torch.no_grad():
            term.pool_A[row, 0] += change
            ends.append(loss())
    close((ends[0] - ends[1]) / (2 * step), gradient, 1e-4)


def test_mos_shares_after_loading(tmp_path: Path) -> None:
    model = adapt(deep_llama(), "mos", 4, **MOS)
    assert torch.equal(logits(model), logits(deep_llama()))
    train(model, 2)
    save_adapter(model, tmp_path / "a")
    state = load_file(tmp_path / "a" / "weft_adapter.safetensors")
    assert sum("pool" in key for key in state) == 7 * 2, "pools are written once a kind"
    other = load_adapter(deep_llama(), tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert trainable(other).count == trainable(model).count
    first, second = (find_adapter(other).terms[f"model.layers.{i}.mlp.up_proj"]["default"] for i in (0, 1))
    assert first.pool_A is second.pool_A
    close(logits(in_peft(deep_llama, tmp_path / "a")), logits(model))


def test_mos_kinds() -> None:
    shapes = {"h.0.attn.c_proj": (8, 8), "h.1.attn.c_proj": (8, 8), "h.0.mlp.c_proj": (8, 32), "fc1": (8, 8)}
    assert [len(layers) for layers in mos.kinds(shapes).values()] == [2, 1, 1]
    assert len(mos.kinds({"m.0.experts.1.up": (4, 4), "m.1.experts.0.up": (4, 4)})) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shards": 3}, "cannot be cut into 3 equal pieces"),
        ({"equivalent_rank": 1, "private_rank": 1}, "give equivalent_rank=2 or more"),
        ({"private_rank": 5}, "private_rank from 0"),
    ],
)
def test_mos_refuses(options: dict[str, Any], words: str) -> None:
    model = deep_llama()
    with pytest.raises(WeftError, match=words):
        adapt(model, "mos", 4, **options)
    assert not weft.terms.adapters.adapters_of(model)
    adapt(model, "mos", 4, equivalent_rank=2)
    with pytest.raises(WeftError, match="give all layers one rank"):
        adapt(model, "mos", 4, name="other", ranks={"model.layers.0.mlp.up_proj": 2})


def test_mos_pools_are_known_as_shared() -> None:
    """Those are what FSDP2 must leave whole where it wraps block by block."""
    assert len(shared_parameters(adapt(deep_llama(), "mos", 4, **MOS))) == 14


@pytest.mark.parametrize("name", ["mos", "said"])
def test_what_is_shared_stays_shared_in_a_model_saved_whole(name: str, tmp_path: Path) -> None:
    model = adapt(deep_llama(), name, 4)
    adapt(model, name, 4, name="second", seed=1)
    train(model, 2)
    model.save_pretrained(tmp_path)
    for again in (LlamaForCausalLM.from_pretrained(tmp_path), LlamaModel.from_pretrained(tmp_path)):
        held = [p for n, p in again.named_parameters(remove_duplicate=False) if ".terms." in n]
        mine = [p for n, p in model.named_parameters(remove_duplicate=False) if ".terms." in n]
        assert len(held) == len(mine) and len({id(p) for p in held}) == len({id(p) for p in mine}) < len(mine)
        if isinstance(again, LlamaForCausalLM):
            assert torch.equal(logits(again), logits(model))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"tied"', '"tide"'))
    with pytest.raises(WeftError, match="an entry 'tide'"):
        LlamaForCausalLM.from_pretrained(tmp_path)


# ---- said


@pytest.mark.parametrize("size", [1, 2, 8, 256])
def test_fwht_is_the_hadamard_matrix(size: int) -> None:
    scipy = pytest.importorskip("scipy.linalg")
    H = torch.from_numpy(scipy.hadamard(size)).double()
    x = drawn(size).double()
    close(fwht(x), H @ x, 1e-12)
    close(fwht(fwht(x)), size * x, 1e-12)


def matrix(width: int, size: int, seed: int = 3) -> Tensor:
    """P (size, width), column by column."""
    return torch.stack([fastfood(column, seed, size) for column in torch.eye(width).double()], 1)


def slow_matrix(width: int, size: int, seed: int = 3) -> Tensor:
    """P from dense factors."""
    scipy = pytest.importorskip("scipy.linalg")
    bits = (max(width, size) - 1).bit_length()
    length = 1 << bits
    H = torch.from_numpy(scipy.hadamard(length)).double()
    flips = torch.diag(counter.signs(counter.subseed(seed, 0), length).double())
    order = torch.eye(length).double()[counter.permutation(counter.subseed(seed, 1), bits)]
    g = counter.normal(counter.subseed(seed, 2), length).double()
    whole = (
        H @ torch.diag(g) @ order @ H @ flips / (math.sqrt(length * float(g.square().sum())) * math.sqrt(size / length))
    )
    return whole[:size, :width]


@pytest.mark.parametrize(("width", "size"), [(5, 64), (5, 50), (64, 64), (20, 6), (1, 1)])
def test_fastfood_is_its_matrix_and_backward_its_transpose(width: int, size: int) -> None:
    P = matrix(width, size)
    close(P, slow_matrix(width, size), 1e-6)
    theta, y = drawn(width).double().requires_grad_(), drawn(size, seed=1).double()
    (project(theta, 3, size) * y).sum().backward()
    close(theta.grad, P.T @ y, 1e-10)
    assert torch.equal(theta.grad, fastfood_transposed(y, 3, width))
    other = drawn(width, seed=2).double()
    close(fastfood(theta.detach() + 2 * other, 3, size), P @ theta.detach() + 2 * P @ other, 1e-10)
    assert torch.equal(matrix(width, size), P) and (size == 1 or not torch.equal(matrix(width, size, 4), P))


def test_fastfood_keeps_lengths_and_angles() -> None:
    theta = drawn(50)
    ratios = [float(fastfood(theta, seed, 3000).norm() / theta.norm()) for seed in range(60)]
    assert abs(sum(ratios) / 60 - 1) < 0.02
    P = matrix(20, 3000)
    cosines = torch.corrcoef(P.T).fill_diagonal_(0)
    assert cosines.abs().max() < 5 / math.sqrt(3000)


def test_fastfood_of_full_width_reaches_everything() -> None:
    """d = D and an invertible P: least squares through P has the minimum of full tuning."""
    P = matrix(64, 64)
    wanted = drawn(64, seed=5).double()
    assert torch.linalg.matrix_rank(P) == 64
    close(P @ torch.linalg.solve(P, wanted), wanted, 1e-8)


def test_said_counts_d_and_starts_at_the_base() -> None:
    model = adapted(METHODS["said"])
    assert trainable(model).count == RANK * 7
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert trainable(adapt(deep_llama(), "said", 1, d=100)).count == 100
    did = adapt(deep_llama(), "said", 1, d=100, structure_aware=False)
    assert trainable(did).count == 100 and len(find_adapter(did).all_terms()[0].theta) == 100
    terms = find_adapter(adapt(deep_llama(), "said", 1, d=100)).all_terms()
    assert len({id(term.theta) for term in terms}) == 1 and len({term.seed for term in terms}) == 21


def test_said_with_frozen_scales_is_did() -> None:
    said, did = adapt(tiny_llama(), "said", d=27), adapt(tiny_llama(), "said", d=20, structure_aware=False)
    for model in (said, did):
        find_adapter(model).all_terms()[0].theta.data.copy_(drawn(20) / 10)
    assert torch.equal(logits(said), logits(did)) and not torch.equal(logits(said), logits(tiny_llama()))
    with torch.no_grad():
        for term in find_adapter(said).all_terms():
            term.gain.fill_(2.0)
    doubled = find_adapter(did).all_terms()
    doubled[0].theta.data.mul_(2)
    close(logits(said), logits(did), 1e-5)


def test_said_gradient_is_that_of_whole_weights(tmp_path: Path) -> None:
    """dL/dtheta = sum_i lambda_i P_i^T dL/dW_i, with the gradients of full tuning; and the file is d numbers."""
    model = adapt(deep_llama(2), "said", d=40)
    full = deep_llama(2)
    full(**task()[0]).loss.backward()
    model(**task()[0]).loss.backward()
    theta = find_adapter(model).all_terms()[0].theta
    expected = torch.zeros(len(theta)).double()
    for layer, terms in find_adapter(model).terms.items():
        gradient = full.get_submodule(layer).weight.grad.flatten().double()
        expected += matrix(len(theta), len(gradient), terms["default"].seed).T @ gradient
    close(theta.grad, expected, 1e-4)
    save_adapter(model, tmp_path / "a")
    state = load_file(tmp_path / "a" / "weft_adapter.safetensors")
    assert sum(t.numel() for t in state.values()) == 40
    other = load_adapter(deep_llama(2), tmp_path / "a")
    assert len({id(term.theta) for term in find_adapter(other).all_terms()}) == 1


def test_said_refuses_a_budget_of_scales_alone() -> None:
    with pytest.raises(WeftError, match="give d=8 or more"):
        adapt(tiny_llama(), "said", d=7)


def test_effective_rates_count_the_scale() -> None:
    assert weft.effective_rates(adapted(METHODS["nola"], alpha=2.0), 0.1) == {"default": pytest.approx(0.05)}
    assert weft.effective_rates(adapted(METHODS["mos"], alpha=16), 0.1) == {"default": pytest.approx(0.4)}
    assert weft.effective_rates(adapted(METHODS["randlora"]), 0.1) == {"default": pytest.approx(0.1)}  # 2 / sqrt(4)
