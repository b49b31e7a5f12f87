"""The contract of a term: one summand T (out x in) of a weight matrix W = T_1 + ... + T_k.

A term is a `torch.nn.Module` that knows its own matrix and nothing else: not its layer's name, not the model, not the
method that made it. An author writes `forward` and `spec`; everything else is derived here, and overridden only to be
faster (the conformance suite then runs both and compares them).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Spec", "Term"]

Spec = dict[str, Any]
"""The JSON-able constructor arguments of a term, with its `kind`."""


class Term(nn.Module):
    """One summand of a weight, of shape (out_features, in_features).

    The constructor takes exactly what `spec()` returns without `kind`, plus `device` and `dtype`, and leaves tensors
    uninitialised: `weft.terms.build(term.spec())` followed by `load_state_dict` rebuilds the term. What is trainable is
    simply what `requires_grad`. A term that is no matrix at all (an adapter with a nonlinearity after the layer) says
    `linear = False`, and its `dense()` raises WeftError; one that changes the base itself, so that two of its sort in
    one layer contradict each other, says `alone = True`.
    """

    kind: ClassVar[str]
    linear: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply T to the last dimension: x (..., in) -> (..., out), equal to x @ dense().T, computed in the dtype of x
        (autocast's, under autocast).
        """
        raise NotImplementedError(f"{type(self).__name__} gives no forward")  # abstract

    def spec(self) -> Spec:
        """JSON-able constructor arguments, with `kind`."""
        return {"kind": self.kind, "in_features": self.in_features, "out_features": self.out_features}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) matrix, computed in `dtype` (None: the stored one). Differentiable, never cached."""
        reference = self._reference()
        identity = torch.eye(self.in_features, device=reference.device, dtype=reference.dtype)
        columns: Tensor = self(identity)
        return columns.transpose(-1, -2).to(dtype or reference.dtype)

    @property
    def num_params(self) -> int:
        """Numbers stored as floating-point tensors, trainable or not (index tensors are not parameters)."""
        return sum(t.numel() for t in self._stored() if t.is_floating_point())

    @property
    def nbytes(self) -> int:
        """Bytes stored, index tensors included."""
        return sum(t.numel() * t.element_size() for t in self._stored())

    def extra_repr(self) -> str:
        """What `print(model)` shows of the term."""
        return ", ".join(f"{key}={value}" for key, value in self.spec().items() if key != "kind")

    def _stored(self) -> list[Tensor]:
        # not by state_dict(), which makes FSDP2 shard its parameters again amid a forward pass
        buffers = [
            buffer
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        return [*self.parameters(), *buffers]

    def _reference(self) -> Tensor:
        """A tensor whose dtype and device are the term's own."""
        return next(t for t in self._stored() if t.is_floating_point())
