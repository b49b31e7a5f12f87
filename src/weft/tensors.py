"""Tensors from files and slices, in aligned memory of their own.

Matrix products of some libraries (MKL on processors without AVX-512) give other bits when an operand does not start at
a multiple of 16 bytes. A tensor of a safetensors file lies in the mapped file wherever the header ends, and a slice
wherever it was cut, so that a run that goes on from a file would differ in bits from one that was not interrupted.
Whatever is read from a file or kept of a larger tensor therefore goes through here.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

__all__ = ["ALIGNMENT", "own_memory", "owned", "plain_values", "read_metadata", "read_tensor", "read_tensors"]

ALIGNMENT = 64
"""Bytes: what torch's allocators give, and more than any product asks for."""


def owned(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous, aligned and alone in its memory; a copy that is, otherwise."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if alone and tensor.is_contiguous() and _aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _aligned(tensor: Tensor) -> bool:
    """Whether it begins at a multiple of ALIGNMENT; a planner's stand-in begins nowhere, and may not be asked."""
    return type(tensor).__name__ == "FakeTensor" or tensor.data_ptr() % ALIGNMENT == 0


def own_memory(module: nn.Module) -> None:
    """Move the parameters and buffers of a module that lie in a mapped file, or start anywhere, to memory of their own.

    In place. Left as they are: tensors that overlap others, since one may be meant as a part of the other, those on
    no device, and those of a kind of their own (sharded, quantised).
    """
    everything = {id(t): t for t in [*module.parameters(), *module.buffers()] if _plain(t)}
    apart: list[list[Tensor]] = []  # groups of tensors that overlap
    end = 0
    for tensor in sorted(everything.values(), key=Tensor.data_ptr):
        if tensor.data_ptr() < end:
            apart[-1].append(tensor)
        else:
            apart.append([tensor])
        end = max(end, tensor.data_ptr() + _extent(tensor))
    for first, *others in apart:
        if not others and (first.data_ptr() % ALIGNMENT or not first.is_contiguous()):
            first.data = first.detach().clone(memory_format=torch.contiguous_format)


def plain_values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that another tool keeps in codes (torchao's), as a plain one; any other tensor itself."""
    coded = type(tensor).dequantize is not Tensor.dequantize
    return tensor.dequantize() if coded else tensor


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError, safetensors.SafetensorError: there is no such file, or it is damaged.
    """
    with safe_open(Path(path), framework="pt") as file:
        return {name: owned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def read_tensor(path: str | os.PathLike[str], name: str) -> Tensor:
    """One of them. Raises what `read_tensors` does, and SafetensorError where there is no tensor of this name."""
    with safe_open(Path(path), framework="pt") as file:
        return owned(file.get_tensor(name))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The file's metadata. Raises what `read_tensors` does."""
    with safe_open(Path(path), framework="pt") as file:
        return file.metadata() or {}


def _plain(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _extent(tensor: Tensor) -> int:
    """Bytes from its first number to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
