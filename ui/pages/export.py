"""The page Export: a finished job → a folder for one program, proven.

?job=NAME chooses a job, ?export=NAME shows a certificate. What is chosen leads to a plan at once; the export itself
runs in a process of its own, whoever looks.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

import studio
from studio import ExportRequest, JobError, StudioError
from ui.downloads import has_adapter
from ui.export_views import export_list, export_view, failure_view, plan_view, progress_view
from ui.exporting import Exports
from ui.html import el
from ui.look import show
from ui.places import Places, checked_name
from ui.views import error_note, page_head

TITLE = "Export"
PATH = "export"

LOOK_SECONDS = 1.0
INTO = [
    ("the better of both, measured", "auto"),
    ("its own weights", "original"),
    ("as training held them, quantised", "quantized"),
]

Updates = dict[Any, Any]


@dataclass
class Page:
    """The components, and what their handlers do.

    `mode` is what the page shows: "new" the form, "run" the export that runs, "view" a certificate. `typed` is whether
    somebody gave a name; else the choices give one.
    """

    places: Places
    exports: Any
    view: Any
    run_box: Any
    progress: Any
    cancel: Any
    form: Any
    outcome: Any
    job: Any
    consumer: Any
    consumer_note: Any
    format: Any
    quant: Any
    weights: Any
    importance: Any
    name: Any
    plan: Any
    start: Any
    mode: Any
    selected: Any
    typed: Any
    seen: Any
    timer: Any
    runs: Exports = field(default_factory=Exports)

    @property
    def choices(self) -> list[Any]:
        return [self.job, self.consumer, self.format, self.quant, self.weights, self.importance, self.name]

    @property
    def outputs(self) -> list[Any]:
        return [value for name, value in vars(self).items() if name not in ("places", "timer", "runs")]

    # ---------------------------------------------------------------- choosing

    def on_load(self, request: gr.Request) -> Updates:
        """A certificate that the address names; else the export that runs; else the form."""
        asked, job = request.query_params.get("export"), request.query_params.get("job")
        run = self.runs.now()
        mode = "view" if asked else "run" if run and not run.ended else "new"
        names = self._jobs()
        job = job if job in names else next(iter(names), None)
        first = studio.consumers()[0].name
        chosen = {self.job: gr.update(choices=names, value=job), self.consumer: first}
        return {
            **self._choose(job, first, None, None, "auto", False, "", False),
            self.typed: False,
            **chosen,
            **self._show(mode),
            **(self._certificate(asked) if asked else {}),
            self.selected: asked,
            **self.on_tick(mode, asked, {}),
        }

    def _jobs(self) -> list[str]:
        """Jobs that succeeded and have an adapter, newest first."""
        found = []
        for job in self.places.jobs():
            with suppress(JobError):  # deleted meanwhile
                if job.state().status == "succeeded" and has_adapter(job):
                    found.append(job.name)
        return found

    def on_choose(
        self,
        job: str | None,
        consumer: str,
        form: str,
        quant: str,
        weights: str,
        important: bool,
        name: str,
        typed: bool,
    ) -> Updates:
        """What goes with the choices, and the plan of them."""
        return self._choose(job, consumer, form, quant, weights, important, name, typed)

    def on_name(
        self, job: str | None, consumer: str, form: str, quant: str, weights: str, important: bool, name: str
    ) -> Updates:
        """A name that somebody typed, which stays whatever is chosen then."""
        return {
            **self._choose(job, consumer, form, quant, weights, important, name, True),
            self.typed: True,
        }

    def _choose(
        self,
        job: str | None,
        consumer: str,
        form: str | None,
        quant: str | None,
        weights: str,
        important: bool,
        name: str,
        typed: bool,
    ) -> Updates:
        reads = studio.formats(consumer)
        chosen = next((found for found in reads if found.name == form), reads[0])
        types = studio.gguf_types() if chosen.name == "gguf" else []
        quant = (quant or "Q4_K_M") if types else None
        quantized = chosen.kind == "model" and job is not None and self._was_quantized(job)
        weights, important = weights if quantized else "auto", important and bool(types)
        suggested = name if typed else self.places.free_export(f"{job}-{consumer}" if job else consumer)
        # a name that stays is not sent back: the answer would overwrite what is typed meanwhile
        name, shown = suggested, gr.skip() if suggested == name else suggested
        note = next(found.note for found in studio.consumers() if found.name == consumer)
        return {
            self.consumer_note: el("p", note, cls="quiet-text"),
            self.format: gr.update(
                choices=[(found.title, found.name) for found in reads], value=chosen.name, visible=len(reads) > 1
            ),
            self.quant: gr.update(choices=types, value=quant, visible=bool(types)),
            self.weights: gr.update(value=weights, visible=quantized),
            self.importance: gr.update(value=important, visible=bool(types)),
            self.name: shown,
            **self._planned(job, consumer, chosen.name, quant, weights, important, name),
        }

    def _was_quantized(self, job: str) -> bool:
        with suppress(StudioError):
            return self.places.job(job).recipe().model.quantization != "none"
        return False

    def _request(
        self, job: str, consumer: str, form: str, quant: str | None, weights: str, important: bool, name: str
    ) -> ExportRequest:
        """What the browser asks for, by names alone: nothing outside the two folders can be meant.

        Raises:
            StudioError: no such job, or a name that could leave its folder.
        """
        what, out = self.places.job(job).path, self.places.exports_root / checked_name(name)
        data = self._training_data(job) if important and quant else None
        return ExportRequest(str(what), out, consumer, form, quant=quant, into=weights, importance=data)

    def _training_data(self, job: str) -> Path | None:
        with suppress(StudioError):
            return self.places.job(job).recipe().data.sources[0].path
        return None

    def _planned(self, job: str | None, *choices: Any) -> Updates:
        """The plan, or why there can be none."""
        if job is None:
            return {self.plan: _no_job(), self.start: gr.update(interactive=False)}
        try:
            plan = studio.plan_export(self._request(job, *choices))
        except StudioError as error:
            return {
                self.plan: error_note("This cannot be exported", error),
                self.start: gr.update(interactive=False),
            }
        return {self.plan: plan_view(plan), self.start: gr.update(interactive=True)}

    # ---------------------------------------------------------------- running

    def on_start(
        self, job: str, consumer: str, form: str, quant: str | None, weights: str, important: bool, name: str
    ) -> Updates:
        """Starts the export in its own process, and shows it."""
        quant = quant if form == "gguf" else None
        try:
            request = self._request(job, consumer, form, quant, weights, important, name)
            studio.plan_export(request)
            self.runs.start(request)
        except StudioError as error:
            return {self.plan: error_note("It was not started", error)}
        return {**self._show("run"), **self.on_tick("run", None, {})}

    def on_cancel(self) -> Updates:
        self.runs.cancel()
        return self.on_tick("run", None, {})

    def on_tick(self, mode: str, selected: str | None, seen: dict[str, Any]) -> Updates:
        """What has changed since the last look: the list, the progress, and the end of the export."""
        run, now = self.runs.now(), time.time()
        listed = studio.list_exports(self.places.exports_root)
        fresh: dict[str, Any] = {"exports": export_list(listed, selected, run, now)}
        if mode == "run" and run:
            fresh["progress"] = "" if run.ended else progress_view(run, now)
        changed = {key: value for key, value in fresh.items() if seen.get(key) != value}
        ended = self._ended() if mode == "run" and run and run.ended else {}
        if not changed and not ended:
            return {self.seen: gr.skip()}
        return {self.seen: {**seen, **fresh}, **{getattr(self, key): value for key, value in changed.items()}, **ended}

    def _ended(self) -> Updates:
        """The certificate of the export that ran, or why there is none, above the form."""
        run = self.runs.now()
        assert run is not None
        if run.status != "succeeded":
            failure = {self.outcome: gr.update(value=failure_view(run), visible=True)}
            return {**self._show("new"), **failure, self.start: gr.update(interactive=True)}
        name = run.request.out.name
        return {**self._show("view"), **self._certificate(name), self.selected: name}

    def _certificate(self, name: str) -> Updates:
        try:
            view = export_view(studio.read_export(self.places.export(name)))
        except StudioError as error:
            view = el("section", el("h1", "This export cannot be shown"), el("p", str(error)), cls="card")
        return {self.view: gr.update(value=view, visible=True)}

    def _show(self, mode: str) -> Updates:
        return {
            self.mode: mode,
            self.view: gr.update(visible=mode == "view"),
            self.run_box: gr.update(visible=mode == "run"),
            self.form: gr.update(visible=mode == "new"),
            self.outcome: gr.update(visible=False),
        }


def build(places: Places) -> None:
    """Builds the page in the current Gradio context."""
    page = _layout(places)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 8}
    typed = {**quiet, "trigger_mode": "always_last", "concurrency_id": "choosing", "concurrency_limit": 1}
    choices = [component.input for component in page.choices if component is not page.name]
    gr.on(choices, page.on_choose, [*page.choices, page.typed], page.outputs, **typed)
    page.name.input(page.on_name, page.choices, page.outputs, **typed)
    page.timer.tick(page.on_tick, [page.mode, page.selected, page.seen], page.outputs, **quiet)
    page.start.click(page.on_start, page.choices, page.outputs, **quiet)
    page.cancel.click(page.on_cancel, None, page.outputs, **quiet)
    block = gr.context.Context.root_block
    assert block is not None
    block.load(page.on_load, None, page.outputs, **quiet)


def _layout(places: Places) -> Page:
    titles = [(found.title, found.name) for found in studio.consumers()]
    with gr.Row(elem_classes="job-page"):
        with gr.Column(scale=1, min_width=220, elem_classes="job-list"):
            show(el("h2", "Exports"))
            exports = show()
            show(el("a", "New export", href="export", cls="button"))
        with gr.Column(scale=4, min_width=520):
            view = show(visible=False)
            with gr.Column(visible=False, elem_classes="card") as run_box:
                progress = show()
                cancel = gr.Button("Cancel this export", size="sm", elem_classes="cancel")
            with gr.Column(visible=False) as form:
                outcome = show(visible=False)
                show(page_head("Export", "A folder that one program can use, proven before it appears."))
                with gr.Column(elem_classes=["card", "section"]):
                    with gr.Row(equal_height=True):
                        job = gr.Dropdown([], label="Job", info="Jobs that succeeded.", **_field())
                        name = gr.Textbox(
                            label="Name",
                            info="Of the folder and of the model.",
                            max_lines=1,
                            elem_classes="field",
                            min_width=200,
                        )
                    consumer = gr.Radio(titles, label="For", elem_classes=["field", "consumers"], interactive=True)
                    consumer_note = show()
                    importance = gr.Checkbox(
                        False,
                        label="Measure what matters on the training data",
                        info="The quantiser spends its bits on the weights that your data uses most.",
                        elem_classes="field",
                        interactive=True,
                    )
                    with gr.Row(equal_height=True):
                        form_of = gr.Dropdown([], label="Format", info="What the program reads.", **_field())
                        quant = gr.Dropdown(
                            [], label="Type", info="The figure is about the bits a weight takes.", **_field()
                        )
                        weights = gr.Dropdown(
                            INTO,
                            value="auto",
                            label="Merged into the base in",
                            info="Training held the base quantised.",
                            **_field(),
                        )
                with gr.Column(elem_classes=["card", "plan-panel"]):
                    show(el("h2", "What will be written"))
                    plan = show()
                with gr.Column(elem_classes="foot"), gr.Row(elem_classes="actions", equal_height=True):
                    show(el("p", "It appears when every check has passed."), elem_classes="status")
                    start = gr.Button("Export", variant="primary", scale=0, min_width=190)
    return Page(
        places=places,
        exports=exports,
        view=view,
        run_box=run_box,
        progress=progress,
        cancel=cancel,
        form=form,
        outcome=outcome,
        job=job,
        consumer=consumer,
        consumer_note=consumer_note,
        format=form_of,
        quant=quant,
        weights=weights,
        importance=importance,
        name=name,
        plan=plan,
        start=start,
        mode=gr.State("new"),
        selected=gr.State(None),
        typed=gr.State(False),
        seen=gr.State({}),
        timer=gr.Timer(LOOK_SECONDS),
    )


def _field() -> dict[str, Any]:
    return {"interactive": True, "filterable": False, "elem_classes": "field", "min_width": 200}


def _no_job() -> Markup:
    return el("p", "No job has succeeded yet: train one first.", cls="quiet-text")
