"""Models that compute what a Llama does, of other layers."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn


def glued(model: nn.Module) -> nn.Module:
    """A model of Phi-3's class that computes the same: queries, keys and values in one matrix, gate and up in one."""
    made = hf.Phi3ForCausalLM(hf.Phi3Config(**{**model.config.to_dict(), "architectures": None, "model_type": "phi3"}))
    state = model.state_dict()
    for name in [name for name in state if "v_proj" in name or "gate_proj" in name]:
        names = ("q_proj", "k_proj", "v_proj") if "v_proj" in name else ("gate_proj", "up_proj")
        whole, one = ("qkv_proj", "v_proj") if "v_proj" in name else ("gate_up_proj", "gate_proj")
        state[name.replace(one, whole)] = torch.cat([state.pop(name.replace(one, part)) for part in names])
    made.load_state_dict(state)
    return made.to(model.dtype).eval()
