"""Where the side network of `weft.grafts.lst` starts: the rows and columns of the backbone that matter most to the
loss.

    F = sum over sequences of (d loss / d W)^2
    worth of a place = the product, over all matrices that share it, of the sums of F over their other side

Residual places are shared by every matrix of every block, so that the blocks fit together; places within a head by q,
k, v and o of one block (in the pairs j, j + head / 2 that are rotated together), neurons by gate, up and down. Norms
within a head (Qwen3) start at one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.stats.calibrate import Batch, frozen, to_device, token_loss

__all__ = ["LAYERS", "Fisher", "cut_out", "fisher", "stack_of"]

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
LAYERS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The layers of a block."""
_NORMS = ("input_layernorm", "post_attention_layernorm")
_WRITES = ("o_proj", "down_proj")  # their rows are residual places; of all others the columns are

Fisher = Sequence[dict[str, Tensor]]
"""Per block: layer -> F (out, in)."""


def stack_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a decoder, the shrunk one's too."""
    found = model.base_model.layers  # type: ignore[union-attr]
    assert isinstance(found, nn.ModuleList)
    return found


def fisher(model: nn.Module, batches: Sequence[Batch]) -> Fisher:
    """The squared gradient of each sequence's loss, summed over the sequences.

    Raises:
        WeftError: a layer's weight is no plain one.
    """
    weights = [(i, name, _weight(block, name)) for i, block in enumerate(stack_of(model)) for name in LAYERS]
    parameters = [weight for _, _, weight in weights]
    if not all(isinstance(weight, nn.Parameter) for weight in parameters):
        raise WeftError(
            "The Fisher information needs plain weights: put the side network beside the model before it is compressed "
            "or adapted, or in Python by weft.adapt(model, 'lst') without batches, where it starts at random."
        )
    sums: list[dict[str, Tensor]] = [{} for _ in stack_of(model)]
    with frozen(model), torch.enable_grad():
        for weight in parameters:
            weight.requires_grad_(True)
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                one = to_device({key: value[row : row + 1] for key, value in batch.items()}, model)
                grads = torch.autograd.grad(token_loss(model, one)[0], parameters)
                for (i, name, _), grad in zip(weights, grads, strict=True):
                    sums[i][name] = sums[i].get(name, 0) + grad.float().square()
        for weight in parameters:
            weight.requires_grad_(False)
    return sums


@torch.no_grad()
def cut_out(side: nn.Module, backbone: nn.Module, kept: Sequence[int], importance: Fisher) -> None:
    """Copy the most important rows and columns of the backbone's kept blocks and norms into the side network."""
    residual = _residual(importance, _size(side.norm))  # type: ignore[arg-type]
    for number, thin in zip(kept, stack_of(side), strict=True):
        wide, F_i = stack_of(backbone)[number], importance[number]
        for name in LAYERS:
            W, own = _weight(wide, name), _own_places(name, wide, thin, F_i)
            rows, columns = (residual, own) if name.endswith(_WRITES) else (own, residual)
            _weight(thin, name).copy_(W[rows.to(W.device)][:, columns.to(W.device)])
            bias, thin_bias = (block.get_submodule(name).bias for block in (wide, thin))
            if isinstance(bias, Tensor) and isinstance(thin_bias, Tensor):
                thin_bias.copy_(bias[rows.to(W.device)])
        for name in _NORMS:
            _weight(thin, name).copy_(_weight(wide, name)[residual.to(W.device)])
    _weight(side, "norm").copy_(_weight(backbone.base_model, "norm")[residual.to(W.device)])  # type: ignore[arg-type]


def _own_places(name: str, wide: nn.Module, thin: nn.Module, F_i: dict[str, Tensor]) -> Tensor:
    """What a layer keeps on the side that is no residual one: neurons, or the same places of each head."""
    if name not in ATTENTION:
        neurons = F_i["mlp.gate_proj"].sum(1), F_i["mlp.up_proj"].sum(1), F_i["mlp.down_proj"].sum(0)
        return _top(*neurons, count=len(_weight(thin, "mlp.gate_proj")))
    head, count = (int(block.self_attn.head_dim) for block in (wide, thin))  # type: ignore[union-attr, arg-type]
    parts = [F_i[n].sum(0 if n.endswith(_WRITES) else 1).view(-1, head).sum(0) for n in ATTENTION]
    chosen = _top(*(part.view(2, -1).sum(0) for part in parts), count=count // 2)
    within = torch.cat([chosen, chosen + head // 2])
    heads = F_i[name].shape[1 if name.endswith(_WRITES) else 0] // head
    return (torch.arange(heads).unsqueeze(1) * head + within).flatten()


def _residual(importance: Fisher, count: int) -> Tensor:
    """The places of the residual width."""
    return _top(*(F_i[n].sum(1 if n.endswith(_WRITES) else 0) for F_i in importance for n in LAYERS), count=count)


def _top(*parts: Tensor, count: int) -> Tensor:
    """The places of the largest products, ascending; by sums of logarithms, for a product of many leaves fp32."""
    worth = torch.stack([part.cpu().double().clamp(min=1e-300).log() for part in parts]).sum(0)
    return worth.topk(count).indices.sort().values


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _size(norm: nn.Module) -> int:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return len(weight)
