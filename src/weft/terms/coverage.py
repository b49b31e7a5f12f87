"""Coverage: what share of a model's matrices a set of layers is, and what is left, with the reason."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft.errors import WeftError
from weft.terms.coded_embedding import embedding_specs
from weft.terms.experts import open_experts, within_experts
from weft.terms.layers import HEAD, OUTSIDE, is_linear, judged, output_head, shape_of
from weft.terms.sum_linear import SumLinear

__all__ = ["Coverage", "coverage", "coverage_of", "require_coverage", "untrained"]

_NOT_NAMED = "it is not among the layers that were named"


@dataclass(frozen=True)
class Coverage:
    """What some layers are of a model.

    Args:
        share: of the numbers in the model's matrices, embeddings and heads aside: 0 to 1.
        left: the other matrices, as the name of a layer or a parameter -> why it is left.
    """

    share: float
    left: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What a record of a run holds of it: `covered`, and `left` by kind, the most frequent first."""
        return {"covered": self.share, "left": self._kinds()}

    def _kinds(self) -> list[str]:
        groups = Counter((name.rpartition(".")[2], reason) for name, reason in self.left.items())
        return [f"{count} x {name} ({reason})" for (name, reason), count in groups.most_common()]

    def __str__(self) -> str:
        all_kinds = self._kinds()
        kinds, more = all_kinds[:6], f" and {len(all_kinds) - 6} other kinds" if len(all_kinds) > 6 else ""
        return f"{100 * self.share:.0f} % of the numbers in the model's matrices" + (
            f"; left as they are: {', '.join(kinds)}{more}" if kinds else ""
        )


def coverage(model: nn.Module, layers: Iterable[str]) -> Coverage:
    """What these linear layers are of the model."""
    chosen, left, numbers = set(layers), {}, Counter[bool]()
    known = set()
    for name, module, reason in judged(model):
        known.add(name)
        if reason in (HEAD, OUTSIDE):
            continue
        out, inn = shape_of(module)
        numbers[name in chosen] += out * inn
        if name not in chosen:
            left[name] = reason or _NOT_NAMED
    for name, size, reason in _others(model, known):
        numbers[False] += size
        left[name] = reason
    total = numbers.total()
    return Coverage(numbers[True] / total if total else 0.0, left)


@within_experts
def coverage_of(model: nn.Module, layers: Iterable[str]) -> Coverage:
    """The same, of a model whose experts may be fused."""
    layers = set(layers)
    open_experts(model, layers.__contains__)
    return coverage(model, layers)


def require_coverage(model: nn.Module, layers: Iterable[str]) -> None:
    """Warn of what is left of the model, where these are all its linear layers and it is more than a hundredth.

    Raises:
        WeftError: there is none, or they are less than half of the numbers in its matrices.
    """
    layers = list(layers)
    found = coverage(model, layers)
    if not layers:
        why = _foreign(model) or _first(found.left)
        raise WeftError(f"{type(model).__name__} has no linear layer that weft could replace{why}.")
    if found.share < 0.5:
        near = layers[0].rpartition(".")[0].rpartition(".")[2] or layers[0]
        raise WeftError(
            f"The linear layers of this {type(model).__name__} are {found}. That is less than half; name the layers "
            f"that you mean, for example layers='*{near}*' (for adapters targets='*{near}*')."
        )
    if found.share < 0.99:
        warnings.warn(f"The linear layers of this {type(model).__name__} are {found}.", stacklevel=3)


def _first(left: dict[str, str]) -> str:
    return f": {'; '.join(f'{name}: {reason}' for name, reason in list(left.items())[:3])}" if left else ""


def _foreign(model: nn.Module) -> str:
    """What stands in the place of linear layers where another tool has quantised the model."""
    theirs = {
        f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_linear(module) and module is not output_head(model)
    }
    if not theirs:
        return ""
    return (
        f": its layers are {' and '.join(sorted(theirs))}, whose weights another tool keeps in codes of its own; load "
        "the model without them and quantise it with weft.quantize, whose layers take adapters"
    )


def _others(model: nn.Module, known: set[str]) -> Iterable[tuple[str, int, str]]:
    """Matrices that belong to no linear layer: name, numbers, why they are left."""
    head, seen = output_head(model), set()
    for path, module in model.named_modules():
        outer = path.split(".")
        inside = any(".".join(outer[:depth]) in known for depth in range(1, len(outer) + 1))
        if inside or module is head or isinstance(module, nn.Embedding | SumLinear):
            continue
        for name, parameter in module._parameters.items():
            token = parameter is not None and parameter.shape[:1] == (1,)  # or a table of positions
            if parameter is None or token or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = type(module).__name__
            if isinstance(module, nn.Linear) or name == "weight":
                yield path, parameter.numel(), f"a {kind} is no linear layer that weft knows"
            else:
                stack = "a stack of matrices" if parameter.dim() == 3 else "it"
                yield f"{path}.{name}" if path else name, parameter.numel(), f"{kind} holds {stack} as one tensor"


def untrained(model: nn.Module) -> list[str]:
    """The names of layers and tables of tokens that are codes alone, without a parameter that a step could change."""
    sums = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SumLinear)]
    fixed = [name for name, layer in sums if not any(True for term in layer._terms() for _ in term.parameters())]
    return fixed + list(embedding_specs(model))
