"""talking-heads: what an attention head writes that heads of later layers read into their values (Merullo et al., 2024,
arXiv 2406.09519; the score of two heads is that of Elhage et al., 2021).

    head: x -> O V x;   V (d_h, d) with the gain of the norm before it, O (d, d_h);   O V = sum_i s_i u_i v_i^T
    composition with a later head (O', V') = ||O' V' O V||_F / (||O' V'||_F ||O V||_F)
    component i for a later head = ||O' V' u_i|| / ||O' V'||_F

Both are given times sqrt(d), which is 1 for random matrices, and for the output layer of each attention but the last:
the largest over its heads, their components and all later heads. A direction that all heads share raises every score;
the outlier says by how many standard deviations the largest component lies above the mean of all.

Source: none usable was published. ||O' V' x|| = ||R x|| for R = T V' (d_h, d) with O' = Q T, so that no d x d matrix is
made.
Deviations: values alone. How queries and keys compose depends on the distance of two tokens where embeddings are
rotary, which weights do not know. A norm before attention is known by its usual names and folded into V; one after it
is not. Gates between V and O count as open.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures.base import Measure
from weft.terms.joints import Joint, joints
from weft.terms.layers import linear_layers, weight_of

__all__ = ["MEASURE", "read", "scores", "value", "written"]

_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1")


@torch.no_grad()
def value(model: nn.Module) -> dict[str, dict[str, float]]:
    """{output layer of each attention: {"composition", "channel", "outlier"}}.

    Raises WeftError where not two attentions are known by their heads.
    """
    found = [joint for joint in joints(model, linear_layers(model)) if joint.kind == "value-output"]
    if len(found) < 2:
        raise WeftError(f"{type(model).__name__} has no two attentions whose heads weft knows; leave this measure out.")
    rows = {}
    for i, joint in enumerate(found[:-1]):
        U, s = written(*_heads(model, joint))
        single = torch.cat([scores(U, read(*_heads(model, later))) for later in found[i + 1 :]])  # two at a time
        power = s.square()
        whole = (single.square() * power).sum(-1) / power.sum(-1).clamp(min=1e-300)
        spread = float(single.std()) or math.inf
        *_, o = joint.members.values()
        rows[o.layer] = {
            "composition": float(whole.max().sqrt()),
            "channel": float(single.max()),
            "outlier": (float(single.max()) - float(single.mean())) / spread,
        }
    return rows


def written(O: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (heads, d, d_h) and sizes (heads, d_h), falling, of what heads O (heads, d, d_h), V (heads, d_h, d)
    write.
    """
    Q, T = torch.linalg.qr(O)
    U, s, _ = torch.linalg.svd(T @ torch.linalg.qr(V.mT)[1].mT)
    return Q @ U, s


def read(O: Tensor, V: Tensor) -> Tensor:
    """R (heads, d_h, d) with ||R x|| = ||O V x||."""
    return torch.linalg.qr(O)[1] @ V


def scores(U: Tensor, R: Tensor) -> Tensor:
    """(reading heads, writing heads, components) of each direction in U alone, times sqrt(d)."""
    heads, d, width = U.shape
    squares = (R.flatten(0, 1) @ U.transpose(0, 1).flatten(1)).square().view(len(R), -1, heads, width).sum(1)
    return (squares * d / R.square().sum((1, 2))[:, None, None].clamp(min=1e-300)).sqrt()


def _heads(model: nn.Module, joint: Joint) -> tuple[Tensor, Tensor]:
    """O (heads, d, d_h) and V (heads, d_h, d) of a "value-output" joint, in fp64."""
    v, o = joint.members.values()
    V = _folded(model, v.layer, weight_of(model.get_submodule(v.layer), torch.float32).double())
    V = V.view(v.copies, joint.width, -1).repeat_interleave(o.copies // v.copies, 0)  # of grouped queries
    O = weight_of(model.get_submodule(o.layer), torch.float32).double()
    return O.view(-1, o.copies, joint.width).transpose(0, 1), V


def _folded(model: nn.Module, layer: str, V: Tensor) -> Tensor:
    """V of what stands before the norm: its columns times the gain, their mean taken off where the norm does that."""
    block = model.get_submodule(layer.rpartition(".")[0].rpartition(".")[0])
    norm = next((module for name, module in block.named_children() if name in _NORMS), None)
    if norm is None:
        return V
    norm = copy.deepcopy(norm).float()
    x = torch.sin(torch.arange(1, V.shape[1] + 1, device=V.device, dtype=torch.float32))  # no entry of it is 0
    x = (x - x.mean()) / x.std(correction=0)
    gain = (norm(x) - norm(-x)) / (2 * x)
    V = V * gain.double()
    return V - V.mean(1, keepdim=True) if torch.allclose(norm(x + 1), norm(x), atol=1e-3) else V


MEASURE = Measure(
    name="talking-heads",
    summary="How much of what a head writes is read by heads of later layers into their values.",
    paper="Merullo et al., 2024, arXiv 2406.09519",
    value=value,
    of="weights",
    reads={
        "composition": "of two heads, the most; 1: as random matrices would; above: one reads what the other wrote",
        "channel": "the same of one direction that is written; sqrt(d): a head that reads nothing else",
        "outlier": "standard deviations of the channel above all directions; small: heads share what they read",
    },
    cost="products of each attention's heads with those of all later ones: d^3 for each pair of layers",
)
