"""The command line: `studio validate | plan | profile | run | merge | combine | export | convert | jobs | cache | …`.

Each command is a short caller of one public function of `studio`. Errors of the studio's tree end a command with
one message and exit code 1 (wrong usage: 2), as JSON where --json was given. Nothing heavy is imported before a
command needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import studio
from studio.cli_data import data_app
from studio.cli_jobs import cancel_or_state, follow_only, jobs_app, show_job, show_started, watch
from studio.cli_outputs import outputs_app
from studio.cli_shared import AsJson, Overwrite, RecipePath, output, print_error, print_json, reported
from studio.errors import StudioError

if TYPE_CHECKING:
    from adapters.packed_cache import CacheEntry
    from adapters.router_profile import RouterProfile
    from studio.recipe import Recipe

app = typer.Typer(
    name="studio",
    help="Fine-tune Mixture-of-Experts models, experts and routers included.",
    epilog="Start with: studio run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(outputs_app)
app.add_typer(jobs_app)
app.add_typer(data_app)

MakeProfile = Annotated[
    bool, typer.Option("--profile", help="Make the router profile first where the placement rule needs one.")
]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"studio {studio.__version__}")
        raise typer.Exit


@app.command(epilog="Example: studio validate recipes/quickstart.yaml")
@reported
def validate(recipe: RecipePath, as_json: AsJson = False) -> None:
    """Check a recipe, its data files and its base model; report every problem with its line."""
    from studio.data import both_rows
    from studio.mixture_view import leak_lines, read_streams

    wanted = studio.load_recipe(recipe)
    streamed = read_streams(wanted, output(), as_json)
    train, held_out = both_rows(wanted)
    planned = studio.make_plan(wanted, thorough=True)  # refuses what the base cannot do
    train_examples = len(train) if streamed is None else streamed
    if as_json:
        counts = {"train_examples": train_examples, "eval_examples": len(held_out)}
        leaks = planned.leaks.model_dump(mode="json") if planned.leaks else None
        counts["dropped_rows"] = planned.dropped_rows
        print_json({"valid": True, **counts, "leaks": leaks, "recipe": wanted.model_dump(mode="json")})
    else:
        typer.echo(f"{recipe} is valid: {train_examples:,} training examples, {len(held_out):,} held out")
        if planned.dropped_rows:
            typer.echo(f"{planned.dropped_rows:,} bad rows are dropped (data.bad_rows: drop); see studio plan")
        for line in leak_lines(planned.leaks):
            typer.echo(line)


@app.command(epilog="Example: studio plan recipes/quickstart.yaml")
@reported
def plan(
    recipe: RecipePath,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Plan for this published model instead of the recipe's base; see shapes."),
    ] = None,
    make_profile: MakeProfile = False,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe will do: bytes, parameters and adapters per class of tensors, and the peak memory."""
    from studio.terminal import plan_view

    wanted = studio.load_recipe(recipe)
    if make_profile and shape:
        raise StudioError("--profile and --shape cannot be combined: a published shape has no weights to profile")
    if make_profile:
        profile_where_missing(wanted, as_json)
    planned = studio.make_plan(wanted, shape)
    if as_json:
        print_json(planned.model_dump(mode="json"))
    else:
        output().print(plan_view(planned))


@app.command(epilog="Example: studio shapes --json")
@reported
def shapes(as_json: AsJson = False) -> None:
    """List the published models that `plan --shape` knows without their files."""
    from studio.shapes import SHAPES
    from studio.terminal import shape_table

    counts = [(shape, shape.base()) for shape in SHAPES.values()]
    if as_json:
        print_json([{"name": s.name, "title": s.title, **base.parameter_counts()} for s, base in counts])
    else:
        output().print(shape_table([(s.name, s.title, base) for s, base in counts]))


@app.command(epilog="Example: studio profile recipes/embedded-sft-routed.yaml")
@reported
def profile(
    recipe: RecipePath,
    again: Annotated[bool, typer.Option("--again", help="Make it even if there is one already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Route a sample of the training data through the base and show which experts it uses."""
    from studio.profile import profile_path
    from studio.terminal import profile_view

    wanted = studio.load_recipe(recipe)
    found = None if again else studio.find_profile(wanted)
    made = found or profile_with_bars(wanted, as_json)
    path = profile_path(wanted)
    if as_json:
        print_json({"path": path, "reused": found is not None, **made.as_json()})
    else:
        output().print(profile_view(made))
        typer.echo(f"{'Made before' if found else 'Saved'}: {path}")


@app.command(epilog="Example: studio run recipes/quickstart.yaml --overwrite")
@reported
def run(
    recipe: RecipePath,
    overwrite: Overwrite = False,
    detach: Annotated[bool, typer.Option("--detach", help="Start the job and return at once.")] = False,
    make_profile: MakeProfile = False,
    as_json: AsJson = False,
) -> None:
    """Start the job of a recipe and follow it to its end. Ctrl-C cancels it."""
    wanted = studio.load_recipe(recipe)
    if make_profile:
        profile_where_missing(wanted, as_json)
    job = studio.submit(wanted, overwrite=overwrite)
    if detach:
        show_started(job, as_json)
    else:
        watch(job, as_json)


@app.command(epilog="Example: studio suggest recipes/quickstart.yaml")
@reported
def suggest(recipe: RecipePath, as_json: AsJson = False) -> None:
    """Show hyper-parameters to begin with, by model size, data size and method, each with its reason and source."""
    from studio.hyper_view import suggestion_table

    found = studio.suggest(studio.load_recipe(recipe))
    if as_json:
        print_json([{**vars(suggested), "recipe": has} for suggested, has in found])
    else:
        output().print(suggestion_table(found))


@app.command("lr-test", epilog="Example: studio lr-test recipes/quickstart.yaml --steps 80")
@reported
def lr_test(
    recipe: RecipePath,
    start: Annotated[float, typer.Option("--from", help="The first learning rate.")] = 1e-6,
    end: Annotated[float, typer.Option("--to", help="The last one.")] = 1.0,
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps between them.")] = 100,
    out: Annotated[Path | None, typer.Option("--out", help="The job directory; else beside the recipe's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find a learning rate: let it grow over a few steps and see where the loss falls. A job like others."""
    from studio.hyper_view import lr_test_view
    from studio.lr_test import Ramp

    job = studio.submit_lr_test(studio.load_recipe(recipe), Ramp(start, end, steps), out=out)
    try:
        state = follow_only(job, as_json)
    except KeyboardInterrupt:
        state = cancel_or_state(job)
    result = job.result()
    if state.status != "succeeded" or result is None:
        show_job(job, state, as_json)
        raise typer.Exit(1)
    print_json(result["lr_test"]) if as_json else output().print(lr_test_view(result["lr_test"]), soft_wrap=True)


@app.command(
    epilog="Example: studio sweep recipes/quickstart.yaml --param training.learning_rate=1e-4..1e-2:log "
    "--param adapter.attention_rank=4,8,16 --trials 12"
)
@reported
def sweep(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="WHAT", help="A recipe, a sweep's YAML, or a sweep's folder to go on with.", show_default=False
        ),
    ],
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="FIELD=RANGE", help="A field and its range or list.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all; 20 if not given.")] = None,
    metric: Annotated[str | None, typer.Option(help="What decides, if not the held-out loss.")] = None,
    sampler: Annotated[str | None, typer.Option(metavar="tpe|random|grid", help="How values are proposed.")] = None,
    prune_after: Annotated[
        int | None, typer.Option(min=0, help="Finished trials before trials are pruned, 4 if not given; 0: none is.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampler.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder; else beside the recipe's jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search hyper-parameters: trials are ordinary jobs, hopeless ones are pruned. Ctrl-C stops it whole."""
    from studio.hyper_view import sweep_progress, sweep_view
    from studio.sweep_space import split_param

    given = {"trials": trials, "metric": metric, "sampler": sampler, "prune_after": prune_after, "seed": seed}
    planned = studio.plan_sweep(what, dict(map(split_param, param or ())), out=out, **given)
    try:
        with sweep_progress(output(), quiet=as_json) as shown:
            results = studio.run_sweep(planned, shown)
    except KeyboardInterrupt:
        stopped = f"stopped; what was tried is kept. Go on with: studio sweep {planned.folder}"
        print_json({"error": {"type": "KeyboardInterrupt", "message": stopped}}) if as_json else print_error(stopped)
        raise typer.Exit(130) from None
    print_json(results) if as_json else output().print(sweep_view(results), soft_wrap=True)


@app.command(epilog="Example: studio cache --remove all")
@reported
def cache(
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="NAME|all", help="Delete this model, or all of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the quantised bases that are kept for the next job, or delete them: a job that needs one builds it anew."""
    from adapters.packed_cache import cache_entries, default_cache_dir

    directory = default_cache_dir()
    entries = cache_entries(directory)
    if remove is not None:
        remove_from_cache(directory, entries, remove, as_json)
    elif as_json:
        rows = [{"name": entry.name, **vars(entry)} for entry in entries]
        print_json({"directory": directory, "size_bytes": total_bytes(entries), "entries": rows})
    elif entries:
        from studio.terminal import cache_table

        output().print(cache_table(entries))
    else:
        typer.echo(f"No quantised bases in {directory}")


@app.command(epilog="Example: studio schema > recipe.schema.json")
@reported
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    print_json(studio.recipe_schema())


@app.command(epilog="Example: studio ui --port 7860")
@reported
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    jobs_root: Annotated[Path, typer.Option(help="The directory that holds the jobs.")] = Path("runs"),
) -> None:
    """Open the studio in the browser, for this machine alone (127.0.0.1)."""
    from ui.app import main as serve

    serve("127.0.0.1", port, jobs_root)


def total_bytes(entries: Sequence[CacheEntry]) -> int:
    return sum(entry.size_bytes for entry in entries)


def remove_from_cache(directory: Path, entries: Sequence[CacheEntry], name: str, as_json: bool) -> None:
    """Deletes the entry `name`, or with "all" every one, and says so."""
    from adapters.packed_cache import remove
    from studio.quantities import as_bytes

    chosen = [entry for entry in entries if name in ("all", entry.name)]
    if not chosen and name != "all":
        known = ", ".join(["all", *(entry.name for entry in entries)])
        raise StudioError(f"no quantised base {name!r} in {directory}; allowed: {known}")
    for entry in chosen:
        remove(entry)
    if as_json:
        print_json({"removed": [entry.name for entry in chosen], "size_bytes": total_bytes(chosen)})
    else:
        typer.echo(f"Removed {len(chosen)} of {len(entries)} quantised bases, {as_bytes(total_bytes(chosen))}")


def profile_where_missing(recipe: Recipe, quiet: bool) -> None:
    """Makes the router profile that the recipe's rule needs, unless there is one or the rule needs none."""
    from studio.placing import needs_profile

    if needs_profile(recipe) and studio.find_profile(recipe) is None:
        profile_with_bars(recipe, quiet)


def profile_with_bars(recipe: Recipe, quiet: bool) -> RouterProfile:
    from studio.terminal import profile_progress

    with profile_progress(output(), quiet) as (routing, loading):
        return studio.make_profile(recipe, routing, loading)


if __name__ == "__main__":
    app(prog_name="studio")
