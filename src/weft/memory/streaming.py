"""flashsvd: inference without a model's wide tensors, which factors do not narrow by themselves: a few rows of an MLP
at a time, and a few heads at a time of what the factors of q, k and v keep (FlashSVD, 2025, arXiv 2508.01506; its code
is Zishan-Shao/FlashSVD).

    MLP          y_i = MLP(x_i), x in pieces of R rows                        R f numbers of its width f, not M f
    attention    P = x A^T (M, r) of q, k and v;  of each group g of heads:
                 h = attention(P_q B_g^T + b_g, P_k B_g^T + b_g, P_v B_g^T + b_g),   P_o += h A_o,g^T (M, r)
                 y = P_o B_o^T + b_o

A piece runs the module's own code: an attention layer sees a model of so many heads less, so that rotary embeddings,
norms of heads, grouped queries and masks are its own, and each key and value is made once. What does not give the same
so (it is tried on three tokens) stays as it is and is named.

Deviations: pieces in plain PyTorch around torch's own attention, where the authors fuse both into kernels that rebuild
tiles on the chip; one factor for all heads, whose rows are the heads', where they factor each head by itself, which
takes more numbers for the same rank (their break-even for one head is r = d h / (d + h): 59 of 64 at d = 768). Not for
training, and with a cache of keys attention runs whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from weft.errors import WeftError
from weft.kernels.lean_linear import Factor
from weft.memory.forwards import original
from weft.memory.lean import is_gated_mlp
from weft.records import Record
from weft.terms import SumLinear

__all__ = ["SAVER", "Saver", "streamed"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@contextmanager
def streamed(model: nn.Module, rows: int = 256, heads: int = 4) -> Iterator[dict[str, str]]:
    """Within the block the model runs in pieces wherever no gradients are asked for: the same function to rounding.
    What comes is what was left as it is, by name, with the reason.

    Args:
        rows: tokens of an MLP at a time.
        heads: of keys at a time, with all queries that share them.

    Raises:
        WeftError: fewer than one of either.

    Example:
        >>> with torch.no_grad(), weft.memory.streamed(model) as left:
        ...     logits = model(input_ids).logits
    """
    if rows < 1 or heads < 1:
        raise WeftError(f"rows is {rows} and heads {heads}: give at least 1 of each.")
    changed, left = [], {}
    for name, module in model.named_modules():
        run = _known(module, rows, heads)
        if isinstance(run, str):
            left[name] = run
        elif run is not None:
            module.forward = run
            changed.append(module)
    try:
        yield left
    finally:
        for module in changed:
            del module.forward


def _known(module: nn.Module, rows: int, heads: int) -> Any:
    """What a module is run by, why it is not, or None where there is nothing to do."""
    mlp, attention = is_gated_mlp(module), {*_PROJECTIONS, "o_proj"} <= dict(module.named_children()).keys()
    if not mlp and not attention:
        unknown = re.search(r"(Attention|MLP)\d*$", type(module).__name__) and any(module.children())
        return "of a form that is not known here" if unknown else None
    if "forward" in module.__dict__:
        return "something else has replaced its forward"
    if mlp:
        return partial(_mlp, module, rows)
    run = partial(_attention, module, heads)
    return run if _agrees(module, run) else "it gives another output in pieces, or does not run so"


def _mlp(module: nn.Module, rows: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() or args or kwargs or len(flat) <= rows:
        return original(module, x, *args, **kwargs)
    y = None
    for start in range(0, len(flat), rows):
        part = original(module, flat[start : start + rows])
        y = part.new_empty(len(flat), part.shape[-1]) if y is None else y
        y[start : start + rows] = part
    assert y is not None
    return y.view(*x.shape[:-1], -1)


def _attention(module: Any, heads: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    size: int = module.head_dim
    layers = {name: getattr(module, name) for name in (*_PROJECTIONS, "o_proj")}
    wide, narrow = (_outputs(layers[name]) // size for name in _PROJECTIONS[:2])
    cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))  # whose name differs by version
    whole = torch.is_grad_enabled() or cached or narrow <= heads
    if whole or any(_hooked(layer) for layer in layers.values()):
        return original(module, hidden_states, *args, **kwargs)
    kept = {name: _Latents(layers[name], hidden_states) for name in _PROJECTIONS}
    out, piece = _Sum(layers["o_proj"]), copy.copy(module)
    shared, others = wide // narrow, []
    for first in range(0, narrow, heads):
        last = min(first + heads, narrow)
        keys = slice(first * size, last * size)
        queries = slice(shared * keys.start, shared * keys.stop)
        parts = {name: kept[name].of(queries if name == "q_proj" else keys) for name in _PROJECTIONS}
        piece.__dict__["_modules"] = {**module._modules, **parts, "o_proj": out.of(queries)}
        _, *rest = original(piece, hidden_states, *args, **kwargs)
        others.append(rest)
    # the probabilities (batch, heads, tokens, tokens), where the model gives them
    rest = [torch.cat(parts, 1) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*others, strict=True)]
    return out.whole(), *rest


class _Pieces(nn.Module):
    """A layer's products and matrices, for some of its outputs or inputs at a time."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        terms: list[Any] = list(layer.terms.values()) if isinstance(layer, SumLinear) else []
        self.factors: list[Factor] = []
        self.weights: list[Tensor] = [] if terms else [layer.weight]
        for term in terms:
            parts, weight = term.lean_parts(), term.lean_weight()
            if parts is not None and all(isinstance(part, Factor) for part in parts):
                self.factors += parts
            elif weight is not None:
                self.weights.append(weight if isinstance(weight, Tensor) else weight(layer.weight.dtype))
            else:
                raise TypeError(f"{type(term).__name__} has neither factors nor a matrix at hand")
        self.bias: Tensor | None = layer.bias
        self.chosen = slice(None)

    def of(self, chosen: slice) -> nn.Module:
        self.chosen = chosen
        return self


class _Latents(_Pieces):
    """x A^T of every product of a layer, of which some outputs are made."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        super().__init__(layer)
        self.x = x
        self.latents = [F.linear(x, factor.A.to(x.dtype)) for factor in self.factors]

    def forward(self, x: Tensor) -> Tensor:
        pairs = [(h * f.scale, f.B) for h, f in zip(self.latents, self.factors, strict=True)]
        pairs += [(self.x, weight) for weight in self.weights]
        y = sum(F.linear(h, W[self.chosen].to(h.dtype)) for h, W in pairs)
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias[self.chosen].to(y.dtype)


class _Sum(_Pieces):
    """A layer that is given some of its inputs at a time; sums are in fp32 at least."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.sums: list[Tensor | None] = [None] * (len(self.factors) + bool(self.weights))
        self.dtype = torch.float32

    def forward(self, h: Tensor) -> Tensor:
        self.dtype = h.dtype
        matrices: list[Sequence[Tensor]] = [[factor.A] for factor in self.factors]
        for i, group in enumerate([*matrices, self.weights][: len(self.sums)]):
            for W in group:
                part = F.linear(h, W[:, self.chosen].to(h.dtype))
                before = self.sums[i]
                self.sums[i] = (
                    part.to(torch.promote_types(part.dtype, torch.float32)) if before is None else before.add_(part)
                )
        return h

    def whole(self) -> Tensor:
        """The layer's output."""
        sums = [s.to(self.dtype) for s in self.sums if s is not None]
        y = sum(F.linear(s * f.scale, f.B.to(s.dtype)) for s, f in zip(sums, self.factors, strict=False))
        y = y + sums[-1] if self.weights else y
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _outputs(layer: Any) -> int:
    found: int = layer.out_features
    return found


def _hooked(layer: nn.Module) -> bool:
    """Whether somebody watches the layer, and so wants it run whole."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


@torch.no_grad()
def _agrees(module: Any, run: Any) -> bool:
    """Whether three tokens give in pieces what they give at once."""
    like: Tensor = module.q_proj.weight
    draw = torch.Generator().manual_seed(0)
    try:
        x, angles = (
            torch.randn(1, 3, module.q_proj.in_features, generator=draw),
            torch.randn(1, 3, module.head_dim, generator=draw),
        )
        about = {"position_embeddings": (angles.cos().to(like), angles.sin().to(like)), "attention_mask": None}
        whole, parts = (f(x.to(like), **about)[0] for f in (partial(original, module), partial(run.func, module, 1)))
    except (TypeError, AttributeError, RuntimeError, ValueError, KeyError):
        return False
    scale = float(whole.float().abs().max())
    return bool((whole.float() - parts.float()).abs().max() <= 100 * torch.finfo(like.dtype).eps * max(scale, 1e-30))


@dataclass(frozen=True, kw_only=True)
class Saver(Record):
    """A way to run a model in less memory.

    Args:
        run: (model, **options) -> a context manager within which the model runs so.
    """

    kind: str = "memory"
    run: Callable[..., AbstractContextManager[Any]]


SAVER = Saver(
    name="flashsvd",
    summary="inference in pieces: a few rows of an MLP at a time, a few heads of what the factors of q, k and v keep",
    paper="FlashSVD, 2025, arXiv 2508.01506",
    defaults={"rows": 256, "heads": 4},
    run=streamed,
)
