"""dsformer: a weight as a small dictionary of input patterns and, for each output, a few of them (Chand et al., 2023,
arXiv 2312.13211).

    W' = S D,   D (m, in) dense,   S (out, m) with k = `share` m numbers in each row
    minimises tr((W - W') C (W - W')^T), C = E[x x^T]: `rounds` times
        S given D    the atoms that what is left of a row is most like, k in `steps` goes, least squares after each
        D given S    least squares, S^+ W; an atom that no row uses becomes what is missing of the worst row

D begins as the principal directions of the outputs. Low rank is k = m: all rows in one subspace. Here each picks its
own, at the same bytes more atoms than a rank; where the rows do lie in one subspace, the factors of `svd-llm` are
better. m is the size of an allocation. Places count, as many bits as m asks for. The product is a dense one with D and
one with S, made whole for the moment: what is saved is bytes.
Deviations: no code was found, and the abstract leaves the layout of blocks open: one dictionary for a matrix. Published
factors are learned for the task, by straight-through steps of a latent W; here sparse coding on the data comes first
(as in CoSpaDi, 2025, arXiv 2509.22075), and `weft finetune OUT --method dsformer` trains D and the numbers of S, with
the places that they have. Several atoms are chosen at a time, where orthogonal matching pursuit chooses one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.linalg.principal import principal_factors
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter, low_rank_terms
from weft.terms import DenseSparse

__all__ = ["METHOD", "code", "dictionary", "factorise", "sizes"]

_LEAST = 1e-6
"""Of the mean of a diagonal: what is added to it where it is inverted."""
_ENTRIES = 2**24
"""Numbers of the systems that are solved at a time."""
_ROUNDS = 64
"""Of conjugate gradients."""


def code(W: Tensor, D: Tensor, C: Tensor, k: int, steps: int = 4) -> tuple[Tensor, Tensor]:
    """values, places (out, k): for each row of W (out, in) k rows of D (m, in) and their least-squares weights in the
    metric C.
    """
    gram, alike = D @ C @ D.mT, W @ C @ D.mT  # (m, m), (out, m)
    scale = _per_length(gram)
    places = torch.empty(len(W), 0, dtype=torch.long, device=W.device)
    values, left = alike.new_empty(len(W), 0), alike
    for i in range(steps):
        more = k * (i + 1) // steps - k * i // steps
        if not more:
            continue
        worth = (left * scale).abs().scatter(1, places, -1.0)
        places = torch.cat([places, worth.topk(more).indices], 1)
        values = _fitted(gram, alike, places, torch.cat([values, values.new_zeros(len(W), more)], 1))
        left = alike - torch.zeros_like(alike).scatter(1, places, values) @ gram
    return values, places


def _fitted(gram: Tensor, alike: Tensor, places: Tensor, start: Tensor) -> Tensor:
    """The least-squares weights (out, k) of chosen atoms, of a few row by row, of many by conjugate gradients."""
    mean = gram.diagonal().mean()
    ridge = torch.where(mean > 0, _LEAST * mean, 1.0)  # of atoms that are all zeros, any will do
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    unit = _per_length(gram)  # atoms of length 1
    gram, alike, scale = gram * unit * unit.unsqueeze(1), alike * unit, unit[places]
    if places.shape[1] ** 2 <= 4 * len(gram):
        return _solved(gram, alike, places) * scale
    return _descended(gram, alike, places, start / scale) * scale


def _per_length(gram: Tensor) -> Tensor:
    """One over the length of each atom, 0 for an atom of zeros: nothing is like it."""
    squares = gram.diagonal()
    return torch.where(squares > 0, squares.rsqrt(), 0.0)


def _descended(gram: Tensor, alike: Tensor, places: Tensor, start: Tensor) -> Tensor:
    """All rows together, each round a product with the whole `gram`, which a metric of data makes near to the identity;
    rows that do not settle are solved one by one.
    """
    chosen, x = (torch.zeros_like(alike).scatter(1, places, t) for t in (torch.ones_like(start), start))
    target = alike * chosen
    p = r = target - (x @ gram) * chosen
    rr = r.square().sum(1, keepdim=True)
    enough = (8 * torch.finfo(r.dtype).eps) ** 2 * target.square().sum(1, keepdim=True)
    for _ in range(_ROUNDS):
        if bool((rr <= enough).all()):
            break
        q = (p @ gram) * chosen
        rate = rr / (p * q).sum(1, keepdim=True).clamp(min=1e-30)
        x, r, before = x + rate * p, r - rate * q, rr
        rr = r.square().sum(1, keepdim=True)
        p = r + rr / before.clamp(min=1e-30) * p
    found, restless = x.gather(1, places), (rr > enough).squeeze(1).nonzero().squeeze(1)
    if len(restless):
        found[restless] = _solved(gram, alike[restless], places[restless])
    return found


def _solved(gram: Tensor, alike: Tensor, places: Tensor) -> Tensor:
    """Row by row, by a Cholesky factorisation each."""
    k = places.shape[1]
    found, rows = [], max(_ENTRIES // (k * k), 1)
    for part, target in zip(torch.split(places, rows), torch.split(alike.gather(1, places), rows), strict=True):
        root, _ = torch.linalg.cholesky_ex(gram[part.unsqueeze(2), part.unsqueeze(1)])
        found.append(torch.cholesky_solve(target.unsqueeze(2), root).squeeze(2))
    return torch.cat(found)


def dictionary(W: Tensor, values: Tensor, places: Tensor, atoms: int, C: Tensor) -> Tensor:
    """D (m, in), the least-squares one; the metric has no say but for atoms that no row uses."""
    S = values.new_zeros(len(W), atoms).scatter(1, places, values)
    used = S.abs().sum(0) > 0
    D = torch.zeros(atoms, W.shape[1], dtype=W.dtype, device=W.device)
    D[used] = torch.linalg.pinv(S[:, used]) @ W
    missing = W - S @ D
    worst = ((missing @ C) * missing).sum(1).argsort(descending=True)[: int((~used).sum())]
    D[(~used).nonzero().squeeze(1)[: len(worst)]] = missing[worst]
    return D


def factorise(
    W: Tensor, C: Tensor, D: Tensor, k: int, *, rounds: int = 4, steps: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """D (m, in), values and places (out, k), from a first D; no round makes the error larger."""
    values, places = code(W, D, C, k, steps)
    for _ in range(rounds if k < len(D) else 0):  # with all atoms the first answer is the best of its rank
        D = dictionary(W, values, places, len(D), C)
        old = _fitted(D @ C @ D.mT, W @ C @ D.mT, places, values), places
        new = code(W, D, C, k, steps)
        better = _errors(W, D, C, *new) < _errors(W, D, C, *old)
        values, places = (torch.where(better.unsqueeze(1), n, o) for n, o in zip(new, old, strict=True))
    return D, values, places


def _errors(W: Tensor, D: Tensor, C: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """What each row lacks (out,)."""
    missing = W - values.new_zeros(len(W), len(D)).scatter(1, places, values) @ D
    return ((missing @ C) * missing).sum(1)


class _Dictionaries(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The principal directions, where every dictionary starts, are found once."""
        W = site.weight(torch.float64)
        C = site.moments["input_moment"].to(W.device, torch.float64)
        C = C + options["ridge"] * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        _, rows, _ = principal_factors(W, C=C)
        W, C, rows = W.float(), C.float(), rows.float()
        for atoms in sizes:
            k = _nonzeros(atoms, options["share"])
            how = {"rounds": options["rounds"], "steps": options["steps"]}
            D, values, places = factorise(W, C, rows[:atoms], k, **how)
            norms = D.norm(dim=1).clamp(min=torch.finfo(D.dtype).tiny)
            values, D = values * norms[places], D / norms.unsqueeze(1)
            yield atoms, Split({"dense_sparse": DenseSparse.of(D.to(site.dtype), values.to(site.dtype), places)})


def _nonzeros(atoms: int, share: float) -> int:
    return max(round(share * atoms), 1)


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(atoms, bytes): a few dozen, up to the smaller side.

    Raises:
        WeftError: a share that is none.
    """
    if not 0 < options["share"] <= 1:
        raise WeftError(f"The share is {options['share']}: it is the part of the atoms that a row uses, up to 1.")
    out, inn = shape
    most = min(out, inn)
    counts = dict.fromkeys(max(most * i // 32, 1) for i in range(1, 33))

    def nbytes(m: int) -> int:
        k = _nonzeros(m, options["share"])
        return (m * inn + out * k) * shape.itemsize + DenseSparse.place_bytes(out, m, k)

    return [(m, nbytes(m)) for m in counts if nbytes(m) < shape.nbytes]


METHOD = Method(
    name="dsformer",
    kind="compress",
    summary="A dense dictionary of input patterns times a sparse matrix: each output picks a few of its own.",
    paper="Chand et al., 2023, arXiv 2312.13211",
    needs=("input_moment",),
    split=_Dictionaries(),
    sizes=sizes,
    trained=low_rank_terms,
    least={"steps": 1},
    defaults={"share": 0.5, "rounds": 4, "steps": 4, "ridge": 1e-2},
)
