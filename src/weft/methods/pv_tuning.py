"""pv-tuning: the codes of a quantised model trained together with its scales (PV-Tuning, Malinovskii et al., 2024,
arXiv 2405.14852; its code Vahe1994/AQLM).

    P    codes fixed: scales and all that is not quantised step by their gradients
    V    the share tau of the codes whose targets W - code_lr u are farthest take the nearest code (`CodeSteps`)

One backward pass serves both. `weft finetune DIR --method pv-tuning --teacher MODEL` on any model in integer codes,
with the dense model's predictions as what is learned (published: KL on logits). Nothing is stored besides what was: the
same codes and scales, other values. Training holds the matrices, a second moment each, and with decay < 1 targets.
decay = 1 is the method; 0, as the published command has it and by default here, keeps what no step spent:
straight-through training under the cap tau. code_lr = 0.01 is published for codes that lie dense (2^16 of 8 weights).
Targets on a grid of few bits have half a step to cross: over several steps 0.03, the default, does, at once (decay = 1)
it wants 0.3, and then trust = 0.003, for a hundredth of all weights leaping each step ruins a model; published beside
decay = 1 is to force each chosen group to another code, which is not here. A run in which no code changes says so.
Deviations: integer grids, published are additive codebooks: a group is one weight, the nearest code is exact and no
beam search; zero points stay. No drawing of groups by a temperature. AdamW (0.9, 0.999) steps the values, published are
(0.9, 0.95). Layers in other codes stay as they are.
"""

from __future__ import annotations

from torch import nn

from weft.methods.base import Method, Site, Split
from weft.rules.code_steps import CodeSteps
from weft.terms import IntegerCode, TunedCode

__all__ = ["METHOD", "finish", "split", "trained"]


def split(site: Site) -> Split:
    """Integer codes as they are trained; a layer without any stays."""
    coded = {key: TunedCode.from_code(t) for key, t in site.terms.items() if isinstance(t, IntegerCode)}
    return Split({**site.terms, **coded}) if coded else Split()


def finish(site: Site) -> Split:
    """The codes that are left."""
    return Split({key: term.finished() for key, term in site.terms.items()})


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter, where there are codes to train."""
    return list(model.parameters()) if any(type(m) is TunedCode for m in model.modules()) else []


METHOD = Method(
    name="pv-tuning",
    kind="train",
    summary="Integer codes, as of rtn or gptq, and their scales trained, a few codes a step, by enough to matter.",
    paper="Malinovskii et al., 2024, arXiv 2405.14852",
    split=split,
    finish=finish,
    ranked=False,
    rules=(CodeSteps,),
    trained=trained,
    defaults={"code_lr": 0.03, "tau": 0.01, "decay": 0.0, "trust": None, "beta": 0.95},
)
