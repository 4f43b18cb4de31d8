"""What the command line's modules share: options, errors as messages, and where the output goes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.errors import ProblemsError, StudioError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the result before it appears.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON, errors included.")]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the studio's errors into one message on stderr (or one JSON object on stdout) and exit code 1."""

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        try:
            command(**arguments)
        except (StudioError, OSError) as error:
            if arguments.get("as_json"):
                print_json(error_as_json(error))
            else:
                print_error(str(error))
            raise typer.Exit(1) from None

    return guarded


def error_as_json(error: Exception) -> dict[str, Any]:
    """{"error": {"type", "message", "problems"}}, and of a failed verification its "checks"."""
    problems = [vars(problem) for problem in error.problems] if isinstance(error, ProblemsError) else []
    checks = {"checks": [vars(check) for check in error.checks]} if isinstance(error, VerificationError) else {}
    return {"error": {"type": type(error).__name__, "message": str(error), "problems": problems, **checks}}


def output() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from studio.terminal import clean

    text = Text.assemble(("error: ", "bold red"), (clean(message), "red"))
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
