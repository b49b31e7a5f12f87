"""Documents as tokens: exactly the completion, and exactly the assistant's turns, are learned."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from weft.embedded import model_path
from weft.errors import WeftError
from weft.train.examples import encode
from weft.train.sources import Chat, Completion, Text

TURNS = (
    {"role": "user", "content": "what is two"},
    {"role": "assistant", "content": "return 2"},
    {"role": "user", "content": "and three"},
    {"role": "assistant", "content": "return 3"},
)
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %} {{ m.content }}\n"
    "{% endgeneration %}{% else %} {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = "{{ messages | length }} {{ messages[-1].content }}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("pico"))


def learned_text(tokenizer, example):
    return tokenizer.decode(example.ids[example.learned])


def test_text_is_learned_whole_and_ended(tokenizer):
    first, second = encode([Text("import os\n"), Text("x = 1")], tokenizer)
    assert first.ids.tolist() == [*tokenizer("import os\n")["input_ids"], tokenizer.eos_token_id]
    assert first.learned.all() and second.learned.all()


def test_only_the_completion_is_learned(tokenizer):
    prompt, completion = "Q: two plus two?\nA:", " 4, of course"
    (example,) = encode([Completion(prompt, completion)], tokenizer)
    assert tokenizer.decode(example.ids) == prompt + completion + tokenizer.eos_token
    assert learned_text(tokenizer, example) == completion + tokenizer.eos_token


def test_a_token_across_the_border_is_learned(tokenizer):
    """`re` + `turn` is one token in the whole: it belongs to the completion, whose first letters it carries."""
    (example,) = encode([Completion("    re", "turn x")], tokenizer)
    assert tokenizer.decode(example.ids) == "    return x" + tokenizer.eos_token
    assert "return x" in learned_text(tokenizer, example)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_turns_are_learned(tokenizer, template):
    tokenizer.chat_template = template
    (example,) = encode([Chat(TURNS)], tokenizer)
    assert learned_text(tokenizer, example) == " return 2\n return 3\n"
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(list(TURNS), tokenize=False)


def test_chats_without_a_usable_template_are_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(WeftError, match="no chat template"):
        encode([Chat(TURNS)], tokenizer)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(WeftError, match="rewrites earlier turns"):
        encode([Chat(TURNS)], tokenizer)
