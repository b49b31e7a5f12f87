"""Inside transformers' own Trainer: a resumed run ends with the bits of the uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weft.optim as wo


def trainer(name: str, directory: Path, steps: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rank = {"frugal": 0.25, "apollo_mini": 1}.get(name, 4)
    columns = {"projection": "columns"} if name == "frugal" else {}
    optimizer = wo.OPTIMIZERS[name](model, rank=rank, lr=1e-3, refresh=3, **columns)
    tokens = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(directory), max_steps=steps, save_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, warmup_steps=2, seed=0,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


@pytest.mark.parametrize("name", ["galore", "apollo", "dct_adamw"])
def test_resume_in_the_trainer(name: str, tmp_path: Path) -> None:
    whole = trainer(name, tmp_path / "whole", 8)
    whole.train()
    resumed = trainer(name, tmp_path / "again", 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
