"""Reading training data: files, directories and `datasets` folders become a list of documents.

    a text file, or a directory of them      each file is one document
    JSONL (.jsonl, .ndjson), JSON list       one record a line or item, its fields chosen by `Fields`
    Parquet, a `datasets` save_to_disk folder   the same, one record a row

A document is one of `Text`, `Completion` (loss on the completion only) and `Chat` (loss on the assistant's turns only).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import WeftError, nearest

__all__ = [
    "Chat",
    "Completion",
    "Document",
    "Fields",
    "Text",
    "read_documents",
    "read_texts",
    "source_files",
    "texts_of",
]


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
    """Messages {"role": ..., "content": ...}; only the assistant's are learned."""

    messages: tuple[Mapping[str, Any], ...]


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


def read_documents(
    paths: str | Path | Sequence[str | Path], fields: Fields | None = None, split: str = "train"
) -> list[Document]:
    """All documents of `paths`, in the order given; the files of a directory in the order of their names.

    Args:
        fields: names of the record fields, where they are not the usual ones.
        split: which part of a `datasets` folder that has several.

    Raises WeftError, naming file and line or row, for a missing path, text that is not UTF-8, a bad JSON line, a
    missing field, a field of the wrong type, or when there is no text at all.
    """
    fields = (fields or Fields()).chosen()
    several = [paths] if isinstance(paths, str | Path) else paths
    documents = [document for path in several for document in _read(Path(path), fields, split)]
    if not any(map(has_content, documents)):
        raise WeftError(f"The data is empty: {', '.join(map(str, several))} holds no text.")
    return [document for document in documents if has_content(document)]


def read_texts(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """The texts of `paths` for calibration or evaluation; records give everything they hold, joined. Raises as
    `read_documents`.
    """
    return [plain_text(document) for document in read_documents(paths)]


def source_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files under `paths` (a `datasets` folder counts as one), in the order given, without reading them. Raises as
    `read_documents` for a missing path.
    """
    several = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    return [file for path in several for file in _files_of(path)]


def texts_of(file: Path) -> Iterator[str]:
    """The texts of one of `source_files`, empty ones left out."""
    return (plain_text(document) for document in _read(file, Fields(), "train") if has_content(document))


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


def _read(path: Path, fields: Fields, split: str) -> Iterable[Document]:
    if _is_datasets_folder(path):
        return _records(_datasets_folder(path, split), fields, f"{path}, row")
    return [document for file in _files_of(path) for document in _read_file(file, fields)]


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f"; beside it there are: {', '.join(nearest(path.name, beside))}" if beside else ""
        raise WeftError(f"There is no data at {path}{hint}.")
    if not path.is_dir() or _is_datasets_folder(path):
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))


def _is_datasets_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)


def _read_file(path: Path, fields: Fields) -> Iterable[Document]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _records(_json_lines(path), fields, f"{path}, line")
        case ".json":
            return _records(_json_list(path), fields, f"{path}, item")
        case ".parquet":
            return _records(_parquet(path), fields, f"{path}, row")
        case _:
            return [Text(_utf8(path))]


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WeftError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out of the data."
        ) from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank."""
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise WeftError(f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}).") from None


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        items = json.loads(_utf8(path))
    except json.JSONDecodeError as error:
        raise WeftError(
            f"{path} is not JSON ({error.msg} at line {error.lineno}); a file with one record a line must end in "
            ".jsonl."
        ) from None
    if not isinstance(items, list):
        raise WeftError(f"{path} holds a JSON {type(items).__name__}: a list of records is needed.")
    return iter(enumerate(items, start=1))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    datasets = _datasets()
    try:
        return _rows(datasets.Dataset.from_parquet(str(path)))
    except Exception as error:  # pyarrow and datasets share no base class for a damaged file
        raise WeftError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error


def _datasets_folder(path: Path, split: str) -> Iterator[tuple[int, Any]]:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise WeftError(f"{path} cannot be read as a datasets folder: {str(error).splitlines()[0]}.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise WeftError(f"{path} has no split {split!r}; it has: {', '.join(loaded)}.")
        loaded = loaded[split]
    return _rows(loaded)


def _rows(dataset: Any) -> Iterator[tuple[int, Any]]:
    return iter(enumerate(dataset, start=1))


def _datasets() -> Any:
    try:
        import datasets  # an optional extra, and slow to import
    except ImportError:
        raise WeftError(
            "Reading Parquet and datasets folders needs the datasets package: pip install 'weft[data]'."
        ) from None
    return datasets


def _records(numbered: Iterable[tuple[int, Any]], fields: Fields, place: str) -> list[Document]:
    """The records as documents; an error says at which `place` (a file and what its numbers count)."""
    return [_document(record, fields, f"{place} {number}") for number, record in numbered]


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
        return Chat(_messages(record[fields.messages], place))
    texts = [_string(record[name], name, place) for name in fields.names()]
    return Text(*texts) if fields.text is not None else Completion(*texts)


def _string(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise WeftError(f"{place}: the field {name!r} holds a {type(value).__name__} where text is needed.")
    return value


def _messages(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    good = isinstance(value, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good:
        raise WeftError(f'{place}: messages must be a list of {{"role": ..., "content": ...}} with text in both.')
    if not any(message["role"] == "assistant" for message in value):
        raise WeftError(f"{place}: no message has the role 'assistant', so there is nothing to learn from it.")
    return tuple(value)
