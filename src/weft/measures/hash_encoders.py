"""hash-encoders: which units of an MLP fire for a token, as a code of bits (He et al., 2021, arXiv 2101.05490).

    b_i = 1 where the pre-activation of unit i is above 0
    firing = mean of b,   constant_units: share of units that always fire, or never,   over all tokens
    codes = different codes / tokens

A unit that never fires can go without loss where the activation is a ReLU; with gates of another kind the sign says
less. Different codes for nearly all tokens mean nothing by themselves: hundreds of random units give them too.

Source: github.com/LeavesLei/activation-code.
Deviations: every token is an input, where the paper codes images; its classification by codes is left out; codes are
compared by a hash of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.measures.base import Measure
from weft.stats.calibrate import Batch
from weft.stats.collect import kept_rows
from weft.stats.layerwise import watch
from weft.terms.joints import joints
from weft.terms.layers import linear_layers

__all__ = ["MEASURE", "Codes", "value"]


class Codes:
    """What a layer's units did so far."""

    def __init__(self) -> None:
        self.fired: Tensor | None = None  # (units,) tokens for which each did
        self.tokens = 0
        self.codes: set[int] = set()

    def add(self, y: Tensor) -> None:
        """Count tokens: pre-activations y (tokens, units)."""
        bits = y > 0
        keys = torch.randint(-(2**62), 2**62, (y.shape[1],), generator=torch.Generator().manual_seed(0))
        self.codes.update((bits.cpu() * keys).sum(1).tolist())  # wraps around: a hash
        fired = bits.sum(0).cpu()
        self.fired = fired if self.fired is None else self.fired + fired
        self.tokens += len(y)

    def figures(self) -> dict[str, float]:
        """Those of the layer."""
        assert self.fired is not None
        constant = (self.fired == 0) | (self.fired == self.tokens)
        return {
            "firing": float(self.fired.double().mean()) / self.tokens,
            "constant_units": float(constant.double().mean()),
            "codes": len(self.codes) / self.tokens,
        }


def value(model: nn.Module, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """{first layer of each MLP: {"firing", "constant_units", "codes"}}. Raises WeftError where there is no MLP."""
    mlps = [joint for joint in joints(model, linear_layers(model)) if joint.kind == "mlp"]
    first = {next(iter(joint.members.values())).layer: joint.width for joint in mlps}
    if not first:
        raise WeftError(f"{type(model).__name__} has no MLP whose units weft knows; leave this measure out.")
    found = {name: Codes() for name in first}
    layers = {name: model.get_submodule(name) for name in first}
    watch(model, batches, layers, lambda name, x, y, stream: found[name].add(kept_rows(y, stream)[:, : first[name]]))
    return {name: codes.figures() for name, codes in found.items()}


MEASURE = Measure(
    name="hash-encoders",
    summary="Which units of each MLP fire, and how many tokens share a code of them.",
    paper="He et al., 2021, arXiv 2101.05490",
    value=value,
    of="model",
    reads={
        "firing": "share of units that fire for a token",
        "constant_units": "share of units that fire always or never on such texts: candidates for pruning",
        "codes": "different codes a token; far below 1: the layer tells few tokens apart",
    },
    cost="a forward pass over the data",
)
