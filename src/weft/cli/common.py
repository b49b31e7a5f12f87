"""What verbs take beside their own options: the shared ones, a file of arguments, and how much is said."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

import typer
import yaml

from weft.cli.options import Device, Dtype, GgufFile, Json, Out, OutUnlessPlanned, PushToHub, Seed, TrustRemoteCode
from weft.errors import WeftError, nearest
from weft.progress import loud

__all__ = ["COMMON", "PUSH", "Answering", "Computing", "Loading", "with_common"]


class Answering(TypedDict):
    """The options of every verb: a command that takes `**common: Unpack[Answering]` has them."""

    seed: Seed
    json: Json


class Computing(Answering):
    """Those of a verb that computes with a model."""

    device: Device
    dtype: Dtype


class Loading(Computing):
    """Those of a verb that loads one."""

    trust_remote_code: TrustRemoteCode
    gguf_file: GgufFile


PUSH = "push_to_hub"
"""The option of every verb that writes a directory."""


def with_common(command: Callable[..., Any]) -> inspect.Signature:
    """The signature of a command with its shared options, and those of every command, behind its own."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        (shared,) = get_args(own.pop().annotation)
        own += [_parameter(name, hint) for name, hint in get_type_hints(shared, include_extras=True).items()]
    writes = any(parameter.annotation in (Out, OutUnlessPlanned) for parameter in own)
    return inspect.Signature([*own, *([_parameter(PUSH, PushToHub)] if writes else []), *COMMON.values()])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    """An option that may be left out: it is then what its type has for nothing, 0, False or None."""
    kind = get_args(annotation)[0]
    default = kind() if isinstance(kind, type) else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make the arguments of a file the defaults of this command; what is given on the command line goes before."""
    if value is not None:
        try:
            ctx.default_map = {**(ctx.default_map or {}), **_defaults(ctx, value)}
        except WeftError as error:
            typer.echo(f"weft: {error}", err=True)
            raise typer.Exit(2) from None
    return value


def _defaults(ctx: typer.Context, path: Path) -> dict[str, Any]:
    """Name -> value of the command's parameters; what is none of them is an option of the method."""
    given = {key.replace("-", "_"): value for key, value in _mapping(ctx, path).items() if value is not None}
    parameters = {p.name: p for p in ctx.command.params if p.name}
    for key in [key for key in given if key not in parameters and key.endswith("_options")]:
        one = key.removesuffix("s")  # the flag gives one pair at a time
        if one in parameters and isinstance(given[key], dict):
            given[one] = [_pair(name, value) for name, value in given.pop(key).items()]
    strange = {key: given.pop(key) for key in sorted(given.keys() - parameters.keys())}
    if strange and "option" not in parameters:
        key = next(iter(strange))
        raise WeftError(f"{path}: weft {ctx.info_name} takes no {key!r}; the nearest are: {_near(key, parameters)}.")
    options = [_pair(key, value) for key, value in strange.items()]
    if options:
        given["option"] = [*given.get("option", []), *options]
    for key, value in given.items():
        several = getattr(parameters[key], "multiple", False) or getattr(parameters[key], "nargs", 1) == -1
        given[key] = value if isinstance(value, list) or not several else [value]
    return given


def _pair(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _mapping(ctx: typer.Context, path: Path) -> Mapping[str, Any]:
    """The arguments in a YAML or JSON file; those of a finished run where it is a run.json."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WeftError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise WeftError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}.") from None
    if isinstance(read, Mapping) and {"command", "arguments", "versions"} <= read.keys():
        if read["command"] != ctx.info_name:
            raise WeftError(f"{path} is the record of weft {read['command']}, not of weft {ctx.info_name}.")
        read = read["arguments"]
    if not isinstance(read, Mapping) or not all(isinstance(key, str) for key in read):
        raise WeftError(f"{path} holds no arguments: write one NAME: VALUE a line.")
    return read


def _near(key: str, parameters: Mapping[str, Any]) -> str:
    return ", ".join(nearest(key, parameters))


def _quiet(value: bool) -> bool:
    if value:
        loud("quiet")
    return value


def _verbose(value: bool) -> bool:
    if value:
        loud("verbose")
    return value


_ANNOTATIONS: dict[str, Any] = {
    "config": Annotated[
        Path | None,
        typer.Option(
            help="Arguments from a YAML or JSON file, or from the run.json of a finished run.",
            is_eager=True,
            callback=_read,
            show_default=False,
        ),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Say nothing while working.", callback=_quiet)],
    "verbose": Annotated[bool, typer.Option("--verbose", help="Say what the libraries say too.", callback=_verbose)],
}
COMMON = {name: _parameter(name, annotation) for name, annotation in _ANNOTATIONS.items()}
