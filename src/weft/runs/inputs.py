"""What lay in the files that a run reads, so that work is never gone on with after one was changed in its place.

    contents(model="base/", data=["a.jsonl"]) -> {"model": {"model.safetensors": "3f0c...", ...}, "data": {...}}

A file counts by its bytes, not by its date (`weft.files.digest`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from weft.errors import WeftError
from weft.files import digest
from weft.io.adapter_places import base_name, is_adapter
from weft.runs.loading import gguf_file, resolve
from weft.train.records import files_of, is_datasets_folder

__all__ = ["Contents", "changes", "contents"]

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
"""Weights, configuration, tokenizer, template, code."""

Contents = dict[str, dict[str, str]]
"""What it is for -> name of file -> digest."""


def contents(**inputs: str | Path | Sequence[str | Path] | None) -> Contents:
    """The digests of the files that each input names; inputs that are None, or name no file here, are left out.

    Args:
        inputs: "model", "teacher", "adapter" and "tokenizer" are directories, Hub ids (as far as they are on this
            machine) or embedded names; any other is data, as `weft.train.sources.read_documents` takes it.
    """
    found = {}
    for what, paths in inputs.items():
        if paths is not None:
            several = [Path(p).expanduser() for p in ([paths] if isinstance(paths, str | Path) else paths)]
            files = [f for path in several for f in (_model(path) if what in _MODELS else _data(path))]
            if files:
                found[what] = dict(zip(_names(files, several), map(digest, files), strict=True))
    return found


_MODELS = ("model", "teacher", "adapter", "tokenizer")


def changes(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs, such as "data (a.jsonl)"; inputs that only one of the two knows are passed over."""
    words = []
    for what in before.keys() & now.keys():
        names = sorted(n for n in before[what].keys() | now[what].keys() if before[what].get(n) != now[what].get(n))
        if names:
            words.append(f"{what} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})")
    return sorted(words)


def _model(name: str | Path) -> list[Path]:
    if is_adapter(name):
        own = sorted(p for p in Path(name).glob("*") if p.suffix in (*MODEL_FILES, ".bin"))
        return [*own, *_model(base_name(name))]
    try:
        path = Path(resolve(name))
    except WeftError:  # an adapter's base may be elsewhere
        path = Path(name)
    file = gguf_file(name)
    if file is not None:
        return [path / file] if (path / file).is_file() else []
    if not path.is_dir():
        path = _cached(str(name)) or path
    return sorted(p for p in path.glob("*") if p.suffix in MODEL_FILES) if path.is_dir() else []


def _cached(hub_id: str) -> Path | None:
    """The snapshot of a model of the Hub on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _data(path: Path) -> list[Path]:
    files = files_of(path)[0]
    return [
        p for file in files for p in (sorted(file.rglob("*")) if is_datasets_folder(file) else [file]) if p.is_file()
    ]


def _names(files: Sequence[Path], roots: Sequence[Path]) -> list[str]:
    """What to call each file: its place in the directory that was given, else its name, or its path where several
    have one name.
    """
    folders = [root for root in roots if root.is_dir()]  # none among thousands of files that were given one by one
    names = []
    for file in files:
        root = next((folder for folder in folders if file.is_relative_to(folder)), file.parent)
        names.append(file.relative_to(root).as_posix())
    several = Counter(names)
    return [str(file.resolve()) if several[name] > 1 else name for file, name in zip(files, names, strict=True)]
