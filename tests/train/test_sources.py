"""Reading data: every kind of input becomes documents, every kind of mistake one sentence."""

from __future__ import annotations

import json

import pytest

from weft.errors import WeftError
from weft.train.sources import Chat, Completion, Fields, Text, read_documents, read_texts


@pytest.fixture
def write(tmp_path):
    def _write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


def lines(*records):
    return "\n".join(json.dumps(r) for r in records) + "\n"


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_text_files_are_documents(write):
    a, b = write("a.txt", "one"), write("b.md", "\ufefftwo\n")
    assert read_documents([b, a]) == [Text("two\n"), Text("one")]


def test_a_directory_is_read_in_order_without_what_is_hidden(write, tmp_path):
    write("d/b.txt", "b"), write("d/a/z.py", "z"), write("d/.git/x", b"\xff"), write("d/c.jsonl", lines({"text": "c"}))
    assert read_documents(tmp_path / "d") == [Text("z"), Text("b"), Text("c")]


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "t", "id": 3}, Text("t")),
        ({"prompt": "p", "completion": "c"}, Completion("p", "c")),
        ({"messages": TURNS}, Chat(tuple(TURNS))),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_usual_fields_are_recognised(write, record, document, name):
    content = lines(record) + "\n" if name.endswith("l") else json.dumps([record])
    assert read_documents(write(name, content)) == [document]


def test_other_field_names(write):
    path = write("x.jsonl", lines({"question": "q", "answer": "a", "body": "b", "turns": TURNS}))
    assert read_documents(path, Fields(prompt="question", completion="answer")) == [Completion("q", "a")]
    assert read_documents(path, Fields(text="body")) == [Text("b")]
    assert read_documents(path, Fields(messages="turns")) == [Chat(tuple(TURNS))]


def test_datasets_folder_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [{"text": "one"}, {"text": "two"}]
    data = datasets.Dataset.from_list(records)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=data.select([0]), test=data.select([1])).save_to_disk(tmp_path / "split")
    data.to_parquet(tmp_path / "x.parquet")
    both = [Text("one"), Text("two")]
    assert read_documents(tmp_path / "plain") == both
    assert read_documents(tmp_path / "x.parquet") == both
    assert read_documents(tmp_path / "split", split="test") == [Text("two")]
    with pytest.raises(WeftError, match="no split 'valid'; it has: train, test"):
        read_documents(tmp_path / "split", split="valid")


def test_read_texts_gives_everything_said(write):
    path = write("x.jsonl", lines({"text": "t"}, {"prompt": "p", "completion": "c"}, {"messages": TURNS}))
    assert read_texts(path) == ["t", "pc", "hi\nhello"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x.jsonl, line 2 is not JSON"),
        ("x.jsonl", '{"text": "a"}\n\n7\n', r"line 3 holds a int: a record"),
        ("x.jsonl", lines({"text": "a"}, {"body": "b"}), r"line 2 has no field 'text'; it has: body.*--text-field"),
        ("x.jsonl", lines({"text": 5}), r"line 1: the field 'text' holds a int where text is needed"),
        ("x.jsonl", lines({"messages": [{"role": "user"}]}), r"line 1: messages must be a list of"),
        ("x.jsonl", lines({"messages": TURNS[:1]}), r"line 1: no message has the role 'assistant'"),
        ("x.json", '{"text": "a"}', r"holds a JSON dict: a list of records"),
        ("x.json", '{"a": 1}\n{"a": 2}\n', r"one record a line must end in .jsonl"),
        ("x.txt", b"\xff\xfe\x00", r"x.txt is not UTF-8 text \(byte 0\)"),
        ("x.txt", " \n\t", r"The data is empty"),
        ("x.jsonl", lines({"prompt": "p", "completion": " "}), r"The data is empty"),
        ("x.parquet", "no", r"cannot be read as Parquet"),
    ],
)
def test_mistakes_are_sentences(write, name, content, sentence):
    with pytest.raises(WeftError, match=sentence) as caught:
        read_documents(write(name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_path_names_its_neighbours(write, tmp_path):
    write("train.jsonl", "")
    with pytest.raises(WeftError, match=r"no data at .*trian.jsonl; beside it there are: train.jsonl"):
        read_documents(tmp_path / "trian.jsonl")


def test_two_kinds_of_fields_at_once_are_refused(write):
    with pytest.raises(WeftError, match="Fields were given for text and prompt"):
        read_documents(write("x.jsonl", lines({"text": "a"})), Fields(text="text", completion="c"))
