"""From files to numbered records: JSONL, JSON lists, CSV, TSV, Parquet and `datasets` folders.

A file's kind is its ending. A record that cannot be read comes as the error that says so, with its place, so that the
reader decides whether the run ends there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from weft.errors import WeftError, nearest

__all__ = ["RECORDS", "TEXTS", "Numbered", "files_of", "folder_records", "is_datasets_folder", "records_of", "utf8"]

Numbered = Iterator[tuple[str, Any]]
"""(place, such as "x.jsonl, line 3"; the record, or the WeftError that says what is wrong with it)."""
TEXTS = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".xml", ".srt"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".php"),
    *(".cs", ".swift", ".kt", ".scala", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql", ".css"),
)
"""Endings of files that are one text each."""


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """The data files under a path (a `datasets` folder counts as one), and those of a directory that are left out: of
    an ending that is no data's, and the README beside files of records.

    Raises WeftError for a missing path, and a file of an unknown ending.
    """
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f"; beside it there are: {', '.join(nearest(path.name, beside))}" if beside else ""
        raise WeftError(f"There is no data at {path}{hint}.")
    if not path.is_dir() or is_datasets_folder(path):
        if path.is_file() and path.suffix and not _is_data(path):
            raise WeftError(
                f"{path} has the ending {path.suffix!r}, which weft does not read as data: give {', '.join(RECORDS)} "
                "or text (.txt, .md, .py ...); if it is text, let its name end in .txt."
            )
        return [path], []
    inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    has_records = any(p.suffix.lower() in RECORDS for p in inside)
    taken = [p for p in inside if _is_data(p) and not (has_records and p.stem.upper() in ("README", "LICENSE"))]
    return taken, [p for p in inside if p not in set(taken)]


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in (*RECORDS, *TEXTS)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)


def is_datasets_folder(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def records_of(path: Path) -> Numbered | None:
    """The records of a file; None for a file that is a text."""
    read = RECORDS.get(path.suffix.lower())
    return read(path) if read else None


def utf8(path: Path) -> str:
    """The text of a file. Raises WeftError where it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WeftError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out of the data."
        ) from None


def _json_lines(path: Path) -> Numbered:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                yield place, WeftError(f"{place} is not JSON ({error.msg} at column {error.colno}).")
            except RecursionError:
                yield place, WeftError(f"{place} is JSON nested too deeply.")


def _lines(path: Path) -> Iterator[str]:
    """Those of a file, one in memory at a time."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError:
        utf8(path)  # says which byte of the whole file it is


def _json_list(path: Path) -> Numbered:
    try:
        items = json.loads(utf8(path))
    except json.JSONDecodeError as error:
        raise WeftError(
            f"{path} is not JSON ({error.msg} at line {error.lineno}); a file with one record a line must end in "
            ".jsonl."
        ) from None
    if not isinstance(items, list):
        raise WeftError(f"{path} holds a JSON {type(items).__name__}: a list of records is needed.")
    return ((f"{path}, item {number}", item) for number, item in enumerate(items, start=1))


def _table(path: Path, delimiter: str) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # a field may be a long text
    rows = csv.DictReader(io.StringIO(utf8(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                have = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                yield (
                    place,
                    WeftError(
                        f"{place} has {have} fields, and the first line of the file {len(rows.fieldnames or ())}."
                    ),
                )
            else:
                yield place, row
    except csv.Error as error:
        raise WeftError(f"{path}, line {rows.line_num} is no row of a table ({error}).") from None


def _parquet(path: Path) -> Numbered:
    datasets = _datasets()
    try:
        return _rows(datasets.Dataset.from_parquet(str(path)), path)
    except Exception as error:  # pyarrow and datasets share no base class for a damaged file
        raise WeftError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error


def folder_records(path: Path, split: str) -> Numbered:
    """The rows of a `datasets` folder. Raises WeftError where it is damaged or lacks this split."""
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise WeftError(f"{path} cannot be read as a datasets folder: {str(error).splitlines()[0]}.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise WeftError(f"{path} has no split {split!r}; it has: {', '.join(loaded)}.")
        loaded = loaded[split]
    return _rows(loaded, path)


def _rows(dataset: Any, path: Path) -> Numbered:
    return ((f"{path}, row {number}", _without_none(row)) for number, row in enumerate(dataset, start=1))


def _without_none(value: Any) -> Any:
    """A row without the fields that it got only because another row has them."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _datasets() -> Any:
    try:
        import datasets  # an optional extra, and slow to import
    except ImportError:
        raise WeftError(
            "Reading Parquet and datasets folders needs the datasets package: pip install 'weft[data]'."
        ) from None
    return datasets


RECORDS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": lambda path: _table(path, ","),
    ".tsv": lambda path: _table(path, "\t"),
    ".parquet": _parquet,
}
"""Endings of files of records, and how they are read."""
