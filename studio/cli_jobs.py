"""`studio jobs`, and how a running job is followed and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import studio
from studio.cli_shared import AsJson, output, print_json, reported
from studio.errors import JobError

if TYPE_CHECKING:
    from studio.jobs import Job, JobState

jobs_app = typer.Typer(name="jobs", help="List, show and cancel jobs.", epilog="Example: studio jobs list")

JobPath = Annotated[str, typer.Argument(metavar="JOB", help="A job directory, or a name in the root.")]
Root = Annotated[Path, typer.Option("--root", help="The directory that holds the jobs.")]


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
