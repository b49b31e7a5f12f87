"""Terms: the summands a weight is made of, one file a structure, and the layer that sums them."""

from __future__ import annotations

from typing import Any

import torch

from weft.errors import WeftError, unknown
from weft.records import load_entry_points
from weft.terms.activated_low_rank import ActivatedLowRank
from weft.terms.aided_code import AidedCode
from weft.terms.base import Spec, Term
from weft.terms.block_affine import BlockAffine
from weft.terms.bottleneck import Bottleneck
from weft.terms.codebook import Codebook
from weft.terms.coded_factors import CodedFactors, PackedFactors
from weft.terms.column_code import ColumnCode
from weft.terms.columns import Columns
from weft.terms.companded import Companded
from weft.terms.complex_code import ComplexCode, ComplexLatent
from weft.terms.core_low_rank import CoreLowRank
from weft.terms.dense import Dense
from weft.terms.dense_sparse import DenseSparse
from weft.terms.factored import Factored
from weft.terms.fading import Fading
from weft.terms.float_code import FloatCode
from weft.terms.gated_learners import GatedLearners
from weft.terms.gated_low_rank import GatedLowRank
from weft.terms.integer_code import IntegerCode
from weft.terms.kronecker import Kronecker
from weft.terms.low_rank import LowRank
from weft.terms.magnitude import Magnitude
from weft.terms.masked import Masked
from weft.terms.monarch import Monarch
from weft.terms.moving_sparse import MovingSparse
from weft.terms.pivoted_low_rank import PivotedLowRank
from weft.terms.pooled_low_rank import PooledLowRank
from weft.terms.projected import Projected
from weft.terms.quantized import Int8, NormalFloat
from weft.terms.random_combination import RandomCombination
from weft.terms.random_products import RandomProducts
from weft.terms.random_store import RandomStore
from weft.terms.removed import Removed
from weft.terms.replacement import Replacement
from weft.terms.rounded_inputs import RoundedInputs
from weft.terms.sampled_spectral import SampledSpectral
from weft.terms.scaled_code import ScaledCode
from weft.terms.scored_mask import ScoredMask
from weft.terms.shard_sum import ShardSum
from weft.terms.shifted import Shifted
from weft.terms.singular_basis import SingularBasis
from weft.terms.sparse import Sparse
from weft.terms.spectral import Spectral
from weft.terms.stepped_code import SteppedCode
from weft.terms.submatrix import Submatrix
from weft.terms.sum_linear import SumLinear
from weft.terms.ternary import Ternary, TernaryLatent
from weft.terms.trained_float import TrainedFloat
from weft.terms.transposed_code import TransposedCode
from weft.terms.tuned_code import TunedCode
from weft.terms.wrapper import Wrapper

__all__ = [
    "TERMS",
    "ActivatedLowRank",
    "AidedCode",
    "BlockAffine",
    "Bottleneck",
    "Codebook",
    "CodedFactors",
    "ColumnCode",
    "Columns",
    "Companded",
    "ComplexCode",
    "ComplexLatent",
    "CoreLowRank",
    "Dense",
    "DenseSparse",
    "Factored",
    "Fading",
    "FloatCode",
    "GatedLearners",
    "GatedLowRank",
    "Int8",
    "IntegerCode",
    "Kronecker",
    "LowRank",
    "Magnitude",
    "Masked",
    "Monarch",
    "MovingSparse",
    "NormalFloat",
    "PackedFactors",
    "PivotedLowRank",
    "PooledLowRank",
    "Projected",
    "RandomCombination",
    "RandomProducts",
    "RandomStore",
    "Removed",
    "Replacement",
    "RoundedInputs",
    "SampledSpectral",
    "ScaledCode",
    "ScoredMask",
    "ShardSum",
    "Shifted",
    "SingularBasis",
    "Sparse",
    "Spec",
    "Spectral",
    "SteppedCode",
    "Submatrix",
    "SumLinear",
    "Term",
    "Ternary",
    "TernaryLatent",
    "TrainedFloat",
    "TransposedCode",
    "TunedCode",
    "Wrapper",
    "build",
    "build_sum",
    "register_term",
]

TERMS: dict[str, type[Term]] = {
    term.kind: term
    for term in (
        Dense,
        NormalFloat,
        Int8,
        IntegerCode,
        FloatCode,
        ScaledCode,
        TrainedFloat,
        TransposedCode,
        ColumnCode,
        Codebook,
        Ternary,
        ComplexCode,
        LowRank,
        PivotedLowRank,
        DenseSparse,
        Spectral,
        Sparse,
        Masked,
        ScoredMask,
        Fading,
        SampledSpectral,
        CoreLowRank,
        GatedLowRank,
        GatedLearners,
        Shifted,
        Magnitude,
        Replacement,
        RandomCombination,
        SingularBasis,
        Columns,
        ShardSum,
        BlockAffine,
        Kronecker,
        RandomProducts,
        MovingSparse,
        PooledLowRank,
        Bottleneck,
        Projected,
        Removed,
        CodedFactors,
        PackedFactors,
        Submatrix,
        ActivatedLowRank,
        Companded,
        Monarch,
        TernaryLatent,
        ComplexLatent,
        TunedCode,
        SteppedCode,
        AidedCode,
        RoundedInputs,
    )
}
"""Every structure by its kind: the closed table that a saved spec is read with."""


def register_term(term: type[Term]) -> type[Term]:
    """Add a structure of your own, so that saved models that hold it can be read; usable as a decorator.

    Raises:
        WeftError: it is no subclass of `Term`, has no `kind`, or the kind is another's.
    """
    if term in TERMS.values():
        return term
    if not (isinstance(term, type) and issubclass(term, Term) and isinstance(term.__dict__.get("kind"), str)):
        raise WeftError(f"{term!r} is no term: give a subclass of weft.terms.Term with a kind of its own.")
    if TERMS.setdefault(term.kind, term) is not term:
        raise WeftError(f"There is a term of kind {term.kind!r} already; give {term.__name__} another kind.")
    return term


def build(spec: Spec, *, device: Any = None, dtype: torch.dtype | None = None) -> Term:
    """The term of a spec, its tensors uninitialised. Raises WeftError for a kind that is not in `TERMS`."""
    arguments = dict(spec)
    kind = arguments.pop("kind")
    if kind not in TERMS:
        load_entry_points()
    if kind not in TERMS:
        raise unknown("kind of term", kind, TERMS)
    built = {key: _built(value, device, dtype) for key, value in arguments.items()}
    return TERMS[kind](**built, device=device, dtype=dtype)  # type: ignore[call-arg]


def _built(value: Any, device: Any, dtype: torch.dtype | None) -> Any:
    """An argument with the specs in it, of terms that hold terms, made into terms."""
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        return build(value, device=device, dtype=dtype)
    return {key: _built(inner, device, dtype) for key, inner in value.items()}


def build_sum(spec: Spec, *, device: Any = None, dtype: torch.dtype | None = None) -> SumLinear:
    """The `SumLinear` of a spec (see `SumLinear.spec`), its tensors uninitialised."""
    terms = {name: build(term, device=device, dtype=dtype) for name, term in spec["terms"].items()}
    first = next(iter(terms.values()))
    bias = torch.empty(first.out_features, device=device, dtype=dtype) if spec["bias"] else None
    return SumLinear(terms, bias, transposed=spec.get("transposed", False))
