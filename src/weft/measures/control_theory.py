"""control-theory: how far a few tokens of a prompt can move what an attention head gives the others (Bhargava et al.,
2023, arXiv 2310.04444).

    part of the output off its uncontrolled direction <= value_gain M k e^a / (D + k e^a),   a = score_gain M^2
    value_gain = sigma_1(W_v),   score_gain = sigma_1(W_q) sigma_1(W_k) / sqrt(d_k)             of a head

for k tokens of the prompt, inputs of length at most M, and the others' sum D of exp(scores). The product of the two
norms holds under rotary embeddings, sigma_1(W_q^T W_k), which is smaller, does not. e^a is beyond all bounds in real
models, where the first factor alone is left: a fall of value_gain after compression lowers what a prompt can do.

Source: github.com/amanb2000/Magic_Words.
Deviations: the bound's factors, the largest of a layer's heads; one head without residual, norm or depth: of a whole
model it says nothing. No prompts are searched for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures.base import Measure
from weft.terms.joints import joints
from weft.terms.layers import linear_layers, weight_of

__all__ = ["MEASURE", "gains", "value"]


def value(model: nn.Module) -> dict[str, dict[str, float]]:
    """{value layer of each attention: {"value_gain", "score_gain"}, "": {"value_gain_largest"}}.

    Raises WeftError where the heads of no attention are known.
    """
    found: dict[str, dict[str, float]] = {}
    for joint in joints(model, linear_layers(model)):
        if joint.kind == "value-output":
            v, o = joint.members.values()
            parent = v.layer.rpartition(".")[0]
            q, k = (f"{parent}.{name}".lstrip(".") for name in ("q_proj", "k_proj"))
            W_v, W_q, W_k = (weight_of(model.get_submodule(name), torch.float32) for name in (v.layer, q, k))
            W_q = W_q.view(o.copies, -1, W_q.shape[1])[:, : joint.width].flatten(0, 1)  # without a gate's
            scores = _largest(W_q, joint.width) * _largest(W_k, joint.width) / math.sqrt(joint.width)
            found[v.layer] = {"value_gain": _largest(W_v, joint.width), "score_gain": scores}
    if not found:
        raise WeftError(f"{type(model).__name__} has no attention whose heads weft knows; leave this measure out.")
    return {**found, "": {"value_gain_largest": max(row["value_gain"] for row in found.values())}}


def _largest(W: Tensor, width: int) -> float:
    return float(gains(W, width).max())


def gains(W: Tensor, width: int) -> Tensor:
    """(heads,) largest singular values of the heads of W (heads width, in), in fp64."""
    heads = W.double().view(-1, width, W.shape[1])
    return torch.linalg.eigvalsh(heads @ heads.mT)[:, -1].clamp(min=0).sqrt()


MEASURE = Measure(
    name="control-theory",
    summary="How far a prompt can move what an attention head gives other tokens.",
    paper="Bhargava et al., 2023, arXiv 2310.04444",
    value=value,
    of="weights",
    reads={
        "value_gain": "largest of the heads; its fall lowers what a prompt can do",
        "score_gain": "how sharply attention can follow a token; the larger, the less the bound says",
    },
    reads_model={"value_gain_largest": "largest of all heads"},
    cost="the largest singular values of each head",
)
