"""Where the rows of a weight live: whole on every process (DDP and one process), or sharded on dimension 0 (FSDP2).

`fully_shard` turns parameters into DTensors sharded on dimension 0, so a gradient is projected on its other side, which
every process holds whole: R = X P is then local, and only a refresh sums anything larger than a vector (s x r numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement, Shard

from weft.errors import WeftError
from weft.optim.base import Rows

__all__ = ["Layout", "layout_of", "local"]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Layout:
    """How a parameter is spread: `mesh` None means whole on every process."""

    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    def rows(self, total: int) -> Rows:
        """The process group over which the rows are spread."""
        if self.mesh is None:
            return Rows(total)
        return Rows(total, self.mesh.get_group(self._dimension))

    @property
    def _dimension(self) -> int:
        return next(i for i, placement in enumerate(self.placements) if placement.is_shard())

    def wrap(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        """A DTensor of the whole `shape`, of which this process holds the rows `part`."""
        if self.mesh is None:
            return part
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def layout_of(parameter: Tensor, name: str) -> Layout:
    """The layout of a parameter. Raises WeftError where it is sharded otherwise than by rows."""
    if not isinstance(parameter, DTensor):
        return Layout()
    placements = parameter.placements
    sharded = [p for p in placements if not p.is_replicate()]
    if not sharded:
        return Layout()
    if len(sharded) > 1 or type(sharded[0]) is not Shard or sharded[0].dim != 0:
        raise WeftError(
            f"{name} is laid out as {placements}; subspace optimizers run on parameters sharded once, on dimension 0 "
            "(fully_shard without tensor parallelism)."
        )
    return Layout(parameter.device_mesh, tuple(placements))
