"""jlcm: codes for the tables of groups of like rows, tables and codes learned together, each code by preference to a
near number of its table (Yvinec, Dapogny and Bailly, 2023, arXiv 2309.17361).

    groups   of equal size, of rows in the order of the first principal component of their 16 quantiles
    tables   k-means of each group's numbers;   codes   argmax_k M_ijk,   M = -(w - c_k)^2 / s^2 at first
    steps    P = dL/dW',   L = tr(D H D^T), H = E[x x^T];   dL/dM_k = softmax's, of P c_k
             M steps by exp(-|c_k - c_now| / s) times what Adam says

s is the mean gap in a group's table. The forward pass takes the argmax, the backward pass the softmax; the last factor
prefers near numbers. Adam steps M (rate 0.01) and the tables (rate 0.01 s), both falling to zero; the least of all
steps is kept. b of 1 to 4 bits a weight, a table of 16-bit numbers a group, and log2(groups) bits a row. x are the
inputs in the model quantised so far.
Deviations: no code was released; quantiles, groups, temperature, factor, rates and steps are ours, where the paper's
text leaves them open. The factor is on the steps: Adam divides a factor of the gradients out again. Learned by layer,
from moments, not by block; rows keep their places, and each has the number of its table, where the paper reorders
neurons and folds that into the next layer. No entropy coding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.kernels.codebooks import kmeans
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter
from weft.methods.codebook import in_16_bits, table_sizes
from weft.terms import Codebook

__all__ = ["METHOD", "Learned", "groups_of", "learn", "sizes"]

_QUANTILES, _MAP_LR, _TABLE_LR = 16, 1e-2, 1e-2


class Learned(NamedTuple):
    """Of the least loss met."""

    codes: Tensor  # (out, in)
    books: Tensor  # (groups, K)
    losses: list[float]  # at each step


def groups_of(W: Tensor, count: int) -> Tensor:
    """The group (out,) of each row of W: `count` of them, as even in size as can be, of rows with like numbers."""
    marks = torch.linspace(0, 1, _QUANTILES, device=W.device, dtype=W.dtype)
    found = torch.quantile(W, marks, dim=1).mT
    centred = found - found.mean(0)
    leading = torch.linalg.eigh(centred.mT @ centred)[1][:, -1]
    place = torch.argsort(torch.argsort(centred @ (leading * leading[-1].sign()), stable=True))
    return place * count // len(W)


def learn(W: Tensor, H: Tensor, owners: Tensor, books: Tensor, steps: int, *, near: bool = True) -> Learned:
    """Codes and tables learned from these tables (groups, K) on; `near` weighs pulls by nearness."""
    s = ((books[:, -1:] - books[:, :1]) / (books.shape[1] - 1)).clamp(min=torch.finfo(books.dtype).tiny)
    gap = s[owners].unsqueeze(1)  # (out, 1, 1)
    M = -((W.unsqueeze(-1) - books[owners].unsqueeze(1)) / gap).square()
    tables = books / s  # in gaps, so that one rate serves all groups
    optimizer = torch.optim.Adam([{"params": [M], "lr": _MAP_LR}, {"params": [tables], "lr": _TABLE_LR}], fused=True)
    best, losses = Learned(M.argmax(-1), books, []), list[float]()
    for step in range(steps + 1):
        now, codes = tables * s, M.argmax(-1)
        D = now[owners].gather(1, codes) - W
        P = 2 * (D @ H)
        losses.append(float((P * D).sum()) / 2)
        if losses[-1] <= min(losses):
            best = Learned(codes, now.clone(), losses)
        if step < steps:
            M.grad, tables.grad = _pulls(M, P, codes, now, owners)
            tables.grad *= s
            before = M.clone() if near else M
            for part, lr in zip(optimizer.param_groups, (_MAP_LR, _TABLE_LR), strict=True):
                part["lr"] = lr * (1 - step / steps)
            optimizer.step()
            if near:
                numbers = now[owners].unsqueeze(1)
                far = (numbers - now[owners].gather(1, codes).unsqueeze(-1)).abs() / gap
                M = M.copy_(torch.lerp(before, M, (-far).exp()))
    return best


def _pulls(M: Tensor, P: Tensor, codes: Tensor, books: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of M (out, in, K) and of the tables (groups, K), of that of the matrix, P (out, in)."""
    numbers, share = books[owners].unsqueeze(1), M.softmax(-1)  # (out, 1, K)
    pull = P.unsqueeze(-1) * numbers
    by_map = share * (pull - (share * pull).sum(-1, keepdim=True))
    places = owners.unsqueeze(1) * books.shape[1] + codes
    by_table = torch.zeros_like(books).view(-1).index_add_(0, places.flatten(), P.flatten())
    return by_map, by_table.view_as(books)


class _JLCM(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes and tables of each width; rows are grouped once."""
        W = site.weight()
        H, count = site.moments["input_moment"].to(W), _count(len(W), options["groups"])
        owners = groups_of(W, count)
        for bits in sizes:
            members = [W[owners == g].flatten() for g in range(count)]
            books = torch.cat([kmeans(m.unsqueeze(0), torch.ones_like(m[:1]), 2**bits) for m in members])
            found = learn(W, H, owners, books, options["steps"])
            stored, told = in_16_bits(site, found.books), None if count in (1, len(W)) else owners
            if told is None and count > 1:
                stored = stored[owners]  # one a row, in the order of rows
            yield bits, Split({"base": Codebook.from_codes(found.codes, stored, told, site.dtype)})


def _count(out: int, groups: int) -> int:
    return max(1, min(groups, out, 256))


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes, tables and their numbers)."""
    return table_sizes(shape, options["bits"], _count(shape[0], options["groups"]))


METHOD = Method(
    name="jlcm",
    kind="quantize",
    summary="Codes of 1 to 4 bits for the tables of groups of like rows, learned together.",
    paper="Yvinec et al., 2023, arXiv 2309.17361",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    split=_JLCM(),
    sizes=sizes,
    least={"groups": 1},
    defaults={"bits": None, "groups": 16, "steps": 100},
)
