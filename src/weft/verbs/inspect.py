"""The spectrum of every weight matrix of a model: how many directions it uses, and how unevenly.

For W (out, in) with singular values s_1 >= s_2 >= ...:

    stable rank     sum s^2 / s_1^2
    effective rank  exp of the entropy of s / sum s                                          (Roy and Vetterli, 2007)
    energy rank     the fewest values that hold 90, 95, 99 % of sum s^2
    norms           spectral s_1, Frobenius sqrt(sum s^2), nuclear sum s

Published measures beyond these are records of `weft.measures`, taken by name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.files import jsonable, write_json, write_text
from weft.linalg import spectrum
from weft.linalg.svd import singular_values
from weft.measures import MEASURES, Measure
from weft.progress import say, track
from weft.runs import record
from weft.runs.loading import load_model, resolve_device, resolve_dtype
from weft.runs.report.pages import report_path
from weft.runs.report.spectra import spectra_page
from weft.seeds import check_seed
from weft.terms import SumLinear
from weft.terms.experts import within_experts
from weft.terms.layers import is_linear, linear_layers, weight_of

__all__ = ["Matrix", "Report", "inspect", "run"]

_FORMS = {".html": "a page with plots", ".json": "the measures"}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix and the measures of its spectrum."""

    name: str
    shape: tuple[int, int]  # (out, in)
    dtype: str
    parameters: int  # numbers stored for it: fewer than out * in where it is a sum of terms
    tied: bool  # whether several modules share it; it is listed once, under the first name
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    spectral_norm: float
    frobenius_norm: float
    nuclear_norm: float
    figures: Mapping[str, float] = field(default_factory=dict)  # of the measures that were asked for, by name


@dataclass(frozen=True)
class Report:
    """What `weft.inspect` found: one `Matrix` each, in the model's order, and the singular values by name."""

    model: str
    matrices: tuple[Matrix, ...]
    spectra: dict[str, Tensor]  # name -> (min(out, in),) singular values, falling, fp32 on the CPU

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: model, parameters (of the matrices), matrices with what was asked for beside the rest. The
        singular values themselves stay in `spectra`.
        """
        total = sum(matrix.parameters for matrix in self.matrices)
        rows = [asdict(matrix) for matrix in self.matrices]
        rows = [{key: x for key, x in row.items() if key != "figures"} | row["figures"] for row in rows]
        found: dict[str, Any] = jsonable({"model": self.model, "parameters": total, "matrices": rows})
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as a whole: a self-contained page with plots for .html, the measures for .json.

        Raises:
            WeftError: the name ends in neither, or its directory does not exist.
        """
        path = report_path(path, _FORMS)
        if path.suffix == ".json":
            write_json(path, self.to_dict())
        else:
            write_text(path, spectra_page(self.to_dict(), self.spectra))


def inspect(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    measures: Sequence[str | Measure] = (),
    against: nn.Module | None = None,
    name: str | None = None,
) -> Report:
    """Measure every matrix of `model`: linear layers, embeddings, the output head, and each expert of a stack.

    A sum of terms is measured as the matrix it stands for. Singular values are those in fp64, on the model's device, to
    1e-8 of the largest; one matrix at a time is in memory beside the model.

    Args:
        layers: shell patterns on names (`*q_proj`), to measure the linear layers that match and nothing else.
        measures: names or records of `weft.measures`, to be taken beside the spectra.
        against: the same model before it was trained or compressed, for measures of pairs; given alone, all of them.
        name: what the report calls the model; its class by default.

    Raises:
        WeftError: a pattern matches nothing, there is no matrix, or one holds NaN or infinity; an unknown measure, one
            of pairs without `against`, or a model whose matrices are others.

    Example:
        >>> weft.inspect(model, measures=["farms"]).save("spectra.html")
    """
    chosen = _measures(measures, against is not None)
    work = partial(_inspect, model, layers, chosen, against, name)
    return work() if against is None else _open_during(against, work)


@within_experts
def _open_during(model: nn.Module, work: Callable[[], Report]) -> Report:
    """The work, while the experts of a second model may be open."""
    return work()


@within_experts
def _inspect(
    model: nn.Module,
    layers: str | Sequence[str] | None,
    measures: Sequence[Measure],
    against: nn.Module | None,
    name: str | None,
) -> Report:
    wanted = _matrices(model, layers)
    if not wanted:
        raise WeftError(f"{type(model).__name__} has no weight matrix to inspect.")
    before = {found[0]: found[1] for found in _matrices(against, layers)} if against is not None else {}
    matrices, spectra = [], {}
    for matrix, weight_of_it, stored, tied in track(wanted, "spectra"):
        weight = _finite(matrix, weight_of_it())
        s = singular_values(weight)
        spectra[matrix] = s.float().cpu()
        figures = _figures(matrix, weight, measures, before)
        matrices.append(_measure(matrix, weight, stored, tied, s.cpu(), figures))
    return Report(name or type(model).__name__, tuple(matrices), spectra)


def run(
    model: str,
    *,
    report: Path | None = None,
    layers: Sequence[str] | None = None,
    measures: str | Sequence[str] = (),
    against: str | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft inspect`: the report of a model on disk as a dict, with `report` also as a page and a record.

    `measures` are names, also with commas between them; `against` is another model's place. `seed` is accepted as by
    every verb; nothing here is random.
    """
    check_seed(seed)
    names = [name.strip() for name in (measures.split(",") if isinstance(measures, str) else measures) if name.strip()]
    _measures(names, against is not None)
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    if report is not None:
        report_path(report, _FORMS)
    arguments = {
        "model": model, "report": report, "layers": layers, "measures": names, "against": against, "dtype": dtype,
    }  # fmt: skip
    started = record.begin("inspect", arguments, seed=seed, device=target)
    load = partial(load_model, device=device, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    other = load(against) if against is not None else None
    found = inspect(load(model), layers or None, measures=names, against=other, name=model)
    if report is not None:
        found.save(report)
        started.write(report, {"matrices": len(found.matrices)})
        say(f"wrote {report}")
    return found.to_dict()


def _measures(wanted: Sequence[str | Measure], pair: bool) -> list[Measure]:
    """The records; without a name, those of pairs where there is another model."""
    chosen = [MEASURES.find(name, "measure") for name in wanted]
    alone = next((measure for measure in chosen if measure.pair and not pair), None)
    if alone is not None:
        raise WeftError(f"The measure {alone.name!r} compares two models: say which other one, by --against.")
    return chosen or [measure for measure in MEASURES.values() if measure.pair and pair]


def _figures(
    name: str, W: Tensor, measures: Sequence[Measure], before: Mapping[str, Callable[[], Tensor]]
) -> dict[str, float]:
    """What the measures say of a matrix."""
    found: dict[str, float] = {}
    for measure in measures:
        pair = []
        if measure.pair:
            W0 = before[name]() if name in before else None
            if W0 is None or W0.shape != W.shape:
                there = "no such matrix" if W0 is None else f"one of {W0.shape[0]} x {W0.shape[1]}"
                raise WeftError(f"The other model has {there} as {name}: compare a model with what it was made from.")
            pair = [_finite(name, W0).to(W.device)]
        found |= measure.value(W, *pair, **measure.defaults)
    return found


_Found = tuple[str, Callable[[], Tensor], int, bool]  # name, what makes the (out, in) weight, numbers stored, tied


def _matrices(model: nn.Module, layers: str | Sequence[str] | None) -> list[_Found]:
    return _every(model) if layers is None else _linear(model, layers)


def _every(model: nn.Module) -> list[_Found]:
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    seen: set[int] = set()
    found: list[_Found] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, SumLinear):
            inside = (*inside, name + ".")
            found.append((name, partial(weight_of, module), _stored(module), False))
            continue
        for weight_name, parameter in module._parameters.items():
            if parameter is None or parameter.dim() not in (2, 3) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            tied = uses[id(parameter)] > 1
            weight = weight_of(module) if is_linear(module) else parameter.detach()
            full = name if weight_name == "weight" else ".".join(filter(None, (name, weight_name)))
            found.extend((n, partial(_itself, w), w.numel(), tied) for n, w in _unstacked(full, weight))
    return found


def _linear(model: nn.Module, layers: str | Sequence[str]) -> list[_Found]:
    chosen = linear_layers(model, layers)
    return [(name, partial(weight_of, module), _stored(module), False) for name, module in chosen.items()]


def _unstacked(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A matrix itself, or each matrix of a stack such as a mixture's experts; nothing for integers, which are codes."""
    if not weight.is_floating_point() or weight.numel() == 0:
        return
    if weight.dim() == 2:
        yield name, weight
    else:
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(weight))


def _stored(module: nn.Module) -> int:
    if isinstance(module, SumLinear):
        return module.num_params - (0 if module.bias is None else module.bias.numel())
    return weight_of(module).numel()


def _itself(weight: Tensor) -> Tensor:
    return weight


def _finite(name: str, weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise WeftError(f"The matrix {name} holds NaN or infinite numbers: the checkpoint is damaged.")
    return weight


def _measure(name: str, weight: Tensor, stored: int, tied: bool, s: Tensor, figures: Mapping[str, float]) -> Matrix:
    return Matrix(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=str(weight.dtype).removeprefix("torch."),
        parameters=stored,
        tied=tied,
        stable_rank=spectrum.stable_rank(s),
        effective_rank=spectrum.effective_rank(s),
        rank_90=spectrum.rank_for_energy(s, 0.90),
        rank_95=spectrum.rank_for_energy(s, 0.95),
        rank_99=spectrum.rank_for_energy(s, 0.99),
        spectral_norm=float(s[0]),
        frobenius_norm=float(s.double().square().sum().sqrt()),
        nuclear_norm=spectrum.nuclear_norm(s),
        figures=figures,
    )
