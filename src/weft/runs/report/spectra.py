"""The page of `weft inspect`: how full each matrix's spectrum is, at a glance, line by line, and as figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from weft.runs.report.pages import commands_list, figures, page, section, table
from weft.runs.report.plots import Series, heat_map, line_chart, ramp

__all__ = ["block_grid", "spectra_charts", "spectra_page"]

_POINTS = 120  # of a curve: more cannot be seen

_COLUMNS = {
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "rank_90": "90 % energy",
    "rank_95": "95 %",
    "rank_99": "99 %",
    "spectral_norm": "spectral",
    "frobenius_norm": "Frobenius",
    "nuclear_norm": "nuclear",
}


_PLAIN = {"name", "shape", "dtype", "parameters", "tied", "compress"}


def spectra_page(report: Mapping[str, Any], spectra: Mapping[str, Tensor], against: str | None = None) -> str:
    """The page of a `Report`: its dict, its singular values by name, and what it was compared with."""
    matrices: Sequence[Mapping[str, Any]] = report["matrices"]
    model, beside = report["model"], f", compared with {against}" if against else ""
    fullness = {m["name"]: m["effective_rank"] / min(m["shape"]) for m in matrices}
    sections = [
        *_of_model(report),
        section(
            "How full the spectra are",
            "Effective rank as a share of the largest possible. A light cell is a matrix that uses few directions.",
            block_grid("effective rank / full rank", fullness, "of full rank"),
        ),
        section(
            "Singular values",
            "One line a layer, light for the first and dark for the last, each relative to its own largest value. "
            "The faster a line falls, the fewer directions carry the matrix.",
            figures(spectra_charts(spectra)),
        ),
        *_prospects(report),
        *_matrices(report),
        section("What follows", "Commands that act on what was found here.", commands_list(report["commands"])),
    ]
    return page(
        f"Inside {model['name']}",
        f"{len(matrices)} matrices, {model['parameters']:,} parameters{beside}. Written by weft inspect.",
        sections,
    )


def _of_model(report: Mapping[str, Any]) -> list[str]:
    """What measures say of the model as a whole, where one was asked."""
    rows = [[_said(k), v, report["reads"].get(k, "")] for k, v in report["model"].items() if k in report["reads"]]
    return [section("The model", "", table(["figure", "value", "how it reads"], rows))] if rows else []


def _prospects(report: Mapping[str, Any]) -> list[str]:
    """What compression would make of each matrix, at a glance."""
    found = {m["name"]: m["compress"] for m in report["matrices"] if m["compress"] is not None}
    if not found:
        return []
    told = report["predicted"]
    by = "Predicted on the text that was given." if told["by"] == "data" else (
        "Predicted by the weights alone, which know nothing of what the model is used for: with --data the loss is in "
        "nats a token."
    )  # fmt: skip
    line = (
        f"The fewest bytes at a predicted loss of {told['limit']:g} ({told['unit']}): a rank, or codes of so many bits."
    )
    shares = {name: p["bytes"] / p["dense_bytes"] for name, p in found.items()}
    words = {name: p["would"] for name, p in found.items()}
    grid = block_grid("bytes kept, darker for more", shares, "of its bytes kept", words)
    outlook = _outlook(report["outlook"])
    below = (
        " Below, of all matrices together: the share of their bytes that is kept, the loss by kfac-svd in nats a token "
        "more, and the share removed times the mean stable rank."
    ) * bool(outlook)
    return [section("What compression would do", f"{line} {by}{below}", grid + outlook)]


def _outlook(outlook: Sequence[Mapping[str, Any]]) -> str:
    """What keeping less is predicted to cost of the whole model."""
    rows = [[f"{one['keep']:.0%}", _cell(one["loss"]), one["score"]] for one in outlook if one["loss"] is not None]
    return table(["kept", "nats more", "stable-rank score"], rows) if rows else ""


def _matrices(report: Mapping[str, Any]) -> list[str]:
    """Every figure of every matrix, what was asked for first, and how those of the measures read."""
    matrices = report["matrices"]
    asked = {key: _said(key) for m in matrices for key in m if key not in _PLAIN | set(_COLUMNS)}
    acts = ["compress would", "bytes kept", "predicted loss", "rank", "bits"]
    headings = ["matrix", *asked.values(), "shape", "dtype", "parameters", *acts, *_COLUMNS.values(), "tied"]
    rows = [
        [
            *(m["name"], *(_cell(m.get(key)) for key in asked)),
            *("x".join(map(str, m["shape"])), m["dtype"], m["parameters"]),
            *_would(m["compress"]),
            *(_cell(m.get(key)) for key in _COLUMNS),
            "tied" * m["tied"],
        ]
        for m in matrices
    ]
    reads = [[_said(k), report["reads"][k]] for k in asked if k in report["reads"]]
    told = [section("How the figures read", "", table(["figure", "how it reads"], reads))] if reads else []
    return [section("Every matrix", "Click a heading to sort.", table(headings, rows)), *told]


def _would(prospect: Mapping[str, Any] | None) -> list[Any]:
    if prospect is None:
        return [""] * 5
    share = prospect["bytes"] / prospect["dense_bytes"]
    return [prospect["would"], share, prospect["loss"], _cell(prospect["rank"]), _cell(prospect["bits"])]


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _said(key: str) -> str:
    return key.replace("_", " ")


def block_grid(title: str, shares: Mapping[str, float], unit: str, words: Mapping[str, str] | None = None) -> str:
    """A heat map of one share a matrix: blocks down, kinds of matrix across; matrices outside any block are left
    out. `words` by matrix stand in the cells, instead of the shares.
    """
    cells = {(block, kind): share for name, share in shares.items() for block, kind in [_place(name)] if block}
    blocks, kinds = list(dict.fromkeys(b for b, _ in cells)), list(dict.fromkeys(k for _, k in cells))
    values = [[cells.get((block, kind)) for kind in kinds] for block in blocks]
    said = {_place(name): text for name, text in (words or {}).items()}
    texts = [[said.get((block, kind)) for kind in kinds] for block in blocks]
    drawn = heat_map(title, blocks, [_short(kind) for kind in kinds], values, unit, texts) if cells else ""
    return drawn and f'<div class="scroll map">{drawn}</div>'


def spectra_charts(spectra: Mapping[str, Tensor]) -> list[str]:
    """One chart a kind of matrix, one line a layer."""
    kinds: dict[str, list[str]] = {}
    for name in spectra:
        kinds.setdefault(_place(name)[1], []).append(name)
    return [_chart(kind, {name: spectra[name] for name in names}) for kind, names in kinds.items()]


def _chart(kind: str, spectra: Mapping[str, Tensor]) -> str:
    depth = max(len(spectra) - 1, 1)
    lines = [
        _curve(name, s, ramp(i / depth if len(spectra) > 1 else 0.6)) for i, (name, s) in enumerate(spectra.items())
    ]
    return line_chart(kind, lines, "index / full rank", "relative singular value", log=True)


def _curve(name: str, s: Tensor, color: str) -> Series:
    step = max(len(s) // _POINTS, 1)
    top = float(s[0]) or 1.0
    kept = range(0, len(s), step)
    return Series(name, [i / len(s) for i in kept], [float(s[i]) / top for i in kept], color)


def _place(name: str) -> tuple[str, str]:
    """("layers 3", "self_attn.q_proj") of "model.layers.3.self_attn.q_proj"; ("", name) outside any block."""
    parts = re.match(r"(?:.*\.)?([A-Za-z_]\w*)\.(\d+)\.(.+)", name)
    return (f"{parts[1]} {parts[2]}", parts[3]) if parts else ("", name)


def _short(kind: str) -> str:
    return kind.rsplit(".", 1)[-1][:10]
