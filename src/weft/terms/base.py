"""The contract of a term: one summand T (out x in) of a weight matrix W = T_1 + ... + T_k.

A term is a `torch.nn.Module` that knows its own matrix and nothing else: not its layer's name, not the model, not the
method that made it. An author writes `forward` (or `summand`, from which it follows) and `spec`; everything else is
derived here, and overridden only to be faster (the conformance suite then runs both and compares them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.lean_linear import Part, Weight
from weft.kernels.transient_linear import Summand, transient_linear

__all__ = ["Factors", "FloatCodes", "IntegerCodes", "Lora", "Spec", "Term"]

Spec = dict[str, Any]
"""The JSON-able constructor arguments of a term, with its `kind`."""

Factors = tuple[Tensor, Tensor]
"""B (out, r) and A (r, in)."""


class Lora(NamedTuple):
    """A term as PEFT's LoRA files hold one: W + B A, each row scaled to the length `magnitude` where there is one."""

    B: Tensor  # (out, r), the scale within
    A: Tensor  # (r, in)
    magnitude: Tensor | None = None  # (out,), of DoRA
    dropout: float = 0.0


class IntegerCodes(NamedTuple):
    """A term as servers' formats of integer codes hold one, g(j) = j // group being the group of the input j:

    T[i, j] = scales[i, g(j)] (codes[i, j] - zeros[i, g(j)])
    """

    codes: Tensor  # (out, in) uint8, from 0 to 2^bits - 1
    scales: Tensor  # (out, groups) fp32
    zeros: Tensor  # (out, groups) uint8, in the codes' range
    bits: int
    group: int

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the range, which formats then leave out."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def signed(self) -> Tensor:
        """The codes less their zero points: (out, in) int16."""
        inn = self.codes.shape[1]
        return self.codes.short() - self.zeros.short().repeat_interleave(self.group, 1)[:, :inn]

    def dense(self) -> Tensor:
        """T (out, in) in fp32."""
        return self.signed() * self.scales.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]


class FloatCodes(NamedTuple):
    """A term as servers' formats of floating-point codes hold one, g(j) = j // group being the group of the input j:

    T[i, j] = scales[i, g(j)] value(codes[i, j])
    """

    codes: Tensor  # (out, in) uint8: sign, exponent and mantissa
    scales: Tensor  # (out, groups) fp32
    element: str  # "e2m1", "e2m3", "e3m2", "e4m3" or "e5m2"
    group: int
    shared: bool  # whether a scale is a power of two, kept in one byte


class Term(nn.Module):
    """One summand of a weight, of shape (out_features, in_features).

    The constructor takes exactly what `spec()` returns without `kind`, plus `device` and `dtype`, and leaves tensors
    uninitialised: `weft.terms.build(term.spec())` followed by `load_state_dict` rebuilds the term. What is trainable is
    simply what `requires_grad`. A term that is no matrix at all (an adapter with a nonlinearity after the layer) says
    `linear = False`, and its `dense()` raises WeftError; one that changes the base itself, so that two of its sort in
    one layer contradict each other, says `alone = True`.

    What the rest of weft wants to know of a structure it asks the term, by the methods below `nbytes`; each has a
    default that is right for a structure of which nothing special is known.
    """

    kind: ClassVar[str]
    linear: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    lean_alone: ClassVar[bool] = False
    """Whether its own forward keeps little for backward already, so that a lean step leaves it as it is."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Its vectors that hold entries of the matrix, by name: weight decay takes them for a matrix."""
    dropout: float = 0.0
    """Probability of zeroing an entry of x while training."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply T to the last dimension: x (..., in) -> (..., out), equal to x @ dense().T, computed in the dtype of x
        (autocast's, under autocast). By default one product with the matrix that `summand` builds for the moment.
        """
        if type(self).summand is Term.summand:
            raise NotImplementedError(f"{type(self).__name__} gives neither forward nor summand")  # abstract
        if torch.compiler.is_compiling():  # which decides itself what is kept
            return F.linear(x, self.dense(x.dtype))
        summand = self.summand()
        assert summand is not None
        return transient_linear(x, [summand], self.out_features)

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

    @property
    def rate_scale(self) -> float | None:
        """What its trained numbers are multiplied by on their way into T: its plain number `scale`, or None."""
        scale = self.__dict__.get("scale")
        return None if scale is None else float(scale)

    def exact_factors(self) -> Factors | None:
        """B (out, r), A (r, in) in fp32 with B A = T, detached; None when T has no exact factors of low rank."""
        return None

    def exact_codes(self) -> IntegerCodes | None:
        """Its exact form as integer codes with a scale a group, detached; None when there is none."""
        return None

    def exact_floats(self) -> FloatCodes | None:
        """Its floating-point codes and scales, where it is nothing else and they give it exactly; None where not."""
        return None

    def lora(self) -> Lora | None:
        """Its exact form in PEFT's LoRA files, in fp32, detached; None when there is none."""
        factors = self.exact_factors()
        return None if factors is None else Lora(*factors, dropout=self.dropout)

    def lean_weight(self) -> Weight | None:
        """What it is multiplied as where it is the first of a sum in a lean step: a matrix (out, in) or a function that
        makes it anew; None where it has no cheap dense form.
        """
        return None

    def lean_parts(self) -> list[Part] | None:
        """Its differentiable factors and entries in the present mode, for a lean step; None where it has none."""
        return None

    def summand(self) -> Summand | None:
        """Its differentiable form as one summand of a matrix that is built for the moment, in the present mode; None
        where it has none.
        """
        return None

    def builds(self, x: Tensor) -> bool:
        """Whether its forward of x builds the (out, in) matrix, so that further summands cost little beside it."""
        return type(self).forward is Term.forward

    def finished(self) -> Term:
        """What is left of it when its training has ended, the same function in evaluation; by default itself."""
        return self

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that an adapter saves of it, by name: `state_dict` without what is another's."""
        return self.state_dict(keep_vars=True)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters among `own_state`, by name."""
        return self.named_parameters()

    def own_spec(self) -> Spec:
        """The spec that goes with `own_state`."""
        return self.spec()

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
