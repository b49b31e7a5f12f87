"""The options that several verbs share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Device", "Dtype", "Json", "Model", "Out", "Seed", "TrustRemoteCode", "Window"]

Model = Annotated[
    str, typer.Argument(help="A model directory, a Hub id, or 'pico' (the embedded model).", show_default=False)
]
Out = Annotated[
    Path, typer.Option("-o", "--out", help="The directory to write; it may not hold anything yet.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout instead of tables.")]
Seed = Annotated[int, typer.Option(help="Where all randomness comes from.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU where there is one.", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16 or auto (the checkpoint's own); auto on a GPU, float32 on a CPU.",
        show_default=False,
    ),
]
Window = Annotated[int, typer.Option(help="Tokens that the model sees at once.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along.")
]
