"""`studio data inspect | formats | score`: data before it is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import studio
from studio.cli_shared import AsJson, RecipePath, output, print_json, reported
from studio.errors import StudioError

if TYPE_CHECKING:
    from studio.data.hard_examples import Scored
    from studio.recipe import Recipe

data_app = typer.Typer(
    name="data",
    help="Look at data before training on them.",
    epilog="Example: studio data inspect rows.jsonl",
    no_args_is_help=True,
)


@data_app.command("inspect", epilog="Example: studio data inspect recipes/data/tickets-train.jsonl --base embedded")
@reported
def data_inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Anything that data.train takes.", show_default=False)],
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="Read it as this recipe would, for its base and method.")
    ] = None,
    base: Annotated[str, typer.Option(help="The base whose tokenizer counts, where there is no recipe.")] = "embedded",
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="A column with another name, as prompt=question; repeat for each."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a file holds: format, counts, lengths, duplicates, bad rows, and what of three rows is trained.

    The exit code is 1 where no row can be used.
    """
    from studio.data_view import reading_progress, report_view

    wanted = studio.load_recipe(recipe) if recipe else None
    mapping = _mapping(columns or ())
    with reading_progress(output(), quiet=as_json) as progress:
        report = studio.inspect_data(file, recipe=wanted, base=base, columns=mapping, progress=progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        output().print(report_view(report))
    if report.good_rows == report.other_rows:
        raise typer.Exit(1)


def _mapping(pairs: Sequence[str]) -> dict[str, str]:
    """From ours=theirs.

    Raises:
        StudioError
    """
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise StudioError(f"--columns received {wrong[0]!r}; allowed: ours=theirs, such as prompt=question")
    return dict(pair.split("=", 1) for pair in pairs)


@data_app.command("formats", epilog="Example: studio data formats")
@reported
def data_formats(as_json: AsJson = False) -> None:
    """List the formats of rows that are recognised."""
    from studio.data.formats import FORMATS
    from studio.data_view import format_table

    if as_json:
        print_json([{"name": n, "title": f.title, "row": f.looks_like, "kind": f.kind} for n, f in FORMATS.items()])
    else:
        output().print(format_table(FORMATS))


@data_app.command("score", epilog="Example: studio data score recipes/quickstart.yaml --out scores")
@reported
def score(
    recipe: RecipePath,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A folder for kept.jsonl, left_out.jsonl and scores.png.", show_default=False),
    ] = None,
    drop_easiest: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share to leave out; the recipe's, or 0.5 if none.", show_default=False),
    ] = None,
    drop_hardest: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="Share to leave out; the recipe's.", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Score even if there are scores already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score every training row by the base's loss on it, and show what would be left out as too easy or hopeless."""
    from studio.data.hard_examples import EASIEST_SHARE, find_scores, summary, write_rows
    from studio.data.of_recipe import selection
    from studio.mixture_view import scores_view

    wanted = studio.load_recipe(recipe)
    found = None if again else find_scores(wanted)
    if found is None:
        _score_with_bars(wanted, as_json)
    of_recipe = wanted.data.drop_easiest or wanted.data.drop_hardest
    easiest = drop_easiest if drop_easiest is not None else wanted.data.drop_easiest if of_recipe else EASIEST_SHARE
    hardest = drop_hardest if drop_hardest is not None else wanted.data.drop_hardest
    kept, left_out = selection(wanted, easiest, hardest)
    files = {}
    if out is not None:
        files = {name: str(write_rows(out / f"{name}.jsonl", rows)) for name, rows in
                 (("kept", kept), ("left_out", left_out))}  # fmt: skip
        files["picture"] = str(_picture(out / "scores.png", kept, left_out))
    rows, scores = summary(kept, left_out), [r.score for r in (*kept, *left_out) if math.isfinite(r.score)]
    if as_json:
        shares = {"drop_easiest": easiest, "drop_hardest": hardest}
        print_json({**shares, "reused": found is not None, "sources": rows, "files": files})
        return
    output().print(scores_view(rows, scores))
    typer.echo(f"With drop_easiest {easiest:g} and drop_hardest {hardest:g}: {len(kept):,} rows kept, "
               f"{len(left_out):,} left out")  # fmt: skip
    for name, path in files.items():
        typer.echo(f"{name.replace('_', ' ').capitalize()}: {path}")


def _score_with_bars(recipe: Recipe, quiet: bool) -> None:
    from studio.scoring import make_scores
    from studio.terminal import profile_progress

    with profile_progress(output(), quiet, "scoring") as (scoring, loading):
        make_scores(recipe, scoring, loading)


def _picture(path: Path, kept: Sequence[Scored], left_out: Sequence[Scored]) -> Path:
    from studio.pictures import draw_scores

    return draw_scores(path, [(row.score, row.why) for row in (*kept, *left_out)])
