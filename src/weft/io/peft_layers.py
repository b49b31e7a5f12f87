"""weft's layers in PEFT: a LoRA of PEFT's on a sum of terms, so that PEFT and TRL adapt compressed models.

    y = SumLinear(x) + scaling * dropout(x) A^T B^T         merged: one more low-rank term of the sum

Imported right after `peft.tuners.lora.model` (see `weft.io.hook`); PEFT takes layers of others through
`LoraConfig._register_custom_module`, which each configuration then calls, and "all-linear" counts sums in.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import peft.tuners.tuners_utils as tuners
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from weft.errors import WeftError
from weft.terms import LowRank, SumLinear
from weft.terms.extras import tables

__all__ = ["LoraSumLinear", "register"]

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


class LoraSumLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA on a `SumLinear`.

    Raises:
        WeftError: DoRA, or a start that is taken from the layer's weight, which a sum of terms does not store.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        if config.use_dora or config.init_lora_weights not in _PLAIN_STARTS:
            what = "use_dora" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
            raise WeftError(
                f"PEFT's {what} reads the weight of a layer, which a compressed one has not; use weft.adapt."
            )
        with warnings.catch_warnings():  # PEFT takes the width of a layer that it does not know, and warns of it
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, config=config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the adapters terms of the sum."""
        for name in tuners.check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                B, A = (cast(Any, factor)[name].weight.detach() for factor in (self.lora_B, self.lora_A))
                term = LowRank.from_factors(B.clone(), A.clone(), scale=self.scaling[name])
                self._sum().terms[f"peft_{name}"] = term
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take them out of the sum again."""
        while self.merged_adapters:
            del self._sum().terms[f"peft_{self.merged_adapters.pop()}"]

    def _sum(self) -> SumLinear:
        base: SumLinear = cast(Any, self).get_base_layer()
        return base


def register() -> None:
    """Have every LoraConfig know sums of terms, and "all-linear" find them. Safe to repeat."""
    theirs, config = cast(Any, tuners), cast(Any, LoraConfig)  # what they keep to themselves
    after, find = config.__post_init__, theirs._maybe_include_all_linear_layers
    if getattr(find, "_weft", False):
        return

    @functools.wraps(after)
    def post_init(self: LoraConfig) -> None:
        after(self)
        self._register_custom_module({SumLinear: LoraSumLinear})

    @functools.wraps(find)
    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = find(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            head = tables(model)[1]
            sums = {name for name, m in model.named_modules() if isinstance(m, SumLinear) and m is not head}
            found.target_modules = {*found.target_modules, *sums}
        return found

    include._weft = True  # type: ignore[attr-defined]
    config.__post_init__, theirs._maybe_include_all_linear_layers = post_init, include


register()
