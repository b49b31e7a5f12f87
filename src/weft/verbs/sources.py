"""A model without weights: its configuration, and the model of some of its blocks, which has no storage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import NotASafetensorsRepoError
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from weft.errors import WeftError
from weft.io.headers import FLOATS, read_headers
from weft.plan.layers import equal
from weft.runs.loading import load_config, load_tokenizer, model_class, resolve
from weft.terms.layers import block_stacks
from weft.train.sizes import configuration

__all__ = ["Source", "source_of"]


@dataclass(frozen=True)
class Source:
    """What a plan is made of."""

    name: str
    config: PreTrainedConfig
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """That of the checkpoint, by its configuration or the headers of its files; fp32 where neither says."""
        return getattr(self.config, "dtype", None) or _stored(self.name) or torch.float32

    @property
    def parameters(self) -> int:
        """Numbers of the whole model."""
        return sum(p.numel() for p in self.whole.parameters())

    @cached_property
    def whole(self) -> nn.Module:
        """All blocks, on the meta device, in fp32: for shapes alone."""
        return self.empty(self.layers, torch.float32)

    @cached_property
    def equal(self) -> bool:
        """Whether all blocks are of the same shapes."""
        return equal(self.whole)

    def empty(self, layers: int, dtype: torch.dtype) -> nn.Module:
        """The model with so many blocks, on the meta device.

        Raises WeftError for a model in codes that weft does not know.
        """
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        codes = getattr(config, "quantization_config", None)
        if codes is not None:
            del config.quantization_config
        cls = model_class(config)
        with torch.device("meta"):
            model: nn.Module = (getattr(cls, "_from_config", None) or cls.from_config)(config, dtype=dtype)
            if codes is not None:
                _code(model, codes, self.name)
        return model


def source_of(model: str | None, size: str | None, window: int, *, trust_remote_code: bool = False) -> Source:
    """That of a directory, a Hub id or the embedded model, or of a published size.

    Raises WeftError for none or both, and as `load_config` does.
    """
    if (model is None) == (size is None):
        raise WeftError("Give a model to plan for, or --size: one of the two.")
    if size is not None:
        return Source(size, configuration(size, load_tokenizer("pico"), window))
    return Source(str(model), load_config(str(model), trust_remote_code=trust_remote_code))


def _stored(name: str) -> torch.dtype | None:
    """The dtype of the first floating-point tensor in the safetensors files of a directory or a Hub id, by their
    headers; None where there are no such files.

    Raises WeftError where the Hub cannot be asked.
    """
    place = resolve(name)
    if Path(place).is_dir():
        files = sorted(Path(place).glob("*.safetensors"))
        dtypes = [header.dtype for header in read_headers([str(file) for file in files]).values()]
    else:
        dtypes = _on_hub(place)
    return next((FLOATS[dtype] for dtype in dtypes if dtype in FLOATS), None)


def _on_hub(name: str) -> list[str]:
    """The dtypes of the tensors of a repository, of whose files the first bytes are fetched."""
    try:
        files = huggingface_hub.get_safetensors_metadata(name).files_metadata.values()
    except NotASafetensorsRepoError:
        return []
    except Exception as error:  # no connection, no such repository, no right to read it: each has classes of its own
        reason = " ".join(str(error).split()).rstrip(".")
        raise WeftError(
            f"{name} names no dtype in its config.json, and the headers of its weights cannot be read from the Hub "
            f"({reason}); give --dtype."
        ) from error
    return [tensor.dtype for file in files for tensor in file.tensors.values()]


def _code(model: nn.Module, codes: Any, name: str) -> None:
    """The sums of terms that the configuration names, in the place of the layers."""
    quantizer = AutoHfQuantizer.from_config(codes)
    if quantizer.quantization_config.quant_method != "weft":
        raise WeftError(f"{name} is in the codes of another tool, of whose memory weft knows nothing; plan its base.")
    found = quantizer.quantization_config
    stacks = {f"{name}.": len(blocks) for name, blocks in block_stacks(model).items()}
    found.layers = {layer: spec for layer, spec in found.layers.items() if _within(layer, stacks)}
    quantizer._process_model_before_weight_loading(model)


def _within(layer: str, stacks: Mapping[str, int]) -> bool:
    """Whether it is outside of the blocks, or in one of those that the model was made with."""
    return all(
        int(layer.removeprefix(stack).split(".")[0]) < count
        for stack, count in stacks.items()
        if layer.startswith(stack)
    )
