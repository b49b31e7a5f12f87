"""The rule callback in a plain transformers Trainer: hooks at the right moments, state kept bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weft.errors import WeftError
from weft.rules import Rule
from weft.train.callback import RULES_FILE, RuleCallback, load_rule_state, save_rule_state


class Decay(Rule):
    """Shrinks one weight after each step by a random factor, and remembers a tensor, a generator and numbers."""

    def start(self, model, terms=None, steps=None):
        self.generator, self.seen, self.total = torch.Generator().manual_seed(7), [], 0.1
        self.trace = torch.zeros(3)

    def before_step(self, model, step):
        assert model.lm_head.weight.grad is not None
        self.before = model.lm_head.weight.detach().clone()

    def after_step(self, model, step):
        assert not torch.equal(self.before, model.lm_head.weight)
        self.seen.append(step)
        draw = torch.rand(3, generator=self.generator)
        self.trace, self.total = self.trace + draw, self.total + draw[0].item()
        with torch.no_grad():
            model.lm_head.weight.mul_(1 - 0.01 * draw[1])

    def state_dict(self):
        return {"trace": self.trace, "random": self.generator.get_state(), "total": self.total, "steps": len(self.seen)}

    def load_state_dict(self, state):
        self.trace, self.total = state["trace"], state["total"]
        self.seen = list(range(1, state["steps"] + 1))
        self.generator.set_state(state["random"])


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = (torch.arange(8) * (i + 3)) % 31
        return {"input_ids": ids, "labels": ids}


def run(directory, resume=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    args = TrainingArguments(
        output_dir=str(directory), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=100,
    )  # fmt: skip
    rule = Decay()
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=Data(), callbacks=[RuleCallback(rule)])
    trainer.train(resume_from_checkpoint=resume)
    return rule, trainer.model


def test_resuming_a_plain_trainer_restores_rules_bit_for_bit(tmp_path):
    whole, model = run(tmp_path / "a")
    assert whole.seen == [1, 2, 3, 4, 5, 6]
    resumed, again = run(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.seen == [1, 2, 3, 4, 5, 6] and resumed.total == whole.total
    assert torch.equal(resumed.trace, whole.trace)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_state_is_saved_exactly_and_its_absence_is_a_sentence(tmp_path):
    class Memory(Rule):
        def state_dict(self):
            return {"a": torch.rand(3, dtype=torch.float64), "b": 0.1 + 0.2, "c": 2**60, "d": torch.tensor(True)}

    torch.manual_seed(0)
    expected = Memory().state_dict()
    torch.manual_seed(0)
    save_rule_state(Memory(), tmp_path)
    loaded = load_rule_state(tmp_path)
    assert torch.equal(loaded["a"], expected["a"]) and loaded["b"] == expected["b"] and loaded["c"] == 2**60
    assert loaded["d"].dtype == torch.bool and loaded["d"]
    (tmp_path / RULES_FILE).unlink()
    with pytest.raises(WeftError, match=RULES_FILE):
        load_rule_state(tmp_path)
