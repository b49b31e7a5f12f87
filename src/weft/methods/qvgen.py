"""qvgen: training towards codes of few bits, with a product of full precision beside them that goes away by and by
(QVGen, Huang et al., 2025, arXiv 2505.11497; its code ModelTC/QVGen, read through its description).

    y = x (Q(V) + B diag(a) A)^T,   Q with a learned step a row;   B A at first the best of rank r for W - Q(W)
    phases of T steps: half of the components fade, the rest is ordered anew by an SVD; r = 32, 16, 8, 4, 2, 1, none

Training begins near the model and ends on the codes alone: what is left are `bits` a weight and a step a row, integer
codes. `weft finetune MODEL --method qvgen --teacher MODEL` learns the dense model's predictions (published, for videos:
its output's squared error). V, s, B and A are trained, from V = W; published rate 3e-5. Evaluation goes without the
product at all times. Training holds the latents, as dense training does.
Deviations: inputs are rounded with `activations` (published: 4 bits, by token, as the weights), without a learned clip
of 0.95; none by default, which leaves matrices. The step starts as LSQ's. The moments of both factors begin anew with
each phase. Embeddings, norms and the head stay. The paper's regulariser of ranks is the schedule, as in its code.
"""

from __future__ import annotations

from weft.methods.base import Method, Site, Split, low_rank_terms
from weft.methods.rtn import scale_dtype
from weft.rules.rank_decay import RankDecay
from weft.terms import AidedCode, Dense, RoundedInputs

__all__ = ["METHOD", "finish", "split"]


def split(site: Site, *, bits: int, auxiliary: int, activations: int | None) -> Split:
    """The weight of a dense layer as latents, and the product; others stay as they are."""
    if any(not isinstance(term, Dense) for term in site.terms.values()):
        return Split()
    stored = str(scale_dtype(site.dtype)).removeprefix("torch.")
    term = AidedCode.from_matrix(site.weight().to(site.dtype), bits, min(auxiliary, *site.shape), stored)
    return Split({"base": term if activations is None else RoundedInputs.of(term, activations, normalise=False)})


def finish(site: Site) -> Split:
    """The codes alone."""
    return Split({key: term.finished() for key, term in site.terms.items()})


METHOD = Method(
    name="qvgen",
    kind="train",
    summary="Training towards codes of few bits, beside a low-rank product that fades away.",
    paper="Huang et al., 2025, arXiv 2505.11497",
    split=split,
    finish=finish,
    ranked=False,
    rules=(RankDecay,),
    trained=low_rank_terms,
    defaults={"bits": 4, "auxiliary": 32, "decay": "cosine", "activations": None},
)
