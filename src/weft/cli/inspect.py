"""`weft inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from weft.cli.answer import gathered, print_json, print_table, work
from weft.cli.common import Loading
from weft.cli.options import Model

__all__ = ["command"]


def command(
    model: Model,
    report: Annotated[
        Path | None, typer.Option(help="Also write a self-contained HTML page with plots.", show_default=False)
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Only layers whose name matches, such as '*mlp*'; again for more.", show_default=False),
    ] = None,
    measures: Annotated[
        str,
        typer.Option(help="Measures to take too, such as farms,power-law; see weft methods.", show_default=False),
    ] = "",
    against: Annotated[
        str | None,
        typer.Option(help="The model before training or compression, for measures of a change.", show_default=False),
    ] = None,
    **common: Unpack[Loading],
) -> None:
    """Measure the spectrum of every weight matrix: ranks, norms, and how many singular values carry its energy."""
    arguments, json = gathered(locals())
    result = work("inspect", **arguments)
    if json:
        print_json(result)
        return
    own = {
        "stable_rank": "stable rank",
        "effective_rank": "effective rank",
        "rank_90": "90 %",
        "rank_95": "95 %",
        "rank_99": "99 %",
        "spectral_norm": "spectral",
        "frobenius_norm": "Frobenius",
        "nuclear_norm": "nuclear",
    }
    known = {"name", "shape", "dtype", "parameters", "tied", *own}
    shown = own | {key: key.replace("_", " ") for m in result["matrices"][:1] for key in m if key not in known}
    columns = {"matrix": "left"} | dict.fromkeys(("shape", "dtype", *shown.values()), "right")
    rows = [
        [m["name"] + " (tied)" * m["tied"], "x".join(map(str, m["shape"])), m["dtype"], *(m[key] for key in shown)]
        for m in result["matrices"]
    ]
    print_table(columns, rows, title=f"{result['model']}: {len(rows)} matrices, {result['parameters']:,} parameters")
