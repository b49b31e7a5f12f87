"""Several optimizers as one: each steps groups of its own, and the whole has one state, one list of groups and one
state_dict, as schedulers, trainers and checkpoints expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weft.errors import WeftError
from weft.optim.state import restore

__all__ = ["Several"]


class Several(torch.optim.Optimizer):
    """The parts step in turn, each on the groups that it was made with.

    Args:
        parts: optimizers of disjoint parameters.

    Raises WeftError where a group is added, since no part is named for it.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self.sizes = [len(part.param_groups) for part in parts]
        self._made = False
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._made = True
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each part. A closure is evaluated once, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made."""
        if self._made:
            raise WeftError("Give all parameters when the optimizer is made: it has a part for each sort of them.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore a state_dict of the same groups, in the dtypes it was saved in; the run goes on bit for bit."""
        restore(self, state_dict)
        self._share()

    def _share(self) -> None:
        """Groups and state of the whole are those of the parts, the very same objects."""
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            part.param_groups = self.param_groups[start : start + size]
            part.state = self.state
            start += size

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in ("parts", "sizes", "_made")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
