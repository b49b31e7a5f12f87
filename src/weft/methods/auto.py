"""auto: of several methods, for each matrix the one, at the size, that keeps the whole model's loss lowest in a budget.

    minimise  sum_l loss_l(c_l),   loss_l(c) = tr(D^T G D X),   D = W'_c - W,   subject to  sum_l bytes_l(c_l) <= budget

with c over all sizes of all candidates: widths of code, group sizes, ranks, codes with factors for what they lost.
Codes are rounded in that same norm (`yaqa`), for tables of a matrix's own or grids of integers, with scales searched,
which costs no byte. `methods=yaqa:clip=true` has grids of integers alone, which servers read.
X = E[x x^T] and G = E[g g^T] are a layer's input and output-gradient moments: the Kronecker-factored Fisher norm in
which kfac-svd truncates (Thoma et al., 2026), one unit for every layer and every structure. `best` solves it; with
`--allocate lems` one measured point a layer puts its curve to scale first. What was chosen is then made anew, block by
block, on the inputs that each layer has in the model changed so far.

The parts are known: bits and ranks of one method by predicted loss (IO-SVD, 2026; LQ-LoRA, 2023, by the Frobenius
norm), the greedy on hulls (Shoham and Gersho, 1988); curves of different structures in one budget are ours.
Deviations: none; the method is ours.
"""

from __future__ import annotations

from weft.methods.base import Method, low_rank_terms
from weft.methods.combined import MixtureSplit

__all__ = ["METHOD"]

_SPLIT = MixtureSplit()

METHOD = Method(
    name="auto",
    kind="compress",
    summary="One budget of bytes over several methods: each matrix gets the codes, rank or both that lose least.",
    paper="weft; the unit of loss: Thoma et al., 2026, openreview IjIgNPFuCt",
    needs=("input_moment", "output_grad_moment"),
    needs_with=_SPLIT.needs,
    allocate="best",
    sequential=True,
    split=_SPLIT,
    sizes=_SPLIT.sizes,
    trained=low_rank_terms,
    defaults={
        "methods": "yaqa:group=null:clip=true:table=true, yaqa:group=128:clip=true:table=true, "
        "yaqa:group=128:clip=true, kfac-svd, yaqa:group=128:clip=true:table=true+eora"
    },
    exempt={"nearer": "Two of its sizes may be of different methods, of which the larger need not be nearer."},
)
