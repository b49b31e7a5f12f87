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


THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% if tools %}<sys>{{ tools | tojson }}</sys>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>\n"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' }}"
    "\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{% if said or not loop.first %}\n{% endif %}"
    "[call {{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
"""As Qwen3's: thoughts of earlier turns are dropped, and the last turn always has one."""
CALLS_ALONE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}"
    "{{ m.content }}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""As Llama 3.1's: a message that calls a tool says nothing else."""


def thoughtful(*answers):
    return tuple(
        message
        for i, answer in enumerate(answers)
        for message in ({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer})
    )


@pytest.mark.parametrize(
    ("answers", "learned"),
    [
        (("one", "two"), "one<end>\n<think>\n\n</think>\n\ntwo<end>\n"),
        (
            ("<think>\nhm\n</think>\n\none", "<think>\nwell\n</think>\n\ntwo"),
            "one<end>\n<think>\nwell\n</think>\n\ntwo<end>\n",
        ),
    ],
)
def test_turns_of_a_template_that_drops_earlier_thoughts(tokenizer, answers, learned):
    tokenizer.chat_template = THINKING
    (example,) = encode([Chat(thoughtful(*answers))], tokenizer)
    assert learned_text(tokenizer, example) == learned
    assert "hm" not in tokenizer.decode(example.ids)


@pytest.mark.parametrize("answer", ["\n\n    return 2", "  two", "\n", "return 2\n\n"])
@pytest.mark.parametrize("template", [PLAIN.replace("] {{", "]\n{{").replace("[assistant]", "[assistant]\n"), PLAIN])
def test_an_answer_may_begin_and_end_with_white_space(tokenizer, template, answer):
    tokenizer.chat_template = template
    turns = (TURNS[0], {"role": "assistant", "content": answer}, *TURNS[2:])
    (example,) = encode([Chat(turns)], tokenizer)
    text = tokenizer.decode(example.ids)
    assert text == tokenizer.apply_chat_template(list(turns), tokenize=False)
    learned = learned_text(tokenizer, example)
    # a token may join the border's line break with the answer's; nothing else of the user's is learned
    assert answer.strip() in learned and "return 3" in learned and "user" not in learned and "assistant" not in learned
    assert learned.count("\n") >= answer.count("\n")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = (
    {"role": "user", "content": "what is two"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four"},
)


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (THINKING, '<think>\n\n</think>\n\n[call add {"a": 2}]<end>\n<think>\n\n</think>\n\nfour<end>\n'),
        (CALLS_ALONE, '{"name": "add", "arguments": {"a": 2}}<end>four<end>'),
    ],
)
def test_calls_of_tools_are_learned_and_tools_are_told(tokenizer, template, learned):
    tokenizer.chat_template = template
    (example,) = encode([Chat(CALLING, tools=[{"name": "add"}])], tokenizer)
    assert learned_text(tokenizer, example) == learned
    assert ('<sys>[{"name": "add"}]</sys>' in tokenizer.decode(example.ids)) == (template is THINKING)


def test_marks_of_a_template_see_the_tools(tokenizer):
    tokenizer.chat_template = "{% if tools %}<sys>{{ tools | tojson }}</sys>{% endif %}" + MARKED
    (example,) = encode([Chat(TURNS, tools=[{"name": "add"}])], tokenizer)
    assert "add" in tokenizer.decode(example.ids) and learned_text(tokenizer, example) == " return 2\n return 3\n"


def test_a_tokenizer_without_places_learns_the_same(tokenizer, monkeypatch):
    documents = [Completion("Q: two plus two?\nA:", " 4, of course"), Chat(TURNS)]
    tokenizer.chat_template = PLAIN
    expected = encode(documents, tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    for one, other in zip(expected, encode(documents, tokenizer), strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.learned.tolist() == other.learned.tolist()


def test_a_template_that_refuses_a_conversation_says_which_and_can_be_passed_over(tokenizer):
    tokenizer.chat_template = PLAIN + "{% if messages | length != 2 %}{{ raise_exception('Only pairs!') }}{% endif %}"
    good, bad = Chat(TURNS[:2]), Chat(TURNS, place="x.jsonl, line 7")
    with pytest.raises(WeftError, match=r"x.jsonl, line 7: the tokenizer's chat template refuses .*Only pairs!"):
        encode([good, bad], tokenizer)
    errors = []
    assert len(encode([bad, good], tokenizer, refuse=errors.append)) == 1 and len(errors) == 1


def test_chats_without_a_usable_template_are_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(WeftError, match="no chat template"):
        encode([Chat(TURNS)], tokenizer)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(WeftError, match="rewrites a turn by what comes after"):
        encode([Chat(TURNS)], tokenizer)
