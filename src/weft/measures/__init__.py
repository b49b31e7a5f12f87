"""Measures of weights, gradients, activations, texts and pairs of models, one file each; `MEASURES` holds their
records.
"""

from __future__ import annotations

from weft.measures import (
    atoms,
    control_theory,
    drift,
    farms,
    gradient_quality,
    hash_encoders,
    hidden_covariance,
    high_dim_dynamics,
    intrinsic_dimension,
    intruder_dimensions,
    lora_limits,
    matrix_nuclear_norm,
    power_law,
    ppl_sparsity,
    superposition,
    talking_heads,
    w_pca,
    weight_matching,
)
from weft.measures.base import Measure
from weft.records import Table

__all__ = ["MEASURES", "Measure"]

_PAGES = (
    *(farms, power_law, w_pca, hidden_covariance, gradient_quality, ppl_sparsity, lora_limits),
    *(superposition, atoms, control_theory, talking_heads, high_dim_dynamics, hash_encoders),
    *(matrix_nuclear_norm, intrinsic_dimension, drift, intruder_dimensions, weight_matching),
)

MEASURES = Table(Measure, [page.MEASURE for page in _PAGES])
