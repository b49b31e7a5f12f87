"""Weight normalisation of a plain model's linear layers: W = g V / ||V|| a row, both g (out, 1) and V (out, in)
trained.

Each length and direction is a parameter of its own (Salimans & Kingma 2016, arXiv 1602.07868), as a torch
parametrisation, so the layers stay what they are. A zero row stays zero instead of becoming NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from weft.errors import WeftError

__all__ = ["fold_weights", "normalize_weights"]


class RowNorm(nn.Module):
    """W = g V / max(||V||, tiny) along `dim`, the input dimension of the layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, V: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(V, dim=self.dim, keepdim=True)
        weight: Tensor = g * (V / length.clamp_min(torch.finfo(V.dtype).tiny))
        return weight

    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(W, dim=self.dim, keepdim=True), W


def normalize_weights(model: nn.Module, names: list[str]) -> None:
    """Normalise the weights called `names` ("...q_proj.weight"), in place; the function computed does not change.

    Call it before `fully_shard` or DDP: it replaces each weight by two parameters. Raises WeftError for sharded
    weights.
    """
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, attribute)
        if isinstance(weight, DTensor):
            raise WeftError(f"{name} is sharded already; call weft.optim.normalize_weights before fully_shard.")
        dim = 1 if isinstance(module, nn.Linear) else 0  # GPT-2's Conv1D stores (in, out)
        parametrize.register_parametrization(module, attribute, RowNorm(dim))


def fold_weights(model: nn.Module) -> None:
    """Undo `normalize_weights`: each weight becomes one dense parameter again, with the value it has."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module) and isinstance(module.parametrizations, nn.ModuleDict):
            for attribute, steps in list(module.parametrizations.items()):
                if isinstance(steps, nn.ModuleList) and isinstance(steps[0], RowNorm):
                    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
