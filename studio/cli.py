"""The command line: `studio validate | plan | profile | run | merge | combine | export | convert | jobs | cache | …`.

Each command is a short caller of one public function of `studio`. Errors of the studio's tree end a command with
one message and exit code 1 (wrong usage: 2), as JSON where --json was given. Nothing heavy is imported before a
command needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import studio
from studio.cli_data_mix import add_to
from studio.cli_shared import AsJson, RecipePath, output, print_error, print_json, reported
from studio.errors import JobError, StudioError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from adapters.packed_cache import CacheEntry
    from adapters.router_profile import RouterProfile
    from studio.jobs import Job, JobState
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
jobs_app = typer.Typer(name="jobs", help="List, show and cancel jobs.", epilog="Example: studio jobs list")
app.add_typer(jobs_app)
data_app = typer.Typer(
    name="data",
    help="Look at data before training on them.",
    epilog="Example: studio data inspect rows.jsonl",
    no_args_is_help=True,
)
add_to(data_app)
app.add_typer(data_app)

JobPath = Annotated[str, typer.Argument(metavar="JOB", help="A job directory, or a name in the root.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the result before it appears.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
MakeProfile = Annotated[
    bool, typer.Option("--profile", help="Make the router profile first where the placement rule needs one.")
]
Root = Annotated[Path, typer.Option("--root", help="The directory that holds the jobs.")]


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
        print_json({"valid": True, **counts, "leaks": leaks, "recipe": wanted.model_dump(mode="json")})
    else:
        typer.echo(f"{recipe} is valid: {train_examples:,} training examples, {len(held_out):,} held out")
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


@app.command(epilog="Example: studio merge runs/quickstart/adapter --out merged/quickstart")
@reported
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The model directory to write.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Number type to write, if not the base's.")] = None,
    into: Annotated[
        str,
        typer.Option(
            "--into",
            metavar="auto|original|quantized",
            help="Merge into the base's own weights, or into these as training held them; "
            "auto: what has the lower loss on the job's held-out data.",
        ),
    ] = "auto",
    verify: Verify = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base: a model that loads without the studio. Killed, the next call goes on.

    Its files and weights are compared with base and adapter before it appears; export also runs it.
    """
    from studio.terminal import merge_progress, merge_view

    with merge_progress(output(), quiet=as_json) as progress:
        report = studio.merge(
            adapter, out, base=base, dtype=dtype, into=into, verify=verify, overwrite=overwrite, progress=progress
        )
    show_written(report, merge_view(report), as_json)


@app.command(epilog="Example: studio evaluate runs/quickstart --data mine.jsonl --task recipes/tasks/domains.yaml")
@reported
def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A job, an adapter directory, or a model.", show_default=False)
    ],
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Rows to measure on.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME|FILE", help="A task of lm-eval, or your own in YAML.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="First rows, and of each task; else 200 and all.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="Schema that answers should fit.")
    ] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--no-chat-template", help="Put the tasks' prompts into it.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of an adapter, if not the one that it names.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a forward pass.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a finished job, an adapter or a model: held-out metrics and tasks, base against tuned, with intervals."""
    from studio.metric_view import measuring_progress, report_view

    tasks = [str(Path(name).absolute()) if name.endswith((".yaml", ".yml")) else name for name in task or ()]
    with measuring_progress(output(), quiet=as_json) as progress:
        report = studio.evaluate(
            what,
            data=data,
            tasks=tasks,
            examples=examples,
            json_schema=json_schema,
            chat_template=chat_template,
            base=base,
            batch_size=batch_size,
            progress=progress,
        )
    print_json(report) if as_json else output().print(report_view(report), soft_wrap=True)


@app.command(
    epilog="Example: studio export runs/quickstart --for ollama --quant Q4_K_M --out exports/quickstart-ollama"
)
@reported
def export(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A job, an adapter directory, or a model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; also the model's name.", show_default=False)],
    consumer: Annotated[str | None, typer.Option("--for", metavar="PROGRAM", help="The program it is for.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="The format, if not the program's first.")
    ] = None,
    quant: Annotated[str | None, typer.Option("--quant", metavar="TYPE", help="GGUF type, if not Q4_K_M.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Number type of safetensors, if not the base's.")] = None,
    into: Annotated[
        str,
        typer.Option("--into", metavar="auto|original|quantized", help="The weights that an adapter is merged into."),
    ] = "auto",
    base: Annotated[str | None, typer.Option(help="The base of an adapter, if not the one that it names.")] = None,
    importance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples that tell the GGUF quantiser which weights matter.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples to verify with, if not the job's held-out ones.")
    ] = None,
    verify: Verify = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder that one program can use, prove it in that program's library, and certify it. Ctrl-C undoes it."""
    from studio.export_view import certificate_view, export_progress, plan_view

    wanted = studio.ExportRequest(
        what, out, consumer, form, base, quant, dtype, into, importance, prompts, verify, overwrite
    )
    planned = studio.plan_export(wanted)
    if dry_run:
        print_json(planned.as_json()) if as_json else output().print(plan_view(planned), soft_wrap=True)
        return
    if not as_json:
        output().print(plan_view(planned), "", soft_wrap=True)
    with export_progress(output(), quiet=as_json) as progress:
        report = studio.export(wanted, progress)
    print_json(report) if as_json else output().print(certificate_view(report), soft_wrap=True)


@app.command(epilog="Example: studio convert runs/quickstart/adapter compact/quickstart --to compact")
@reported
def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter directory.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter directory to write.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="compact|peft", help="The form to write.", show_default=False)],
    verify: Verify = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in its other form: compact (each expert its own rank) or peft (stock PEFT loads it).

    Both forms are compared bit by bit before the new one appears.
    """
    from studio.terminal import convert_view

    report = studio.convert(adapter, out, to=to, verify=verify, overwrite=overwrite)
    show_written(report, convert_view(report), as_json)


@app.command(epilog="Example: studio combine runs/a runs/b --weight 0.7 --weight 0.3 --out combined")
@reported
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Adapters of one base.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The adapter directory to write.", show_default=False)],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="One of each adapter, in their order; 1 each if none. Negative takes it away."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="sum|ties|dare", help="How they are combined; a sum is exact.")
    ] = "sum",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank, if not the sum of their ranks.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Fraction of values that ties (0.2) and dare (0.5) keep.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare's choice.")] = 0,
    base: Annotated[str | None, typer.Option(help="The base model, if not the one the adapters name.")] = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Combine several adapters of one base into one.

    A sum is compared with the adapters, value by value, before it appears; of ties and dare all but the values.
    """
    from rich.text import Text

    from studio.combining import summary
    from studio.terminal import clean, merge_progress

    with merge_progress(output(), quiet=as_json, what="combining") as progress:
        report = studio.combine(
            adapters,
            out,
            weights=weight,
            method=method,
            rank=rank,
            density=density,
            seed=seed,
            base=base,
            verify=verify,
            overwrite=overwrite,
            progress=progress,
        )
    show_written(report, Text(clean(summary(report))), as_json)


@app.command(epilog="Example: studio verify exports/quickstart --adapter runs/quickstart")
@reported
def verify(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that export wrote.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Its base, if not where its certificate says.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter in it, or the job that trained that.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples to verify with, if not the job's held-out ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify an export again: its files against its certificate, and what it says against the trained model."""
    from studio.export_view import certificate_view

    report = studio.verify(export, base=base, adapter=adapter, prompts=prompts)
    print_json(report) if as_json else output().print(certificate_view(report), soft_wrap=True)
    if report["verdict"] == "failed":
        raise typer.Exit(1)


@app.command(epilog="Example: studio push exports/Llama-tickets me/Llama-tickets --dry-run")
@reported
def push(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that export wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; private if not.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything here, and upload nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a certified export to a hub, privately. The token is the hub client's affair: see hf auth login."""
    from studio.export_view import push_view

    report = studio.push(export, repository, public=public, dry_run=dry_run)
    print_json(report) if as_json else output().print(push_view(report), soft_wrap=True)


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


@data_app.command("inspect", epilog="Example: studio data inspect recipes/data/tickets-train.jsonl --base embedded")
@reported
def data_inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Anything that data.train takes.", show_default=False)],
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="Read it as this recipe would, for its base and method.")
    ] = None,
    base: Annotated[str, typer.Option(help="The base whose tokenizer counts, where there is no recipe.")] = "embedded",
    as_json: AsJson = False,
) -> None:
    """Show what a file holds: format, counts, lengths, duplicates, bad rows, and what of three rows is trained."""
    from studio.data_view import reading_progress, report_view

    wanted = studio.load_recipe(recipe) if recipe else None
    with reading_progress(output(), quiet=as_json) as progress:
        report = studio.inspect_data(file, recipe=wanted, base=base, progress=progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        output().print(report_view(report))


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


@jobs_app.callback(invoke_without_command=True)
def jobs_main(context: typer.Context, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        jobs_list(root=root, as_json=as_json)
    else:  # what stands before the command holds for it too
        context.default_map = {context.invoked_subcommand: {"root": str(root), "as_json": as_json}}


@jobs_app.command("list", epilog="Example: studio jobs list --root runs")
@reported
def jobs_list(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """List the jobs in a root, newest first."""
    from studio.terminal import job_table

    rows = [(job, job.state()) for job in studio.list_jobs(root)]
    if as_json:
        print_json([job_as_json(job, state) for job, state in rows])
    elif rows:
        output().print(job_table(rows))
    else:
        typer.echo(f"No jobs in {root}. Start one: studio run recipes/quickstart.yaml")


@jobs_app.command("show", epilog="Example: studio jobs show quickstart --follow")
@reported
def jobs_show(
    job: JobPath,
    root: Root = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow", help="Follow the job until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show where a job stands and, once it has ended, its result."""
    found = find_job(job, root)
    if follow and not found.state().ended:
        follow_only(found, as_json)
    show_job(found, found.state(), as_json)


@jobs_app.command("cancel", epilog="Example: studio jobs cancel quickstart")
@reported
def jobs_cancel(job: JobPath, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Cancel a queued or running job, and wait until its processes are gone."""
    found = find_job(job, root)
    state = found.cancel()
    if as_json:
        print_json(job_as_json(found, state))
    else:
        typer.echo(f"{found.name} is {state.status}")


# -------------------------------------------------------------------- shared by the commands


def find_job(name: str, root: Path) -> Job:
    """The job at the path `name`, or of that name in `root`."""
    return studio.open_job(name if (Path(name) / "state.json").is_file() else root / name)


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


def show_written(report: dict[str, Any], view: RenderableType, as_json: bool) -> None:
    """What was written, and how every check of it came out."""
    from studio.export_view import checks_table, verdict

    if as_json:
        print_json(report)
        return
    output().print(checks_table(report["checks"]), "", view, verdict(report["checks"]), soft_wrap=True)


def watch(job: Job, as_json: bool) -> None:
    """Follows a job that this command started; Ctrl-C cancels it; exits non-zero unless it succeeds."""
    from studio.terminal import plan_view

    try:
        if not as_json:
            output().print(plan_view(job.plan()), "")
        state = follow_only(job, as_json)
    except KeyboardInterrupt:
        if not as_json:
            typer.echo("\nCancelling, waiting for the training process to end …")
        state = cancel_or_state(job)
    if not as_json:
        typer.echo()
    show_job(job, state, as_json)
    if state.status != "succeeded":
        raise typer.Exit(1)


def follow_only(job: Job, quiet: bool) -> JobState:
    from studio.follow import follow, wait

    return wait(job) if quiet else follow(job, output())


def cancel_or_state(job: Job) -> JobState:
    try:
        return job.cancel()
    except JobError:  # it ended by itself meanwhile
        return job.state()


def show_started(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job_as_json(job, job.state()))
    else:
        typer.echo(f"Started {job.path}\nFollow it: studio jobs show {job.path} --follow")


def show_job(job: Job, state: JobState, as_json: bool) -> None:
    """The result of a job that has one; of one that did not succeed, where it stands and why."""
    from studio.progress import losses
    from studio.terminal import job_view, result_view

    result = job.result()
    if as_json:
        print_json({**job_as_json(job, state), "result": result})
    elif result and state.ended:
        output().print(result_view(job, result))
    if not as_json and state.status != "succeeded":
        output().print(job_view(job, state, losses(job.metrics())))


def job_as_json(job: Job, state: JobState) -> dict[str, Any]:
    error = state.error.model_dump() if state.error else None
    return {"job": str(job.path), **state.model_dump(exclude={"error"}), "error": error}


if __name__ == "__main__":
    app(prog_name="studio")
