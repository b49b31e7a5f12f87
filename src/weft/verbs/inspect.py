"""The spectrum of every weight matrix of a model: how many directions it uses, and how unevenly.

For W (out, in) with singular values s_1 >= s_2 >= ...:

    stable rank     sum s^2 / s_1^2
    effective rank  exp of the entropy of s / sum s                                          (Roy and Vetterli, 2007)
    energy rank     the fewest values that hold 90, 95, 99 % of sum s^2
    norms           spectral s_1, Frobenius sqrt(sum s^2), nuclear sum s

Published measures beyond these are records of `weft.measures`, taken by name. Of every layer that can be compressed,
`weft.verbs.prospects` says what would become of it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.files import jsonable, write_json, write_text
from weft.linalg import spectrum
from weft.linalg.svd import singular_values
from weft.measures import Measure
from weft.progress import say, track
from weft.runs import record
from weft.runs.calibration import calibration_texts, check_enough
from weft.runs.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_dtype
from weft.runs.report.pages import report_path
from weft.runs.report.spectra import spectra_page
from weft.seeds import check_seed
from weft.stats.calibrate import Batch
from weft.terms import SumLinear
from weft.terms.coverage import coverage_of
from weft.terms.experts import within_experts
from weft.terms.layers import is_linear, linear_layers, weight_of
from weft.train.windows import calibration_batches
from weft.verbs.evaluate import check_context
from weft.verbs.measuring import Looked, OfInput, beyond, chosen, of_matrix, whole
from weft.verbs.moments import UNIT
from weft.verbs.prospects import Outlook, Prospect, Prospects, commands, predicted

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
    compress: Prospect | None = None  # what would become of it; None for what is no layer, or is compressed already

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the figures beside the rest."""
        row = asdict(self)
        figures = row.pop("figures")
        return {**row, **figures, "compress": row["compress"] and {**row["compress"], "would": self.compress.words}}  # type: ignore[union-attr]


@dataclass(frozen=True)
class Report:
    """What `weft.inspect` found: one `Matrix` each, in the model's order, and the singular values by name."""

    model: str
    matrices: tuple[Matrix, ...]
    spectra: dict[str, Tensor]  # name -> (min(out, in),) singular values, falling, fp32 on the CPU
    figures: Mapping[str, float] = field(default_factory=dict)  # of the model, by name
    measures: tuple[Measure, ...] = ()
    layers: tuple[str, ...] = ()  # the patterns that were asked for
    data: str | None = None  # what was read, where something was
    against: str | None = None  # what the other model is called
    outlook: tuple[Outlook, ...] = ()  # of the whole model, at several budgets

    @property
    def commands(self) -> list[str]:
        """What to do next, as commands."""
        found = {matrix.name: matrix.compress for matrix in self.matrices if matrix.compress is not None}
        return commands(self.model, found, layers=self.layers, data=self.data, against=self.against)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: model (its name, the parameters of the matrices, figures), matrices with what was asked for beside
        the rest, how figures read, what compression is predicted by, and what it is predicted to cost at several
        budgets. Singular values stay in `spectra`.
        """
        total = sum(matrix.parameters for matrix in self.matrices)
        reads = {
            key: words for measure in self.measures for key, words in {**measure.reads, **measure.reads_model}.items()
        }
        found: dict[str, Any] = jsonable(
            {
                "model": {"name": self.model, "parameters": total, **self.figures},
                "matrices": [matrix.to_dict() for matrix in self.matrices],
                "reads": reads,
                "predicted": predicted(self.data),
                "outlook": [asdict(one) for one in self.outlook],
                "commands": self.commands,
            }
        )
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
            write_text(path, spectra_page(self.to_dict(), self.spectra, self.against))


def inspect(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    *,
    measures: Sequence[str | Measure] = (),
    batches: Sequence[Batch] = (),
    against: nn.Module | None = None,
    name: str | None = None,
    data: str | None = None,
    against_name: str | None = None,
) -> Report:
    """Measure every matrix of `model`: linear layers, embeddings, the output head, and each expert of a stack.

    A sum of terms is measured as the matrix it stands for. Singular values are those in fp64, on the model's device, to
    1e-8 of the largest; one matrix at a time is in memory beside the model, and statistics of as many blocks as take
    little beside it.

    Args:
        layers: shell patterns on names (`*q_proj`), to measure the linear layers that match and nothing else.
        measures: names or records of `weft.measures`, to be taken beside the spectra.
        batches: of text, for measures of activations, gradients and texts (`weft.train.windows.calibration_batches`);
            with them, losses of compression are predicted by the data, and otherwise by the weights alone.
        against: the same model before it was trained or compressed, for measures of pairs; given alone, all of them.
        name: what the report calls the model; its class by default.
        data, against_name: what it calls the text and the other model.

    Raises:
        WeftError: a pattern matches nothing, there is no matrix, or one holds NaN or infinity; an unknown measure, one
            that lacks what it looks at, or a model whose matrices are others.

    Example:
        >>> weft.inspect(model, measures=["farms"]).save("spectra.html")
    """
    taken = chosen(measures, pair=against is not None, data=bool(batches))
    names = {
        "model": name or type(model).__name__,
        "data": (data or "the text") if batches else None,
        "against": (against_name or type(against).__name__) if against is not None else None,
    }
    work = partial(_inspect, model, layers, taken, batches, against, names)
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
    batches: Sequence[Batch],
    against: nn.Module | None,
    names: Mapping[str, Any],
) -> Report:
    wanted = _matrices(model, layers)
    if not wanted:
        raise WeftError(f"{type(model).__name__} has no weight matrix to inspect.")
    before = {found[0]: found[1] for found in _matrices(against, layers)} if against is not None else {}
    needs = dict.fromkeys([*(need for measure in measures for need in measure.needs), *(UNIT if batches else ())])
    looked = Looked(model, layers, batches, against, tuple(needs))
    prospects, of_input = Prospects(model, list(looked.linear), data=bool(batches)), OfInput(measures)
    more = beyond(looked, measures)
    matrices, spectra = [], {}
    for matrix, weight_of_it, stored, tied in track(wanted, "spectra"):
        weight = _finite(matrix, weight_of_it())
        s, moments = singular_values(weight), looked.moments.get(matrix)
        W0 = _finite(matrix, before[matrix]()) if matrix in before else None
        figures = (
            of_matrix(measures, matrix, weight, W0) | (of_input(moments) if moments else {}) | more.get(matrix, {})
        )
        spectra[matrix] = s.float().cpu()
        found = _measure(matrix, weight, stored, tied, s.cpu(), figures)
        matrices.append(replace(found, compress=prospects.of(matrix, s, moments)))
    figures = more.get("", {}) | whole(model, measures, {m.name: m.figures for m in matrices})
    patterns = (layers,) if isinstance(layers, str) else tuple(layers or ())
    return Report(
        matrices=tuple(matrices), spectra=spectra, figures=figures, measures=tuple(measures), layers=patterns,
        outlook=tuple(prospects.outlook()), **names,
    )  # fmt: skip


def run(
    model: str,
    *,
    report: Path | None = None,
    layers: Sequence[str] | None = None,
    measures: str | Sequence[str] = (),
    data: str | Path | None = None,
    windows: int = 8,
    window: int = 512,
    against: str | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`weft inspect`: the report of a model on disk as a dict, with `report` also as a page and a record.

    `measures` are names, also with commas between them, and `options` theirs; `data` is text that the model reads,
    `windows` of `window` tokens spread over it; `against` is another model's place. `seed` draws the windows.

    Raises:
        WeftError: any argument that cannot work, before a model is loaded where it can be told.
    """
    check_seed(seed)
    if windows < 1 or window < 2:
        raise WeftError(f"--windows has to be at least 1 and --window at least 2, not {windows} and {window}.")
    names = [name.strip() for name in (measures.split(",") if isinstance(measures, str) else measures) if name.strip()]
    taken = chosen(names, pair=against is not None, data=data is not None, options=options)
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    if report is not None:
        report_path(report, _FORMS)
    arguments = {
        "model": model, "report": report, "layers": layers, "measures": names, "data": data, "windows": windows,
        "window": window, "against": against, "dtype": dtype, **options,
    }  # fmt: skip
    started = record.begin("inspect", arguments, seed=seed, device=target)
    batches = _batches(model, data, windows, window, seed, trust_remote_code) if data is not None else []
    kept = "auto" if data is None else None  # a text is read in what the device computes in
    load = partial(
        load_model, device=device, dtype=dtype or kept, trust_remote_code=trust_remote_code, mapped=data is None
    )
    other = load(against) if against is not None else None
    source = load(model)
    if batches:
        check_enough(source, batches, layers or None)
    found = inspect(
        source, layers or None, measures=taken, batches=batches, against=other, name=model,
        data=None if data is None else str(data), against_name=against,
    )  # fmt: skip
    covered = coverage_of(source, [matrix.name for matrix in found.matrices]).facts()
    if report is not None:
        found.save(report)
        started.write(report, {"matrices": len(found.matrices), **covered})
        say(f"wrote {report}")
    told = found.to_dict()
    return {**told, "model": told["model"] | covered}


def _batches(
    model: str, data: str | Path, windows: int, window: int, seed: int, trust_remote_code: bool
) -> list[dict[str, Tensor]]:
    """The windows that the model reads, one a batch."""
    texts, _ = calibration_texts(data, model)
    check_context(load_config(model, trust_remote_code=trust_remote_code), window)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    return calibration_batches(tokenizer, texts, windows=windows, window=window, batch=1, seed=seed)


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
