"""Which parameters of a model are projected: the matrices inside its blocks. All others are stepped whole.

A block is whatever lies under an `nn.ModuleList` or `nn.Sequential`, which is where transformers keeps its layers: so
the linear layers (`nn.Linear`, GPT-2's `Conv1D`, adapter factors) are matrices, and embeddings, norms, biases and the
output head are not. Frozen parameters are left alone; a tied one is given once, and whole if any of its owners is
whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from weft.errors import WeftError

__all__ = ["Named", "parameter_groups", "split_parameters"]

Named = tuple[str, Tensor]


def split_parameters(
    model: nn.Module, exclude: Sequence[str] = (), *, stacks: bool = False
) -> tuple[list[Named], list[Named]]:
    """(matrices to project, everything else) among the trainable parameters, as (name, parameter) pairs.

    Names that contain any of `exclude` are not projected. With `stacks`, three-dimensional stacks of matrices and
    vectors of a matrix's entries (a module's `entries` names them) count as matrices, though none can be projected.
    Raises WeftError when there is nothing to train or to project.
    """
    trainable: list[Named] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise WeftError("No parameter of the model requires a gradient; there is nothing to train.")
    whole = set(_whole(model, exclude, 3 if stacks else 2))
    matrices = [(name, p) for name, p in trainable if p not in whole]
    if not matrices and not stacks:
        raise WeftError(
            "The model's blocks (nn.ModuleList, nn.Sequential) have no trainable matrix, so that an optimizer of "
            "matrices has nothing to step; take one for every weight, such as adamw, or a method that trains matrices; "
            'in Python, give the groups: [{"params": matrices, "rank": 128}, {"params": others}].'
        )
    return matrices, [(name, p) for name, p in trainable if p in whole]


def _whole(model: nn.Module, exclude: Sequence[str], dimensions: int) -> Iterator[Tensor]:
    """Parameters not to be projected; a tied one comes once for each owner."""
    containers = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    entries = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        for own in getattr(module, "entries", ())
        if dimensions > 2
    }
    embeddings = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    for name, p in model.named_parameters(remove_duplicate=False):
        in_block = any(name.startswith(c) for c in containers)
        matrix = 2 <= p.ndim <= dimensions and 1 not in p.shape and not any(name.startswith(e) for e in embeddings)
        if not (in_block and (matrix or name in entries)) or any(x in name for x in exclude):
            yield p


def parameter_groups(
    model: nn.Module | Iterable[Any], exclude: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(groups to project, groups to step whole) of a model, or of explicit groups: those that have a "rank" are
    projected."""
    if isinstance(model, nn.Module):
        matrices, others = split_parameters(model, exclude)
        return [{"params": matrices}], [{"params": others}] if others else []
    groups = list(model)
    if not all(isinstance(group, dict) for group in groups):
        raise WeftError(
            'Give a model, or groups as dictionaries: [{"params": matrices, "rank": 128}, {"params": others}].'
        )
    projected = [dict(group) for group in groups if "rank" in group]
    if not projected:
        raise WeftError('None of the groups has a "rank", so nothing would be projected.')
    return projected, [dict(group) for group in groups if "rank" not in group]
