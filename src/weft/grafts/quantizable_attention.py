"""quantizable-attention: heads that can be silent, so that no activations need to grow huge for it and a model can be
rounded to 8 bits (Bondarenko et al., 2023, arXiv 2306.12929; its code Qualcomm-AI-research/outlier-free-transformers,
read through its description).

    out_h(t) = r sigmoid(G_h(x_t)) sum_j p_tj v_j      gated attention
    p = clip((zeta - gamma) softmax(s) + gamma, 0, 1), gamma = -alpha / length      clipped softmax

x are the layer's inputs. G is, for each head, `gate` "head": its d of them -> 1; "mlp": d -> d / 4 -> 1 with a ReLU;
"all": all of them -> 1; null: none. Gates open by `probability` at first (0.25). On a trained model weights are drawn
with deviation `std` and r = 1 / probability (`rescale`), which starts near the model's function, and gates alone are
trained, or with `whole` all weights; a fresh model (`weft pretrain --method quantizable-attention`) is trained whole,
with r = 1 and gates drawn as linear layers are. Published is pre-training, for which alone benefits are claimed; with
alpha = 12 at length 512 (OPT), 3.2 at 128 (BERT), zeta = 1. alpha > 0 changes a trained model at once, builds the
L x T matrix, and is to be trained whole. gamma stays that of the training's `length` whatever the text's; 0 leaves the
model's own kernel.
Deviations: gamma is not made of each batch's length (the code's alpha / T of the moment), so that a cache decodes as
the whole text; a gate reads its hidden / heads inputs where these are not as many as a head has.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError, unknown
from weft.grafts.attention import exchangeable
from weft.grafts.base import Graft
from weft.kernels.clipped_attention import clipped_attention
from weft.seeds import generator
from weft.terms.layers import attention_layers, heads_of

__all__ = ["GATES", "GRAFT", "Silencer"]

GATES = ("head", "mlp", "all")
_PLACE, _GATED, _CLIPPED = "weft_silencer", "weft_gated", "weft_clipped"


class Silencer(nn.Module):
    """The gates of one attention layer, and the two ends of its softmax."""

    pending: Tensor | None = None

    def __init__(self, gate: str | None, heads: int, features: int, ends: tuple[float, float], device: Any) -> None:
        super().__init__()
        self.gate, self.heads, (self.gamma, self.zeta), self.factor = gate, heads, ends, 1.0
        size = features if gate == "all" else features // heads
        # no tensor is called "weight": a checkpoint's loader takes that for a layer's
        shapes: dict[str, tuple[int, ...]] = {} if gate is None else {"G": (heads, size), "offset": (heads,)}
        if gate == "mlp":
            shapes = {"inner": (heads, size // 4, size), "inner_offset": (heads, size // 4)} | shapes
            shapes["G"] = (heads, size // 4)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))

    @property
    def clips(self) -> bool:
        """Whether its softmax is another than the plain one."""
        return (self.gamma, self.zeta) != (0.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, features) -> r sigmoid(G(x)) (batch, tokens, heads)."""
        named = {name: parameter.to(x.dtype) for name, parameter in self.named_parameters()}
        if self.gate != "all":
            x = x.reshape(*x.shape[:-1], self.heads, -1)
        if self.gate == "mlp":
            x = (torch.einsum("bthd,hkd->bthk", x, named["inner"]) + named["inner_offset"]).relu()
        pattern = "btd,hd->bth" if self.gate == "all" else "bthd,hd->bth"
        return self.factor * (torch.einsum(pattern, x, named["G"]) + named["offset"]).sigmoid()

    def open(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the attention layer: the gates for the function that follows."""
        self.pending = self(args[0] if args else kwargs["hidden_states"])

    def silence(self, out: Tensor) -> Tensor:
        """The heads' sums (batch, tokens, heads, d), gated."""
        gates, self.pending = self.pending, None
        return out if gates is None else out * gates.unsqueeze(-1).to(out.dtype)


@torch.no_grad()
def build(
    model: Any,
    seed: int,
    *,
    gate: str | None,
    probability: float,
    std: float | None,
    rescale: bool,
    alpha: float,
    length: int,
    zeta: float,
    whole: bool,
) -> dict[str, nn.Module]:
    """Gates for every attention layer, drawn by its name.

    Raises:
        WeftError: an option that cannot be, nothing to train, or the model's attention cannot be exchanged.
    """
    _check(gate, probability, alpha, length, zeta, whole)
    layers = exchangeable(model, "its heads stay as they are", "attention_chunk_size")
    strange = next((layer for layer in layers.values() if _features(layer) % heads_of(layer)), None)
    if strange is not None:
        raise WeftError(f"The {_features(strange)} features of the model cannot be shared evenly by its heads' gates.")
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        device = next(layer.parameters()).device
        part = Silencer(gate, heads_of(layer), _features(layer), (-alpha / length, zeta), device)
        _draw(part, generator(seed, GRAFT.name, name), std)
        if gate is not None:
            part.offset.fill_(log(probability / (1 - probability)))  # type: ignore[operator, union-attr]
            part.factor = 1 / probability if rescale else 1.0
        made[f"{name}.{_PLACE}"] = part
    return made


def _check(gate: str | None, probability: float, alpha: float, length: int, zeta: float, whole: bool) -> None:
    if gate is not None and gate not in GATES:
        raise unknown("gate of attention", gate, GATES)
    if not 0 < probability < 1:
        raise WeftError(f"probability is {probability}: give how far gates are open at first, between 0 and 1.")
    if alpha < 0 or length < 1 or zeta < 1:
        raise WeftError(f"alpha is {alpha}, length {length} and zeta {zeta}: give 0, 1 and 1, or more of each.")
    if gate is None and alpha == 0 and zeta == 1:
        raise WeftError("Without a gate, alpha=0 and zeta=1 are the model's own attention: give alpha=12, or a gate.")
    if gate is None and not whole:
        raise WeftError("A clipped softmax has no numbers of its own to train: give whole=true, or a gate.")


def _features(layer: nn.Module) -> int:
    """The layer's inputs, which parts of a model may have their own number of."""
    return int(layer.q_proj.in_features)  # type: ignore[arg-type, union-attr]


def _draw(part: Silencer, draw: torch.Generator, std: float | None) -> None:
    """Weights, and biases within; by `std`, or None: as linear layers are, U(-1/sqrt(n), 1/sqrt(n)) of n inputs."""
    for name in ("inner", "G", "inner_offset"):
        parameter = part._parameters.get(name)
        if parameter is None or (std is not None and name == "inner_offset"):
            continue
        inputs = part.inner.shape[-1] if name == "inner_offset" else parameter.shape[-1]  # type: ignore[union-attr, index]
        numbers = torch.randn if std is not None else torch.rand
        drawn = numbers(parameter.shape, generator=draw)
        parameter.copy_(std * drawn if std is not None else (2 * drawn - 1) / inputs**0.5)


def connect(model: Any, modules: Mapping[str, nn.Module]) -> tuple[str, dict[str, int]]:
    """The attention function that clips and gates, in place of the model's, and a hook on each layer; returns the name
    of that one and the hooks' numbers.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    for name, mask in ((_GATED, sdpa_mask), (_CLIPPED, eager_mask)):
        AttentionInterface.register(name, _attend)
        AttentionMaskInterface.register(name, mask)
    before: str = model.config._attn_implementation
    clips = any(isinstance(part, Silencer) and part.clips for part in modules.values())
    model.set_attn_implementation(_CLIPPED if clips else _GATED)
    hooks = {}
    for place, part in modules.items():
        layer = place.rpartition(".")[0]
        if part.gate is not None:
            opener = model.get_submodule(layer).register_forward_pre_hook(_open, with_kwargs=True)
            hooks[layer] = opener.id
    return before, hooks


def disconnect(model: Any, remembered: tuple[str, dict[str, int]]) -> None:
    """The attention function of before, without hooks."""
    before, hooks = remembered
    for layer, number in hooks.items():
        module = model.get_submodule(layer)
        del module._forward_pre_hooks[number], module._forward_pre_hooks_with_kwargs[number]
    model.set_attn_implementation(before)


def count(model: Any, options: Mapping[str, Any]) -> int:
    """A head's gate of n inputs has n + 1 numbers, one of two layers (n + 1) n / 4 + n / 4 + 1; with `whole` all the
    model's besides.
    """
    total = 0
    for _, layer in attention_layers(model):
        features, heads = _features(layer), heads_of(layer)
        n = features // heads
        each = {None: 0, "head": n + 1, "mlp": (n + 1) * (n // 4) + n // 4 + 1, "all": features + 1}
        total += heads * each[options["gate"]]
    return total + (sum(p.numel() for p in model.parameters()) if options["whole"] else 0)


def _open(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    part = layer._modules.get(_PLACE)
    if isinstance(part, Silencer):
        part.open(layer, args, kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **how: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (batch, heads, tokens, d) -> (batch, tokens, heads, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    part = module._modules.get(_PLACE)
    if not isinstance(part, Silencer) or not part.clips:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **how)
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = clipped_attention(query, key, value, mask, scale, part.gamma, part.zeta, dropout).transpose(1, 2)
    return (part.silence(out) if isinstance(part, Silencer) else out).contiguous(), None


GRAFT = Graft(
    name="quantizable-attention",
    summary="heads that can be silent, by a gate each or a softmax that is clipped, so that activations stay small",
    paper="Bondarenko et al., 2023, arXiv 2306.12929",
    defaults={
        "gate": "head", "probability": 0.25, "std": 0.01, "rescale": True, "alpha": 0.0, "length": 512, "zeta": 1.0,
        "whole": False,
    },
    fresh={"std": None, "rescale": False},
    begins=("fresh", "given"),
    build=build,
    connect=connect,
    disconnect=disconnect,
    count=count,
    deviates="by the small random weights of the gates (std), and by the clip (alpha, zeta)",
)  # fmt: skip
