"""Orthonormal bases of dominant subspaces: Cholesky-QR, range finder, randomised SVD, block power iteration.

Shapes: `G (..., n, s)` a matrix (any leading batch dimensions), `Q (..., s, r)` an orthonormal basis of part of its row
space (right side), `r <= s`. Every function computes in fp32, or in fp64 where the input is fp64; half precision is
upcast. Sources: Halko, Martinsson & Tropp 2011 (range finder, Alg. 4.4; randomised SVD, Alg. 5.1); Fukaya et al. 2014
and 2020 (Cholesky-QR repeated, shifted); Björck & Golub 1973 (angles).

Where the rows of `G` are spread over processes, `reduce` sums a partial result over them: every function that takes it
asks for nothing larger than `s x r` (or `r x r`) to be summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "canonical_signs",
    "captured_energy",
    "cholesky_qr",
    "principal_angles",
    "randomized_svd",
    "range_finder",
    "rayleigh_ritz",
    "subspace_iteration",
    "upcast",
]

Reduce = Callable[[Tensor], Tensor]


def local(x: Tensor) -> Tensor:
    """The `reduce` of one process: the partial sum is the sum."""
    return x


def upcast(x: Tensor) -> Tensor:
    """`x` in the precision of a factorisation: fp64 stays, everything else becomes fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cholesky_qr(Y: Tensor, repeat: int = 2) -> Tensor:
    """An orthonormal basis of the columns of `Y (..., s, r)`, `r <= s`, by `repeat` rounds of Cholesky-QR.

    Columns are first scaled to unit length; each round solves `Q L^T = Y` with
    `L L^T = Y^T Y + ridge I`, the ridge being `10 eps` of the mean diagonal. Batch members whose result is not
    orthonormal to `100 eps` (rank deficiency, a bad condition number) are done again by Householder QR, which
    completes the basis. A zero matrix gives unit vectors. Like every QR it keeps the span of each leading group of
    columns, with `diag(R) >= 0`.
    """
    Y = upcast(Y)
    eps = torch.finfo(Y.dtype).eps
    eye = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    Q = Y / Y.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    for _ in range(repeat):
        gram = Q.mT @ Q
        ridge = 10 * eps * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        L, _ = torch.linalg.cholesky_ex(gram + ridge * eye)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    error = (Q.mT @ Q - eye).abs().amax(dim=(-2, -1)) if Q.shape[-1] else Q.new_zeros(Q.shape[:-2])
    bad = ~(error <= 100 * eps)  # also true where the factorisation gave NaN
    if bool(bad.any()):
        Q[bad] = _householder(Y[bad])
    return Q


def _householder(Y: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(Y)
    basis: Tensor = Q * _signs(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    return basis


def _signs(x: Tensor) -> Tensor:
    signs: Tensor = torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
    return signs


def canonical_signs(Q: Tensor, previous: Tensor | None = None) -> Tensor:
    """`Q (..., s, r)` with the sign of each column chosen so that two machines agree.

    With `previous` (same shape) each column points the way of its predecessor (non-negative inner product); without it,
    or where the two are exactly orthogonal, the entry of largest magnitude is positive.
    """
    largest = Q.gather(-2, Q.abs().argmax(dim=-2, keepdim=True))
    if previous is not None:
        dot = (Q * previous.to(Q.dtype)).sum(dim=-2, keepdim=True)
        largest = torch.where(dot == 0, largest, dot)
    return Q * _signs(largest)


def subspace_iteration(G: Tensor, Q: Tensor, steps: int = 1, reduce: Reduce = local) -> Tensor:
    """`steps` rounds of block power iteration `Q <- orth(G^T (G Q))`, started from `Q (..., s, r)`.

    Converges to the top-r right singular subspace of `G (..., n, s)` at the rate `(sigma_{r+1} / sigma_r)^2` a round,
    each leading group of columns by itself, so a warm start keeps column c near column c. One `s x r` sum a round.
    """
    G, Q = upcast(G), upcast(Q)
    for _ in range(steps):
        Q = cholesky_qr(reduce(G.mT @ (G @ Q)))
    return Q


def rayleigh_ritz(G: Tensor, Q: Tensor, rank: int, reduce: Reduce = local) -> tuple[Tensor, Tensor]:
    """The best `rank` directions inside span(Q), largest first: basis `(..., s, rank)`, singular values `(..., rank)`.

    Takes the eigenvectors of the `q x q` Gram matrix `(G Q)^T (G Q)`, formed in fp64.
    """
    Z = (upcast(G) @ upcast(Q)).double()
    values, vectors = torch.linalg.eigh(reduce(Z.mT @ Z))
    top = vectors.flip(-1)[..., :rank].to(Q.dtype)
    return Q @ top, values.flip(-1)[..., :rank].clamp_min(0).sqrt().to(Q.dtype)


def range_finder(A: Tensor, size: int, power: int = 2, *, generator: torch.Generator) -> Tensor:
    """An orthonormal basis `(..., m, size)` of nearly the range of `A (..., m, n)`: `power` rounds from `A Omega`."""
    A = upcast(A)
    omega = torch.randn(*A.shape[:-2], A.shape[-1], size, dtype=A.dtype, device=generator.device, generator=generator)
    return subspace_iteration(A.mT, cholesky_qr(A @ omega.to(A.device)), power)


def randomized_svd(
    A: Tensor, rank: int, *, oversample: int = 8, power: int = 2, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated SVD `U (..., m, r), S (..., r), Vh (..., r, n)` of `A (..., m, n)` by a random sketch.

    The sketch has `rank + oversample` columns. Canonical signs on U. Exact to rounding where rank(A) <= r + oversample.
    """
    A = upcast(A)
    size = min(rank + oversample, *A.shape[-2:])
    Q = range_finder(A, size, power, generator=generator)
    small, S, Vh = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    U = (Q @ small)[..., :rank]
    signs = _signs((canonical_signs(U) * U).sum(dim=-2))
    return U * signs.unsqueeze(-2), S[..., :rank], Vh[..., :rank, :] * signs.unsqueeze(-1)


def principal_angles(P: Tensor, Q: Tensor) -> Tensor:
    """Angles in radians, ascending, between the spans of two orthonormal bases `(..., s, p)` and `(..., s, q)`, p >= q.

    Small angles come from the sines, large ones from the cosines, so both ends are accurate to rounding.
    """
    P, Q = upcast(P), upcast(Q)
    cross = P.mT @ Q
    cosine = torch.linalg.svdvals(cross).clamp(max=1)
    sine = torch.linalg.svdvals(Q - P @ cross).flip(-1).clamp(max=1)[..., : cosine.shape[-1]]
    return torch.where(cosine.square() > 0.5, torch.asin(sine), torch.acos(cosine))


def captured_energy(G: Tensor, Q: Tensor, reduce: Reduce = local) -> Tensor:
    """The share `||G Q||_F^2 / ||G||_F^2` of `G (..., n, s)` inside span(Q); 1 for a zero matrix. Shape `(...)`."""
    G, Q = upcast(G), upcast(Q)
    both = reduce(torch.stack([(G @ Q).square().sum(dim=(-2, -1)), G.square().sum(dim=(-2, -1))]))
    return torch.where(both[1] > 0, both[0] / both[1], torch.ones_like(both[0]))
