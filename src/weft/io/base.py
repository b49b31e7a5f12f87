"""Base: what an adapter's files say of the model that the adapter was made on, its fingerprint included.

The fingerprint is 16 numbers of each adapted layer's weight (of what it stores, where it is no matrix) and of the input
embedding, at places that depend on the shape alone, in fp32, with the dtype and the kinds of terms they were stored in:

    same weights   ||a - b|| <= 0.01 max(||a||, ||b||) on every tensor that both have sampled

which holds in any floating-point dtype (bf16 rounds by at most 0.004 of a number) and not for other weights. Where one
of the two is in code (NF4, int8) and the other is not, the bound is 0.5: a code of three bits or more is that near,
other weights are sqrt(2) apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.terms import SumLinear, Term
from weft.terms.adapters import base_terms
from weft.terms.extras import places, tables
from weft.terms.layers import is_linear

__all__ = ["Base", "Sample", "base_of", "check_readable", "other_weights", "sample"]

COUNT = 16
"""Numbers of each tensor."""
ROWS = 32
"""Of an embedding, whose further rows may be resized."""
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Sample:
    """Some numbers of one tensor."""

    values: tuple[float, ...]
    dtype: str  # that the tensor is stored in, e.g. "bfloat16"
    kinds: tuple[str, ...]  # of its terms, e.g. ("dense",)


@dataclass(frozen=True)
class Base:
    """The model of an adapter, as far as its files tell.

    Args:
        name: the directory or Hub id that it was loaded from.
        task: PEFT's word for what it does, e.g. "CAUSAL_LM".
        transposed: whether its layers are GPT-2's `Conv1D`.
        targets: PEFT's `target_modules` that mean exactly the adapted layers.
        samples: its fingerprint, by the name of a layer or of the embedding; empty where it is not known.
        tied: further names of the input embedding's weight, e.g. "lm_head.weight".
    """

    name: str | None = None
    task: str | None = None
    transposed: bool = False
    targets: tuple[str, ...] = ()
    samples: Mapping[str, Sample] = field(default_factory=dict)
    tied: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """What is written in weft_adapter.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any] | str | None) -> Base:
        """The inverse of `json`; a text alone is the name."""
        if not isinstance(entry, Mapping):
            return cls(entry)
        samples = {
            key: Sample(tuple(found["values"]), found["dtype"], tuple(found["kinds"]))
            for key, found in entry["samples"].items()
        }
        tied = tuple(entry.get("tied", ()))  # absent in format 1
        return cls(entry["name"], entry["task"], entry["transposed"], tuple(entry["targets"]), samples, tied)


def base_of(model: nn.Module, layers: Iterable[str]) -> Base:
    """The base of an adapter on these layers. Under FSDP2, call it on every process: the shards are gathered."""
    layers = list(layers)
    sums = [model.get_submodule(layer) for layer in layers]
    return Base(
        getattr(getattr(model, "config", None), "name_or_path", "") or None,
        next((task for suffix, task in _TASKS.items() if type(model).__name__.endswith(suffix)), None),
        any(isinstance(layer, SumLinear) and layer.transposed for layer in sums),
        tuple(_targets(model, layers)),
        sample(model, layers),
        _tied(model),
    )


def check_readable(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse, before anything is trained on them, layers whose numbers cannot be read back to be saved or merged.

    Raises:
        WeftError: another tool keeps a weight in a tensor of its own kind that does not give its numbers.
    """
    kinds: dict[type, str] = {}
    for layer in layers:
        for tensor in model.get_submodule(layer).parameters():
            if type(tensor) not in (Tensor, nn.Parameter, DTensor, FakeTensor):  # the last has none, in a plan
                kinds.setdefault(type(tensor), layer)
    for kind, layer in kinds.items():
        try:
            sample(model, [layer])
        except Exception as error:  # whatever the other tool raises
            reason = " ".join(str(error).split())[:120]
            raise WeftError(
                f"The weight of {layer} is a {kind.__module__}.{kind.__name__}, whose numbers weft cannot read "
                f"({reason}), so that no adapter on it could be saved or merged; dequantise the model first."
            ) from error


def _tied(model: nn.Module) -> tuple[str, ...]:
    embedding, _ = tables(model)
    weight = None if embedding is None else embedding._parameters.get("weight")
    if weight is None:
        return ()
    return tuple(f"{path}.{leaf}" for path, module, leaf in places(model, weight) if module is not embedding)


@torch.no_grad()
def sample(model: nn.Module, layers: Iterable[str]) -> dict[str, Sample]:
    """The fingerprint of the model's own weights, adapters aside, on these layers."""
    found = {layer: _of_terms(list(base_terms(model, layer).values())) for layer in layers}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    weight = getattr(embedding, "weight", None)
    if name is not None and isinstance(weight, Tensor) and weight.dim() == 2:  # in codes it is empty
        table = _whole(weight)
        found[name] = _sample([table[:ROWS]], ["embedding"])
    return {key: one for key, one in found.items() if one is not None}


def other_weights(ours: Mapping[str, Sample], theirs: Mapping[str, Sample]) -> str | None:
    """The first tensor that both sampled whose values are not the same weights; None where there is none."""
    for name in ours.keys() & theirs.keys():
        if not _same(ours[name], theirs[name]):
            return min(n for n in ours.keys() & theirs.keys() if not _same(ours[n], theirs[n]))
    return None


def _same(one: Sample, other: Sample) -> bool:
    a, b = (torch.tensor(found.values, dtype=torch.float64) for found in (one, other))
    bound = 0.01 if one.kinds == other.kinds else 0.5
    return a.shape == b.shape and bool((a - b).norm() <= bound * torch.maximum(a.norm(), b.norm()))


def _of_terms(terms: list[Term]) -> Sample | None:
    """Of their matrix; where one of them is none, of all that they store."""
    kinds = [term.kind for term in terms]
    if all(term.linear for term in terms):
        return _sample([_whole(term.dense()) for term in terms], kinds)
    stored = [_whole(tensor) for term in terms for tensor in term._stored()]
    dtype = next(tensor.dtype for tensor in stored if tensor.is_floating_point())
    return _sample([torch.cat([tensor.flatten().to(dtype) for tensor in stored]).unsqueeze(0)], kinds)


def _sample(matrices: list[Tensor], kinds: list[str]) -> Sample | None:
    """Numbers of the sum of some matrices of one shape; None where there are none (on the meta device)."""
    if any(matrix.is_meta for matrix in matrices):
        return None
    rows, columns = matrices[0].shape
    places = torch.arange(1, COUNT + 1) * 2654435761 % (rows * columns)  # Knuth's multiplicative hashing
    picked = [m[(places // columns).to(m.device), (places % columns).to(m.device)].float().cpu() for m in matrices]
    values = torch.stack(picked).sum(0)
    return Sample(
        tuple(float(f"{value:.6g}") for value in values), str(matrices[0].dtype).removeprefix("torch."), tuple(kinds)
    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _targets(model: nn.Module, layers: list[str]) -> list[str]:
    """The last parts of the layers' names where they mean exactly these layers, else the whole names."""
    suffixes = {layer.rpartition(".")[2] for layer in layers}
    meant = {
        name for name, module in model.named_modules() if is_linear(module) and name.rpartition(".")[2] in suffixes
    }
    meant = {name for name in meant if ".terms." not in name}
    return sorted(suffixes) if meant == set(layers) else sorted(layers)
