"""From what a user types to a model in memory: a directory, a Hub id or the name of an embedded model; a device; a
dtype.

Every failure is one sentence that says what to do. Nothing is unpickled, and a checkpoint's own code runs only when
asked to.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import weft.embedded
from weft.errors import WeftError, nearest
from weft.io.adapter_places import base_name, is_adapter
from weft.io.adapters import load_adapter
from weft.io.precision import note_precision, saved_size
from weft.io.quantizer import forget_quantizer
from weft.progress import say
from weft.tensors import own_memory

__all__ = [
    "gguf_file",
    "has_tokenizer",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_class",
    "resolve",
    "resolve_device",
    "resolve_dtype",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DTYPE_NAMES = {**_DTYPES, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def resolve(name: str | os.PathLike[str]) -> str:
    """What transformers is to load: the path of a directory, or a Hub id; of an adapter, those of its base; of a GGUF
    file, those of what it lies in.

    Raises:
        WeftError: `name` can only be meant as a path, and there is no model there.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if not name:
        raise WeftError("The model's name is empty; give a directory, a Hub id or 'pico'.")
    if gguf_file(name) is not None:
        return _home_of_gguf(path)
    if path.is_dir():
        if is_adapter(path):
            return _base_of_adapter(path)
        if not (path / "config.json").is_file():
            raise WeftError(f"{name} holds no config.json, so it is no model directory.")
        return str(path)
    if name in weft.embedded.MODELS:
        return str(weft.embedded.model_path(name))
    if path.is_file():
        raise WeftError(f"{name} is a file; give the directory of the model, the one that holds config.json.")
    looks_like_path = (
        name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or ("/" in name and path.parent.is_dir())
    )
    if looks_like_path:
        raise WeftError(f"There is no directory {name!r}{_neighbours(path)}.")
    return name


def gguf_file(name: str | os.PathLike[str]) -> str | None:
    """The name of the GGUF file that is meant: one by its path, one of a Hub repository as ORG/REPO/FILE.gguf, or the
    only one in a directory without a config.json; None where another sort of model is.

    Raises:
        WeftError: a directory holds several and nothing else.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [] if (path / "config.json").is_file() else sorted(p.name for p in path.glob("*.gguf"))
        if len(inside) > 1:
            raise WeftError(f"{path} holds {len(inside)} GGUF files; name one of them: --gguf-file {inside[0]}.")
        return inside[0] if inside else None
    return path.name if path.suffix == ".gguf" else None


def _home_of_gguf(path: Path) -> str:
    if find_spec("gguf") is None:
        raise WeftError("GGUF files are read by the package gguf: pip install gguf.")
    home = path if path.is_dir() else path.parent
    if not path.exists() and (home.is_dir() or path.is_absolute() or len(path.parts) != 3):
        raise WeftError(f"There is no GGUF file {path}.")
    return str(home)


def _how(name: str | os.PathLike[str]) -> dict[str, str]:
    """What transformers is to be told beside the place."""
    file = gguf_file(name)
    return {} if file is None else {"gguf_file": file}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to compute on; None for the GPU where there is one, else the CPU.

    Raises:
        WeftError: there is no such device on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise WeftError(f"There is no device {str(device)!r} on this machine; it has: {', '.join(there)}.") from None
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype to load weights in: None stands for the checkpoint's own on an accelerator, and for float32 on a CPU,
    where half precision is slow.

    Raises:
        WeftError: the name is not that of a floating-point dtype.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in _DTYPE_NAMES:
        raise WeftError(f"There is no dtype {dtype!r}; choose one of: auto, {', '.join(_DTYPES)}.")
    return _DTYPE_NAMES[dtype]


def load_config(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, without its weights. Raises WeftError as `load_model` does."""
    with _explained(name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            resolve(name), trust_remote_code=trust_remote_code, **_how(name)
        )
    return config


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    mapped: bool = False,
) -> PreTrainedModel:
    """The model of a directory, a Hub id or an embedded name, in eval mode, as the class that its configuration names;
    of an adapter's directory, its base with the adapter on.

    Args:
        device: None for the GPU where there is one, else the CPU.
        dtype: None for the checkpoint's own on an accelerator and float32 on a CPU, to be written in the checkpoint's
            own all the same (`weft.io.precision`); "auto" for the checkpoint's own everywhere.
        trust_remote_code: run Python code that the checkpoint brings along.
        mapped: leave weights in the files that they are mapped from, as far as they are as stored: for who looks at one
            after another, and neither changes them nor rests on bits. What was looked at can leave the memory again.

    Raises:
        WeftError: there is no such model, device or dtype; a file is damaged; or tensors are missing, which
            transformers would fill with random numbers.
    """
    target = resolve_device(device)
    wanted = resolve_dtype(dtype, target)
    config = load_config(name, trust_remote_code=trust_remote_code)
    with _explained(name):
        model, info = model_class(config).from_pretrained(
            resolve(name),
            dtype=wanted or "auto",
            device_map=None if target.type == "cpu" else {"": target},
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **_how(name),
        )
    loaded: PreTrainedModel = model
    missing = sorted(info["missing_keys"])
    if missing:
        raise WeftError(
            f"The checkpoint {name} lacks {len(missing)} tensors that it should hold, such as {missing[0]}."
        )
    if is_adapter(name):
        load_adapter(loaded, name)
    if not mapped:
        own_memory(loaded)
    if gguf_file(name) is not None:
        forget_quantizer(loaded)
        say(f"The weights of {name} are decoded to {loaded.dtype}: {saved_size(loaded)[1] / 1e6:,.1f} MB.")
    elif dtype is None and wanted is not None:  # widened to compute in, to be written as it was read
        _note_precision(loaded, resolve(name))
    loaded.eval()  # type: ignore[no-untyped-call]
    return loaded


def _note_precision(model: PreTrainedModel, name: str) -> None:
    directory = Path(name)
    if not directory.is_dir():
        found = try_to_load_from_cache(name, "config.json")
        directory = Path(found).parent if isinstance(found, str) else directory
    if directory.is_dir():
        note_precision(model, directory)


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of an adapter: its own where it brings one, else its base's.

    Raises WeftError as `load_model` does.
    """
    home = os.fspath(name) if has_tokenizer(name) else resolve(name)
    with _explained(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            home, trust_remote_code=trust_remote_code, **_how(name)
        )
    return tokenizer


def has_tokenizer(name: str | os.PathLike[str]) -> bool:
    """Whether the directory holds a tokenizer."""
    return (Path(name).expanduser() / "tokenizer_config.json").is_file()


def _base_of_adapter(path: Path) -> str:
    name = base_name(path)
    if is_adapter(name):
        raise WeftError(f"The adapter in {path} was made on the adapter in {name}; merge that one into its base first.")
    try:
        return resolve(name)
    except WeftError as error:
        raise WeftError(
            f"The adapter in {path} was made on {name}, which is not here ({str(error).rstrip('.')}); put it on its "
            f"base with: weft merge BASE --adapter {path}."
        ) from None


def model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that the checkpoint was saved from, or the auto class that leads to it."""
    architecture = next(iter(config.architectures or []), None)
    for auto_class, path in (getattr(config, "auto_map", None) or {}).items():
        if auto_class.startswith("AutoModel") and str(path).endswith(f".{architecture}"):
            return getattr(transformers, auto_class)
    return getattr(transformers, architecture or "AutoModelForCausalLM", transformers.AutoModelForCausalLM)


@contextmanager
def _explained(name: str | os.PathLike[str]) -> Iterator[None]:
    """What transformers and safetensors raise over a checkpoint, as one sentence."""
    try:
        yield
    except WeftError:
        raise
    except SafetensorError as error:
        raise WeftError(f"A weight file of {name} is damaged or cut short ({error}); fetch it again.") from error
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        close = difflib.get_close_matches(os.fspath(name), weft.embedded.MODELS)
        meant = f" If you meant the embedded model, it is called {close[0]!r}." if close else ""
        raise WeftError(f"{name} cannot be loaded: {reason}.{meant}") from error


def _neighbours(path: Path) -> str:
    there = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = nearest(path.name, there) if there else []
    return f"; beside it there are: {', '.join(close)}" if close else ""
