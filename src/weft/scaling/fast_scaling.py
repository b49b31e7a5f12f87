"""fast-scaling: the depth and width of a model that costs `factor` times as much, grown mainly in width, since
activations then rise least (Dollar et al., 2021, arXiv 2103.06877).

    depth' = depth s^(1 - alpha),   width' = width s^(alpha / 2)
    compute s,   parameters s,   activations s^(1 - alpha / 2)                      alpha = 0.8 is the paper's choice

Source: facebookresearch/pycls, pycls/models/scaler.py, without the resolution that text has none of.
Deviations: the share of the resolution goes to the depth; the width is rounded to a multiple of the head's size, the
analogue of the group width. Ours: the form for a Transformer's blocks, whose compute a token is 24 depth width^2
without attention's own.
"""

from __future__ import annotations

from weft.scaling.base import Law, Quantity

__all__ = ["LAW", "predict"]


def predict(depth: float, width: float, factor: float, alpha: float, head: float) -> dict[str, float]:
    """The new depth and width, and by what factors compute (and parameters of the blocks) and activations then grow."""
    d = max(1, round(depth * factor ** (1 - alpha)))
    w = max(1, round(width * factor ** (alpha / 2) / head)) * int(head)
    return {
        "depth": d,
        "width": w,
        "compute_factor": d * w**2 / (depth * width**2),
        "activation_factor": d * w / (depth * width),
    }


LAW = Law(
    name="fast-scaling",
    summary="The shape of a costlier model whose activations grow least.",
    paper="Dollar et al., 2021, arXiv 2103.06877",
    takes={
        "depth": Quantity("blocks"),
        "width": Quantity("width of the model (hidden size)"),
        "factor": Quantity("times the compute", 1, 100),
        "alpha": Quantity("share of the growth that the width takes, 0 to 1", 1 / 3, 1, 0.8),
        "head": Quantity("width of an attention head, which stays", default=64),
    },
    formula=predict,
    caution=(
        "It was measured on convolutional networks. Text models whose depth is too small lose; width changes the best "
        "learning rate, too."
    ),
)
