"""How a command works and answers: the verb's `run` with stdout kept clean, mistakes as sentences, results as
tables or JSON.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer

import weft
from weft.cli.common import COMMON, PUSH, with_common
from weft.cli.options import method_options, named_values
from weft.errors import WeftError
from weft.progress import first_process, say, tune_libraries
from weft.signals import listening

__all__ = ["answer", "answering", "gathered", "number", "print_facts", "print_json", "print_table", "work"]

R = TypeVar("R")


def answering(command: Callable[..., R], *, resumes: bool = False) -> Callable[..., R]:
    """`command`, with its errors turned into one line on stderr and an exit code.

    Args:
        resumes: whether the same command goes on where an interrupted one stopped.
    """

    @functools.wraps(command)
    def answered(*args: Any, **kwargs: Any) -> R:
        for name in COMMON:  # their callbacks have done what they ask for
            kwargs.pop(name, None)
        repository = kwargs.pop(PUSH, None)
        try:
            with listening(), _pushing(kwargs.get("out"), repository):
                return command(*args, **kwargs)
        except WeftError as error:
            _stop(str(error), 2)
        except KeyboardInterrupt as error:
            by = f" by {error}" if str(error) not in ("", "SIGINT") else ""
            way_on = "the same command goes on from the last finished step" if resumes else "nothing was written"
            _stop(f"Interrupted{by}; {way_on}.", 130)
        except OSError as error:
            _stop(str(error), 2)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            _stop(f"The device is out of memory; give a smaller --window or --batch, or --device cpu. ({error})", 2)

    answered.__signature__ = with_common(command)  # type: ignore[attr-defined]
    return answered


@contextlib.contextmanager
def _pushing(out: Path | None, repository: str | None) -> Iterator[None]:
    """Check first that the output can be uploaded, where that is asked for; upload it when the block ends well."""
    if repository is None:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        hub = importlib.import_module("weft.verbs.hub")
        hub.check_push(repository)
    yield
    if first_process() and out is not None and out.is_dir():  # a dry run writes none
        with contextlib.redirect_stdout(sys.stderr):
            hub.push(out, repository)


def answer(verb: str, arguments: Mapping[str, Any], *, unused: Sequence[str] = ()) -> None:
    """Do the work of a verb and print what it found.

    Args:
        arguments: all that the command was given, its `locals()`.
        unused: names of those that the verb takes no notice of.
    """
    given, json = gathered(arguments)
    result = work(verb, **{name: value for name, value in given.items() if name not in unused})
    print_json(result) if json else print_facts(result)


def gathered(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The arguments of a verb, out of the `locals()` of its command, and whether JSON is wanted.

    Raises WeftError for an --option that is no NAME=VALUE or has a flag of its own.
    """
    given = {**arguments, **arguments.get("common", {})}
    given.pop("common", None)
    file = given.pop("gguf_file", None)
    if file is not None:
        given["model"] = f"{given['model']}/{file}"
    json, option = given.pop("json"), given.pop("option", None)
    for name, example in {"optimizer_option": "rank=4", "then_option": "rank=32"}.items():
        if name in given:
            named = named_values(given.pop(name), f"--{name.replace('_', '-')}", example)
            given[f"{name}s"] = named or None
    return given | method_options(option, given), json


def work(verb: str, *, run: str = "run", **arguments: Any) -> Any:
    """What `weft.verbs.<verb>.<run>` returns. Libraries print to stdout while they work; here that goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        function = getattr(importlib.import_module(f"weft.verbs.{verb}"), run)
        tune_libraries()
        warnings.showwarning = _show_warning
        return function(**arguments)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
    """A warning of ours as one line; others as Python shows them."""
    if Path(filename).is_relative_to(Path(weft.__file__).parent):
        say(f"weft: {message}", always=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, *rest[:1]))


def print_json(value: Any) -> None:
    """One JSON value on stdout, by the first process of a run of several."""
    if first_process():
        typer.echo(json.dumps(value, indent=2))


def print_table(columns: Mapping[str, str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; words are folded to the terminal's width, numbers never cut.

    Args:
        columns: heading -> "left" or "right".
    """
    if not first_process():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading, justify in columns.items():
        table.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(number(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no width of its own
    if "right" in columns.values():
        natural = console.measure(table, options=console.options.update(width=1000)).maximum
        console.width = max(console.width, natural)  # better wrapped by the terminal than cut
    console.print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line; a share that is covered, and what is left and why, in words; what is nested is left
    to the JSON.
    """
    words = {"covered": _percent(facts["covered"]), "left": "; ".join(facts["left"])} if "left" in facts else {}
    flat = {k.replace("_", " "): v for k, v in {**facts, **words}.items() if not isinstance(v, dict | list)}
    print_table({"": "left", " ": "left"}, list(flat.items()))


def _percent(share: float) -> str:
    return f"{share:.0%} of the numbers in the model's matrices"


def number(value: Any) -> str:
    """A value as a person reads it: thousands grouped, four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _stop(sentence: str, code: int) -> NoReturn:
    typer.echo("weft: " + " ".join(sentence.split()), err=True)
    raise typer.Exit(code)
