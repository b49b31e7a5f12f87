"""The loss tr(D^T M D C) of many errors D (out, in) of one layer, in fp32; of a large layer along random directions.

    tr(D^T M D C) = E ||S L^T D||_C^2,   M = L L^T,   S (k, out) of independent normal numbers of variance 1 / k

for the larger side of D, and k = 256: k (out + in) products an entry of the smaller side instead of out^2 + in^2. The
estimate is unbiased, off by at most sqrt(2 / k) = 9 % (a loss all in one direction) and by far less where it is spread;
all errors of a layer are seen along the same directions, so that their order hardly suffers. (Hutchinson, 1990, doi:
10.1080/03610919008812866.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.linalg.whiten import moment_root

__all__ = ["DIRECTIONS", "WeightedLoss"]

DIRECTIONS = 256


class WeightedLoss:
    """D (out, in) -> tr(D^T M D C).

    Args:
        C: (in, in) moment of the inputs.
        M: (out, out) moment of the output gradients.
        generator: of the directions, on the CPU.
        directions: how many; a layer whose larger side is at most twice as long is done exactly.
    """

    def __init__(self, C: Tensor, M: Tensor, generator: torch.Generator, directions: int = DIRECTIONS) -> None:
        self.C: Tensor | None = C.float()
        self.M: Tensor | None = M.float()
        self.left: Tensor | None = None  # S L^T (k, out), in the place of M
        self.right: Tensor | None = None  # L S^T (in, k), in the place of C
        if max(len(M), len(C)) <= 2 * directions:
            return
        larger = M if len(M) >= len(C) else C
        S = torch.randn(directions, len(larger), generator=generator) / directions**0.5
        seen = S.to(larger.device) @ moment_root(larger, ridge=1e-8).factor.mT.float()
        if larger is M:
            self.left, self.M = seen, None
        else:
            self.right, self.C = seen.mT, None

    def __call__(self, D: Tensor) -> Tensor:
        """The loss of one error, a number."""
        D = D.float()
        D = D if self.left is None else self.left @ D
        D = D if self.right is None else D @ self.right
        by_outputs = D if self.M is None else self.M @ D
        by_inputs = D if self.C is None else D @ self.C
        return (by_outputs * by_inputs).double().sum().clamp(min=0)
