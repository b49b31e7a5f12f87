"""The invariants of the adapters of other structures than low rank: bone, soka, compacter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from tests.methods.one_layer import One, close
from tests.processes import together
from weft.errors import WeftError
from weft.io.adapters import load_adapter, save_adapter
from weft.linalg.kronecker import balanced_divisor, kronecker_sum, kronecker_svd, rearrange
from weft.methods import METHODS, compacter, soka
from weft.rules import Rules
from weft.rules.replicated import shared_parameters
from weft.terms import BlockAffine, Bottleneck, Dense, Kronecker, ShardSum, Shifted
from weft.terms.adapters import find_adapter
from weft.terms.bottleneck import HyperLinear
from weft.testing_adapters import PROPERTIES, adapted, task, tiny_gpt2, tiny_llama, train
from weft.verbs.adapt import adapt, rules, trainable

OUT, IN, R = 24, 20, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    B, binary = term.exact_factors()
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


# ---- compacter


def two_blocks() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.2, **sizes))
        return model.eval()


def bottleneck(n: int = 4, rank: int = 2, width: int = 8) -> Bottleneck:
    """A term with every number drawn, around a frozen weight, for a layer with a bias."""
    term = Bottleneck(IN, OUT, width, n, rank, True, {"base": Dense.from_matrix(drawn(OUT, IN))})
    for i, parameter in enumerate((term.A, *term.down.parameters(), *term.up.parameters())):
        parameter.data = 0.5 * drawn(*parameter.shape, seed=i)
    term.offset = drawn(OUT, seed=9)
    return term.requires_grad_(True)


@pytest.mark.parametrize(("p", "q", "n", "rank"), [(24, 8, 4, 1), (8, 24, 4, 3), (6, 9, 3, 2), (5, 7, 1, 1)])
def test_the_hypercomplex_product_is_the_sum_of_kronecker_products(p: int, q: int, n: int, rank: int) -> None:
    layer = HyperLinear(p, q, n, rank)
    A = drawn(n, n, n)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = drawn(*parameter.shape, seed=i)
    W = sum(torch.kron(A[i], layer.s[i].detach() @ layer.t[i].detach()) for i in range(n))
    x = drawn(3, 5, p, seed=7)
    close(layer(x, A), x @ W + layer.bias)
    close(layer.matrix(A), W, 1e-6)
    assert int(torch.linalg.matrix_rank(W)) <= n * n * rank
    if n == 1:
        close(W, A.item() * layer.s[0] @ layer.t[0])


def test_compacter_is_a_bottleneck_on_the_layers_output() -> None:
    term, x = bottleneck(), drawn(3, 5, IN, seed=1)
    W = term.base_dense(torch.float32)
    h = x @ W.mT
    z = (h + term.offset) @ term.down.matrix(term.A) + term.down.bias
    gelu_new = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    close(term(x), h + gelu_new @ term.up.matrix(term.A) + term.up.bias)


def test_compacter_gradients() -> None:
    term = bottleneck().double()
    x = drawn(2, IN, seed=1).double().requires_grad_()
    names = ["A", "down.s", "down.t", "down.bias", "up.s", "up.t", "up.bias"]
    values = [term.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(term, dict(zip(names, values, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(run, (x, *values))


def test_compacter_counts_are_the_papers() -> None:
    count = METHODS["compacter"].count
    options = METHODS["compacter"].options({})
    # 816 down as the card has it, 24 + 768 + 768 up
    assert count(768, 3072, 24, options) == 816 + 1560
    down, up = HyperLinear(768, 24, 4, 1), HyperLinear(24, 768, 4, 1)
    assert [sum(p.numel() for p in layer.parameters()) for layer in (down, up)] == [816, 1560]
    assert METHODS["compacter"].count_shared({"a": (8, 8), "b": (8, 8)}, 4, options) == 64


def test_compacter_places_one_adapter_after_each_sublayer() -> None:
    model = adapt(two_blocks(), "compacter", 4)
    adapter = find_adapter(model)
    ends = [f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.o_proj", "mlp.down_proj")]
    assert list(adapter.terms) == ends
    assert len({id(term.A) for term in adapter.all_terms()}) == 1
    norms = [f"model.layers.{i}.{norm}_layernorm.weight" for i in range(2) for norm in ("input", "post_attention")]
    assert set(adapter.extras) == {*norms, "model.norm.weight"}
    assert trainable(model).count == 4 * 3 * (16 + 4) + 64 + 5 * 16
    plus = adapt(two_blocks(), "compacter", 4, attention=False, norms=False)
    assert list(find_adapter(plus).terms) == ends[1::2] and not find_adapter(plus).extras
    assert (model(task()[0]["input_ids"]).logits - two_blocks()(task()[0]["input_ids"]).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "sublayer"),
    [
        ("transformer.h.0.attn.c_proj", "attention"),
        ("transformer.h.0.mlp.c_proj", "feed-forward"),
        ("transformer.h.0.attn.c_attn", None),
        ("encoder.layer.0.attention.output.dense", "attention"),
        ("encoder.layer.0.output.dense", "feed-forward"),
        ("encoder.layer.0.intermediate.dense", None),
        ("encoder.layer.0.attention.self.value", None),
        ("decoder.block.0.layer.0.SelfAttention.o", "attention"),
        ("decoder.block.0.layer.1.EncDecAttention.o", None),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "feed-forward"),
        ("model.decoder.layers.0.self_attn.out_proj", "attention"),
        ("model.decoder.layers.0.encoder_attn.out_proj", None),
        ("model.decoder.layers.0.fc2", "feed-forward"),
        ("gpt_neox.layers.0.attention.dense", "attention"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", "feed-forward"),
        ("pooler.dense", None),
    ],
)
def test_compacter_knows_the_ends_of_sublayers(name: str, sublayer: str | None) -> None:
    assert compacter.sublayer_of(name) == sublayer


def test_compacter_shared_matrices_get_the_gradients_of_all_layers() -> None:
    """The sum over the layers, and the same after copying, saving and loading."""
    model = adapt(two_blocks(), "compacter", 4)
    shared = find_adapter(model).all_terms()[0].A
    shared.data = 0.3 * drawn(4, 4, 4)
    model(**task()[0]).loss.backward()
    apart = copy.deepcopy(model)
    terms = find_adapter(apart).all_terms()
    assert len({id(term.A) for term in terms}) == 1 and terms[0].A is not shared
    for term in terms:
        term.A = nn.Parameter(term.A.detach().clone())
    apart(**task()[0]).loss.backward()
    close(shared.grad, sum(term.A.grad for term in terms), 1e-4)
    assert [id(p) for p in shared_parameters(model)] == [id(shared)]
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for p in frozen.values()) and not any("norm" in n for n in frozen)
    assert all(p.grad is not None and p.grad.any() for n, p in trainable(model).parameters.items() if "norm" in n)


def test_compacter_shared_matrices_are_saved_once(tmp_path: Path) -> None:
    model = adapt(two_blocks(), "compacter", 4)
    train(model, 2)
    save_adapter(model, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "weft_adapter.safetensors")
    assert sum(tensor.shape == (4, 4, 4) for tensor in state.values()) == 1
    other = load_adapter(two_blocks(), tmp_path / "adapter")
    assert len({id(term.A) for term in find_adapter(other).all_terms()}) == 1
    assert trainable(other).count == trainable(model).count
    ids = task()[0]["input_ids"]
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_compacter_reads_the_output_with_its_bias() -> None:
    model = adapted(METHODS["compacter"], tiny_gpt2)
    layer = model.get_submodule("transformer.h.0.mlp.c_proj")
    term = layer.terms["default"]
    assert torch.equal(term.offset, layer.bias)
    term.A.data = 0.3 * drawn(4, 4, 4)
    x = drawn(5, layer.in_features)
    h = F.linear(x, term.base_dense(torch.float32), layer.bias)
    z = F.gelu(h @ term.down.matrix(term.A) + term.down.bias, approximate="tanh")
    close(layer(x), h + z @ term.up.matrix(term.A) + term.up.bias)


def test_compacter_cannot_be_merged_and_nothing_changes() -> None:
    model = adapt(two_blocks(), "compacter", 4)
    adapt(model, "lora", 2, name="second")
    with pytest.raises(WeftError, match="cannot be merged"):
        weft.merge_adapter(model, "default")
    assert all(adapter.active for adapter in (find_adapter(model, "default"), find_adapter(model, "second")))


def test_compacter_refuses_what_does_not_fit() -> None:
    with pytest.raises(WeftError, match="multiples of n = 4"):
        adapt(two_blocks(), "compacter", 6)
    with pytest.raises(WeftError, match="end a sublayer"):
        adapt(two_blocks(), "compacter", 4, targets="q_proj")
    layer = "model.layers.0.self_attn.q_proj"
    assert list(find_adapter(adapt(two_blocks(), "compacter", 4, ranks={layer: 4})).terms) == [layer]


def sharded_worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model = adapt(two_blocks(), "compacter", 4)
    mesh, shared = init_device_mesh("cpu", (2,)), set(shared_parameters(model))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=shared)
    fully_shard(model, mesh=mesh, ignored_params=shared)
    batch = {key: value.chunk(2)[rank] for key, value in task()[1].items()}
    descend(model, batch)
    state = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trainable(model).parameters.items()}
    torch.save({name: p.detach() for name, p in state.items()}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def descend(model: nn.Module, batch: dict[str, Tensor]) -> None:
    rule = Rules(rules(model))
    rule.start(model, steps=100)
    for _ in range(2):
        model(**batch).loss.backward()
        rule.before_step(model, 1)
        torch.optim.SGD(trainable(model).parameters.values(), lr=100.0).step()  # A is small, and so is its gradient
        model.zero_grad()


@pytest.mark.distributed
def test_compacter_shares_its_matrices_between_sharded_blocks(tmp_path: Path) -> None:
    together(sharded_worker, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = adapt(two_blocks(), "compacter", 4)
    start = find_adapter(alone).all_terms()[0].A.detach().clone()
    descend(alone, task()[1])
    for name, parameter in trainable(alone).parameters.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-3, atol=1e-6)
    assert (find_adapter(alone).all_terms()[0].A - start).abs().max() > 1e-5


def test_compacters_matrices_stay_shared_in_a_model_saved_whole(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=2)).eval()
    train(adapt(model, "compacter", 4), 2)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    shared = [p for name, p in again.named_parameters(remove_duplicate=False) if name.endswith(".A")]
    assert len(shared) == 6 and len({id(p) for p in shared}) == 1
    ids = task()[0]["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
