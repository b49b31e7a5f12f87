from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from weft.errors import WeftError
from weft.terms import TERMS, Dense, LowRank, Sparse, SumLinear, Term, build
from weft.terms.layers import linear_layers, replace, weight_of
from weft.testing import EXAMPLES, MATRIX_CHECKS, TERM_CHECKS, check_sum, check_term, example

LINEAR = [kind for kind, term in TERMS.items() if term.linear]


def test_every_kind_has_an_example() -> None:
    assert EXAMPLES.keys() == TERMS.keys()
    assert all(type(example(kind)) is TERMS[kind] for kind in TERMS)


@pytest.mark.parametrize("check", TERM_CHECKS)
@pytest.mark.parametrize("kind", TERMS)
def test_term(kind: str, check: str) -> None:
    if check in MATRIX_CHECKS and kind not in LINEAR:
        pytest.skip("this kind has no matrix")
    TERM_CHECKS[check](example(kind))


@pytest.mark.parametrize("kind", [kind for kind in TERMS if kind not in LINEAR])
def test_a_term_that_is_no_matrix_says_so(kind: str) -> None:
    term = example(kind)
    check_term(lambda: example(kind))
    x, y = torch.randn(2, 5, term.in_features, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(term(x + y), term(x) + term(y), atol=1e-3)
    with pytest.raises(WeftError, match="cannot be merged"):
        term.dense()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", LINEAR)
def test_sum(kind: str, bias: bool, transposed: bool) -> None:
    terms = {"first": example(kind, 1), "second": example("low_rank", 2), "third": example("sparse", 3)}
    check_sum(SumLinear(terms, torch.linspace(-1, 1, 12) if bias else None, transposed=transposed))


kinds = st.lists(st.sampled_from(sorted(LINEAR)), min_size=1, max_size=4)


@given(kinds, st.integers(0, 2**16))
def test_a_sum_of_terms_is_the_sum_of_their_matrices(names: list[str], seed: int) -> None:
    terms = [example(kind, seed + i).double() for i, kind in enumerate(names)]
    layer = SumLinear({f"t{i}": term for i, term in enumerate(terms)})
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = torch.stack([term.dense() for term in terms]).sum(0)
    torch.testing.assert_close(layer(x), x @ total.T)
    torch.testing.assert_close(layer.dense(), total)
    assert layer.num_params == sum(term.num_params for term in terms)
    assert layer.nbytes == sum(term.nbytes for term in terms)


@given(kinds, st.permutations(range(4)), st.integers(0, 2**16))
def test_the_order_of_terms_does_not_matter(names: list[str], order: list[int], seed: int) -> None:
    terms = {f"t{i}": example(kind, seed + i).double() for i, kind in enumerate(names)}
    shuffled = {f"t{i}": terms[f"t{i}"] for i in order if i < len(names)}
    torch.testing.assert_close(SumLinear(terms).dense(), SumLinear(shuffled).dense())


@given(st.sampled_from(sorted(LINEAR)), st.integers(0, 2**16), st.floats(-3, 3))
def test_a_term_is_linear(kind: str, seed: int, factor: float) -> None:
    term = example(kind, seed).double()
    x, y = torch.randn(2, 5, term.in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(term(factor * x + y), factor * term(x) + term(y))


class Wrong(LowRank):
    """Breaks one promise of a term at a time."""

    broken: str = ""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.detach() if self.broken == "gradients" else x)
        return y + 0.1 if self.broken == "forward" else y.float() if self.broken == "moves" else y

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dense().to(dtype or self.A.dtype) if self.broken == "dense_dtype" else super().dense(dtype)

    def spec(self) -> dict[str, object]:
        return super().spec() | ({"scale": 1.0} if self.broken == "rebuild" else {})

    @property
    def nbytes(self) -> int:
        return 0 if self.broken == "counts" else super().nbytes

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        return self.B.detach(), self.A.detach() * (2 if self.broken == "answers" else self.scale)

    def __deepcopy__(self, memo: dict[int, object]) -> Term:
        if self.broken == "copies":
            return self
        twin = type(self).from_factors(self.B.clone(), self.A.clone(), scale=self.scale)
        twin.broken = self.broken
        return twin


@pytest.mark.parametrize(
    "broken", ["", "forward", "gradients", "dense_dtype", "rebuild", "copies", "moves", "counts", "answers"]
)
def test_the_suite_finds_what_is_broken(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "low_rank", Wrong)
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator)

    def make() -> Term:
        term = Wrong.from_factors(B, A, scale=0.5)
        term.broken = broken
        return term

    failed = [name for name, check in TERM_CHECKS.items() if _fails(check, make())]
    assert (broken in failed) if broken else not failed
    if not broken:
        check_term(make, 0.5 * B @ A)
        with pytest.raises(AssertionError):
            check_term(make, B @ A)


def _fails(check: Callable[[Term], None], term: Term) -> bool:
    try:
        check(term)
    except AssertionError:
        return True
    return False


def test_unknown_kind() -> None:
    with pytest.raises(WeftError, match="no kind of term called 'low_rnk'; the nearest are: low_rank"):
        build({"kind": "low_rnk", "in_features": 2, "out_features": 2})


def test_terms_of_different_shapes_make_no_sum() -> None:
    with pytest.raises(ValueError, match="terms of one shape"):
        SumLinear({"a": Dense(2, 3), "b": Dense(3, 2)})
    with pytest.raises(ValueError, match="terms of one shape"):
        SumLinear({})


def test_conv1d_is_replaced_and_given_back() -> None:
    root = nn.Module()
    root.layer = Conv1D(6, 4)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    W, expected = weight_of(root.layer), root.layer(x)
    assert W.shape == (6, 4)
    replace(root, "layer", SumLinear({"dense": Dense.from_matrix(W)}, root.layer.bias, transposed=True))
    torch.testing.assert_close(root.layer(x), expected)
    plain = root.layer.collapse()
    assert type(plain) is Conv1D and plain.weight.shape == (4, 6)
    torch.testing.assert_close(plain(x), expected)


def tiny_llama(**options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes, **options))


def test_tied_and_shared_weights_are_left_alone() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert not any("lm_head" in name or "embed" in name for name in linear_layers(model))
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight  # one weight in two modules
    second.mlp.gate_proj = first.mlp.gate_proj  # one module in two places
    left = linear_layers(model)
    assert not any("up_proj" in name or "gate_proj" in name for name in left)
    assert len(left) == 2 * 5


def test_a_layer_shows_the_dtype_and_device_it_has() -> None:
    layer = SumLinear({"a": example("low_rank"), "b": Sparse.from_mask(torch.ones(12, 8), torch.eye(12, 8) > 0)})
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float32, "cpu")
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.terms["b"].positions.dtype == torch.int32
    assert layer.to("meta").weight.is_meta
