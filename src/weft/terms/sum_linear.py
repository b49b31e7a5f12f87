"""SumLinear: a linear layer whose weight is W = T_1 + ... + T_k; it replaces `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from weft.kernels.transient_linear import transient_linear, worthwhile
from weft.terms.base import Spec, Term
from weft.terms.hooks import at_hand

__all__ = ["SumLinear"]


class SumLinear(nn.Module):
    """y = x (T_1 + ... + T_k)^T + bias, for x (..., in) -> y (..., out).

    Args:
        terms: name -> Term, all of one shape; the order is the order of summation. Names are identifiers without dots.
        bias: (out,) or None.
        transposed: True when the layer replaced a `Conv1D`, whose weight is stored (in, out); `collapse` then gives a
            `Conv1D` back.

    `weight` is an empty buffer of the layer's dtype and device: code that only peeks at `layer.weight.dtype` or
    `.device` reads the truth, and a loader that knows nothing of weft finds a tensor of the wrong shape and refuses,
    instead of filling the layer with noise.

    `aside` lists terms of adapters that are not in use: no part of the sum or the state, but moved and cast with it.

    Raises:
        ValueError: no terms, or terms of different shapes.
    """

    weight: Tensor

    def __init__(self, terms: Mapping[str, Term], bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        shapes = {name: (term.out_features, term.in_features) for name, term in terms.items()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"a sum needs one or more terms of one shape, got {shapes or 'none'}")
        (self.out_features, self.in_features) = next(iter(shapes.values()))
        self.transposed = transposed
        self.terms = nn.ModuleDict(dict(terms))
        self.aside: list[Term] = []
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        reference = next(iter(terms.values()))._reference()
        self.register_buffer("weight", torch.empty(0, dtype=reference.dtype, device=reference.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        fused = self.fused(x)
        if fused is not None:
            return fused
        first, *rest = self.terms.values()
        y: Tensor = first(x)
        for term in rest:
            y = y + term(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def fused(self, x: Tensor) -> Tensor | None:
        """The layer on many rows of x by one product with the sum of its terms, which nobody keeps; None where one
        product a term is better: few rows, or no term that builds its matrix anyway.
        """
        terms = self._terms()
        if len(terms) < 2 or not any(term.builds(x) for term in terms):
            return None
        if not worthwhile(x.numel() // max(1, self.in_features), self.out_features, self.in_features):
            return None
        with at_hand(self.terms):
            asked = [term.summand() for term in terms]
            summands = [summand for summand in asked if summand is not None]
            if len(summands) < len(terms):
                return None
            return transient_linear(x, summands, self.out_features, self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The (out, in) sum of the terms' matrices, added in fp32 or wider; `dtype` None means the stored one."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with at_hand(self.terms):
            total = sum(term.dense(wide) for term in self._terms())
        assert isinstance(total, Tensor)
        return total.to(dtype or self.weight.dtype)

    def collapse(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The plain layer of the same function: `nn.Linear`, or `Conv1D` where that was replaced; the terms are added
        in fp32 or wider and cast to `dtype` (None: the stored one) last.
        """
        dtype = dtype or self.weight.dtype
        weight = self.dense(dtype)
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                plain: nn.Module = Conv1D(self.out_features, self.in_features)  # type: ignore[no-untyped-call]
            weight = weight.transpose(0, 1)
        else:
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().contiguous())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone().to(dtype))
        elif self.transposed:
            plain.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=weight.device))
        return plain

    def spec(self) -> Spec:
        """JSON-able: {"bias", "transposed", "terms": {name: spec}}; `weft.terms.build_sum` reads it."""
        return {
            "bias": self.bias is not None,
            "transposed": self.transposed,
            "terms": {name: term.spec() for name, term in self._named_terms()},
        }

    @property
    def num_params(self) -> int:
        """Numbers stored by the terms and the bias."""
        return sum(term.num_params for term in self._terms()) + (0 if self.bias is None else self.bias.numel())

    @property
    def nbytes(self) -> int:
        """Bytes stored by the terms and the bias."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return sum(term.nbytes for term in self._terms()) + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SumLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for term in self.aside if recurse else ():
            term._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def _terms(self) -> list[Term]:
        return [term for _, term in self._named_terms()]

    def _named_terms(self) -> list[tuple[str, Term]]:
        return list(self.terms.items())  # type: ignore[arg-type]
