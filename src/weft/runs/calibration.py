"""Which text a verb reads where none was given, said aloud; and whether it is enough to calibrate on.

Calibration text decides what is kept: a model of prose that is calibrated on source code alone loses its prose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import weft.embedded
from weft.embedded.text import default_text
from weft.progress import say
from weft.terms.layers import linear_layers, shape_of
from weft.train.sources import read_texts

__all__ = ["calibration_texts", "check_enough", "say_default"]

MIXED = "Python's own sources and chapters of its documentation, in turn"


def calibration_texts(
    given: str | Path | Sequence[str | Path] | None, model: str, *, read: bool = True
) -> tuple[list[str], str]:
    """The texts to calibrate a model on, and what they are, for the record and the model card.

    Args:
        read: whether the result depends on them, so that the default is worth a word.
    """
    if given is not None:
        paths = [given] if isinstance(given, str | Path) else given
        return read_texts(given), ", ".join(Path(path).name for path in paths)
    if read:
        say_default(model, "calibration", MIXED, "--calibration")
    return [default_text("mixed")], MIXED


def say_default(model: str, purpose: str, what: str, option: str) -> None:
    """Say which text is taken for want of one, to whoever brings a model that was not made on it."""
    if _origin(model) not in weft.embedded.MODELS:
        say(
            f"No {option} was given: the text for {purpose} is weft's default, {what}. That may be unlike what "
            f"{model} is for, and the result then is poor where it matters: give {option} TEXT of the kind that it "
            "will be used on."
        )


def _origin(model: str) -> str:
    """The model that a directory of weft's was made of, as far as the records beside them tell."""
    for _ in range(16):  # a chain of verbs; a record may name its own place
        try:
            model = str(json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))["arguments"]["model"])
        except (OSError, ValueError, KeyError, TypeError):
            break
    return model


def check_enough(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], layers: Any = None) -> int:
    """How many tokens the batches hold; says so where they are fewer than a layer has input channels, for then their
    second moments say nothing about some directions.
    """
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    widths = {name: shape_of(model.get_submodule(name))[1] for name in linear_layers(model, layers)}
    widest = max(widths, key=lambda name: widths[name])
    if tokens < widths[widest]:
        say(
            f"The calibration text has {tokens:,} tokens, and {widest} has {widths[widest]:,} input channels: "
            "statistics of fewer tokens than channels leave directions out; give more --windows, or a larger --window."
        )
    return tokens
