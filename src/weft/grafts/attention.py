"""Which models' attention function another can take the place of."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.errors import WeftError
from weft.terms.layers import attention_layers

__all__ = ["exchangeable"]


def exchangeable(model: Any, otherwise: str, *keys: str) -> dict[str, nn.Module]:
    """The attention layers by name.

    Raises WeftError, ending in `otherwise`, where their function does what another in its place would not: it caps
    scores, has sinks, or one of these further keys of the configuration says so.
    """
    config, layers = model.config.get_text_config(), dict(attention_layers(model))
    own = [key for key in ("attn_logit_softcapping", *keys) if getattr(config, key, None)]
    # beside its projections: the sinks of GPT-OSS, which come to the function by a name of each model's own
    own += [name for layer in layers.values() for name, _ in layer.named_parameters(recurse=False)]
    if not layers or not model._can_set_attn_implementation() or own:
        why = f" (it has {own[0]} of its own)" if own else ""
        raise WeftError(f"The attention of {type(model).__name__} cannot be exchanged{why}, so {otherwise}.")
    return layers
