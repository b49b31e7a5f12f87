"""Writing a model directory: weights, config, tokenizer, and a model card that says how the model was made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.io.adapters import base_name, read_adapter
from weft.io.peft_config import CONFIG as PEFT_CONFIG
from weft.io.precision import as_stored
from weft.io.quantizer import remark, sum_specs

__all__ = ["adapter_card", "model_card", "save_model"]

Run = Mapping[str, Any]
"""The record of a run, as in `run.json`: command, arguments, versions, metrics ..."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | os.PathLike[str],
    *,
    run: Run | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write everything that `from_pretrained` and `push_to_hub` need into `directory`.

    A model that was widened to compute in is written in the precision of its checkpoint (`weft.io.precision`). The
    directory is not made whole or not at all here: verbs give the one of `weft.runs.output.open_output`, which is.

    Args:
        model: with sums of terms or without; its marks are brought up to date.
        tokenizer: None where there is none to save.
        run: what is known of how the model was made, for the model card.
        max_shard_size: as in `save_pretrained`.
    """
    directory = Path(directory)
    remark(model)
    with as_stored(model):
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(model_card(model, run or {}), encoding="utf-8")


def model_card(model: PreTrainedModel, run: Run) -> str:
    """The README.md of a model directory, front matter included; only what the model and the record of the run tell."""
    config = getattr(model.config, "quantization_config", None)
    base = str(run.get("arguments", {}).get("model", ""))
    on_hub = _HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    front = ["---", "library_name: transformers", *([f"base_model: {base}"] if on_hub else []), "tags:", "- weft"]
    front += [f"- {config.method}"] if config and config.method else []
    title = f"# {Path(base).name or type(model).__name__}, {'a sum of terms' if config else 'dense'}"
    made = f"Made by `weft {run['command']}`" if "command" in run else "Made by [weft](https://pypi.org/project/weft)"
    sections = [
        "\n".join([*front, "---"]),
        title,
        f"{made}: {_summary(model)}",
        _usage(model),
        _table("Measured", run.get("metrics", {})),
        _table("Arguments", run.get("arguments", {})),
        _table("Versions", run.get("versions", {})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def adapter_card(directory: Path, run: Run) -> str:
    """The README.md of an adapter's directory, front matter included; only what its files and the run tell."""
    base, peft = base_name(directory), (directory / PEFT_CONFIG).is_file()
    method = read_adapter(directory).adapter.method
    on_hub = _HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    tags = [*([f"base_model:adapter:{base}"] if on_hub else []), *(["lora"] if peft else []), "weft", method]
    front = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        f"library_name: {'peft' if peft else 'weft'}",
        "tags:",
    ]
    weft = ["import weft", "", 'weft.load_adapter(model, "path-of-this-directory")']
    usage = ["from peft import PeftModel", "", 'PeftModel.from_pretrained(model, "path-of-this-directory")', ""] * peft
    sections = [
        "\n".join([*front, *(f"- {tag}" for tag in dict.fromkeys(tags)), "---"]),
        f"# {Path(base).name}, a {method} adapter",
        f"Made by `weft {run.get('command', 'finetune')}` on {base if on_hub else Path(base).name}, `model` here:",
        "\n".join(["```python", *usage, *weft, "```"]),
        _table("Measured", run.get("metrics", {})),
        _table("Arguments", run.get("arguments", {})),
        _table("Versions", run.get("versions", {})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(model: PreTrainedModel) -> str:
    parameters, sums = model.num_parameters(), sum_specs(model)
    kinds = sorted({term["kind"].replace("_", "-") for spec in sums.values() for term in spec["terms"].values()})
    what = (
        f"{len(sums)} weight matrices are sums of {' and '.join(kinds)} terms"
        if sums
        else "every weight matrix is dense"
    )
    return f"a {type(model).__name__} of {parameters:,} parameters, in which {what}."


def _usage(model: PreTrainedModel) -> str:
    lines = [
        f"from transformers import {type(model).__name__}",
        "",
        f'model = {type(model).__name__}.from_pretrained("path-or-hub-id")',
    ]
    if sum_specs(model):
        lines.insert(0, "import weft  # teaches transformers to load it: pip install weft")
    return "\n".join(["```python", *lines, "```"])


def _table(title: str, values: Mapping[str, Any]) -> str:
    """A Markdown table of the numbers and names among `values`, or nothing."""
    rows = [f"| {key} | {_cell(value)} |" for key, value in _flat(values) if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows]) if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys; lists, which are long, left out."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            flat.append((f"{prefix}{key}", value))
    return flat


def _cell(value: Any) -> str:
    shown = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return shown.replace("|", "\\|").replace("\n", " ")
