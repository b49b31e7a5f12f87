"""Published laws against figures that were worked out elsewhere."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.scaling import LAWS, number
from weft.scaling.chinchilla import loss
from weft.scaling.qid_law import bits
from weft.scaling.vocab_law import tokens_per_character


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"),
    [("1B", "100B", 1.66e-3, 1.11e6), ("7B", "1.4T", 9.3e-4, 5.0e6), ("60M", "2B", 3.7e-3, 119e3)],
)
def test_step_law_gives_the_published_examples(parameters: str, tokens: str, lr: float, batch: float) -> None:
    said = LAWS["step-law"].predict(parameters=parameters, tokens=tokens)
    assert said["lr"] == pytest.approx(lr, rel=0.01) and said["batch_tokens"] == pytest.approx(batch, rel=0.01)
    assert said["batch"] == round(said["batch_tokens"] / 2048)


def test_step_law_scales_as_the_card_says() -> None:
    one, wide, long = (
        LAWS["step-law"].predict(parameters=n, tokens=d) for n, d in ((3e8, 1e10), (6e8, 1e10), (3e8, 2e10))
    )
    assert wide["lr"] / one["lr"] == pytest.approx(2**-0.713, rel=1e-3) and wide["batch"] == one["batch"]
    assert long["lr"] / one["lr"] == pytest.approx(1.2376, rel=1e-3)
    assert long["batch_tokens"] / one["batch_tokens"] == pytest.approx(1.4855, rel=1e-3)


@pytest.mark.parametrize(
    ("parameters", "width", "loss_added"),
    [("12B", 2, 1.73), ("12B", 3, 0.186), ("12B", 4, 0.038), ("160M", 2, 4.6), ("160M", 3, 0.49), ("160M", 4, 0.10)],
)
def test_qid_law_gives_the_worked_values_and_its_inverse_the_bits(parameters, width, loss_added) -> None:
    said = LAWS["qid-law"].predict(parameters=parameters, tokens="206B", bits=width)
    assert said["loss_added"] == pytest.approx(loss_added, rel=0.02)
    assert said["perplexity_factor"] == pytest.approx(math.exp(said["loss_added"]))
    assert bits(number(parameters), 206e9, said["loss_added"]) == pytest.approx(width, abs=1e-9)


def test_qid_law_refuses_billions() -> None:
    with pytest.raises(WeftError, match="counts single tokens, not billions"):
        LAWS["qid-law"].predict(parameters="7B", tokens=206, bits=4)


def test_chinchilla_splits_compute_as_a_search_over_splits_does() -> None:
    said = LAWS["chinchilla"].predict(compute=1e21)
    sizes = [1e8 * 1.002**i for i in range(3000)]
    best = min(sizes, key=lambda n: loss(n, 1e21 / 6 / n))
    assert said["parameters"] == pytest.approx(best, rel=0.003)
    assert said["tokens"] * said["parameters"] * 6 == pytest.approx(1e21)


def test_vocab_law_agrees_with_the_zero_of_the_derivative() -> None:
    """Approach 2 from its definition: dC/dV = 0 at fixed text, and a line through the logarithms."""
    from scipy.optimize import brentq

    sizes = {33e6: 512, 85e6: 768, 151e6: 768, 302e6: 1024, 631e6: 1536, 1.13e9: 2048, 2.87e9: 3200}

    def slope(V: float, n: float, d: float) -> float:
        rise = (tokens_per_character(V * 1.0001) - tokens_per_character(V)) / (0.0001 * V)
        return d * tokens_per_character(V) + (n + V * d) * rise

    best = {n: d * brentq(slope, 500, 150_000, args=(n, d)) for n, d in sizes.items()}
    logs = [(math.log(n / 33e6), math.log(v / best[33e6])) for n, v in best.items() if n > 33e6]
    gamma = sum(x * y for x, y in logs) / sum(x * x for x, _ in logs)
    small, large = (LAWS["vocab-law"].predict(parameters=n, width=1) for n in (33e6, 33e7))
    stated = math.log10(large["vocabulary_parameters"] / small["vocabulary_parameters"])
    assert gamma == pytest.approx(stated, abs=0.01)
    values = [tokens_per_character(v) for v in (4e3, 1e4, 1e5, 2e5)]
    assert values == sorted(values, reverse=True) and tokens_per_character(1e6) == values[-1]


@given(st.integers(2, 60), st.integers(1, 40), st.floats(1, 50), st.floats(0.34, 1))
def test_fast_scaling_keeps_the_exponents(depth: int, heads: int, factor: float, alpha: float) -> None:
    said = LAWS["fast-scaling"].predict(depth=depth, width=64 * heads, factor=factor, alpha=alpha)
    assert said["width"] % 64 == 0 and said["depth"] >= depth * factor ** (1 - alpha) - 0.51
    same = LAWS["fast-scaling"].predict(depth=depth, width=64 * heads, factor=1)
    assert (same["depth"], same["width"], same["compute_factor"]) == (depth, 64 * heads, 1)
    fine = LAWS["fast-scaling"].predict(depth=depth * 1e6, width=64e6, factor=factor, alpha=alpha)
    assert fine["compute_factor"] == pytest.approx(factor, rel=1e-4)
    assert fine["activation_factor"] == pytest.approx(factor ** (1 - alpha / 2), rel=1e-4)


def test_a_law_says_where_it_was_not_fitted() -> None:
    assert LAWS["step-law"].predict(parameters="1B", tokens="20B")["outside"] == []
    said = LAWS["step-law"].predict(parameters="70B", tokens="20B")["outside"]
    assert len(said) == 1 and said[0].startswith("parameters = 7e+10 lies outside")


def test_what_is_wrong_is_said_in_a_sentence() -> None:
    law = LAWS["step-law"]
    with pytest.raises(WeftError, match="The law 'step-law' needs tokens: tokens of training"):
        law.predict(parameters="1B")
    with pytest.raises(WeftError, match="no quantity of the law 'step-law' called 'token'; the nearest are: tokens"):
        law.predict(parameters="1B", token="2B")
    for wrong in ("-1", "0", "many", "1BB", "nan", "inf", "1e999"):
        with pytest.raises(WeftError, match="must be a positive number"):
            law.predict(parameters=wrong, tokens="1B")


def test_numbers() -> None:
    assert [number(x) for x in ("1B", "350m", "1.5T", "2e9", "20_000", 7, 0.5)] == [
        1e9,
        3.5e8,
        1.5e12,
        2e9,
        2e4,
        7,
        0.5,
    ]


def test_repeated_tokens_are_warned_of() -> None:
    said = [LAWS["token-crisis"].predict(tokens=t, unique="1B", parameters="50M") for t in ("1B", "3B", "10B")]
    assert [one["epochs"] for one in said] == [1, 3, 10] and said[0]["tokens_per_parameter"] == 20
    assert [("dropout" in one["advice"]) for one in said] == [False, False, True]
