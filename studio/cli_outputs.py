"""`studio merge | evaluate | export | convert | combine | verify | push`: what becomes of a finished job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import studio
from studio.cli_shared import AsJson, Overwrite, Verify, output, print_json, reported

if TYPE_CHECKING:
    from rich.console import RenderableType


outputs_app = typer.Typer()


@outputs_app.command(epilog="Example: studio merge runs/quickstart/adapter --out merged/quickstart")
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


@outputs_app.command(
    epilog="Example: studio evaluate runs/quickstart --data mine.jsonl --task recipes/tasks/domains.yaml"
)
@reported
def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A job, an adapter directory, or a model.", show_default=False)
    ],
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Rows to measure on.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME|FILE", help="A task of lm-eval, or your own in YAML.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Measure the first N rows, and N examples of each task; without it what the job's recipe says, "
            "or 200 rows and whole tasks.",
            show_default=False,
        ),
    ] = None,
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


@outputs_app.command(
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
        Path | None,
        typer.Option(
            metavar="FILE", help="Data, or an importance matrix, that tell the GGUF quantiser which weights matter."
        ),
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


@outputs_app.command(epilog="Example: studio convert runs/quickstart/adapter compact/quickstart --to compact")
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


@outputs_app.command(epilog="Example: studio combine runs/a runs/b --weight 0.7 --weight 0.3 --out combined")
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


@outputs_app.command(epilog="Example: studio verify exports/quickstart --adapter runs/quickstart")
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


@outputs_app.command(epilog="Example: studio push exports/Llama-tickets me/Llama-tickets --dry-run")
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


def show_written(report: dict[str, Any], view: RenderableType, as_json: bool) -> None:
    """What was written, and how every check of it came out."""
    from rich.console import Group

    from studio.export_view import checks_table, verdict

    if as_json:
        print_json(report)
        return
    output().print(Group(checks_table(report["checks"]), "", view, verdict(report["checks"])), soft_wrap=True)
