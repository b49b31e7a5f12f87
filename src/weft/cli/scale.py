"""`weft scale`: a command for every published law, made from its record, and `weft scale fit`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Unpack

import typer

from weft.cli.answer import answering, gathered, print_facts, print_json, work
from weft.cli.common import Answering
from weft.cli.options import Json
from weft.scaling import LAWS, Law

__all__ = ["app"]

app = typer.Typer(help="Scaling laws: what published ones say, and fits of your own runs.", no_args_is_help=True)


def _law(law: Law) -> Callable[..., None]:
    """A command whose options are the law's quantities."""

    def command(json: bool = False, **quantities: Any) -> None:
        result = work("scale", law=law.name, **quantities)
        print_json(result) if json else _print(result)

    command.__doc__ = f"{law.summary} {law.paper}."
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY,
            default=None if q.default is None else f"{q.default:g}",
            annotation=Annotated[str | None, typer.Option(help=_sentence(q.meaning), show_default=bool(q.default))],
        )
        for name, q in law.takes.items()
    ]  # fmt: skip
    answer = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    command.__signature__ = inspect.Signature([*options, answer])  # type: ignore[attr-defined]
    return command


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _fit(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Tables with a line a run, or directories of weft pretrain.", show_default=False),
    ],
    by: Annotated[
        list[str] | None,
        typer.Option(help="A quantity that was varied, such as tokens; again for a second.", show_default=False),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="The column of the loss.", show_default=False)] = None,
    compute: Annotated[
        str | None, typer.Option(help="Also split this many floating-point operations best.", show_default=False)
    ] = None,
    draws: Annotated[int, typer.Option(help="Of the bootstrap that gives the intervals.")] = 200,
    **common: Unpack[Answering],
) -> None:
    """Fit a power law above a floor to runs, with intervals."""
    arguments, json = gathered(locals())
    result = work("scale", run="run_fit", **arguments)
    print_json(result) if json else _print(result)


def _print(result: dict[str, Any]) -> None:
    """Figures, a line each, then what is to be known of them."""
    words = [*result.get("cautions", []), *result.get("outside", []), result.get("caution", "")]
    flat = {key: value for key, value in result.items() if key not in ("cautions", "outside", "caution")}
    for key, value in list(flat.items()):
        if isinstance(value, dict):
            flat |= {f"{key} {name}": v for name, v in value.items()}
    print_facts({k: " to ".join(f"{x:.4g}" for x in v) if isinstance(v, list) else v for k, v in flat.items()})
    for sentence in filter(None, words):
        typer.echo(sentence)


app.command("fit")(answering(_fit))
for _law_record in LAWS.values():
    app.command(_law_record.name)(answering(_law(_law_record)))
