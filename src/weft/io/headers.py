"""What the headers of a checkpoint's safetensors files say: read and checked before any tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from weft.errors import WeftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FLOATS", "Header", "check_tensors", "keep_mixed_precision", "read_headers", "renamed"]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Header(NamedTuple):
    """One stored tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, I32 ...


Headers = dict[str, Header]


def check_tensors(
    model: PreTrainedModel, layers: list[str], files: list[str], quantizer: Any, tied: Mapping[str, str]
) -> Headers:
    """Compare the tensors of the model's sums with those in the files; returns the headers by the model's names.

    Args:
        model: with its sums in place, on the meta device.
        layers: the names of those sums.
        tied: tensors that are one, name -> the first of its names; the files hold it under any of them.

    Raises:
        WeftError: a file cannot be read to its end; a sum's tensor is missing, has another shape, or belongs to no sum
            of the config.
    """
    stored = renamed(model, read_headers(files), quantizer)
    for name, home in [*tied.items(), *tied.items()]:  # to the home, and from there to the others
        for here, there in ((name, home), (home, name)):
            if here in stored:
                stored.setdefault(there, stored[here])
    expected = {
        f"{name}.{key}": tuple(t.shape) for name in layers for key, t in model.get_submodule(name).state_dict().items()
    }
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise WeftError(
            f"The checkpoint lacks {_some(missing)}: a weight file is missing or damaged; fetch it again, whole."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise WeftError(
                f"The checkpoint's {name} has shape {list(stored[name].shape)}, and its config.json says "
                f"{list(shape)}; fetch it again."
            )
    strange = sorted(name for name in _of_sums(stored) - expected.keys() if name in stored and _inside(model, name))
    if strange:
        raise WeftError(
            f"The checkpoint holds {_some(strange)}, of which its config.json knows nothing; fetch it again, whole."
        )
    return stored


def keep_mixed_precision(model: PreTrainedModel, layers: list[str], stored: Headers) -> None:
    """Have a term whose precision is not its layer's (an fp32 adapter on a bf16 base), and what is no layer's (a
    graft), loaded as it was stored.

    All other tensors follow the dtype that the caller of `from_pretrained` asks for.
    """
    for layer in layers:
        for key, tensor in model.get_submodule(layer).state_dict(keep_vars=True).items():
            dtype, reference = stored[f"{layer}.{key}"].dtype, stored.get(f"{layer}.weight")
            if dtype in FLOATS and (reference is None or dtype != reference.dtype):
                tensor.data = tensor.data.to(FLOATS[dtype])


def read_headers(files: list[str]) -> Headers:
    """The stored tensors by the names in the files. Raises WeftError for a file that cannot be read."""
    headers: Headers = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise WeftError(f"The weights of a weft model are read from safetensors files, not from {file}.")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  it is no mapping
                    stored = opened.get_slice(key)
                    headers[key] = Header(tuple(stored.get_shape()), stored.get_dtype())
        except (SafetensorError, OSError) as error:
            raise WeftError(
                f"The weight file {file} is missing, damaged or cut short ({error}); fetch it again."
            ) from error
    return headers


def renamed(model: PreTrainedModel, stored: Headers, quantizer: Any) -> Headers:
    """The stored headers by the model's own names, as transformers' loader will map them."""
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()

    def rename(key: str) -> str:
        renamed = rename_source_key(key, renamings, converters, model.base_model_prefix, own)[0]
        if renamed not in own and key in own:
            renamed = rename_source_key(key, [], [], model.base_model_prefix, own)[0]
        return str(renamed)

    return {rename(key): header for key, header in stored.items()}


def _of_sums(stored: Headers) -> set[str]:
    """The stored names that belong to a sum of terms, which is known by its empty `weight`."""
    sums = tuple(
        name.removesuffix("weight") for name, h in stored.items() if name.endswith(".weight") and h.shape == (0,)
    )
    return {name for name in stored if name.startswith(sums)} if sums else set()


def _inside(model: PreTrainedModel, name: str) -> bool:
    """Whether the model has a module where this tensor belongs; a head that this class lacks does not count."""
    layer = name.rpartition(".terms.")[0] or name.rpartition(".")[0]
    return any(path == layer for path, _ in model.named_modules())


def _some(names: list[str]) -> str:
    return f"the tensor {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
