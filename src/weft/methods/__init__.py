"""Methods: one file each. `weft.methods()` lists them; `weft.methods.METHODS` holds them by name.

Example:
    >>> weft.methods.METHODS["kfac-svd"].needs
    ('input_moment', 'output_grad_moment')
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from weft.methods import (
    acm,
    adadim,
    afm,
    allora,
    asvd,
    auto,
    awq,
    baq,
    bitnet,
    bone,
    ce_ssl,
    codebook,
    cola,
    compacter,
    conadv,
    corda,
    deft,
    dora,
    dqt,
    dsformer,
    dylora,
    effort,
    eora,
    eva,
    float_code,
    full,
    fwsvd,
    gptq,
    ifairy,
    increlora,
    int2_1,
    int8,
    jlcm,
    kasa,
    kfac_svd,
    lamda,
    lift,
    loldu,
    lora,
    lora_ga,
    lora_ggpo,
    lora_sb,
    lora_xs,
    loram,
    lorc,
    lord,
    lost,
    low_rank,
    lq_lora,
    lrp_pruning,
    maestro,
    minitron,
    modegpt,
    monarch,
    mos,
    nm_gradient_flow,
    nola,
    normal_float,
    olora,
    one_bit_adapters,
    paca,
    pela,
    pifa,
    pissa,
    pst,
    pv_tuning,
    qvgen,
    randlora,
    random_mask,
    rtn,
    said,
    saliency_apiq,
    salt,
    sft,
    signround,
    sltrain,
    soka,
    soma,
    sora,
    sorsa,
    sparsegpt,
    spdf,
    sst,
    svd,
    svd_llm,
    svfit,
    tiny_training,
    trp,
    wanda,
    weight_compander,
    welore,
    yaqa,
)
from weft.methods.base import Factors, Method, Site, Split
from weft.records import Table, tables

__all__ = ["METHODS", "Factors", "Method", "Site", "Split", "find"]

_PAGES: tuple[ModuleType, ...] = (
    svd,
    fwsvd,
    asvd,
    afm,
    lord,
    svd_llm,
    kfac_svd,
    pifa,
    dsformer,
    welore,
    # layers that are cut together
    modegpt,
    lrp_pruning,
    # some of the weights, and a mask
    wanda,
    sparsegpt,
    # codes of few bits, and what takes up their error
    normal_float,
    int8,
    float_code,
    rtn,
    gptq,
    yaqa,
    awq,
    adadim,
    baq,
    signround,
    codebook,
    jlcm,
    saliency_apiq,
    eora,
    lorc,
    # several of the above, chosen by layer
    auto,
    # made for fresh layers
    low_rank,
    sltrain,
    lost,
    cola,
    monarch,
    sst,
    maestro,
    weight_compander,
    bitnet,
    dqt,
    ifairy,
    # made for trained ones
    trp,
    pela,
    spdf,
    nm_gradient_flow,
    # made for either, and dense
    conadv,
    # training of what is there
    full,
    pst,
    acm,
    pv_tuning,
    tiny_training,
    qvgen,
    # starts of a low-rank product
    lora,
    int2_1,
    dora,
    pissa,
    olora,
    corda,
    eva,
    lora_ga,
    lora_sb,
    lora_xs,
    lq_lora,
    soma,
    sorsa,
    # the weight's own factors
    svfit,
    loldu,
    kasa,
    salt,
    effort,
    # other structures
    bone,
    soka,
    compacter,
    # numbers that layers share, or that nobody keeps
    nola,
    randlora,
    mos,
    said,
    one_bit_adapters,
    # chosen entries
    random_mask,
    paca,
    lift,
    sft,
    # rules of training
    sora,
    allora,
    dylora,
    increlora,
    lamda,
    lora_ggpo,
    ce_ssl,
    deft,
    # a smaller copy to train on, and one to keep
    loram,
    minitron,
)

METHODS = Table(Method, (method for page in _PAGES for method in vars(page).get("METHODS") or (page.METHOD,)))
"""Every method by name; a page holds a METHOD, or METHODS where several are one formula."""


def find(name: str, *kinds: str) -> Method:
    """The method of that name, of one of these kinds (none: any). Raises WeftError with the nearest names."""
    return METHODS.find(name, *kinds)


class _Room(ModuleType):
    """This module, callable: `weft.methods()` and `weft.methods.svd` are both what they look like."""

    def __call__(self) -> list[dict[str, Any]]:
        """The record of everything published that weft has, of every room, a kind after another: its name, kind,
        summary, paper, defaults, and what else its sort tells.
        """
        found = [record for table in tables() for record in table.values()]
        kinds = list(dict.fromkeys(record.kind for record in found))
        return [record.record() for record in sorted(found, key=lambda record: kinds.index(record.kind))]


sys.modules[__name__].__class__ = _Room
