"""Packing: best fit wastes little and loses nothing, and no document in a row sees another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, OPTConfig

from weft.errors import WeftError
from weft.train.examples import Example
from weft.train.packing import IGNORED, best_fit, collate, packing_refusal, rows

SMALL = {"vocab_size": 97}
CONFIGS = {
    "llama": LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "opt": OPTConfig(
        **SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "bloom": BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


def model_of(name, attention="sdpa"):
    torch.manual_seed(0)
    implementation = "eager" if name == "bloom" else attention
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation).eval()


def example(length, unlearned=0, seed=0):
    ids = torch.randint(2, 97, (length,), generator=torch.Generator().manual_seed(length * 1009 + seed))
    return Example(ids, torch.arange(length) >= unlearned)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_places_everything_once_and_is_never_twice_too_long(lengths):
    window = 50
    bins = best_fit(lengths, window)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in chosen) for chosen in bins]
    assert max(loads) <= window
    # a bound of any best fit: no two bins could have been one
    assert all(a + b > window for i, a in enumerate(loads) for b in loads[i + 1 :])


def test_each_piece_of_a_long_text_begins_as_a_text_does():
    whole = torch.arange(100, 125)
    begun = Example(torch.cat([torch.tensor([1]), whole]), torch.ones(26, dtype=torch.bool))
    made = rows([begun], window=10, packed=False, before=(1,))
    pieces = [row["input_ids"][row["attention_mask"].bool()].tolist() for row in made]
    assert all(piece[0] == 1 for piece in pieces)
    assert [token for piece in sorted(pieces, key=lambda p: p[1]) for token in piece[1:]] == whole.tolist()
    learned = [row["labels"] for row in made]
    # what has only the beginning in front of it is learned at the document's own beginning alone
    assert sum(int((labels != IGNORED).sum()) for labels in learned) == 25 - 2


def test_best_fit_is_fast_enough_for_a_large_corpus():
    lengths = torch.randint(1, 4097, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit(lengths, 4096)
    assert len(bins) <= 1.02 * sum(lengths) / 4096


def test_rows_hold_every_text_token_and_mask_each_first():
    examples = [example(7), example(3), example(25), example(10)]
    made = rows(examples, window=10)
    # 25 = 10 + 10 + 5; the pieces 10 10 10 7 5 3 fit in five rows
    assert len(made) == 5 and made.tokens == 45 and made.examples == 4 and made.dropped == made.shortened == 0
    seen = sorted(made.input_ids[made.positions >= 0].tolist())
    assert seen == sorted(token for e in examples for token in e.ids.tolist())
    starts = made.positions == 0
    assert (made.labels[starts] == IGNORED).all() and (made.labels[made.positions < 0] == IGNORED).all()
    inside = made.positions > 0
    assert torch.equal(made.labels[inside], made.input_ids[inside])


def test_prompts_are_ignored_and_long_examples_shortened_not_cut():
    made = rows([example(12, unlearned=4), example(30, unlearned=10), example(5, unlearned=3)], window=10)
    # the second has nothing to learn in its first ten tokens
    assert (made.examples, made.dropped, made.shortened) == (2, 1, 2)
    first = next(row for row in made if (row["labels"] != IGNORED).sum() == 6)
    assert (first["labels"][:4] == IGNORED).all() and torch.equal(first["labels"][4:], first["input_ids"][4:])


def test_nothing_to_learn_is_a_sentence():
    with pytest.raises(WeftError, match="none of its 2 documents has anything to learn in its first 8 tokens"):
        rows([example(20, unlearned=9), example(1)], window=8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_a_packed_document_are_those_of_the_document_alone(name, attention):
    model = model_of(name, attention)
    assert packing_refusal(model) is None
    examples = [example(9), example(5), example(6)]
    made = rows(examples, window=24)
    assert len(made) == 1
    batch = collate([made[0]])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = 0
        for e in sorted(examples, key=lambda e: -len(e.ids)):
            alone = model(input_ids=e.ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + len(e.ids)], alone, atol=1e-5, rtol=1e-5)
            start += len(e.ids)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_loss_of_rows_is_that_of_the_documents_one_by_one(name):
    """Packed (llama) or padded (opt): the same mean over the same targets."""
    model = model_of(name)
    examples = [example(9, unlearned=3), example(5), example(6, unlearned=2)]
    made = rows(examples, window=16, padding=1, packed=packing_refusal(model) is None)
    losses = []
    with torch.no_grad():
        batch = collate([made[i] for i in range(len(made))])
        loss = model(**batch, use_cache=False).loss
        for e in examples:
            logits = model(input_ids=e.ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            nll = -logits[torch.arange(len(e.ids) - 1), e.ids[1:]]
            losses.append(nll[e.learned[1:]])
    torch.testing.assert_close(loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_leak_are_refused_with_the_reason(name, dtype):
    reason = packing_refusal(model_of(name).to(dtype))
    assert reason is not None and "lets a document in a packed row see the one before it" in reason


def test_the_probe_leaves_the_mode_alone():
    model = model_of("llama").train()
    packing_refusal(model)
    assert model.training


def test_padded_rows_are_cut_to_the_longest_of_the_batch():
    made = rows([example(4), example(7)], window=16, padding=1, packed=False)
    batch = collate([made[0], made[1]])
    assert batch["input_ids"].shape == (2, 7) and batch["attention_mask"].sum(1).tolist() == [4, 7]
