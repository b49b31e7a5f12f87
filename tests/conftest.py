"""What tests of several rooms share: a tiny trained-shape model on disk, beside the embedded tokenizer."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from weft.embedded import model_path

# no deadline: a busy machine is no fault of the code; tests that need more examples than 50 say so
settings.register_profile("weft", deadline=None, max_examples=50)
settings.load_profile("weft")

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    # every seed is kept for devices that may come, each time with the stack of the call in words, which is a long one
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: it is put out of the way of the collections that each Trainer asks for."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def imported_to_stay() -> None:
    """What earlier tests have imported or compiled stays too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def registries() -> list[dict]:
    """The tables of every room, and the kinds of terms."""
    from weft import records
    from weft.terms import TERMS

    return [TERMS, *records.tables()]


@pytest.fixture(autouse=True)
def as_registered(registries: list[dict]) -> Iterator[None]:
    """What a test registers ends with it, so that no test meets the records of another, in whatever order they run."""
    before = [dict(table) for table in registries]
    yield
    for table, records in zip(registries, before, strict=True):
        table.clear()
        table.update(records)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of random weights in fp32, with the embedded model's tokenizer. Read it, do not write to it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, directory / name)
    return directory
