"""Directories of adapters and grafts: which they are, and the model that they were made on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from weft.errors import WeftError
from weft.io import peft
from weft.io.adapter_files import CONFIG, GRAFT_CONFIG

__all__ = ["base_name", "check_directory", "check_terms", "graft_in", "is_adapter"]

_CONFIGS = (CONFIG, peft.CONFIG, GRAFT_CONFIG)


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory as a path. Raises WeftError where there is no adapter and no graft in it."""
    path = Path(directory).expanduser()
    if not any((path / name).is_file() for name in _CONFIGS):
        raise WeftError(f"{path} holds no adapter: neither {CONFIG} nor {peft.CONFIG} is there.")
    return path


def check_terms(directory: str | os.PathLike[str]) -> Path:
    """The directory as a path. Raises WeftError where no adapter is in it, or a graft, which is no sum of terms."""
    path = check_directory(directory)
    graft = graft_in(path)
    if graft is not None:
        raise WeftError(
            f"{path} holds the graft {graft!r}, which changes the forward pass: it cannot be merged into weights, nor "
            "combined with others."
        )
    return path


def graft_in(directory: str | os.PathLike[str]) -> str | None:
    """The name of the graft that the directory holds; None where it holds none."""
    path = Path(directory).expanduser() / GRAFT_CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["name"]) if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeftError(f"The graft in {directory} is damaged or incomplete ({error!r}); fetch it again.") from error


def is_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether the directory holds an adapter, or a graft, and no model."""
    path = Path(directory)
    there = any((path / name).is_file() for name in _CONFIGS)
    return there and not (path / "config.json").is_file()


def base_name(directory: str | os.PathLike[str]) -> str:
    """The directory or Hub id of the model that an adapter was made on.

    Raises:
        WeftError: there is no adapter, or its files do not say.
    """
    path = check_directory(directory)
    try:
        own = path / (GRAFT_CONFIG if (path / GRAFT_CONFIG).is_file() else CONFIG)
        said = json.loads((own if own.is_file() else path / peft.CONFIG).read_text(encoding="utf-8"))
        name = said["base"]["name"] if own.is_file() else said.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeftError(f"The adapter in {path} is damaged or incomplete ({error}); fetch it again.") from error
    if not name:
        raise WeftError(f"The adapter in {path} does not say which model it was made on; give that one as the model.")
    return str(name)
