"""int2.1: a low-rank product beside frozen codes, trained to give back what rounding took: the model before it was
quantised is the teacher (LREC of INT2.1, Chai et al., 2023, arXiv 2306.08162).

    W' = C + s B A,   C codes,   A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0,  s = alpha / r,  alpha = 4 r
    loss  KL(teacher || model) + 0.1 cross-entropy of the labels, means a token

`weft compress MODEL -o CODED --method gptq --option bits=2 --option group=128`, then
`weft finetune CODED -o OUT --method int2.1 --rank 32 --teacher MODEL --data TEXT --lr 3e-4`, on general text. Only
factors are trained; codes are decoded for the moment of each product, forward and backward, and nothing of the size of
a weight is kept between the two (EMEF). r (in + out) numbers a matrix: 0.16 bit a weight at rank 32 of LLaMA-7B, 16
bits each. A second adapter for a task goes beside it.
Deviations: the divergence is a mean a token; the released code sums it over 2048 of them beside a weight of 200 for the
labels, the same ratio. AdamW instead of Adam with 1e-5 of decay in the gradient. The teacher runs beside the model; the
code reads its logits from a disk. On layers without codes it is lora at this scale.
"""

from __future__ import annotations

from typing import Any

from weft.methods.adapter import SCALING, lora_count, low_rank
from weft.methods.base import Method, Site, Split
from weft.methods.lora import initialise

__all__ = ["METHOD", "split"]

_SCALE = 4.0


def split(site: Site, *, alpha: float | None, **options: Any) -> Split:
    """The product, nothing at first."""
    return low_rank(initialise)(site, alpha=_SCALE * site.nominal if alpha is None else alpha, **options)


METHOD = Method(
    name="int2.1",
    kind="adapt",
    summary="A low-rank product beside frozen codes, taught by the model before it was quantised.",
    paper="Chai et al., 2023, arXiv 2306.08162",
    split=split,
    count=lora_count,
    labels=0.1,
    defaults={**SCALING, "dropout": 0.05},
)
