"""Texts that are read in pieces: the tokens of the whole, whatever the tokenizer and wherever a piece ends."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weft.embedded import model_path
from weft.embedded.text import default_text
from weft.train import encoding
from weft.train.encoding import token_ids, token_pieces
from weft.train.stream import StreamedRows

TEXTS = {
    "code": default_text("evaluation")[:60_000],
    "other letters": "Grüße, 世界! Привет — naïve café 😀\n\n" * 900,
    "spaces": ("\n\n   \t" * 40 + "x" * 30) * 90,
    "one word": "abcde" * 6000,
}


@pytest.fixture(scope="module")
def tokenizers():
    """Byte-level pairs, as GPT-2's and Llama 3's; and with a mark for a space, and one in front, as Llama 2's."""
    pairs = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    pairs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pairs.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False)
    pairs.train_from_iterator([line for text in TEXTS.values() for line in text.split("\n")[:400]], trainer)
    pairs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marked = PreTrainedTokenizerFast(tokenizer_object=pairs, unk_token="<unk>", bos_token="<s>")
    return {"bytes": AutoTokenizer.from_pretrained(model_path("pico")), "marks": marked}


@pytest.mark.parametrize("which", ["bytes", "marks"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("piece", [4096, 5003])
def test_pieces_are_the_tokens_of_the_whole(tokenizers, which, text, piece, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", piece)
    tokenizer, words = tokenizers[which], TEXTS[text]
    whole = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = list(token_pieces(tokenizer, words))
    assert torch.cat(pieces).tolist() == whole
    assert max(map(len, pieces)) < len(whole) / 2 or text in ("one word", "spaces"), "no piece is most of the text"


def test_documents_are_read_together_or_by_themselves(tokenizers, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 4096)
    code, tokenizer = TEXTS["code"], tokenizers["bytes"]
    documents = ["", "short", code, "a", code[:5000], "b", *(code[i : i + 900] for i in range(0, 9000, 900))]
    found = token_ids(tokenizer, documents)
    for document, ids in zip(documents, found, strict=True):
        assert ids.dtype == torch.int64
        assert ids.tolist() == tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def test_a_slow_tokenizer_reads_a_text_whole():
    class Letters:
        is_fast = False

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    text = "a" * (encoding.PIECE + 5) + "b"
    assert torch.cat(list(token_pieces(Letters(), text))).tolist() == [ord(c) for c in text]


def test_a_long_document_to_train_on_is_read_in_pieces_too(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 4096)
    tokenizer, code = tokenizers["bytes"], TEXTS["code"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("short", code)))
    rows = StreamedRows([tmp_path / "a.jsonl"], tokenizer, 8, 4, 0, tmp_path / "tokens.bin")
    one, other = (tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in ("short", code))
    end = tokenizer.eos_token_id
    before = rows.before.tolist()
    assert [i for run in rows._runs() for i in run] == [*before, *one, end, *before, *other, end]
