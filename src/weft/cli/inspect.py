"""`weft inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Unpack

import typer

from weft.cli.answer import gathered, print_facts, print_json, print_table, work
from weft.cli.common import Loading
from weft.cli.options import Layers, MethodOptions, Model, Window

__all__ = ["command"]

_OWN = {
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "rank_90": "90 %",
    "rank_95": "95 %",
    "rank_99": "99 %",
    "spectral_norm": "spectral",
    "frobenius_norm": "Frobenius",
    "nuclear_norm": "nuclear",
}
_KNOWN = {"name", "shape", "dtype", "parameters", "tied", "compress", *_OWN}


def command(
    model: Model,
    report: Annotated[
        Path | None, typer.Option(help="Also write a self-contained HTML page with plots.", show_default=False)
    ] = None,
    layers: Layers = None,
    measures: Annotated[
        str,
        typer.Option(help="Measures to take too, such as farms,ppl-sparsity; see weft methods.", show_default=False),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text that the model reads, for measures of activations and gradients, and for predicted losses.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text are read.")] = 8,
    window: Window = 512,
    against: Annotated[
        str | None,
        typer.Option(help="The model before training or compression, for measures of a change.", show_default=False),
    ] = None,
    option: MethodOptions = None,
    **common: Unpack[Loading],
) -> None:
    """Measure every weight matrix, what the model makes of a text, and what compression would do to each."""
    arguments, json = gathered(locals())
    result = work("inspect", **arguments)
    if json:
        print_json(result)
        return
    matrices = result["matrices"]
    shown = _OWN | {key: key.replace("_", " ") for m in matrices for key in m if key not in _KNOWN}
    columns = {"matrix": "left"} | dict.fromkeys(("shape", "dtype", *shown.values(), "compress"), "right")
    rows = [
        [
            *(m["name"] + " (tied)" * m["tied"], "x".join(map(str, m["shape"])), m["dtype"]),
            *(m.get(key, "") for key in shown),
            _would(m["compress"]),
        ]
        for m in matrices
    ]
    name, parameters, *_ = result["model"].values()
    print_table(columns, rows, title=f"{name}: {len(rows)} matrices, {parameters:,} parameters")
    figures = {key: value for key, value in result["model"].items() if key not in ("name", "parameters")}
    if figures:
        print_facts(figures)
    typer.echo("\n".join(["", *_looks(result["outlook"]), _says(result["predicted"])]))
    typer.echo("\n".join(f"  {line}" for line in result["commands"]))


def _would(prospect: Mapping[str, Any] | None) -> str:
    """What would become of a matrix, and the share of its bytes that is kept."""
    return "" if prospect is None else f"{prospect['would']} ({prospect['bytes'] / prospect['dense_bytes']:.0%})"


def _looks(outlook: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is predicted of the whole model."""
    losses = [f"{one['loss']:.2g} at {one['keep']:.0%}" for one in outlook if one["loss"] is not None]
    words = "By kfac-svd, the loss is predicted to rise by so many nats a token at what is kept:"
    return [f"{words} {', '.join(losses)}."] if losses else []


def _says(predicted: Mapping[str, Any]) -> str:
    """How the last column was found, and what stands below."""
    by = "on the text that was given" if predicted["by"] == "data" else "by the weights alone (give --data for more)"
    return (
        f"compress: the fewest bytes at a predicted loss of {predicted['limit']:g} ({predicted['unit']}), {by}. "
        "What follows from it:"
    )
