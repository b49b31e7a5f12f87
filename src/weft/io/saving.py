"""Saving follows the model: `save_pretrained` asks it for its sums of terms, so that no verb has to remember.

Whatever put the sums there, a verb, a method or a loop of one's own, the directory is a weft directory; and a model
that has none any more is written as a plain one. Imported after `transformers.modeling_utils`, see `weft.io.hook`.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from weft.io.quantizer import check_alone, remark

__all__ = ["follow"]


def follow(models: type[PreTrainedModel]) -> None:
    """Have `models.save_pretrained`, and so `push_to_hub` and every trainer, bring the marks up to date first."""
    save = models.save_pretrained
    if getattr(save, "asks_weft", False):
        return

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        check_alone(self)
        remark(self)
        return save(self, *args, **kwargs)

    save_pretrained.asks_weft = True  # type: ignore[attr-defined]
    models.save_pretrained = save_pretrained  # type: ignore[method-assign]


follow(PreTrainedModel)
