"""farms: the heavy-tail exponent of a matrix's spectrum without the bias of its shape (Hu et al., 2025, arXiv
2506.06280).

    alpha = exponent of the tail of the pooled eigenvalues of B B^T over windows B (b, b ratio) of W (out, in)

The exponent of a whole matrix depends on out / in even for noise; windows of one shape do not. Low alpha: a heavy tail,
a well trained matrix; high: little structure, which prunes more easily.

Source: github.com/HUST-AI-HYZ/FARMS; blocks of 2000, 15 windows a side and the start of the tail at the peak are its
settings for language models.
Deviations: a window that would be wider than the matrix shrinks on both sides, where the released code takes an empty
slice; windows that coincide count once; zeros are told by 1e-10 of the largest eigenvalue, not by 1e-5 of anything, so
that alpha does not depend on the scale of W; the start of the tail is kept within 0.95 to 1.5 of the peak, as the code
means (its lower bound never binds).
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.linalg.power_law import tail_exponent
from weft.measures.base import Measure

__all__ = ["MEASURE", "value", "windows"]

_ZERO = 1e-10


def value(
    W: Tensor, *, block: int = 2000, ratio: float = 1.0, count: int = 15, start: str = "peak"
) -> dict[str, float]:
    """{"alpha"} of W (out, in); one window at a time in fp64."""
    pooled = []
    for B in windows(W, block, ratio, count):
        wide = B.double() if B.shape[0] <= B.shape[1] else B.double().mT
        pooled.append(torch.linalg.eigvalsh(wide @ wide.mT))
    eigenvalues = torch.cat(pooled)
    return {"alpha": tail_exponent(eigenvalues[eigenvalues > _ZERO * eigenvalues.amax()], start)}


def windows(W: Tensor, block: int, ratio: float, count: int) -> list[Tensor]:
    """Views of W of one shape, (b, b ratio) with b at most `block`, at most `count` down and across."""
    rows = min(block, W.shape[0], max(1, int(W.shape[1] / ratio)))
    columns = max(1, int(rows * ratio))
    down, across = (_starts(size, part, count) for size, part in zip(W.shape, (rows, columns), strict=True))
    return [W[i : i + rows, j : j + columns] for i in down for j in across]


def _starts(size: int, part: int, count: int) -> list[int]:
    step = max(1, (size - part) // max(count - 1, 1))
    return sorted({min(i * step, size - part) for i in range(count)})


MEASURE = Measure(
    name="farms",
    summary="Heavy-tail exponent of the spectrum, on windows of one shape.",
    paper="Hu et al., 2025, arXiv 2506.06280",
    value=value,
    reads={"alpha": "low: heavy tail, well trained; high: light tail, prunes easily"},
    cost="the eigenvalues of up to 225 windows of each matrix",
    defaults={"block": 2000, "ratio": 1.0, "count": 15, "start": "peak"},
)
