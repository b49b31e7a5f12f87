"""The table of optimizers: one record for each that is published, in the order in which they are listed."""

from __future__ import annotations

from typing import Any

from weft.optim.adaptive_batch import AdaptiveBatch
from weft.optim.mfac import mfac
from weft.optim.muon import muon
from weft.optim.presets import apollo, apollo_mini, dct_adamw, fira, frugal, galore, galore_8bit, gradnormlorp
from weft.optim.record import Optimizer, optimizer
from weft.optim.scale import scale
from weft.optim.sinkgd import sign, sinkgd
from weft.optim.sm3 import SM3
from weft.optim.spectron import spectron
from weft.optim.sso import SSO
from weft.optim.whole import adagrad, adagrad_norm, adamw, adamw_8bit, adamw_fp8
from weft.optim.zeroth_order import mezo
from weft.records import Table

__all__ = ["OPTIMIZERS"]

# The published models by the numbers in their blocks' matrices: LLaMA 60M has 25 million, 130M 85, 350M 302, 1B 1,208,
# and 7B 6,476. Below them the rank is the quarter of a side that it is at 60M.
_BELOW = (0, {"rank": 0.25})
_SMALL, _MIDDLE, _LARGE, _HUGE = 20_000_000, 50_000_000, 700_000_000, 4_000_000_000
_GALORE = (_BELOW, (_SMALL, {"rank": 128}), (_MIDDLE, {"rank": 256}), (_LARGE, {"rank": 512}), (_HUGE, {"rank": 1024}))
_FIRA: tuple[tuple[int, dict[str, Any]], ...] = (
    *_GALORE[:3],
    (_LARGE, {"rank": 512, "scale": 0.0625}),
    (_HUGE, {"rank": 64, "scale": 0.0625}),
)
_APOLLO = (_BELOW, (_SMALL, {"rank": 128}), (_MIDDLE, {"rank": 192}), (150_000_000, {"rank": 256}))
_GRADNORM = (*_GALORE[:3], (_LARGE, {"rank": 1024}))  # the scripts'
_DCT: tuple[tuple[int, dict[str, Any]], ...] = (_BELOW, (_SMALL, {}))
_OWN_LOOP = "call it in a loop of your own, as docs/optim.md shows"

OPTIMIZERS: Table[Optimizer] = Table(
    Optimizer,
    [
        optimizer(
            adamw, "adamw", "Adam with decoupled weight decay on the blocks' matrices.",
            "Loshchilov and Hutter, 2019, arXiv 1711.05101",
        ),
        optimizer(
            adamw_8bit, "adamw_8bit", "AdamW with block-wise moments of 8 bits.",
            "Dettmers et al., 2022, arXiv 2110.02861",
        ),
        optimizer(
            adamw_fp8, "adamw_fp8", "AdamW with block-wise moments in float8.",
            "torchao's AdamWFp8, after Dettmers et al., 2022, arXiv 2110.02861",
        ),
        optimizer(
            galore, "galore", "Adam on the gradient's top singular directions.",
            "Zhao et al., 2024, arXiv 2403.03507", by_size=_GALORE,
        ),
        optimizer(
            galore_8bit, "galore_8bit", "GaLore with block-wise 8-bit moments.",
            "Zhao et al., 2024, arXiv 2403.03507", by_size=_GALORE,
        ),
        optimizer(
            fira, "fira", "GaLore, plus the rest of the gradient scaled row by row as Adam scaled the inside.",
            "Chen et al., 2024, arXiv 2410.01623", by_size=_FIRA,
        ),
        optimizer(
            frugal, "frugal", "AdamW on a quarter of the space, which moves; signs of the gradient on the rest.",
            "Zmushko et al., 2024, arXiv 2411.07837",
        ),
        optimizer(
            apollo, "apollo", "The raw gradient, each channel scaled by the factor Adam has on a random sketch of it.",
            "Zhu et al., 2024, arXiv 2412.05270", by_size=_APOLLO,
        ),
        optimizer(
            apollo_mini, "apollo_mini", "APOLLO with one factor a matrix, from a sketch of rank 1.",
            "Zhu et al., 2024, arXiv 2412.05270",
        ),
        optimizer(
            dct_adamw, "dct_adamw", "AdamW on the discrete cosine coefficients that align best with the gradient.",
            "Modoranu et al., 2025, arXiv 2505.17967", by_size=_DCT,
        ),
        optimizer(
            gradnormlorp, "gradnormlorp", "GaLore on the directions of weight-normalised layers, or on factors.",
            "Huang et al., 2024, arXiv 2412.19616", by_size=_GRADNORM,
            on_factors={"normalize": False},  # factors are projected as they are
        ),
        optimizer(
            muon, "muon", "Orthogonal steps along the momentum of the blocks' matrices; AdamW beside them.",
            "Jordan et al., 2024; Liu et al., 2025, arXiv 2502.16982",
        ),
        optimizer(
            spectron, "spectron", "Muon whose steps of two factors are bounded by their norms; AdamW beside them.",
            "Janson et al., 2026, arXiv 2602.12429",
        ),
        optimizer(
            scale, "scale", "Normalised gradients without state, momentum for the head alone; AdamW for vectors.",
            "Glentis et al., 2025, arXiv 2506.16659",
        ),
        optimizer(
            sinkgd, "sinkgd", "Stateless steps whose rows and columns have equal norms; AdamW beside the matrices.",
            "Scetbon et al., 2025, arXiv 2502.06742",
        ),
        optimizer(
            sign, "sign", "Stateless steps along the gradient's sign; AdamW beside the matrices.",
            "Bernstein et al., 2018, arXiv 1802.04434",
        ),
        optimizer(
            adagrad, "adagrad", "Steps over the root of the sum of squared gradients, an accumulator an entry.",
            "Duchi et al., 2011, JMLR 12",
        ),
        optimizer(
            adagrad_norm, "adagrad_norm", "AdaGrad with one accumulator a weight.",
            "Ward, Wu and Bottou, 2019, arXiv 1806.01811",
        ),
        optimizer(
            mfac, "mfac", "The gradient preconditioned with the inverse Fisher matrix of the last gradients.",
            "Frantar, Kurtic and Alistarh, 2021, arXiv 2107.03356",
        ),
        optimizer(
            mezo, "mezo", "Gradients from loss differences along random directions, without a backward pass.",
            "Malladi et al., 2023, arXiv 2305.17333", backward=False,
            loop=f"It asks for a loss and no gradient, which the training loop does not offer; {_OWN_LOOP}.",
        ),
        optimizer(
            SM3, "sm3", "One accumulator a row and one a column, for scattered entries of a matrix.",
            "Anil et al., 2019, arXiv 1901.11150",
            loop="It must be told which entries of a matrix it holds; train by the method sft with grow='ma'.",
        ),
        optimizer(
            SSO, "sso", "Several steps on a quadratic around the model's outputs, for one call of a costly loss.",
            "Lavington et al., 2023, arXiv 2302.02607",
            loop=f"It asks for outputs and a loss apart, which the training loop does not offer; {_OWN_LOOP}.",
        ),
        optimizer(
            AdaptiveBatch, "adaptive_batch", "A batch that grows with the noise of the gradient, beside any optimizer.",
            "Lau, Liu and Kolar, 2024, arXiv 2402.11215",
            loop=f"It sets the size of the batch, which the training loop keeps fixed; {_OWN_LOOP}.",
        ),
    ],
)  # fmt: skip
"""The published optimizers by name."""
