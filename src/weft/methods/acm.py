"""acm: layers that spend on each token as much as it needs: learners that are added up, and a small gate that says how
many (adaptive computation modules, Wojcik et al., 2023, arXiv 2312.10193; its code
bartwojcik/adaptive_computation_modules).

    T(x) = sum_{n <= k(x)} B_n A_n x,   k(x) from 0 to N

    phase 1    learners are fitted to the layer: here in closed form, the leading components, n-th part after part
    phase 2    the gates alone learn the smallest k that is near enough; phase 3 trains all to a budget (`GatePhases`)

`weft finetune OUT --method acm --teacher MODEL` on a model of low-rank factors (svd-llm, kfac-svd) takes these, in
their order of worth; a dense layer is cut by SVD to `capacity` of the rank that saves nothing. `target` is the share of
the learners that shall run in the mean. It saves operations, by token, and no bytes; on one token at a time a layer is
three small products instead of one. A rank that follows the token cannot be merged.
Deviations: learners are linear, as published for projections; MLPs are not replaced as a whole. Prefixes of a truncated
SVD are the least-squares answer of phase 1 for white inputs, or for the data where the factors are; the gate's target
compares with all learners, since what they were made of is gone; published, it is the first after which the error falls
by less than a fifth. Budget and diversity are those of the soft gates. A draw executes exactly the learners that it
says, and a token may run none, where published projections run one at least. The weight of the budget is 1, published
is 0.1 over 97 epochs; a run that ends off its target says so. Gates have two layers, published are three; what is no
learner or gate stays as it is in phase 3. A rank that N does not divide is filled up with components of zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from weft.errors import WeftError
from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.rules.gate_phases import GatePhases
from weft.terms import GatedLearners

__all__ = ["METHOD", "split"]


def split(site: Site, *, learners: int, hidden: int, capacity: float) -> Split:
    """The layer's factors in parts, those of its SVD where it has none; a layer of too low a rank stays.

    Raises:
        WeftError: no learner, or a capacity that is no share.
    """
    if learners < 1 or not 0 < capacity <= 1:
        raise WeftError(f"learners is {learners} and capacity {capacity}: give one or more, and a share above 0.")
    terms = list(site.terms.values())
    out, inn = site.shape
    factors = terms[0].exact_factors() if len(terms) == 1 else None
    if factors is None:
        U, s, Vh = torch.linalg.svd(site.weight(torch.float32), full_matrices=False)
        rank = max(int(capacity * out * inn / (out + inn)) // learners, 1) * learners
        factors = (U * s.sqrt())[:, :rank], (s.sqrt().unsqueeze(1) * Vh)[:rank]
    B, A = factors
    if len(A) < learners:
        return Split()
    B, A = (t.to(site.device, site.dtype) for t in (B, A))
    lacking = -len(A) % learners  # components of zeros, so that the parts are equal and none of the layer's is lost
    B, A = F.pad(B, (0, lacking)), F.pad(A, (0, 0, 0, lacking))
    return Split({"base": GatedLearners.from_factors(B, A, learners, hidden, site.generator)})


METHOD = Method(
    name="acm",
    kind="train",
    summary="Learners that are added up, and a gate that says for each token how many.",
    paper="Wojcik et al., 2023, arXiv 2312.10193",
    split=split,
    ranked=False,
    rules=(GatePhases,),
    trained=low_rank_terms,
    least={"hidden": 1},
    defaults={
        "learners": 4, "hidden": 16, "capacity": 1.0, "target": 0.6, "gates": 0.2, "tolerance": 0.1,
        "weight": 1.0, "entropy": 0.05, "diversity": 0.05,
    },
)  # fmt: skip
