"""svfit: train the r leading singular values of the weight, everything else of it frozen (Sun et al., 2024, arXiv
2409.05926, section 3).

    W = U S V;   W + U_r diag(sigma - S_r) V_r,  sigma from S_r;   r trainable numbers

Trained is delta = sigma - S_r, from 0: the same steps, an exact start in any dtype, and the base (quantised, too) keeps
its bytes. The frozen sides are r (in + out) stored numbers: they are saved, for close singular values leave them
undetermined. `energy=0.99` takes the smallest r, at most `rank`, that holds this share of the squared singular values;
the paper's "99 % of the information" is not defined. `relative=True` trains sigma / S_r instead, so that one learning
rate suits values of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.linalg.spectrum import rank_for_energy
from weft.linalg.svd import singular_values, truncated_svd
from weft.methods.adapter import no_gradient
from weft.methods.base import Method, Moments, Site, Split
from weft.terms import Spectral, Term

__all__ = ["METHOD", "check_share", "diagonal_count", "split", "spread", "trained_diagonal"]


def split(site: Site, *, energy: float | None, relative: bool) -> Split:
    """A diagonal of zeros between the weight's own principal sides."""
    U, s, V = truncated_svd(site.weight(), site.rank)
    return Split({"": trained_diagonal(site, U * s if relative else U, torch.zeros(site.rank), V)})


def spread(
    moments: Mapping[str, Moments], shapes: Mapping[str, tuple[int, int]], rank: int, options: Mapping[str, Any]
) -> dict[str, int]:
    """At most `rank` values, as many as hold the energy where a share of it is given."""
    energy = options["energy"]
    check_share("energy", energy)
    if energy is None:
        return dict.fromkeys(shapes, rank)
    enough = {name: rank_for_energy(singular_values(moments[name]["weight"]), energy) for name in shapes}
    return {name: max(1, min(rank, found)) for name, found in enough.items()}


def trained_diagonal(site: Site, U: Tensor, s: Tensor, V: Tensor) -> Term:
    """The term U diag(s) V of which s alone is trained."""
    term = Spectral.from_factors(*(factor.to(site.device, site.dtype) for factor in (U, s, V)))
    return no_gradient(term, "U", "V")


def check_share(name: str, share: float | None) -> None:
    """Raises WeftError for a share that is none."""
    if share is not None and not 0 < share <= 1:
        raise WeftError(f"The option {name} is a share of the whole, above 0 and at most 1; {share} is not.")


def diagonal_count(out_features: int, in_features: int, rank: int, options: Mapping[str, Any]) -> int:
    """r."""
    return rank


METHOD = Method(
    name="svfit",
    kind="adapt",
    summary="The leading singular values of the weight trained alone, between their frozen singular vectors.",
    paper="Sun et al., 2024, arXiv 2409.05926",
    split=split,
    count=diagonal_count,
    spread=spread,
    defaults={"energy": None, "relative": False},
)
