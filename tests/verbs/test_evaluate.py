"""Perplexity against a slow independent computation, and what `weft eval` refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from weft.errors import WeftError
from weft.verbs import evaluate as verb
from weft.verbs.evaluate import evaluate, model_size, run

TEXT = "import os\n\n\ndef add(first, second):\n    return first + second\n\n\n" * 12


@pytest.fixture(scope="module")
def loaded(tiny_directory):
    return AutoModelForCausalLM.from_pretrained(tiny_directory), AutoTokenizer.from_pretrained(tiny_directory)


def slow_loss(model, tokenizer, window, stride, count=None):
    """One token at a time, each from its own forward pass over its context."""
    stream = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    starts = list(range(0, len(stream) - window + 1, stride))
    if count is None and starts[-1] + window < len(stream):
        starts.append(len(stream) - window)
    scored, total = {0} | {s for s in starts[:count] if stride == window and s % window == 0}, []
    for start in starts[:count]:
        for place in range(start + 1, start + window):
            if place not in scored:
                scored.add(place)
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([stream[start:place]])).logits[0, -1].double()
                total.append(-logits.log_softmax(-1)[stream[place]].item())
    return sum(total) / len(total), len(total), len(stream)


@pytest.mark.parametrize(("window", "stride", "count"), [(16, 16, None), (16, 7, None), (24, 1, 5), (30, 30, 3)])
def test_loss_equals_a_slow_computation(loaded, window, stride, count):
    model, tokenizer = loaded
    loss, tokens, _ = slow_loss(model, tokenizer, window, stride, count)
    found = evaluate(model, tokenizer, TEXT, window, stride, count)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(loss, abs=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_beginning_is_in_front_of_every_window_and_never_scored(loaded):
    """As the model sees the first window of a text; the tokens scored are the same with and without it."""
    model, tokenizer = loaded
    found = evaluate(model, tokenizer, TEXT, 17, bos=True)
    plain = evaluate(model, tokenizer, TEXT, 16)
    assert found["bos"] and not plain["bos"] and found["tokens"] == plain["tokens"]
    stream = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    starts = range(0, len(stream) - 15, 16)
    total, tokens = 0.0, 0
    for start, stop in [*((s, s + 16) for s in starts), (len(stream) - 16, len(stream))]:
        ids = torch.tensor([[tokenizer.bos_token_id, *stream[start:stop]]])
        with torch.no_grad():
            losses = -model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        new = losses[1:] if start in starts else losses[starts[-1] + 16 - start :]
        total, tokens = total + float(new.sum()), tokens + len(new)
    assert tokens == found["tokens"] and found["loss"] == pytest.approx(total / tokens, abs=2e-6)


def test_small_and_large_batches_give_the_same_loss(loaded, monkeypatch):
    model, tokenizer = loaded
    one = evaluate(model, tokenizer, TEXT, 16)["loss"]
    monkeypatch.setattr(verb, "LOGIT_BYTES", 1)
    monkeypatch.setattr(verb, "FLOAT_ROWS", 3)
    assert evaluate(model, tokenizer, TEXT, 16)["loss"] == pytest.approx(one, abs=1e-6)


def test_word_and_byte_perplexity_are_those_of_the_harness(loaded):
    """exp(total nll / words) with words = re.split(r"\\s+", text); tokens without context are charged the mean."""
    model, tokenizer = loaded
    found = evaluate(model, tokenizer, TEXT, 16, stride=1)
    _, _, length = slow_loss(model, tokenizer, 16, 16)
    total = found["loss"] * length
    assert found["words"] == len(re.split(r"\s+", TEXT))
    assert found["word_perplexity"] == pytest.approx(math.exp(total / found["words"]), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / len(TEXT.encode())), rel=1e-6)


def test_the_model_is_left_as_it_was(loaded):
    model, tokenizer = loaded
    model.train()
    evaluate(model, tokenizer, TEXT, 16)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()


def test_size_counts_tied_weights_once():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    names = dict(model.named_parameters())  # named_parameters lists a tied one once
    expected = sum(p.numel() for p in names.values())
    assert model_size(model) == (expected, expected * 4)
    assert model_size(model.bfloat16()) == (expected, expected * 2)


def test_run_reads_files_and_has_the_promised_keys(tiny_directory, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    found = run(str(tiny_directory), text=path, window=32, windows=2, device="cpu")
    promised = {"perplexity", "tokens", "parameters", "bytes", "tokens_per_second", "peak_memory_bytes"}
    assert promised <= set(found) and found["tokens"] == 62 and found["windows"] == 2
    assert found["tokens_per_second"] > 0 and found["peak_memory_bytes"] > found["bytes"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"window": 1}, "The window is 1 tokens"),
        ({"stride": 0, "window": 8}, "The stride is 0 tokens"),
        ({"window": 256}, "The window is 256 tokens and the model's context 128"),
        ({"windows": 900, "window": 64}, "not 900"),
        ({"windows": 0, "window": 64}, "--windows is 0"),
        ({"text": "nowhere.txt"}, "no data at nowhere.txt"),
    ],
)
def test_mistakes_are_sentences_before_the_model_is_loaded(tiny_directory, tmp_path, monkeypatch, arguments, sentence):
    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    monkeypatch.setattr(verb, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(WeftError, match=sentence):
        run(str(tiny_directory), **{"text": path, "device": "cpu", **arguments})


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(WeftError, match="BertForMaskedLM is no causal language model"):
        run(str(tmp_path), text=__file__, window=16)
