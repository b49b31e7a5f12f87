"""One text at a time: gradients are autograd's, hidden states the model's, padding and masked labels left out."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from weft.errors import WeftError
from weft.stats.texts import gradients_by_text, last_hidden, texts_of
from weft.terms.layers import linear_layers
from weft.testing_grafts import tiny_decoder
from weft.testing_measures import texts


def test_gradients_are_autograd_s() -> None:
    model, found = tiny_decoder().double(), defaultdict(list)
    gradients_by_text(model, texts(), linear_layers(model), lambda name, x, g: found[name].append(g.mT @ x))
    assert found.keys() == linear_layers(model).keys() and all(len(rows) == 3 for rows in found.values())
    for i, text in enumerate(texts()):
        model.zero_grad()
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        model(**text, labels=labels).loss.backward()
        for name, layer in linear_layers(model).items():
            torch.testing.assert_close(found[name][i], layer.weight.grad, rtol=1e-6, atol=1e-9)


def test_what_is_not_predicted_pulls_at_nothing() -> None:
    (text, *_), found = texts(), {}
    labels = text["input_ids"].clone()
    labels[:, :12] = -100
    model = tiny_decoder()
    gradients_by_text(model, [{**text, "labels": labels}], linear_layers(model), lambda n, x, g: found.update({n: g}))
    rows = found["model.layers.1.mlp.down_proj"].any(1)
    assert not rows[:11].any() and rows[11:-1].all(), "the last block's MLP sees the answer's predictions alone"


def test_hidden_states_are_the_model_s_without_padding() -> None:
    model, batches = tiny_decoder(), texts()
    together = {key: torch.cat([text[key] for text in batches]) for key in batches[0]}
    found = list(last_hidden(model, [together]))
    assert [len(H) for H in found] == [24, 24, 12] and len(list(texts_of([together]))) == 3
    for H, text in zip(found, batches, strict=True):
        n = int(text["attention_mask"].sum())
        expected = model.model(input_ids=text["input_ids"][:, :n]).last_hidden_state[0]
        torch.testing.assert_close(H, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_hidden_states_is_told_so() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(2, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(WeftError, match="Bare gives no last hidden states"):
        next(last_hidden(Bare(), texts()))
