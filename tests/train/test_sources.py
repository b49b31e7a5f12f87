"""Reading data: every kind of input becomes documents, every kind of mistake one sentence."""

from __future__ import annotations

import json

import pytest

from weft.errors import WeftError
from weft.train.sources import Chat, Completion, Fields, Skipped, Text, read_documents, read_texts


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
        ("x.yaml", "a: 1", r"x.yaml has the ending '.yaml', which weft does not read as data: give .jsonl"),
        ("x.csv", "text,id\na,1\nb\n", r"x.csv, line 3 has 1 fields, and the first line of the file 2"),
        ("x.csv", "text,id\na,1,2\n", r"x.csv, line 2 has 3 fields, and the first line of the file 2"),
        ("x.csv", 'text\n"a', r"x.csv, line 1 is no row of a table"),
        ("x.csv", "body\na\n", r"x.csv, line 2 has no field 'text'; it has: body"),
        ("x.jsonl", '{"text": "\\ud800"}\n', r"line 1: the field 'text' holds half a character \('.ud800'"),
        ("x.jsonl", lines({"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}), r"line 1: .* half a"),
        ("x.jsonl", lines({"messages": TURNS, "tools": "[{"}), r"line 1: the field 'tools' is a text that is not JSON"),
        ("x.jsonl", lines({"messages": TURNS, "tools": {"name": 1}}), r"line 1: the field 'tools' must be a list"),
        ("x.jsonl", lines({"messages": [{"role": "assistant", "content": None}]}), r"line 1: messages must be"),
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


def test_tables_are_records(write):
    prose = 'a "quoted" line\nand another, with a comma'
    quoted = '"' + prose.replace('"', '""') + '"'
    path = write("x.csv", f"id,text\n1,plain\n2,{quoted}\n")
    assert read_documents(path) == [Text("plain"), Text(prose)]
    path = write("x.tsv", "question\tanswer\np, with a comma\tc\n")
    assert read_documents(path, Fields(prompt="question", completion="answer")) == [Completion("p, with a comma", "c")]


def test_what_is_no_data_in_a_directory_is_left_out_by_name(write, tmp_path):
    write("d/train.csv", "text\na\n"), write("d/README.md", "# Card"), write("d/LICENSE", "MIT")
    write("d/config.yaml", "a: 1"), write("d/notes.txt", "text beside")
    with pytest.warns(UserWarning, match=r"Left out of the data in .*d: LICENSE, README.md, config.yaml\."):
        assert read_documents(tmp_path / "d") == [Text("text beside"), Text("a")]
    write("book/README.md", "first"), write("book/a.md", "second")  # texts alone: it is one of them
    assert read_documents(tmp_path / "book") == [Text("first"), Text("second")]


def test_fields_of_a_plain_text_are_refused(write):
    with pytest.raises(WeftError, match="x.txt is one plain text, which has no field 'question'"):
        read_documents(write("x.txt", "words"), Fields(prompt="question"))


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def test_tools_and_their_calls_are_read(write):
    """Arguments become a record, which a template would otherwise quote twice; a call needs no content."""
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, TURNS[1]]
    tools = [{"name": "add"}]
    for given in (tools, json.dumps(tools)):
        (chat,) = read_documents(write("x.jsonl", lines({"messages": turns, "tools": given})))
        assert chat.tools == tools and chat.place.endswith("x.jsonl, line 1")
        assert chat.messages[1]["content"] == ""
        assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}


def test_parquet_keeps_no_fields_that_only_other_rows_have(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": "user", "content": "hi", "name": "me"}, {"role": "assistant", "content": "one"}]},
        {"messages": [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "two"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    first, second = read_documents(tmp_path / "x.parquet")
    assert first.messages[0]["name"] == "me" and "name" not in second.messages[0]


def test_bad_records_are_left_out_up_to_a_number_and_listed(write):
    path = write("x.jsonl", '{"text": "a"}\n{"text": \n{"body": "b"}\n{"text": "c"}\n')
    skipped = Skipped(2)
    assert read_documents(path, skipped=skipped) == [Text("a"), Text("c")]
    assert ["line 2 is not JSON" in skipped.errors[0], "line 3 has no field" in skipped.errors[1]] == [True, True]
    with pytest.raises(WeftError, match=r"line 3 has no field .*after 1 others, the limit of --skip-bad"):
        read_documents(path, skipped=Skipped(1))
