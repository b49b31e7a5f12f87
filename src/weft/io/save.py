"""Writing a model directory: weights, config, tokenizer, what else belongs to the model, and a model card that says how
it was made.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weft.io.cards import Run, adapter_card, model_card, source_directory
from weft.io.precision import as_stored
from weft.io.quantizer import remark

__all__ = ["adapter_card", "model_card", "save_model", "write_companions"]

_BESIDE = (
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Files that belong to a model and are neither weights nor written by transformers."""


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
    write_companions(model, tokenizer, directory)
    (directory / "README.md").write_text(model_card(model, run or {}), encoding="utf-8")


def write_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """What stands beside the weights: the tokenizer, processors, licences, the further modules (pooling, normalisation)
    of a sentence-transformers model.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    source = source_directory(model.name_or_path) if model.name_or_path else None
    if source is not None and source.resolve() != directory.resolve():
        _copy_companions(source, directory)


def _copy_companions(source: Path, directory: Path) -> None:
    for file in (file for pattern in _BESIDE for file in source.glob(pattern) if file.is_file()):
        if not (directory / file.name).exists():
            shutil.copy(file, directory / file.name)
    modules = source / "modules.json"
    for module in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []:
        folder = (source / str(module.get("path", ""))).resolve()
        if folder.is_dir() and folder.parent == source.resolve():
            shutil.copytree(folder, directory / folder.name, dirs_exist_ok=True)
