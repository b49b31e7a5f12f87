"""Token windows: every token scored once, calibration windows disjoint and seeded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from weft.embedded import model_path
from weft.errors import WeftError
from weft.train.windows import (
    batches,
    calibration_batches,
    check_ids,
    evaluation_windows,
    opening,
    token_stream,
    token_windows,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("pico"))


TEXT = "def add(a, b):\n    return a + b\n" * 60


@given(st.data())
def test_every_token_with_context_is_scored_exactly_once(data):
    window = data.draw(st.integers(2, 40))
    tokens = data.draw(st.integers(window, 300))
    stride = data.draw(st.integers(1, window))
    times = [0] * tokens
    for w in evaluation_windows(tokens, window, stride):
        assert 0 <= w.start <= tokens - window and w.context >= 1
        for position in range(w.start + w.context, w.start + window):
            times[position] += 1
    if stride < window:
        assert times[0] == 0 and set(times[1:]) <= {1}
    else:  # disjoint windows: their first tokens have no context; the last window is moved back to the end
        unscored = [i for i, n in enumerate(times) if n == 0]
        assert unscored == list(range(0, tokens - window + 1, window)) and max(times) == 1


def test_count_takes_the_first_windows():
    assert evaluation_windows(100, 10, count=3) == evaluation_windows(100, 10)[:3]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((5, 8), "5 tokens, fewer than one window of 8"),
        ((100, 1), "at least 2"),
        ((100, 8, 9), "between 1 and the window, 8"),
        ((100, 8, 0), "between 1 and the window, 8"),
        ((20, 8, None, 3), "holds 2 windows of 8 tokens, not 3"),
        ((20, 8, None, 0), "at least 1"),
    ],
)
def test_impossible_windows_are_refused(arguments, sentence):
    with pytest.raises(WeftError, match=sentence):
        evaluation_windows(*arguments)


def test_stream_ends_each_document_once(tokenizer):
    one = tokenizer("a b c")["input_ids"]
    end = tokenizer.eos_token_id
    assert token_stream(tokenizer, ["a b c", " ", "a b c"]).tolist() == [*one, end, *one, end]
    with pytest.raises(WeftError, match="empty"):
        token_stream(tokenizer, ["", " \n"])


def test_token_windows_are_slices_of_the_stream(tokenizer):
    stream = token_stream(tokenizer, TEXT)
    windows = token_windows(tokenizer, TEXT, 16, count=4, stride=5)
    assert windows.shape == (4, 16)
    for i in range(4):
        assert torch.equal(windows[i], stream[5 * i : 5 * i + 16])


def test_batches_hold_every_window_once():
    windows = torch.arange(21).reshape(7, 3)
    made = list(batches(windows, 3))
    assert [len(b["input_ids"]) for b in made] == [3, 3, 1]
    assert torch.equal(torch.cat([b["input_ids"] for b in made]), windows)
    assert all(b["attention_mask"].all() and torch.equal(b["labels"], b["input_ids"]) for b in made)


def test_calibration_windows_are_seeded_and_each_from_its_own_part(tokenizer):
    stream = token_stream(tokenizer, TEXT)
    part = len(stream) // 5

    def draw(seed):
        return torch.cat([b["input_ids"] for b in calibration_batches(tokenizer, TEXT, 5, 16, 2, seed)])

    for i, row in enumerate(draw(0)):
        assert any(torch.equal(stream[s : s + 16], row) for s in range(i * part, (i + 1) * part - 15))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_calibration_refuses_a_short_text(tokenizer):
    with pytest.raises(WeftError, match="100 windows of 16 tokens need 1600 tokens"):
        calibration_batches(tokenizer, TEXT, 100, 16)
    with pytest.raises(WeftError, match="at least 1"):
        calibration_batches(tokenizer, TEXT, 0, 16)


@pytest.fixture
def beginning(tokenizer):
    """The embedded tokenizer, made to begin every text with a token of its own, as Gemma's and Llama's do."""
    from tokenizers.processors import TemplateProcessing

    other = AutoTokenizer.from_pretrained(model_path("pico"))
    other.add_special_tokens({"bos_token": "<bos>"})
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", other.bos_token_id)]
    )
    assert other("x = 1")["input_ids"] == [other.bos_token_id, *tokenizer("x = 1")["input_ids"]]
    return other


def test_the_opening_is_what_the_tokenizer_puts_in_front(tokenizer, beginning):
    assert opening(tokenizer) == () and opening(beginning) == (beginning.bos_token_id,)
    assert opening(beginning, bos=False) == () and opening(beginning, bos=True) == opening(beginning)
    assert opening(tokenizer, bos=True) == (tokenizer.bos_token_id,)
    tokenizer = AutoTokenizer.from_pretrained(model_path("pico"))
    tokenizer.bos_token = None
    with pytest.raises(WeftError, match="no beginning-of-text token: leave --bos away"):
        opening(tokenizer, bos=True)


def test_every_window_begins_as_a_text_does_and_holds_the_same_text(tokenizer, beginning):
    """Measured on Gemma-3-270M, windows without their <bos> double the perplexity."""
    begin = beginning.bos_token_id
    stream = token_stream(beginning, [TEXT, TEXT])
    assert torch.equal(stream, token_stream(tokenizer, [TEXT, TEXT])) and begin not in stream
    windows = token_windows(beginning, TEXT, 16)
    plain = token_windows(beginning, TEXT, 15, bos=False)
    assert (windows[:, 0] == begin).all() and torch.equal(windows[:, 1:], plain)
    (batch,) = calibration_batches(beginning, TEXT, 4, 16, 4)
    assert (batch["input_ids"][:, 0] == begin).all() and (batch["input_ids"][:, 1:] != begin).all()


def test_a_token_that_the_model_has_no_row_for_is_named(tokenizer):
    from transformers import LlamaConfig

    check_ids(torch.tensor([0, 5]), LlamaConfig(vocab_size=6), tokenizer)
    with pytest.raises(WeftError, match=r"number 6 of the tokenizer, and the model has rows for 6 tokens"):
        check_ids(torch.tensor([0, 6]), LlamaConfig(vocab_size=6), tokenizer)
