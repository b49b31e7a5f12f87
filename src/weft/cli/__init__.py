"""The command line: one file a verb, argument parsing and printing only.

Every verb keeps the same promises. A mistake is one line on stderr and exit code 2; an interrupt is a sentence and
exit code 130; with --json, stdout holds the JSON and nothing else; progress goes to stderr. torch and transformers
are imported by a command's work, not by its parsing, so that help and argument errors are instant.
"""

from __future__ import annotations

import typer

import weft
from weft.cli import (
    combine,
    compress,
    demo,
    evaluate,
    export,
    finetune,
    inspect,
    merge,
    methods,
    plan,
    pretrain,
    quantize,
    scale,
    select,
)
from weft.cli.answer import answering

__all__ = ["app", "main"]

app = typer.Typer(
    name="weft",
    help="Memory-efficient training, fine-tuning and compression of language models: a weight is a sum of terms.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("inspect")(answering(inspect.command))
app.command("compress")(answering(compress.command, resumes=True))
app.command("finetune")(answering(finetune.command, resumes=True))
app.command("pretrain")(answering(pretrain.command, resumes=True))
app.command("eval")(answering(evaluate.command))
app.command("merge")(answering(merge.command))
app.command("combine")(answering(combine.command))
app.command("quantize")(answering(quantize.command, resumes=True))
app.command("export")(answering(export.command))
app.command("plan")(answering(plan.command))
app.command("select")(answering(select.command, resumes=True))
app.command("methods")(answering(methods.command))
app.add_typer(scale.app, name="scale")
app.command("demo")(answering(demo.command, resumes=True))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"weft {weft.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    pass


def main() -> None:
    """The `weft` command."""
    app()
