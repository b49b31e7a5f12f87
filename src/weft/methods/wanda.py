"""wanda: of each row the weights that move its output most stay, as they are (Sun et al., 2023, arXiv 2306.11695).

    S_ij = |W_ij| sqrt(E[x_j^2]);   of row i the d in largest stay

A size is the density d, the share of weights kept. `pattern` "2:4" (4:8, ...) keeps the 2 largest of every 4 inputs in
a row instead. What is stored are the kept numbers and a mask of one bit a weight.
Deviations: inputs are measured anew for each group of layers within a block (o_proj's behind pruned q, k and v), where
the released code takes those of a whole block in one pass, behind the pruned blocks before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.bit_packing import packed_size
from weft.methods.base import Method, Shape, Site, Split, low_rank_terms
from weft.terms import Masked

__all__ = ["METHOD", "largest", "parsed_pattern", "pruned_sizes", "sizes", "split"]

DENSITIES = tuple(i / 20 for i in range(1, 20))


def largest(scores: Tensor, keep: int) -> Tensor:
    """(..., n) bool: the `keep` largest of each row; of equals, the later ones."""
    order = scores.sort(dim=-1, stable=True).indices[..., scores.shape[-1] - keep :]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def parsed_pattern(pattern: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", or None of "unstructured".

    Raises:
        WeftError: it is no such text, or n is not below m.
    """
    if pattern == "unstructured":
        return None
    n, _, m = pattern.partition(":")
    if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
        raise WeftError(f"The pattern {pattern!r} is none: give N:M with N below M, such as 2:4, or leave it out.")
    return int(n), int(m)


def split(site: Site, *, pattern: str) -> Split:
    """The kept weights of each row."""
    W = site.weight()
    scores = W.abs() * site.moments["input_moment"].diagonal().to(W.device, W.dtype).sqrt()
    found = parsed_pattern(pattern)
    if found is None:
        mask = largest(scores, round(site.size * W.shape[1]))
    else:
        mask = largest(scores.unflatten(1, (-1, found[1])), found[0]).flatten(1)  # type: ignore[no-untyped-call]
    return Split({"base": Masked.from_mask(W.to(site.dtype), mask)})


def pruned_sizes(shape: Shape, options: Mapping[str, Any], kept: Mapping[float, int]) -> list[tuple[float, int]]:
    """(density, bytes of kept numbers and mask), by what each density keeps; of a pattern, its own density.

    Raises:
        WeftError: the pattern does not divide the inputs.
    """
    found = parsed_pattern(options["pattern"])
    if found is not None:
        n, m = found
        if shape[1] % m:
            raise WeftError(f"The pattern {n}:{m} does not divide {shape[1]} inputs; leave those layers out.")
        kept = {n / m: shape.numel * n // m}
    mask = packed_size(shape.numel, 1)
    bytes_of = {count: (density, count * shape.itemsize + mask) for density, count in kept.items() if count}
    return list(bytes_of.values())


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[float, int]]:
    """(density, bytes): every twentieth."""
    return pruned_sizes(shape, options, {d: shape[0] * round(d * shape[1]) for d in DENSITIES})


METHOD = Method(
    name="wanda",
    kind="compress",
    summary="Of each row the weights with the largest |weight| times input size stay; the mask takes a bit.",
    paper="Sun et al., 2023, arXiv 2306.11695",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    split=split,
    sizes=sizes,
    trained=low_rank_terms,
    defaults={"pattern": "unstructured"},
)
