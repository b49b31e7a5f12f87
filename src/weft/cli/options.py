"""The options that several verbs share, each written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.errors import WeftError
from weft.records import parsed_value

__all__ = [
    "Bos",
    "Device",
    "DryRun",
    "Dtype",
    "EarlyStopping",
    "Embeddings",
    "GgufFile",
    "Json",
    "Layers",
    "LoadBest",
    "LogEvery",
    "MethodOptions",
    "Model",
    "OptimizerOptions",
    "Out",
    "OutUnlessPlanned",
    "PushToHub",
    "ReportTo",
    "SaveTotalLimit",
    "Seed",
    "TrustRemoteCode",
    "Window",
    "method_names",
    "method_options",
    "named_values",
]

Model = Annotated[
    str,
    typer.Argument(
        help="A model directory, a GGUF file, a Hub id, or 'pico' (the embedded model).", show_default=False
    ),
]
Out = Annotated[
    Path, typer.Option("-o", "--out", help="The directory to write; it may not hold anything yet.", show_default=False)
]
OutUnlessPlanned = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="The directory to write; it may not hold anything yet.", show_default=False),
]
Embeddings = Annotated[
    str | None, typer.Option(help="8bit: the embedding and the head in codes too, a scale a row.", show_default=False)
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        help="Only layers whose name matches, such as '*mlp*', or all but '!*.0.*'; again for more.",
        show_default=False,
    ),
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
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin every window with the beginning-of-text token; as the tokenizer does.",
        show_default=False,
    ),
]
LogEvery = Annotated[int, typer.Option(help="Steps between two lines of metrics.jsonl.")]
SaveTotalLimit = Annotated[int, typer.Option(help="How many checkpoints are kept.")]
ReportTo = Annotated[str, typer.Option(help="Also log to tensorboard, wandb or mlflow.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Train one step, write nothing, and say what the run would take.")
]
LoadBest = Annotated[
    bool, typer.Option("--load-best", help="End with the checkpoint of the least loss on --eval-data.")
]
EarlyStopping = Annotated[
    int | None,
    typer.Option(help="End after so many evaluations without a lower loss on --eval-data.", show_default=False),
]
Window = Annotated[int, typer.Option(help="Tokens that the model sees at once.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along.")
]
GgufFile = Annotated[
    str | None, typer.Option(help="The model's GGUF file, in its directory or Hub repository.", show_default=False)
]
PushToHub = Annotated[
    str | None, typer.Option(help="Upload the output to this repository of the Hub.", show_default=False)
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="A hyperparameter of the method, as NAME=VALUE; again for more.", show_default=False),
]

OptimizerOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--optimizer-option",
        help="A hyperparameter of the optimizer, as NAME=VALUE; again for more.",
        show_default=False,
    ),
]


def method_names(*kinds: str) -> Callable[[str], list[str]]:
    """Completes the names of methods of these kinds; of any where none is given."""

    def complete(incomplete: str) -> list[str]:
        from weft.verbs.methods import run

        listed = [record["name"] for record in run() if not kinds or record["kind"] in kinds]
        return [name for name in dict.fromkeys(listed) if name.startswith(incomplete)]

    return complete


def method_options(given: Sequence[str] | None, taken: Mapping[str, Any]) -> dict[str, Any]:
    """The NAME=VALUE pairs of --option as keyword arguments.

    Args:
        taken: the arguments that have an option of their own.

    Raises:
        WeftError: a pair without an equals sign, or for an argument that is taken.
    """
    options = named_values(given, "--option", "ridge=1e-3")
    for name in options.keys() & taken.keys():
        flag = f"--{name.replace('_', '-')} {options[name]}"
        raise WeftError(f"--option {name}={options[name]}: this is no hyperparameter of the method; give it as {flag}.")
    return options


def named_values(given: Sequence[str] | None, flag: str, example: str) -> dict[str, Any]:
    """NAME=VALUE pairs as a dictionary, values read as JSON where they are JSON and as text otherwise.

    Raises WeftError for a pair without an equals sign.
    """
    options: dict[str, Any] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise WeftError(f"{flag} {pair!r} is no NAME=VALUE, such as {flag} {example}.")
        options[name.replace("-", "_")] = parsed_value(value)
    return options
