"""The conformance suite of terms: what a structure owes to everything that uses it. For plug-ins as for weft itself.

    from weft.testing import check_term
    check_term(lambda: MyTerm.from_factors(B, A), dense=B @ A)

Each check is a function of a term, raises AssertionError, and leaves the term as it was. weft's own kinds are run from
`EXAMPLES`; a kind without an example fails weft's tests.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.kernels.float_format import float_values
from weft.terms import SumLinear, Term, build, build_sum, register_term
from weft.testing_examples import EXAMPLES, example

__all__ = ["EXAMPLES", "MATRIX_CHECKS", "TERM_CHECKS", "check_sum", "check_term", "example"]


def check_term(make: Callable[[], Term], dense: Tensor | None = None) -> None:
    """Run every check of `TERM_CHECKS` on a fresh term.

    Args:
        make: a new term at each call, with parameters that are not all zero.
        dense: the (out, in) matrix that the term must equal, from an independent formula.

    Raises:
        AssertionError: the term breaks the contract of `weft.terms.Term`.
    """
    register_term(type(make()))  # so that its spec can be built; one of weft's own is there already
    for name, check in TERM_CHECKS.items():
        if make().linear or name not in MATRIX_CHECKS:
            check(make())
    if dense is not None:
        torch.testing.assert_close(make().dense(dense.dtype).detach(), dense)


def check_forward(term: Term) -> None:
    """forward(x) = x @ dense().T for every number of leading dimensions, none and empty ones included."""
    term = copy.deepcopy(term).double()
    W = term.dense().detach()
    assert W.shape == (term.out_features, term.in_features)
    for shape in [(), (1,), (5,), (2, 3), (0,), (2, 0)]:
        x = _draw(*shape, term.in_features)
        _close(term(x), x @ W.T, "forward differs from x @ dense().T")
    _close(term(_draw(term.in_features, 5).T), _draw(term.in_features, 5).T @ W.T, "forward of a transposed x differs")


def check_gradients(term: Term) -> None:
    """Gradients of x and of every trainable parameter are those of autograd through `dense()`."""
    term = copy.deepcopy(term).double()
    for shape in [(), (2, 5)]:
        x, g = _draw(*shape, term.in_features), _draw(*shape, term.out_features)
        by_dense = _gradients(term, lambda x: x @ term.dense().T, x, g)
        _close_all(_gradients(term, term, x, g), by_dense, "gradients differ from those through dense()")
    term.requires_grad_(False)
    grads = _gradients(term, term, x, g)
    assert all(grad is None for name, grad in grads.items() if name != "x"), "a frozen parameter got a gradient"


def check_default_dense(term: Term) -> None:
    """An own `dense()` agrees with the contract's default, which applies the term to the identity."""
    term = copy.deepcopy(term).double()
    _close(term.dense(), Term.dense(term), "dense() differs from the default")


def check_dense_dtype(term: Term) -> None:
    """`dense(dtype)` has that dtype and its precision; `dense()` has the stored one."""
    assert term.dense().dtype == term._reference().dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert term.dense(dtype).dtype == dtype
    wide, exact = term.dense(torch.float64), copy.deepcopy(term).double().dense()
    _close(wide, exact, "dense(float64) is far from that of the same term in float64", atol=1e-5)
    assert _needs_float64(wide) or not _needs_float64(exact), "dense(float64) is computed in less than float64"


def check_rebuild(term: Term) -> None:
    """The spec, by way of JSON, and the tensors, by way of safetensors, give the same term again, exactly."""
    spec = json.loads(json.dumps(term.spec()))
    state = load(save(dict(term.state_dict())))
    built, on_meta = build(spec), build(spec, device="meta")
    built.load_state_dict(state)
    on_meta.load_state_dict(state, assign=True)
    x = _draw(5, term.in_features, dtype=torch.float32)
    for again in (built, on_meta):
        assert type(again) is type(term) and again.spec() == term.spec()
        assert torch.equal(again(x), term(x))
        assert not term.linear or torch.equal(again.dense(), term.dense())


def check_meta_is_empty(term: Term) -> None:
    """Building on the meta device allocates nothing, in whatever dtype is asked for, and shapes are right."""
    for dtype in (torch.float32, torch.bfloat16):
        built = build(term.spec(), device="meta", dtype=dtype)
        assert all(t.is_meta for t in built.state_dict().values()), "a tensor ignores device="
        assert built._reference().dtype == dtype, "the tensors ignore dtype="
        for key, tensor in term.state_dict().items():
            assert built.state_dict()[key].shape == tensor.shape, key


def check_copies(term: Term) -> None:
    """Deep copies and pickles compute the same and share no memory."""
    x = _draw(5, term.in_features, dtype=torch.float32)
    for twin in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert torch.equal(twin(x), term(x)) and twin.spec() == term.spec()
        theirs, ours = ({t.data_ptr() for t in _tensors(m) if t.numel()} for m in (twin, term))
        assert not theirs & ours, "a copy shares memory with the original"
        assert _flags(twin) == _flags(term), "a copy forgets what is trainable"


def check_moves(term: Term) -> None:
    """`.to(dtype)` moves floating-point tensors alone, and results follow; `.to("meta")` works."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        moved = copy.deepcopy(term).to(dtype)
        for before, after in zip(_tensors(term), _tensors(moved), strict=True):
            assert after.dtype == (dtype if before.is_floating_point() else before.dtype)
        assert moved(_draw(5, term.in_features, dtype=dtype)).dtype == dtype
        assert term(_draw(5, term.in_features, dtype=dtype)).dtype == dtype, "the result is not in the dtype of x"
        if term.linear:
            _close(moved.dense(torch.float32), term.dense(torch.float32), f"dense() in {dtype} differs", atol=0.1)
    assert copy.deepcopy(term).to("meta")(torch.empty(5, term.in_features, device="meta")).shape == (
        5,
        term.out_features,
    )


def check_autocast(term: Term) -> None:
    """Under autocast the result is bf16, close to the fp32 one, and gradients arrive in the parameters' dtype."""
    x, g = (_draw(5, n, dtype=torch.float32) for n in (term.in_features, term.out_features))

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = term(x)
            assert y.dtype == torch.bfloat16, "autocast is ignored"
        return y.float()  # type: ignore[no-any-return]

    _close_all(_gradients(term, cast, x, g), _gradients(term, term, x, g), "autocast is far off", atol=0.1, rtol=0.1)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in term.parameters())


def check_checkpointing(term: Term) -> None:
    """Activation checkpointing changes no bit of the gradients."""
    x, g = (_draw(5, n, dtype=torch.float32) for n in (term.in_features, term.out_features))

    def again(x: Tensor) -> Tensor:
        return checkpoint(term, x, use_reentrant=False)  # type: ignore[no-any-return, no-untyped-call]

    _close_all(_gradients(term, again, x, g), _gradients(term, term, x, g), "checkpointing differs", atol=0, rtol=0)


def check_inference(term: Term) -> None:
    """`torch.inference_mode` gives what `torch.no_grad` gives, for an input made within it as for one from before."""
    term = copy.deepcopy(term).eval()
    before = _draw(5, term.in_features, dtype=torch.float32)
    with torch.no_grad():
        expected = term(before)
    with torch.inference_mode():
        for x in (before, before.clone()):
            _close(term(x), expected, "inference mode gives something else", atol=1e-5)


def check_compile(term: Term) -> None:
    """`torch.compile` takes forward and backward whole, without a graph break."""
    term = copy.deepcopy(term)
    torch.compiler.reset()
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
    x, g = (_draw(5, n, dtype=torch.float32) for n in (term.in_features, term.out_features))
    _close_all(_gradients(term, compiled, x, g), _gradients(term, term, x, g), "the compiled term differs", atol=1e-5)


def check_counts(term: Term) -> None:
    """`nbytes` is what safetensors writes, and `num_params` the floating-point numbers or the coded weights in it."""
    written = save(dict(term.state_dict()))
    header = 8 + int.from_bytes(written[:8], "little")
    assert term.nbytes == len(written) - header, "nbytes is not what is stored"
    numbers = sum(t.numel() for t in load(written).values() if t.is_floating_point())
    assert term.num_params in (numbers, term.out_features * term.in_features)


def check_answers(term: Term) -> None:
    """What the term says of itself is true: its exact factors, its LoRA, its codes, its lean forms, its own state."""
    term = copy.deepcopy(term)
    lora = term.lora()
    for factors in (term.exact_factors(), lora[:2] if lora and lora.magnitude is None else None):
        if factors is not None:
            B, A = factors
            assert B.dtype == A.dtype == torch.float32 and not (B.requires_grad or A.requires_grad)
            _close(B @ A, term.dense(torch.float32), "the exact factors are another matrix", atol=1e-5, rtol=1e-4)
    codes = term.exact_codes()
    if codes is not None:
        assert int(codes.codes.max()) < 2**codes.bits and torch.equal(codes.dense(), term.dense(torch.float32))
    floats = term.exact_floats()
    if floats is not None:
        scales = floats.scales.repeat_interleave(floats.group, 1)[:, : term.in_features]
        assert torch.equal(float_values(floats.codes, floats.element) * scales, term.dense(torch.float32))
    for training in (False, True):
        term.train(training)
        lean = term.lean_weight()
        matrix = 0 if lean is None else lean if isinstance(lean, Tensor) else lean(torch.float32)
        products = term.lean_parts() or []
        x = _draw(5, term.in_features, dtype=torch.float32)
        if lean is not None or products:
            total = sum((part.matrix() for part in products), start=matrix)
            _close(x @ total.mT, term(x), "the lean form is another function", atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
    assert term.rate_scale is None or isinstance(term.rate_scale, float)
    state = term.own_state()
    build(term.own_spec(), device="meta").load_state_dict(state, assign=True)
    assert dict(term.own_parameters()).keys() <= state.keys() <= term.state_dict().keys()


TERM_CHECKS: dict[str, Callable[[Term], None]] = {
    "forward": check_forward,
    "gradients": check_gradients,
    "default_dense": check_default_dense,
    "dense_dtype": check_dense_dtype,
    "rebuild": check_rebuild,
    "meta_is_empty": check_meta_is_empty,
    "copies": check_copies,
    "moves": check_moves,
    "autocast": check_autocast,
    "checkpointing": check_checkpointing,
    "inference": check_inference,
    "compile": check_compile,
    "counts": check_counts,
    "answers": check_answers,
}
"""What `check_term` runs, by name."""

MATRIX_CHECKS = ("forward", "gradients", "default_dense", "dense_dtype")
"""Those among them that ask for the term's matrix, which one with `linear = False` does not have."""


def check_sum(layer: SumLinear) -> None:
    """The layer of the terms: forward, `dense`, `collapse`, spec and state agree with one another.

    Raises:
        AssertionError: they do not.
    """
    wide = copy.deepcopy(layer).double()
    x, bias = _draw(2, 5, layer.in_features), 0 if wide.bias is None else wide.bias
    expected = sum(x @ term.dense().T for term in wide._terms()) + bias
    _close(wide(x), expected, "forward is not the sum of the terms")
    _close(wide.dense(), sum(term.dense() for term in wide._terms()), "dense() is not the sum of the terms")
    plain = wide.collapse()
    assert isinstance(plain, nn.Linear) != layer.transposed
    _close(plain(x), expected, "collapse() is another function")
    again = build_sum(json.loads(json.dumps(layer.spec())), device="meta")
    again.load_state_dict(load(save(dict(layer.state_dict()))), assign=True)
    assert again.spec() == layer.spec() and torch.equal(again(x.float()), layer(x.float()))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x.float()), layer(x.float())) and twin.weight.shape == (0,)
    biases = 0 if layer.bias is None else len(layer.bias)
    assert layer.num_params == sum(term.num_params for term in layer._terms()) + biases
    for dtype in (torch.bfloat16, torch.float64):
        moved = copy.deepcopy(layer).to(dtype)
        assert moved.weight.dtype == moved(x.to(dtype)).dtype == dtype, "weight shows another dtype than the layer has"


def _draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def _needs_float64(W: Tensor) -> bool:
    return not torch.equal(W, W.float().double())


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())


def _flags(module: nn.Module) -> list[bool]:
    return [p.requires_grad for p in module.parameters()]


def _gradients(term: Term, function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> dict[str, Tensor | None]:
    """The gradients of <function(x), g> by name, x's among them; the term's own are cleared before and after."""
    term.zero_grad()
    x = x.detach().requires_grad_(True)
    torch.autograd.backward((function(x) * g).sum())
    found = {"x": x.grad} | {name: p.grad for name, p in term.named_parameters()}
    term.zero_grad()
    return found


def _close(actual: Any, expected: Any, what: str, atol: float = 1e-9, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda found: f"{what}: {found}")


def _close_all(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], what: str, **tolerance: float
) -> None:
    for name, wanted in expected.items():
        found = actual[name]
        assert (found is None) == (wanted is None), f"{what}: {name} has a gradient on one side only"
        if wanted is not None:
            _close(found, wanted, f"{what} in {name}", **tolerance)
