"""cmlora: one dominant adapter among others, mixed in the outputs (CMLoRA: Cached Multi-LoRA, 2025, arXiv 2502.04923).

    logits(x) = sum_j w_j logits_j(x) / sum_j w_j
    w_j = n for all but the dominant one, w0 n for that,  n = N / (w0 + N - 1)

for N adapters, one in use at a time. The output-space counterpart of a merge, and a reference to judge merges by:
nothing interferes, and a pass costs as many as there are adapters.
Deviations: made for the noise predictions of image models; the rotation of the dominant adapter over denoising steps
and the cache of slow features have no counterpart in a language model's forward pass and are left out.
"""

from __future__ import annotations

from weft.errors import WeftError
from weft.merging.base import Merger

__all__ = ["MERGER", "dominant"]


def dominant(count: int, which: int = 0, strength: float | None = None) -> list[float]:
    """The weights of `count` adapters, which sum to `count`.

    Args:
        which: the position of the dominant adapter.
        strength: w0; None for the published N - 0.5, 1 for equal weights.
    """
    if not 0 <= which < count:
        raise WeftError(f"There is no adapter {which} among {count} to be the dominant one; give 0 to {count - 1}.")
    strength = count - 0.5 if strength is None else strength
    share = count / (strength + count - 1)
    return [strength * share if position == which else share for position in range(count)]


MERGER = Merger(
    name="cmlora",
    kind="mix",
    summary="the weighted mean of the outputs with each adapter, one of them dominant",
    paper="Zou et al., 2025, arXiv 2502.04923",
    weights=dominant,
    defaults={"which": 0, "strength": None},
)
