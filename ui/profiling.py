"""Profiles the data of a recipe in a process of its own, so that the app itself never loads torch.

profile_in_child(recipe) ─▶ (stage, done, total) …      ends when the profile is saved
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from markupsafe import Markup

import studio
from studio import Recipe, StudioError
from ui.views import meter

LOADING, ROUTING = "Loading the base", "Routing a sample of your data"
SECONDS_TO_END = 5.0


def profile_in_child(recipe: Recipe) -> Iterator[tuple[str, int, int]]:
    """Makes and saves the profile of `recipe`; yields how far it is. Closing the iterator ends the process.

    Raises:
        StudioError: the profile cannot be made, or its process was killed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_make, args=(studio.recipe_to_yaml(recipe), there), daemon=True)
    child.start()
    there.close()
    try:
        yield from _messages(here)
    except EOFError:
        child.join(SECONDS_TO_END)
        code = child.exitcode
        hint = " (often the machine ran out of memory)" if code == -9 else ""
        raise StudioError(f"the process that profiles the data ended with exit code {code}{hint}") from None
    finally:
        child.terminate()
        child.join(SECONDS_TO_END)


def whole_percents(steps: Iterator[tuple[str, int, int]]) -> Iterator[Markup]:
    """The progress as pictures, one for each whole per cent."""
    last = None
    for stage, done, total in steps:
        if (now := (stage, 100 * done // max(1, total))) != last:
            last = now
            yield meter(stage, done, total)


def _messages(pipe: Connection) -> Iterator[tuple[str, int, int]]:
    """Until the child says that it is done. Raises EOFError where it ends without saying so."""
    while True:
        kind, *values = pipe.recv()
        if kind == "done":
            return
        if kind == "failed":
            raise StudioError(values[0])
        yield values[0], values[1], values[2]


def _make(text: str, pipe: Connection) -> None:
    """In the child: everything that it has to say goes through the pipe."""

    def told(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: pipe.send(("progress", stage, done, total))

    try:
        studio.make_profile(studio.parse_recipe(text), told(ROUTING), told(LOADING))
        pipe.send(("done",))
    except StudioError as error:
        pipe.send(("failed", str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
