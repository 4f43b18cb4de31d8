"""The page Jobs: every job of the root, and one of them live, from its files. ?job=NAME selects it.

One timer looks at the files; what has not changed is not sent again. A job that has ended is not read again.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from markupsafe import Markup

import studio
from studio import Job, JobError, JobState, StudioError
from studio.preference_view import preference_panels
from studio.progress import router_rows, waiting_for
from ui import job_views
from ui.heatmaps import as_plot, router_figure
from ui.html import el
from ui.look import show
from ui.places import Places, Source
from ui.preference_views import preference_figure
from ui.routing_panel import RoutingPanel, build_routing_panel
from ui.routing_views import warnings_view
from ui.views import error_note, plan_view

TITLE = "Jobs"
PATH = "jobs"

LOOK_SECONDS = 1.0
LOG_LINES = 200

ROUTING_FILES = ("profile.safetensors", "profile_after.safetensors", "placement.json", "delta_norms.json")
"""What the pictures of a job are drawn from, as it comes."""

Updates = dict[Any, Any]
Seen = dict[str, Any]


@dataclass
class Page:
    """The components, and what their handlers do. `seen` is what this page shows already."""

    places: Places
    jobs: Any
    head: Any
    figures: Any
    curve: Any
    warnings: Any
    router_box: Any
    router: Any
    preference_box: Any
    preference: Any
    routing: RoutingPanel
    result: Any
    cancel: Any
    sure: Any
    yes: Any
    no: Any
    details: Any
    log_box: Any
    log: Any
    plan: Any
    recipe: Any
    name: Any
    seen: Any
    timer: Any

    @property
    def outputs(self) -> list[Any]:
        others = ("places", "timer", "yes", "no", "routing")
        return [*(value for name, value in vars(self).items() if name not in others), *self.routing.outputs]

    def on_load(self, request: gr.Request) -> Updates:
        """The job that the address names, else the newest."""
        return self.on_tick(request.query_params.get("job"), {})

    def on_tick(self, name: str | None, seen: Seen) -> Updates:
        """What has changed on disk since the last look."""
        listed = [(job, state) for job in self.places.jobs() if (state := _state(job))]
        name = name or next((job.name for job, _ in listed), None)
        fresh: Seen = {"jobs": job_views.job_list(listed, name, time.time())}
        if name is None:
            fresh["head"] = _nothing()
        elif (ended := _ended(listed, name)) is None or seen.get("ended") != ended:
            fresh |= {**self._look(name), "ended": ended}
        changed = {key: value for key, value in fresh.items() if seen.get(key) != value}
        if not changed:
            return {self.seen: gr.skip()}
        return {self.name: name, self.seen: {**seen, **fresh}, **self._updates(changed)}

    def _look(self, name: str) -> Seen:
        """Everything there is to show of one job."""
        try:
            job = self.places.job(name)
            state, rows, result = job.state(), job.metrics(), job.result()
            waits_for = waiting_for(job) if state.status == "queued" else None
            return {
                "head": job_views.head(job, state, rows, waits_for),
                "figures": job_views.live_figures(state, rows, result),
                "curve": (state.total_steps, job_views.loss_points(rows), job_views.held_out_points(rows)),
                "warnings": warnings_view(rows),
                "router": (state.total_steps, router_rows(rows)),
                "preference": (state.total_steps, preference_panels(rows)),
                "routing": (job.path, _stamps(job)),
                "result": job_views.result_view(job, result) if result and state.ended else None,
                "cancel": not state.ended,
                "log": job_views.log_view(job.log_tail(LOG_LINES)),
                "plan": _plan(job),
                "recipe": self.places.text_of(Source("job", name)),
                "log_box": state.status in ("failed", "lost") and not result,
                "details": True,
            }
        except StudioError as error:
            head = el("section", el("h1", "This job cannot be shown"), el("p", str(error)), cls="card")
            nothing = {"figures": None, "warnings": None, "result": None, "routing": None}
            return {
                "head": head,
                **nothing,
                "curve": (0, [], []),
                "router": (0, []),
                "preference": (0, ()),
                "cancel": False,
                "details": False,
            }

    def _updates(self, changed: Seen) -> Updates:
        found: Updates = {}
        for key in ("jobs", "head", "log", "plan", "recipe"):
            if key in changed:
                found[getattr(self, key)] = changed[key]
        for key in ("figures", "warnings", "result"):
            if key in changed:
                found[getattr(self, key)] = gr.update(value=changed[key] or "", visible=changed[key] is not None)
        if "curve" in changed:
            total, pairs, held_out = changed["curve"]
            named = [(*pair, "training") for pair in pairs] + [(*pair, "held out") for pair in held_out]
            points = pd.DataFrame(named, columns=["step", "loss", "of"])
            found[self.curve] = gr.update(value=points, x_lim=[0, total], visible=len(points) > 1)
        if "router" in changed:
            total, rows = changed["router"]
            found[self.router_box] = gr.update(visible=bool(rows))
            found[self.router] = as_plot(router_figure(rows, total)) if rows else None
        if "preference" in changed:
            total, panels = changed["preference"]
            found[self.preference_box] = gr.update(visible=bool(panels))
            found[self.preference] = as_plot(preference_figure(panels, total)) if panels else None
        if "routing" in changed:
            found |= self._routing(changed["routing"])
        if "cancel" in changed:
            found[self.cancel] = gr.update(visible=changed["cancel"])
            found[self.sure] = gr.update(visible=False)
        if changed.get("log_box"):
            found[self.log_box] = gr.update(open=True)
        if "details" in changed:
            found[self.details] = gr.update(visible=changed["details"])
        return found

    def _routing(self, seen: tuple[Path, Any] | None) -> Updates:
        """The pictures of a job's routing, as far as its files go."""
        if seen is None:
            return self.routing.updates(None, None)
        path, plan = seen[0], None
        with suppress(JobError):  # an unreadable plan is said where the plan is shown
            plan = studio.open_job(path).plan()
        return self.routing.updates(studio.job_routing(path), plan)

    def on_cancel(self, name: str, seen: Seen) -> Updates:
        """Ends the job and shows it ended."""
        try:
            self.places.job(name).cancel()
        except JobError as error:
            gr.Warning(str(error))
        return {self.sure: gr.update(visible=False), **self.on_tick(name, seen)}


def build(places: Places) -> None:
    """Builds the page in the current Gradio context."""
    page = _layout(places)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 8}
    page.timer.tick(page.on_tick, [page.name, page.seen], page.outputs, **quiet)
    page.yes.click(page.on_cancel, [page.name, page.seen], page.outputs, **quiet)
    ask = {page.sure: gr.update(visible=True), page.cancel: gr.update(visible=False)}
    page.cancel.click(lambda: ask, None, [page.sure, page.cancel], **quiet)
    keep = {page.sure: gr.update(visible=False), page.cancel: gr.update(visible=True)}
    page.no.click(lambda: keep, None, [page.sure, page.cancel], **quiet)
    block = gr.context.Context.root_block
    assert block is not None
    block.load(page.on_load, None, page.outputs, **quiet)


def _layout(places: Places) -> Page:
    with gr.Row(elem_classes="job-page"):
        with gr.Column(scale=1, min_width=220, elem_classes="job-list"):
            show(el("h2", "Jobs"))
            jobs = show()
            show(el("a", "New job", href="./", cls="button"))
        with gr.Column(scale=4, min_width=520):
            head = show()
            cancel = gr.Button("Cancel this job", visible=False, size="sm", elem_classes="cancel")
            with gr.Row(visible=False, elem_classes="card sure", equal_height=True) as sure:
                show(el("p", "Cancel this job? What it has trained so far is lost."))
                yes = gr.Button("Yes, cancel it", variant="stop", size="sm", scale=0, min_width=150)
                no = gr.Button("Let it run", size="sm", scale=0, min_width=130)
            figures = show(visible=False)
            curve = gr.LinePlot(
                x="step",
                y="loss",
                color="of",
                color_map={"training": "#0f766e", "held out": "#c2571a"},
                x_title="step",
                y_title="loss",
                color_title="loss",
                title="Loss",
                x_axis_format="d",
                height=260,
                visible=False,
                buttons=[],
                elem_classes="card curve",
            )
            warnings = show(visible=False)
            with gr.Column(visible=False, elem_classes="card") as preference_box:
                show(el("h2", "Preference while training"))
                preference = gr.Plot(show_label=False, container=False, elem_classes="picture")
            with gr.Column(visible=False, elem_classes="card") as router_box:
                show(el("h2", "The router while training"))
                router = gr.Plot(show_label=False, container=False, elem_classes="picture")
            routing = build_routing_panel("Experts")
            result = show(visible=False)
            with gr.Column(visible=False) as details:
                with gr.Accordion("Log", open=False, elem_classes="more") as log_box:
                    log = show()
                with gr.Accordion("Plan", open=False, elem_classes="more"):
                    plan = show()
                with gr.Accordion("Recipe", open=False, elem_classes="more"):
                    recipe = gr.Code(label="As it was submitted", language="yaml", interactive=False)
    return Page(
        places=places,
        jobs=jobs,
        head=head,
        figures=figures,
        curve=curve,
        warnings=warnings,
        preference_box=preference_box,
        preference=preference,
        router_box=router_box,
        router=router,
        routing=routing,
        result=result,
        cancel=cancel,
        sure=sure,
        yes=yes,
        no=no,
        details=details,
        log_box=log_box,
        log=log,
        plan=plan,
        recipe=recipe,
        name=gr.State(None),
        seen=gr.State({}),
        timer=gr.Timer(LOOK_SECONDS),
    )


def _state(job: Job) -> JobState | None:
    """The state, or None for a job that was deleted between two looks."""
    try:
        return job.state()
    except JobError:
        return None


def _ended(listed: list[tuple[Job, JobState]], name: str) -> tuple[str, float] | None:
    """Which run of the job of that name has ended: its files change no more. None while it lives."""
    return next(((name, state.created_at) for job, state in listed if job.name == name and state.ended), None)


def _stamps(job: Job) -> list[float | None]:
    """When each file that pictures are drawn from was written; None for one that is not there."""
    paths = [job.path / name for name in ROUTING_FILES]
    return [path.stat().st_mtime if path.is_file() else None for path in paths]


def _plan(job: Job) -> Markup:
    try:
        return plan_view(job.plan())
    except JobError as error:
        return error_note("The plan cannot be read", error)


def _nothing() -> Markup:
    return el(
        "section",
        el("h1", "No jobs yet"),
        el("p", "A job appears here when it is started, and stays: its state lives on disk.", cls="quiet-text"),
        el("a", "Fine-tune a model", href="./", cls="button primary"),
        cls="card empty",
    )
