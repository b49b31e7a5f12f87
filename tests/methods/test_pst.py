"""pst against its lines in fp64: the rise of the sparsity, the learned scores, and what is left."""

from __future__ import annotations

import pytest
import torch

from tests.methods.one_layer import One, close
from tests.methods.test_structures import IN, OUT, batches, drawn
from weft.errors import WeftError
from weft.methods import METHODS
from weft.rules.cubic_sparsity import CubicSparsity
from weft.seeds import generator
from weft.terms import Masked, ScoredMask, SumLinear
from weft.terms.layers import linear_layers
from weft.testing_adapters import task, tiny_llama
from weft.testing_rules import PROPERTIES, check_rule
from weft.verbs.fresh import Structure, finish, restructure

CHANGE, SCORE, STEPS, RATE = 2, 3, 20, 0.02


def made() -> One:
    """One layer with a mask to be learned, in fp64."""
    model = One(drawn())
    term = ScoredMask.from_matrix(drawn(), CHANGE, SCORE, generator(0, "pst"))
    model.layer = SumLinear({"base": term}).double()
    return model


def rule(sparsity: float = 0.6, dense: float = 0.1, settle: float = 0.2) -> CubicSparsity:
    return CubicSparsity(sparsity, dense, settle)


def test_it_follows_its_lines() -> None:
    """Plain gradient descent: the score's gradient is that of the masked weight times the weight."""
    model = made().train()
    term = model.layer.terms["base"]
    assert isinstance(term, ScoredMask)
    names = ("U", "V", "A", "B", "R", "C")
    optimizer = torch.optim.SGD([getattr(term, name) for name in names], lr=RATE)
    schedule = rule()
    schedule.start(model, steps=STEPS)
    W = term.W.detach().clone()
    U, V, A, B, R, C = (getattr(term, name).detach().clone() for name in names)
    shares = []
    for step, (x, y) in enumerate(batches(), 1):
        # dense for 2 of 20 steps, rising until step 16
        v = 0.6 * (1 - (1 - max(step - 2, 0) / 15) ** 3) if step <= 16 else 0.6
        changed = W + U @ V
        free, learned, rows, columns = changed.tolist(), (A @ B).tolist(), R.flatten().tolist(), C.flatten().tolist()
        S = [[abs(free[i][j]) + learned[i][j] + rows[i] + columns[j] for j in range(IN)] for i in range(OUT)]
        order = sorted(((S[i][j], i, j) for i in range(OUT) for j in range(IN)), reverse=True)
        M = torch.zeros(OUT, IN, dtype=torch.float64)
        for _, i, j in order[: round((1 - v) * OUT * IN)]:
            M[i, j] = 1
        shares.append(int((M == 0).sum()))
        assert int((~term.mask()).sum()) == shares[-1] == OUT * IN - term.kept
        residual = x @ (M * changed).T - y
        loss = (model(x) - y).square().mean()
        assert float(loss.detach()) == pytest.approx(float(residual.square().mean()), rel=1e-9)
        schedule.update(model, optimizer, loss, step)
        G = 2 / residual.numel() * residual.T @ x
        dS, dW = G * changed, G * M
        grads = (dW @ V.T, U.T @ dW, dS @ B.T, A.T @ dS, dS.sum(1, keepdim=True), dS.sum(0, keepdim=True))
        U, V, A, B, R, C = (p - RATE * g for p, g in zip((U, V, A, B, R, C), grads, strict=True))
        for name, expected in zip(names, (U, V, A, B, R, C), strict=True):
            close(getattr(term, name), expected, 1e-8)
        if step == STEPS:
            break
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == round(0.6 * OUT * IN)
    assert torch.equal(term.W, W)


def test_without_learned_scores_it_is_magnitude_pruning() -> None:
    W = drawn()
    term = ScoredMask.from_matrix(W, 0, 0, generator(0, "pst"))
    torch.testing.assert_close(term.dense(), W, rtol=0, atol=0)
    term.kept = 7
    smallest = W.abs().flatten().sort(descending=True).values[6]
    assert torch.equal(term.mask(), W.abs() >= smallest)


def test_a_model_begins_as_it_is_trains_few_numbers_and_ends_as_its_kept_entries() -> None:
    model, method = tiny_llama(), METHODS["pst"]
    x = {"input_ids": task()[0]["input_ids"]}
    with torch.no_grad():
        before = model(**x).logits
    structure = Structure(method, None, method.options({"change": 2, "score": 3}))
    restructure(model, structure, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(**x).logits, before)
    trained = method.freeze(model)
    terms = [module for module in model.modules() if isinstance(module, ScoredMask)]
    expected = sum((2 + 3 + 1) * (term.out_features + term.in_features) for term in terms)
    assert sum(p.numel() for p in trained) == expected and len(terms) == 7
    schedule = rule(0.5)
    schedule.start(model, steps=4)
    for step in range(1, 5):
        with torch.no_grad():  # scores that matter
            for p in trained:
                p.add_(torch.randn(p.shape, generator=generator(step, "noise")) * 0.05)
        schedule.after_step(model, step)
    with torch.no_grad():
        during = model(**x).logits
        finish(model, structure)
        torch.testing.assert_close(model(**x).logits, during, atol=1e-5, rtol=1e-5)
    left = [module for module in model.modules() if isinstance(module, Masked)]
    assert len(left) == 7 and not any(isinstance(module, ScoredMask) for module in model.modules())
    assert all(term.nonzeros == round(0.5 * term.out_features * term.in_features) for term in left)


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name != "acts"])
def test_the_schedule_is_a_rule(name: str) -> None:
    def start() -> tuple[object, dict[str, dict[str, object]]]:
        model = tiny_llama()
        restructure(model, Structure(METHODS["pst"], None, METHODS["pst"].options({"change": 2, "score": 2})), 0)
        METHODS["pst"].freeze(model)
        return model, {n: dict(layer.terms) for n, layer in linear_layers(model).items()}  # type: ignore[union-attr, arg-type]

    check_rule(rule, start, name)  # type: ignore[arg-type]


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(WeftError, match="sparsity is 1"):
        rule(1.0)
    with pytest.raises(WeftError, match="below 1 together"):
        rule(0.5, 0.5, 0.5)
    with pytest.raises(WeftError, match="0 or more"):
        METHODS["pst"].split(None, change=-1, score=2)  # type: ignore[misc, arg-type]
