"""welore: one threshold k on the min-max normalised singular values of the weights (Jaiswal et al., 2024, arXiv
2407.11239).

    t_j = (s_j - s_m) / (s_1 - s_m),   r = #{j : t_j >= k},   at least 1

As published; `floor` (0 as published) keeps at least that share of the uniform rank, against the starvation that one
outlier singular value causes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weft.allocate.base import Allocator, Choices, LayerInfo, bisect_threshold

__all__ = ["ALLOCATION", "allocate"]


def allocate(layers: Mapping[str, LayerInfo], budget: int, *, floor: float = 0.0) -> Choices:
    """The smallest threshold whose ranks fit the budget, found by bisection."""
    normalised = {
        name: _min_max(layer.weight_spectrum) for name, layer in layers.items() if layer.weight_spectrum is not None
    }
    share = budget / sum(layer.shape.nbytes for layer in layers.values())

    def rank_at(name: str, t: float) -> int:
        shape = layers[name].shape
        return max(int((normalised[name] >= 1 - t).sum()), int(floor * share * shape.numel / sum(shape)))

    return bisect_threshold(
        layers, budget, lambda t: {name: layer.at_rank(rank_at(name, t)) for name, layer in layers.items()}
    )


def _min_max(s: Tensor) -> Tensor:
    spread = s[0] - s[-1]
    return (s - s[-1]) / spread if spread > 0 else (s > 0).to(s.dtype)


ALLOCATION = Allocator(
    name="welore",
    summary="One threshold on the min-max normalised singular values of all weights.",
    paper="Jaiswal et al., 2024, arXiv 2407.11239",
    allocate=allocate,
    reads=("weight_spectrum",),
)
