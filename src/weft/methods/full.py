"""full: every parameter is trained; the yardstick of all the others."""

from __future__ import annotations

from torch import nn

from weft.methods.base import Method

__all__ = ["METHOD"]


def _all(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


METHOD = Method(
    name="full",
    kind="train",
    summary="Full fine-tuning: every parameter is trained.",
    paper="none",
    trained=_all,
)
