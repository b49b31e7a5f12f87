"""Terms: the summands a weight is made of, one file a structure, and the layer that sums them."""

from __future__ import annotations

from typing import Any

import torch

from weft.errors import unknown
from weft.terms.base import Spec, Term
from weft.terms.dense import Dense
from weft.terms.low_rank import LowRank
from weft.terms.sparse import Sparse
from weft.terms.spectral import Spectral
from weft.terms.sum_linear import SumLinear

__all__ = ["TERMS", "Dense", "LowRank", "Sparse", "Spec", "Spectral", "SumLinear", "Term", "build", "build_sum"]

TERMS: dict[str, type[Term]] = {term.kind: term for term in (Dense, LowRank, Spectral, Sparse)}
"""Every structure by its kind: the closed table that a saved spec is read with."""


def build(spec: Spec, *, device: Any = None, dtype: torch.dtype | None = None) -> Term:
    """The term of a spec, its tensors uninitialised. Raises WeftError for a kind that is not in `TERMS`."""
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in TERMS:
        raise unknown("kind of term", kind, TERMS)
    return TERMS[kind](**arguments, device=device, dtype=dtype)


def build_sum(spec: Spec, *, device: Any = None, dtype: torch.dtype | None = None) -> SumLinear:
    """The `SumLinear` of a spec (see `SumLinear.spec`), its tensors uninitialised."""
    terms = {name: build(term, device=device, dtype=dtype) for name, term in spec["terms"].items()}
    first = next(iter(terms.values()))
    bias = torch.empty(first.out_features, device=device, dtype=dtype) if spec["bias"] else None
    return SumLinear(terms, bias, transposed=spec.get("transposed", False))
