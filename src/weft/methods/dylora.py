"""dylora: every step cuts all adapters to one random rank, so that the trained adapter can be cut to any (Valipour et
al., 2022, arXiv 2210.07558).

    b ~ U{1, ..., r} once a step;   y = W x + (alpha / b) B[:, :b] A[:b] x;   r (in + out) trainable numbers
    frozen: only component b learns in that step; otherwise the first b do

Evaluation, merging and saving use rank r, or any b after `truncate(model, b)`, with the scale alpha / b; nothing is
lost by it. With `frozen`, each component learns in one step of r: train longer, or at a higher rate.
Deviations: the paper allows other distributions of b. As in the released code, Adam's moments still move, towards zero,
components that do not learn in a step. The scale is 1 unless `alpha` is given, published are alpha 16 at r 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.methods import lora
from weft.methods.adapter import lora_count, scale_of
from weft.methods.base import Method, Site, Split
from weft.rules.gate_draws import GateDraws
from weft.terms import GatedLowRank
from weft.terms.adapters import find_adapter

__all__ = ["METHOD", "split", "truncate"]


def split(site: Site, *, alpha: float | None, frozen: bool) -> Split:
    """LoRA's start, all components open."""
    scale = scale_of(site.nominal, alpha=alpha)
    B, A = (factor.to(site.device, site.dtype) for factor in lora.initialise(site, scale))
    return Split({"": GatedLowRank.from_factors(B, A, torch.ones(site.rank), scale=scale)})


@torch.no_grad()
def truncate(model: nn.Module, rank: int, name: str | None = None) -> nn.Module:
    """Use an adapter (None: the only one) at this rank from now on, in evaluation, merging and saving.

    The same model is returned. The components beyond are closed, not lost: a later call may open them again. PEFT's
    files hold the first `rank` ones, as a LoRA of that rank.

    Raises:
        WeftError: no such adapter, one of another method, or a rank that it does not have.
    """
    adapter = find_adapter(model, name)
    if adapter.method != "dylora":
        raise WeftError(f"{adapter.name!r} is an adapter of {adapter.method!r}; only 'dylora' can be cut to any rank.")
    most = adapter.settings["rank"]
    if not 1 <= rank <= most:
        raise WeftError(f"Rank {rank} is not possible for {adapter.name!r}; give a rank from 1 to {most}.")
    for term in adapter.all_terms():
        assert isinstance(term, GatedLowRank)
        term.gate.copy_(_gate(rank, most, term.rank))
    return model


def _gate(b: int, nominal: int, rank: int) -> Tensor:
    """nominal / b for the first b components: alpha / nominal, the term's scale, becomes alpha / b."""
    return (torch.arange(rank) < b) * (nominal / b)


def _sampler(*, frozen: bool, rank: int, seed: int) -> GateDraws:
    """One rank a step for the whole model."""

    def draw(generator: torch.Generator, nominal: int, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        b = int(torch.randint(1, nominal + 1, (), generator=generator))
        numbers = [torch.arange(1, rank + 1) for rank in ranks]
        return [(_gate(b, nominal, len(n)), n == b if frozen else n <= b) for n in numbers]

    return GateDraws(draw, rank=rank, seed=seed)


METHOD = Method(
    name="dylora",
    kind="adapt",
    summary="LoRA cut to a random rank at every step, which can then be cut to any rank without training again.",
    paper="Valipour et al., 2022, arXiv 2210.07558",
    split=split,
    count=lora_count,
    rules=(_sampler,),
    defaults={"alpha": None, "frozen": True},
)
