"""one-bit-adapters: a LoRA whose factors are trained through a quantiser of one bit, or two, four or eight (Jie, Wang
and Deng, 2023, arXiv 2307.16867).

    w_q = q((w - mean) / (deviation + 1e-5)) * deviation + mean for w = A, B;   y = W x + s B_q dropout(A_q x)
    r (in + out) trainable numbers, of `bits` bits each in the file that `pack` leads to, and 16 bytes a layer
    A ~ U(-1/sqrt(in), 1/sqrt(in)),  B ~ N(0, 1e-3^2) within two deviations: a zero has no sign to quantise

q takes the nearest of 2^bits conditional medians of a normal number; its gradient is 1, while the mean and the
deviation keep theirs. `save_adapter` keeps the latent numbers, to be trained on; `pack(model)` first leaves the bits.
Deviations: the form for linear layers (Bi-LoRA) alone, neither the bottleneck of Bi-AdaptFormer nor the binary head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from weft.errors import WeftError
from weft.kernels.median_code import BITS
from weft.methods.adapter import kaiming, lora_count
from weft.methods.base import Method, Site, Split
from weft.terms import CodedFactors, Term
from weft.terms.adapters import Adapter, activate, adapters_of, detach, find_adapter
from weft.terms.adapters import attach as put_on

__all__ = ["METHOD", "pack", "split"]


def split(site: Site, *, bits: int, scale: float, dropout: float) -> Split:
    """Latent factors of full precision under the quantiser."""
    if bits not in BITS:
        raise WeftError(f"A factor is quantised to 1, 2, 4 or 8 bits, not to {bits}; for 32 bits use method 'lora'.")
    out_features, in_features = site.shape
    term = CodedFactors(in_features, out_features, site.rank, bits, scale=scale, dropout=dropout, device="meta")
    B = nn.init.trunc_normal_(torch.empty(out_features, site.rank), std=1e-3, a=-2e-3, b=2e-3, generator=site.generator)
    A = kaiming(site.rank, in_features, site.generator)
    term.A, term.B = (nn.Parameter(factor.to(site.device, site.dtype)) for factor in (A, B))
    return Split({"": term})


def pack(model: nn.Module, name: str | None = None) -> nn.Module:
    """Replace the latent factors of an adapter (None: the only one) by their codes, for good: the same function, no
    longer trainable, and `weft.save_adapter` writes r (in + out) bits / 8 + 16 bytes a layer.

    Raises:
        WeftError: no such adapter, or one without quantised factors.
    """
    adapter = find_adapter(model, name)
    if not all(isinstance(term, CodedFactors) for term in adapter.all_terms()):
        raise WeftError(f"The adapter {adapter.name!r} ({adapter.method}) holds no quantised factors to be packed.")
    names = [other.name for other in adapters_of(model).values() if other.active]
    detach(model, adapter.name)
    put_on(model, _packed(adapter))
    activate(model, names)
    return model


def _packed(adapter: Adapter) -> Adapter:
    terms: Mapping[str, Mapping[str, Term]] = adapter.terms
    packed = {
        layer: {key: term.packed() for key, term in found.items() if isinstance(term, CodedFactors)}
        for layer, found in terms.items()
    }
    return Adapter(adapter.name, adapter.method, packed, adapter.settings, adapter.rates)  # type: ignore[arg-type]


METHOD = Method(
    name="one-bit-adapters",
    kind="adapt",
    summary="A LoRA trained through a quantiser, down to one bit for each number of its factors.",
    paper="Jie, Wang and Deng, 2023, arXiv 2307.16867",
    split=split,
    count=lora_count,
    deviates="B starts at quantised random numbers of standard deviation 1e-3.",
    defaults={"bits": 1, "scale": 1.0, "dropout": 0.1},
)
