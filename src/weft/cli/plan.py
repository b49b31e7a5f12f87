"""`weft plan`."""

from __future__ import annotations

from typing import Annotated, Unpack

import typer

from weft.cli.answer import gathered, print_json, print_table, work
from weft.cli.common import Computing
from weft.cli.options import TrustRemoteCode, Window

__all__ = ["command"]


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="A model directory, a Hub id, or 'pico'; its weights are not read.", show_default=False),
    ] = None,
    memory: Annotated[str, typer.Option(help="What there is, such as 8GB or 24GiB.", show_default=False)] = "",
    size: Annotated[
        str | None,
        typer.Option(help="In the place of a model: a published size, 9m to 7b.", show_default=False),
    ] = None,
    task: Annotated[str, typer.Option(help="finetune, pretrain, compress or serve.")] = "finetune",
    methods: Annotated[
        str,
        typer.Option(
            help="Such as lora,nf4+lora,full+galore: a code of the weights, a method, an optimizer; or all.",
            show_default=False,
        ),
    ] = "",
    batch: Annotated[int, typer.Option(help="Rows for which the parts are given.")] = 1,
    window: Window = 512,
    rank: Annotated[int | None, typer.Option(help="As in weft finetune and weft pretrain.", show_default=False)] = None,
    lean: Annotated[bool, typer.Option(help="Keep fewer activations and no logits.")] = True,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    time: Annotated[bool, typer.Option(help="Measure the machine for a second; predict the time of a step.")] = True,
    trust_remote_code: TrustRemoteCode = False,
    **common: Unpack[Computing],
) -> None:
    """Say what fits: memory and time of a job by every method, and the largest batch; nothing but headers is read."""
    arguments, json = gathered(locals())
    result = work("plan", **arguments)
    if json:
        print_json(result)
        return
    training = ("gradients", "optimizer", "activations")
    own = ("statistics", "disk") if result["task"] == "compress" else training
    parts = ("peak_bytes", "weights", *own, "workspace")
    columns = {"method": "left", "fits": "left"} | {p.removesuffix("_bytes") + " MB": "right" for p in parts}
    timed = ["seconds"] if any(row["seconds"] is not None for row in result["methods"]) else []
    rows = [
        [
            *(row["name"], row["fits"], *(None if row.get(p) is None else row[p] / 1e6 for p in parts), row["batch"]),
            *(row[t] for t in timed),
        ]
        for row in result["methods"]
    ]
    title = f"{result['task']} of {result['model']}, {result['rows']} x {result['window']} tokens, {result['dtype']}"
    print_table({**columns, "largest batch": "right", **dict.fromkeys(timed, "right")}, rows, title=title)
    for row in result["methods"]:
        if row.get("reason"):
            typer.echo(f"{row['name']} is not planned: {row['reason']}")
