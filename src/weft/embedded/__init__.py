"""What every installation carries, so that the first command needs no download: a small trained model and a source
of real text.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS", "model_path"]

_HERE = Path(__file__).parent
MODELS = ("pico",)
"""The names that `MODEL` may be on the command line beside a directory or a Hub id."""


def model_path(name: str = "pico") -> Path:
    """The directory of an embedded model."""
    return _HERE / name
