"""Model cards: the README.md of a model's or an adapter's directory, front matter included; only what the files, the
source's own card and the record of the run tell, and nothing of where anything lay on this machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from transformers import PreTrainedModel

from weft.io.adapter_places import base_name
from weft.io.adapters import method_of
from weft.io.peft_config import CONFIG as PEFT_CONFIG
from weft.io.quantizer import sum_specs

__all__ = ["Run", "adapter_card", "export_card", "model_card", "source_directory"]

Run = Mapping[str, Any]
"""The record of a run, as in `run.json`: command, arguments, versions, metrics ..."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_INHERITED = ("license", "license_name", "license_link", "language")
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def source_directory(name: str | os.PathLike[str]) -> Path | None:
    """Where the files of a model lie on this machine: its directory, or its snapshot of the Hub; None where neither."""
    if Path(name).is_dir():
        return Path(name)
    if not on_hub(str(name)):
        return None
    found = try_to_load_from_cache(str(name), "config.json")
    return Path(found).parent if isinstance(found, str) else None


def on_hub(name: str) -> bool:
    """Whether a name is that of a model of the Hub, as far as a name tells."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _metadata(card: Path) -> Mapping[str, Any]:
    try:
        return metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # a card that nobody can read says nothing
        return {}


def _front(base: str, source: Path | None, own: Mapping[str, Any]) -> str:
    """The front matter: what the source's card says of licence and language, the base, and `own`."""
    card = source / "README.md" if source else None
    theirs = _metadata(card) if card and card.is_file() else {}
    above = base if on_hub(base) else theirs.get("base_model")
    front = {key: theirs[key] for key in _INHERITED if key in theirs}
    front |= {"base_model": above} if above else {}
    front |= {"pipeline_tag": theirs["pipeline_tag"]} if "pipeline_tag" in theirs else {}
    return "---\n" + yaml.safe_dump({**front, **own}, sort_keys=False, allow_unicode=True) + "---"


def model_card(model: PreTrainedModel, run: Run) -> str:
    """The README.md of a model directory, front matter included; only what the model and the record of the run tell."""
    config = getattr(model.config, "quantization_config", None)
    method = getattr(config, "method", None)
    own = {"library_name": "transformers", **_pipeline(model), "tags": ["weft", *([method] if method else [])]}
    form = "a sum of terms" if config else "dense"
    return _card(model, run, own, form, _summary(model), _usage(model))


def export_card(model: PreTrainedModel, run: Run, format: str, library: str, usage: str) -> str:
    """The same for a model in another format than weft's, which `library` reads, as `usage` shows."""
    own = {"library_name": library, **_pipeline(model), "tags": ["weft", format]}
    return _card(model, run, own, format, f"a {type(model).__name__} in the format {format}.", usage)


def _card(model: PreTrainedModel, run: Run, own: Mapping[str, Any], form: str, summary: str, usage: str) -> str:
    base = str(run.get("arguments", {}).get("model", ""))
    made = f"Made by `weft {run['command']}`" if "command" in run else "Made by [weft](https://pypi.org/project/weft)"
    sections = [
        _front(base, source_directory(model.name_or_path or base), own),
        f"# {Path(base).name or type(model).__name__}, {form}",
        f"{made}: {summary}",
        usage,
        _table("Measured", run.get("metrics", {})),
        _table("Arguments", _without_places(run.get("arguments", {}))),
        _table("Versions", run.get("versions", {})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _pipeline(model: PreTrainedModel) -> dict[str, str]:
    tag = next((tag for end, tag in _PIPELINES.items() if type(model).__name__.endswith(end)), None)
    return {"pipeline_tag": tag} if tag else {}


def adapter_card(directory: Path, run: Run) -> str:
    """The README.md of an adapter's directory, front matter included; only what its files and the run tell."""
    base, peft = base_name(directory), (directory / PEFT_CONFIG).is_file()
    method = method_of(directory)
    known = on_hub(base)
    tags = [*([f"base_model:adapter:{base}"] if known else []), *(["lora"] if peft else []), "weft", method]
    own = {"library_name": "peft" if peft else "weft", "tags": list(dict.fromkeys(tags))}
    weft = ["import weft", "", 'weft.load_adapter(model, "path-of-this-directory")']
    usage = ["from peft import PeftModel", "", 'PeftModel.from_pretrained(model, "path-of-this-directory")', ""] * peft
    sections = [
        _front(base, source_directory(base), own),
        f"# {Path(base).name}, a {method} adapter",
        f"Made by `weft {run.get('command', 'finetune')}` on {base if known else Path(base).name}, `model` here:",
        "\n".join(["```python", *usage, *weft, "```"]),
        _table("Measured", run.get("metrics", {})),
        _table("Arguments", _without_places(run.get("arguments", {}))),
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


def _without_places(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with files and directories by their names alone."""
    kept = {key: value for key, value in arguments.items() if key != "out"}
    return {key: _name(key, value) if isinstance(value, str) else value for key, value in kept.items()}


def _name(key: str, value: str) -> str:
    is_id = key in ("model", "tokenizer") and on_hub(value)
    return value if is_id or os.sep not in value else Path(value).name


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
