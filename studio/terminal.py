"""What the command line shows: plan, result and job list as Rich renderables. No logic, no files.

Text that comes from a model, a data file or a log goes through `clean`: it is shown, never interpreted.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from studio.hyper_view import lr_test_view
from studio.methods import REWARD_HEAD
from studio.metric_view import gate_lines, metric_table
from studio.mixture_view import data_lines
from studio.progress import SIDES, ran_for, steps, warnings
from studio.quantities import SPARKS, as_bytes, as_count, as_duration, as_percent, sparkline

if TYPE_CHECKING:
    from adapters.packed_cache import CacheEntry
    from adapters.router_profile import RouterProfile
    from studio.jobs import Job, JobState
    from studio.plan import Plan
    from studio.weights import Base

STATUS_STYLES = {
    "queued": "yellow",
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
    "lost": "red",
}
MEMORY_PARTS = (
    "weights", "adapters", "gradients", "optimizer", "activations", "workspace", "logits", "reward_models", "tasks",
    "runtime",
)  # fmt: skip
MOST_WARNINGS = 10
"""Shown at the end of a run; all of them are in its metrics.jsonl."""

EXPERT_PATHS = {"fast": "keeps the experts' activations", "lean": "computes the experts again in the backward"}


def clean(text: str) -> str:
    """`text` with its control characters made visible, so that no escape sequence reaches the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def warning_text(words: str) -> Text:
    return Text.assemble(("warning: ", "bold yellow"), clean(words))


# -------------------------------------------------------------------- plan


def plan_view(plan: Plan) -> RenderableType:
    """The plan: the model, each class of tensors with its weights and adapters, and the memory at the peak."""
    moe = f", {plan.moe_layers} of them MoE with {plan.experts} experts, top-{plan.top_k}" if plan.experts else ""
    model = f"{clean(plan.model)} · {plan.model_type} · {plan.layers} layers{moe}"
    parameters = as_count(plan.parameters)
    if plan.experts:
        parameters += f" parameters, {as_count(plan.active_parameters)} active per token"
    lines = [("Model", model), ("", parameters), *data_lines(plan), *_placement_lines(plan)]
    if plan.learning_rate is not None:
        lines.append(("Rate", f"{plan.learning_rate:g}, for auto; studio suggest says why"))
    head = [Text.assemble((f"{name:<8}", "bold"), words) for name, words in lines]
    said = [warning_text(words) for words in plan.warnings]
    return Group(*head, "", _class_table(plan), "", _memory_table(plan), *([""] if said else []), *said)


def _class_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False, footer_style="bold")
    table.add_column("Tensors", footer="total")
    columns = (
        ("Count", f"{sum(entry.tensors for entry in plan.classes):,}"),
        ("Params", as_count(plan.parameters)),
        ("Type", ""),
        ("Memory", as_bytes(plan.bytes)),
        ("Rank", ""),
        ("Trainable", as_count(plan.trainable_parameters)),
        ("Share", as_percent(plan.trainable_fraction)),
    )
    for name, footer in columns:
        table.add_column(name, footer=footer, justify="left" if name == "Type" else "right")
    for entry in plan.classes:
        trained = entry.trainable_parameters
        table.add_row(
            entry.name.replace("_", " "),
            f"{entry.tensors:,}",
            as_count(entry.parameters),
            entry.dtype,
            as_bytes(entry.bytes),
            str(entry.rank) if entry.rank else "–",
            as_count(trained) if trained else "–",
            as_percent(trained / entry.parameters) if trained else "–",
            style="" if trained else "dim",
        )
    return table


def _memory_table(plan: Plan) -> Table:
    parts = plan.memory.model_dump()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    peak = plan.memory.peak_bytes
    table.add_row("Predicted peak memory", as_bytes(peak), "", style="bold")
    for name in (name for name in MEMORY_PARTS if parts[f"{name}_bytes"]):
        count = parts[f"{name}_bytes"]
        label = f"  {name.replace('_', ' ')}"
        table.add_row(Text(label, style="not bold"), as_bytes(count), Text(_bar(count, peak), style="cyan"))
    at_hand = "not known" if plan.memory_at_hand_bytes is None else as_bytes(plan.memory_at_hand_bytes)
    table.add_row("Memory at hand", at_hand, "")
    if plan.experts:
        table.add_row("Expert path", plan.expert_path, EXPERT_PATHS[plan.expert_path])
    return table


def _bar(count: float, whole: float, width: int = 30) -> str:
    return "█" * round(width * count / whole) if whole else ""


def _placement_lines(plan: Plan) -> list[tuple[str, str]]:
    """(name, words) of the placement: rule, experts adapted, what that saves, and what it covers of the data."""
    placement = plan.placement
    if placement is None:
        return []
    words = [placement.rule, f"{placement.experts_adapted:,} of {placement.experts_in_all:,} routed experts adapted"]
    if placement.parameters_saved:
        saved = placement.parameters_saved / (placement.parameters + placement.parameters_saved)
        words.append(f"{as_percent(saved)} fewer expert parameters than with the largest rank on all")
    lines = [("Experts", " · ".join(words))]
    shares = dict(placement.coverage or {})
    if len(shares) == 2:  # one data source: it is all of them
        shares.pop("all")
    covered = [f"{clean(name)} {as_percent(share)}" for name, share in shares.items()]
    return [*lines, ("Covers", f"of the routed tokens: {' · '.join(covered)}")] if covered else lines


# -------------------------------------------------------------------- profile


def profile_view(profile: RouterProfile) -> RenderableType:
    """The router profile: the sample, then each layer with its load, its experts as a strip, and the busiest three."""
    from studio.routing_view import reach

    sources = [f"{clean(s)} {as_count(n)}" for s, n in zip(profile.sources, profile.tokens.tolist(), strict=True)]
    sample = f"{sum(profile.tokens.tolist()):,} tokens, seed {profile.seed}"
    model = f"{len(profile.layers)} MoE layers with {profile.experts} experts, top-{profile.top_k}"
    if profile.shared_experts:
        model += f"; {profile.shared_experts} shared in each layer, not counted here"
    lines = [("Sample", sample), ("Sources", " · ".join(sources)), ("Model", model)]
    head = [Text.assemble((f"{name:<8}", "bold"), words) for name, words in lines]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("Layer", "Load entropy", "90 % on", f"Experts 0 to {profile.experts - 1}", "Busiest, share of tokens"):
        table.add_column(name, justify="left" if name.startswith(("Experts", "Busiest")) else "right")
    shares, entropies = profile.share(), profile.load_entropy().tolist()
    for layer, entropy, share in zip(profile.layers, entropies, shares, strict=True):
        row = share.tolist()
        most = f"{reach(share[None]):.0f}"
        table.add_row(str(layer), f"{entropy:.3f}", most, Text(heat_strip(row), style="cyan"), _busiest(row))
    return Group(*head, "", table)


def heat_strip(shares: Sequence[float], width: int = 48) -> str:
    """A character an expert, as high as its share; a dot: no token. Of too many experts neighbours share one."""
    width = min(width, len(shares))
    edges = [round(i * len(shares) / width) for i in range(width + 1)]
    most = [max(shares[a:b]) for a, b in pairwise(edges)]
    top = max(most) or 1.0
    return "".join(SPARKS[round(value / top * (len(SPARKS) - 1))] if value else "·" for value in most)


def _busiest(shares: Sequence[float], count: int = 3) -> str:
    order = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:count]
    return ", ".join(f"{expert}: {as_percent(shares[expert])}" for expert in order)


def shape_table(rows: Sequence[tuple[str, str, Base]]) -> RenderableType:
    """Published shapes: (name, title, base) each, with their parameters."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("Shape", "Model", "Layers", "Experts", "Parameters", "In experts", "Active"):
        table.add_column(name, justify="left" if name in ("Shape", "Model") else "right")
    for name, title, base in rows:
        counts = [f"{count / 1e9:.1f} B" for count in base.parameter_counts().values()]
        table.add_row(name, title, str(len(base.layers)), str(base.experts), *counts)
    return table


# -------------------------------------------------------------------- result


def result_view(job: Job, result: dict[str, Any]) -> RenderableType:
    """The finished run: before and after, generations side by side, memory, time, where the files lie, warnings."""
    if found := result.get("lr_test"):
        return lr_test_view(found)
    parts: list[RenderableType] = []
    if result.get("generations"):
        parts += [*_generations(result["generations"]), ""]
    if result.get("before") and result.get("after"):
        sides = (result["before"], result["after"], result.get("change") or {})
        parts += [metric_table(*sides, result.get("start"), result.get("change_from_start")), ""]
    if lines := gate_lines(result.get("gate") or []):
        parts += [*lines, ""]
    parts += [Text(line) for line in _rounds(result.get("trained", {}).get("rounds", []))]
    parts.append(_facts(job, result))
    return Group(*parts, *_warning_lines(job))


def _warning_lines(job: Job) -> list[Text]:
    """The newest warnings of the run, and how many came before them."""
    found = warnings(job.metrics())
    hidden = len(found) - MOST_WARNINGS
    earlier = [Text(clean(f"{hidden:,} earlier ones in {job.path / 'metrics.jsonl'}"), "dim")] if hidden > 0 else []
    lines = [*(warning_text(words) for words in found[-MOST_WARNINGS:]), *earlier]
    return [Text(), *lines] if lines else []


def _rounds(rounds: Iterable[dict[str, Any]]) -> list[str]:
    """What rejection sampling kept, a line a round."""
    return [
        f"Round {row['round']}: {row['sampled']:,} completions sampled, {as_percent(row['acceptance'])} accepted, "
        f"{row['kept']:,} kept from {row['prompts_with_kept']:,} prompts"
        for row in rounds
    ]


def _generations(rows: Iterable[dict[str, str]]) -> list[RenderableType]:
    return [Text("Answers to held-out prompts", style="bold"), *(_generation(row) for row in rows)]


def _generation(row: dict[str, str]) -> Panel:
    reference = row["reference"].strip()
    answers = Table(box=None, expand=True, pad_edge=False)
    cells = []
    for side in (name for name in SIDES if name in row):
        right = row[side].strip() == reference
        said = ("  ✓ matches" if right else "  ✗ differs", "green" if right else "red")
        mark = Text.assemble(side, said if reference else "")
        answers.add_column(mark, ratio=1, overflow="fold")
        cells.append(Text(clean(row[side].strip()) or "(nothing)"))
    answers.add_row(*cells)
    prompt = Text(clean(row["prompt"].strip()))
    wanted = Text.assemble(("reference  ", "dim"), clean(reference))
    parts = (prompt, wanted, answers) if reference else (prompt, answers)
    return Panel(Group(*parts), box=box.ROUNDED, border_style="dim")


def _next(job: Job) -> str:
    """The command that makes something of the adapter."""
    path = shlex.quote(str(job.path))
    if (job.path / "adapter" / REWARD_HEAD).is_file():
        return f"studio merge {path} --out merged/{job.name}"
    return f"studio export {path} --for transformers --out exports/{job.name}"


def _facts(job: Job, result: dict[str, Any]) -> Table:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    if memory := result.get("memory"):
        facts.add_row("Peak memory", _memory_fact(memory["predicted_bytes"], memory["measured_bytes"]))
    if seconds := result.get("seconds"):
        shares = ", ".join(f"{k.replace('_', ' ')} {as_duration(v)}" for k, v in seconds.items() if k != "total")
        facts.add_row("Time", f"{as_duration(seconds['total'])} ({shares}), {result.get('steps', 0):,} steps")
    places = dict(result.get("files") or {"job": job.path})
    if (job.path / "pictures").is_dir():
        places["pictures"] = job.path / "pictures"
    for name, place in places.items():
        facts.add_row(name.replace("_", " ").capitalize(), Text(clean(str(place))))
    if all(verdict["passed"] for verdict in result.get("gate") or []):
        facts.add_row("Next", Text(clean(_next(job))))
    return facts


def _memory_fact(predicted: float, measured: float) -> str:
    off = f" ({round(100 * (measured - predicted) / predicted):+d} %)" if predicted else ""
    return f"{as_bytes(predicted)} predicted, {as_bytes(measured)} measured{off}"


# -------------------------------------------------------------------- merge


@contextmanager
def merge_progress(console: Console, quiet: bool, what: str = "merging") -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes, as the callback that `studio.merge` and `combine` take; None where nothing is to be shown."""
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def profile_progress(
    console: Console, quiet: bool, what: str = "routing"
) -> Iterator[tuple[Callable[[int, int], None] | None, ...]]:
    """Two bars, as the callbacks of `studio.make_profile`: `what` is done, and before that bytes of the base read."""
    if quiet or not console.is_terminal:
        yield None, None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console) as bars:
        loading, routing = (bars.add_task(title, total=None, start=False) for title in ("loading", what))

        def report(task: TaskID) -> Callable[[int, int], None]:
            def update(done: int, total: int) -> None:
                bars.start_task(task)
                bars.update(task, completed=done, total=total)

            return update

        yield report(routing), report(loading)


def merge_view(report: dict[str, Any]) -> RenderableType:
    """What a merge has written."""
    changed = (
        f"{report['changed']:,} of {report['tensors']:,} tensors changed, {report['experts_changed']:,} expert matrices"
    )
    size = f"{as_bytes(report['bytes'])} in {report['dtype']}"
    lines = [f"Merged model in {clean(str(report['out']))}: {size}, {changed}", _merged_into(report["into"])]
    if relative := sorted(delta["relative"] for delta in report["deltas"]):
        lines.append(f"Change of a tensor, ‖Δ‖ / ‖W‖: {relative[len(relative) // 2]:.2%}, at most {relative[-1]:.2%}")
    if head := report.get("head"):
        loads = f"transformers loads it as {head['class']}" if head["class"] else "transformers has no class for it"
        lines.append(f"Reward model: score.weight beside the weights; {loads}; rewards[].job reads this folder, too")
    if report["resumed"]:
        lines.append(f"{report['resumed']} of {report['files']} weight files were there from a merge that was killed")
    return Text("\n".join([*lines, *(f"Warning: {clean(warning)}" for warning in report["warnings"])]))


def _merged_into(into: dict[str, Any]) -> str:
    names = {"original": "the base's own weights", "quantized": "the base as training held it, quantised"}
    losses = into["losses"] or {}
    shown = "".join(f"; loss {loss:.4f} in {names[name]}" for name, loss in losses.items())
    return f"Merged into {names[into['chosen']]}: {into['why']}{shown}"


def convert_view(report: dict[str, Any]) -> RenderableType:
    """What a conversion has written."""
    sizes = f"{as_bytes(report['bytes'])}, was {as_bytes(report['bytes_before'])}"
    where = clean(str(report["out"]))
    return Text(f"Adapter in {where}: {report['to']} form, {report['experts']:,} expert matrices, {sizes}")


# -------------------------------------------------------------------- jobs


def job_table(rows: Sequence[tuple[Job, JobState]], now: float | None = None) -> RenderableType:
    """The jobs of a root, newest first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("Job", "Status", "Phase", "Steps", "Created", "Time"):
        table.add_column(name, justify="right" if name in ("Steps", "Time") else "left")
    for job, state in rows:
        created = _minute(state.created_at)
        table.add_row(clean(job.name), status_text(state), state.phase, steps(state), created, ran_for(state, now))
    return table


def job_view(job: Job, state: JobState, losses: Sequence[float]) -> RenderableType:
    """One job: where it stands, its loss so far, what it failed of, and what was warned of."""
    view = Table(box=None, show_header=False, pad_edge=False)
    view.add_column(style="bold", no_wrap=True)
    view.add_column(overflow="fold")
    view.add_row("Job", Text(clean(str(job.path))))
    view.add_row("Status", status_text(state))
    view.add_row("Phase", f"{state.phase}, step {steps(state)}")
    if ran_for(state):
        view.add_row("Time", ran_for(state))
    if losses:
        view.add_row("Loss", f"{losses[-1]:.4f}  {sparkline(losses)}")
    if state.ended and not (job.path / "adapter").exists():
        view.add_row("Adapter", "none was written")
    if state.error:
        view.add_row("Error", Text(clean(f"{state.error.type}: {state.error.message}"), style="red"))
        view.add_row("Log", Text(clean(str(job.path / "log.txt"))))
    return Group(view, *_warning_lines(job))


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def status_text(state: JobState) -> Text:
    return Text(state.status, style=STATUS_STYLES[state.status])


# -------------------------------------------------------------------- cache


def cache_table(entries: Sequence[CacheEntry]) -> RenderableType:
    """The quantised bases that are kept, with what they take in all."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False, footer_style="bold")
    table.add_column("Name", footer="total", no_wrap=True)
    table.add_column("Base", overflow="fold")
    table.add_column("Format")
    table.add_column("Size", footer=as_bytes(sum(entry.size_bytes for entry in entries)), justify="right", no_wrap=True)
    table.add_column("Built")
    for entry in entries:
        texts = [Text(clean(text)) for text in (entry.name, _base(entry.source), _cache_format(entry.settings))]
        table.add_row(*texts, as_bytes(entry.size_bytes), _minute(entry.built_at))
    return table


def _base(source: str) -> str:
    """A directory; the hub id where it is a snapshot in the hub's cache, models--org--name/snapshots/hash."""
    hub = next((part for part in source.split("/") if part.startswith("models--")), None)
    return hub.removeprefix("models--").replace("--", "/") if hub else source


def _cache_format(settings: dict[str, Any]) -> str:
    """ "nf4, double quantisation, 2 experts in int8, bfloat16, cuda"."""
    parts = [str(settings.get("quantize"))]
    if settings.get("double_quant") and parts[0] in ("nf4", "fp4"):
        parts.append("double quantisation")
    if experts := settings.get("int8_experts"):
        parts.append(f"{len(experts)} experts in int8")
    parts.append(str(settings.get("dtype")).removeprefix("torch."))
    return ", ".join([*parts, str(settings.get("device"))])
