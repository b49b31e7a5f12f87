"""conadv: dense matrices, each batch trained on once more with its embeddings moved to where older weights lose most
(Concurrent Adversarial Learning, Liu et al., 2021, arXiv 2106.00221; its code conadv/ConAdv, read through its
description).

    d = eps rms(e) sign(dL(w_{t - tau}; e) / de),   loss L(w_t; e) + omega L(w_t; e + d)

Very large batches find sharp minima; small worst-case moves of the inputs smooth the loss. With weights of tau steps
before, the attack on a batch could have been made beside the steps since, on other machines. On one machine it saves no
time, and a step costs about three: this is what the idea does to the loss.
Deviations: for language models, of the embedded tokens (published for images, where it clips to a ball of pixels); one
step, from the clean batch, away from the true tokens (the code's attack is aimed at wrong labels and may start from a
random point); no separate norms for moved batches; any optimizer (LARS in the paper). Older weights are copied: one
copy of what is trained for each step of tau.
"""

from __future__ import annotations

from weft.methods.base import Method
from weft.methods.trp import count, split
from weft.rules.adversary import ConcurrentAdversary

__all__ = ["METHOD"]

METHOD = Method(
    name="conadv",
    kind="pretrain",
    summary="Dense matrices; each batch once more, moved to where older weights lose most.",
    paper="Liu et al., 2021, arXiv 2106.00221",
    split=split,
    count=count,
    ranked=False,
    rules=(ConcurrentAdversary,),
    begins=("fresh", "given"),
    finish=split,
    defaults={"eps": 0.05, "omega": 1.0, "delay": 1},
)
