"""Reading training data: files, directories and `datasets` folders become a list of documents.

    a text file (.txt, .md, .py ...)         one document
    JSONL (.jsonl, .ndjson), JSON list       one record a line or item, its fields chosen by `Fields`
    CSV and TSV with a first line of names, Parquet, a `datasets` save_to_disk folder
                                             the same, one record a row
    a directory                              its files of these kinds, in the order of their names; others are named

A document is one of `Text`, `Completion` (loss on the completion only) and `Chat` (loss on the assistant's turns only).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import WeftError
from weft.train.records import Numbered, files_of, folder_records, is_datasets_folder, records_of, utf8

__all__ = [
    "Chat",
    "Completion",
    "Document",
    "Fields",
    "Skipped",
    "Text",
    "read_documents",
    "read_texts",
    "recorded",
    "source_files",
    "texts_of",
]

NAMED = 5
"""Files that a message lists."""


@dataclass(frozen=True)
class Text:
    """Plain text; every token is learned."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion; only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages {"role": ..., "content": ...}; only the assistant's are learned.

    Args:
        tools: descriptions of the tools that the template tells the model of; None for none.
        place: file and line or row it was read from.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: list[Any] | None = None
    place: str = field(default="", compare=False)


Document = Text | Completion | Chat


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold what; None takes the usual names, whichever of messages, prompt + completion,
    text is there.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def chosen(self) -> Fields:
        """Only what was asked for, with the partner of a lone prompt or completion field; raises WeftError for two
        kinds at once.
        """
        kinds = {"text": self.text, "prompt": self.prompt or self.completion, "messages": self.messages}
        asked = [kind for kind, field in kinds.items() if field is not None]
        if len(asked) > 1:
            raise WeftError(
                f"Fields were given for {' and '.join(asked)}: a record is one of these, so give only one kind."
            )
        if asked == ["prompt"]:
            return Fields(prompt=self.prompt or "prompt", completion=self.completion or "completion")
        return self

    def of(self, record: Mapping[str, Any]) -> Fields:
        """The fields to read this record by: the chosen ones, or the first usual kind that the record has."""
        if self != Fields():
            return self
        usual = (Fields(messages="messages"), Fields(prompt="prompt", completion="completion"), Fields(text="text"))
        return next((fields for fields in usual if all(name in record for name in fields.names())), Fields(text="text"))

    def names(self) -> list[str]:
        """The fields that a record must have."""
        return [name for name in (self.text, self.prompt, self.completion, self.messages) if name is not None]


@dataclass
class Skipped:
    """Records left out because something is wrong with them, at most `limit` of them.

    Raises WeftError, when called, with the error of the first one too many.
    """

    limit: int = 0
    errors: list[str] = field(default_factory=list)

    def __call__(self, error: WeftError) -> None:
        """Leave one more out, for this error."""
        if len(self.errors) >= self.limit:
            more = f" (after {self.limit} others, the limit of --skip-bad)" if self.limit else ""
            raise WeftError(f"{str(error).rstrip('.')}{more}.") from None
        self.errors.append(str(error))


def read_documents(
    paths: str | Path | Sequence[str | Path],
    fields: Fields | None = None,
    split: str = "train",
    skipped: Skipped | None = None,
) -> list[Document]:
    """All documents of `paths`, in the order given; the files of a directory in the order of their names.

    Args:
        fields: names of the record fields, where they are not the usual ones.
        split: which part of a `datasets` folder that has several.
        skipped: gets the records that are left out; None leaves none out.

    Raises WeftError, naming file and line or row, for a missing path, a file of an unknown ending, text that is not
    UTF-8, a bad JSON line, a missing field, a field of the wrong type, fields asked of a plain text, or when there is
    no text at all. Warns of the files of a directory that are left out.
    """
    fields = (fields or Fields()).chosen()
    several = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    documents = [
        document
        for path in several
        for file in _data_files(path)
        for document in _read(file, fields, split, skipped or Skipped())
    ]
    if not any(map(has_content, documents)):
        raise WeftError(f"The data is empty: {', '.join(map(str, several))} holds no text.")
    return [document for document in documents if has_content(document)]


def read_texts(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """The texts of `paths` for calibration or evaluation; records give everything they hold, joined. Raises as
    `read_documents`.
    """
    return [plain_text(document) for document in read_documents(paths)]


def recorded(path: Path) -> Iterator[tuple[Any, str]]:
    """Each record of a file with its text, one after another, none of which is kept here.

    Raises WeftError, naming the line, where one cannot be read or holds no text, or where the file is one text.
    """
    numbered = records_of(path)
    if numbered is None:
        raise WeftError(f"{path} is one text: give records to choose among (.jsonl, .csv, .parquet ...).")
    for place, record in numbered:
        if isinstance(record, WeftError):
            raise record
        document = _document(record, Fields().chosen(), place)
        if not has_content(document):
            raise WeftError(f"{place} is a record without text; take such records out first.")
        yield record, plain_text(document)


def source_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files under `paths` (a `datasets` folder counts as one), in the order given, without reading them. Raises
    and warns as `read_documents` for a path.
    """
    several = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    return [file for path in several for file in _data_files(path)]


def texts_of(file: Path) -> Iterator[str]:
    """The texts of one of `source_files`, empty ones left out."""
    documents = _read(file, Fields(), "train", Skipped())
    return (plain_text(document) for document in documents if has_content(document))


def plain_text(document: Document) -> str:
    """Everything that the document says, without its roles."""
    match document:
        case Text(text):
            return text
        case Completion(prompt, completion):
            return prompt + completion
        case Chat(messages):
            return "\n".join(str(message["content"]) for message in messages)


def has_content(document: Document) -> bool:
    """Whether there is anything to learn in it."""
    return bool((document.completion if isinstance(document, Completion) else plain_text(document)).strip())


def _data_files(path: Path) -> list[Path]:
    files, left = files_of(path)
    if left:
        names = ", ".join(str(p.relative_to(path)) for p in left[:NAMED])
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        warnings.warn(f"Left out of the data in {path}: {names}{more}.", stacklevel=3)
    return files


def _read(path: Path, fields: Fields, split: str, skipped: Skipped) -> Iterable[Document]:
    records = folder_records(path, split) if is_datasets_folder(path) else records_of(path)
    if records is not None:
        return _documents(records, fields, skipped)
    if fields != Fields():
        raise WeftError(
            f"{path} is one plain text, which has no field {fields.names()[0]!r}: fields are for JSONL, JSON, CSV, "
            "TSV, Parquet and datasets folders."
        )
    return [Text(utf8(path))]


def _documents(records: Numbered, fields: Fields, skipped: Skipped) -> Iterator[Document]:
    for place, record in records:
        try:
            if isinstance(record, WeftError):
                raise record
            yield _document(record, fields, place)
        except WeftError as error:
            skipped(error)


def _document(record: Any, fields: Fields, place: str) -> Document:
    if not isinstance(record, Mapping):
        raise WeftError(f"{place} holds a {type(record).__name__}: a record with named fields is needed.")
    fields = fields.of(record)
    missing = [name for name in fields.names() if name not in record]
    if missing:
        raise WeftError(
            f"{place} has no field {missing[0]!r}; it has: {', '.join(record)}. Name the right ones with --text-field, "
            f"--prompt-field and --completion-field, or --messages-field."
        )
    if fields.messages is not None:
        return Chat(_messages(record[fields.messages], place), _tools(record.get("tools"), place), place)
    texts = [_string(record[name], name, place) for name in fields.names()]
    return Text(*texts) if fields.text is not None else Completion(*texts)


def _string(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise WeftError(f"{place}: the field {name!r} holds a {type(value).__name__} where text is needed.")
    return _encodable(value, name, place)


def _encodable(value: str, name: str, place: str) -> str:
    """The text itself; JSON can spell halves of characters (lone surrogates), which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise WeftError(
            f"{place}: the field {name!r} holds half a character ({half!a}, at character {error.start + 1}), which is "
            "no text."
        ) from None
    return value


def _messages(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    if not (isinstance(value, Sequence) and all(map(_is_message, value))):
        raise WeftError(
            f'{place}: messages must be a list of {{"role": ..., "content": ...}} with text in both, or with '
            "tool_calls and no content."
        )
    if not any(message["role"] == "assistant" for message in value):
        raise WeftError(f"{place}: no message has the role 'assistant', so there is nothing to learn from it.")
    for message in value:
        _encodable(json.dumps(message, ensure_ascii=False, default=str), "messages", place)
    return tuple(map(_message, value))


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message as templates expect it: a text for its content, which they would write out as None, and the
    arguments of a tool call as a record, which they would quote twice.
    """
    calls = message.get("tool_calls")
    return {
        **message,
        "content": message.get("content") or "",
        **({"tool_calls": [_call(call) for call in calls]} if calls else {}),
    }


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _is_message(message: Any) -> bool:
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
        return False
    calls = message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        return False
    return isinstance(message.get("content"), str) or (message.get("content") is None and bool(calls))


def _tools(value: Any, place: str) -> list[Any] | None:
    """The tools of a conversation, which some data sets write as JSON in a text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise WeftError(f"{place}: the field 'tools' is a text that is not JSON ({error.msg}).") from None
    if not value:
        return None
    if not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
        raise WeftError(f"{place}: the field 'tools' must be a list of descriptions, each a record.")
    return list(value)
