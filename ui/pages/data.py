"""The page Data: what a file holds, before anything is trained on it. ?source=recipe:NAME chooses whose data.

A recipe says which base, method and lengths the rows are read for; file, format and columns can be changed here to try
them out, and the lines that a recipe needs then are shown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import gradio as gr
from markupsafe import Markup

import studio
from studio import DataReport, Recipe, RecipeError, StudioError
from ui.data_views import report_view
from ui.html import el
from ui.look import show
from ui.places import Places, Source
from ui.views import error_note, meter, note, page_head

TITLE = "Data"
PATH = "data"

LOOK_SECONDS = 0.25
Updates = dict[Any, Any]


@dataclass
class Page:
    """The components, and what their handlers do."""

    places: Places
    source: Any
    file: Any
    format: Any
    columns: Any
    start: Any
    stop: Any
    report: Any

    @property
    def outputs(self) -> list[Any]:
        return [value for name, value in vars(self).items() if name != "places"]

    @property
    def asked(self) -> list[Any]:
        return [self.source, self.file, self.format, self.columns]

    def on_load(self, request: gr.Request) -> Updates:
        """The recipe that the address names, else the quickstart."""
        sources = self.places.sources()
        known = [value for _, value in sources]
        wanted = request.query_params.get("source")
        source = wanted if wanted in known else next(iter(known), None)
        chosen = {self.source: gr.update(choices=sources, value=source)}
        return {**chosen, **(self._settings_of(source) if source else {}), self.report: ""}

    def on_source(self, source: str) -> Updates:
        return {**self._settings_of(source), self.report: ""}

    def _settings_of(self, source: str) -> Updates:
        """File, format and columns as the recipe has them."""
        try:
            data = self._recipe(source).data
        except StudioError as error:
            return {self.report: error_note("This recipe cannot be read", error)}
        columns = ", ".join(f"{ours}={theirs}" for ours, theirs in data.columns.items())
        return {self.file: _first_file(data), self.format: data.format, self.columns: columns}

    def _recipe(self, source: str) -> Recipe:
        parsed = Source.parse(source)
        return studio.parse_recipe(self.places.text_of(parsed), self.places.file_of(parsed))

    def on_inspect(self, source: str, file: str, form: str, columns: str) -> Iterator[Updates]:
        """The report, and how far the reading has come until then."""
        try:
            recipe = self._changed(source, file, form, columns)
        except StudioError as error:
            yield {self.report: error_note("This cannot be inspected", error)}
            return
        yield {self.report: meter("Reading", 0, 0), **_running(self, True)}
        read, stopped = [0, 0], Event()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(_inspect, recipe, read, stopped)
            try:
                while not future.done():
                    time.sleep(LOOK_SECONDS)
                    yield {self.report: meter("Reading", read[0], read[1])}
            finally:  # the button Stop ends this generator, and the pool waits for the reading
                stopped.set()
        yield {self.report: _outcome(future, recipe), **_running(self, False)}

    def _changed(self, source: str, file: str, form: str, columns: str) -> Recipe:
        """The recipe with what the page says of its data.

        Raises:
            RecipeError: as for a recipe with these lines.
        """
        recipe = self._recipe(source)
        values = recipe.model_dump(mode="json")
        values["data"] |= {"train": file, "format": form, "columns": _pairs(columns), "phases": [], "temperature": None}
        return studio.parse_recipe(json.dumps(values), self.places.file_of(Source.parse(source)))


def _first_file(data: Any) -> str:
    return str(data.train[0].path if isinstance(data.train, tuple) else data.train)


def _pairs(text: str) -> dict[str, str]:
    """From "prompt=question, completion=answer".

    Raises:
        RecipeError
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if "=" not in part]:
        message = f"received {wrong[0]!r}; allowed: ours=theirs, separated by commas, such as prompt=question"
        raise RecipeError([studio.Problem("data.columns", None, message)])
    named = [part.split("=", 1) for part in parts]
    return {ours.strip(): theirs.strip() for ours, theirs in named}


class _StoppedError(Exception):
    """Nobody waits for the report any longer."""


def _inspect(recipe: Recipe, read: list[int], stopped: Event) -> DataReport:
    def progress(done: int, total: int) -> None:
        read[:] = [done, total]
        if stopped.is_set():
            raise _StoppedError

    return studio.inspect_data(_first_file(recipe.data), recipe=recipe, progress=progress)


def _outcome(future: Future[DataReport], recipe: Recipe) -> Markup:
    try:
        report = future.result()
    except StudioError as error:
        return error_note("This cannot be read", error)
    return report_view(report, recipe)


def _running(page: Page, running: bool) -> Updates:
    return {page.start: gr.update(interactive=not running), page.stop: gr.update(interactive=running)}


def build(places: Places) -> None:
    """Builds the page in the current Gradio context."""
    page = _layout(places)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
    page.source.input(page.on_source, page.source, page.outputs, **quiet)
    run = gr.on(
        [page.start.click, page.file.submit, page.columns.submit], page.on_inspect, page.asked, page.outputs, **quiet
    )
    stopped = note("quiet", "Stopped")
    page.stop.click(lambda: {page.report: stopped, **_running(page, False)}, None, page.outputs, cancels=[run], **quiet)
    block = gr.context.Context.root_block
    assert block is not None
    block.load(page.on_load, None, page.outputs, **quiet)


def _layout(places: Places) -> Page:
    formats = Recipe.model_json_schema()["$defs"]["DataSettings"]["properties"]["format"]["enum"]
    show(page_head("Data", "What a file holds, and what of it is learned, before anything is trained."))
    with gr.Column(elem_classes=["card", "section"]):
        with gr.Row(equal_height=True):
            source = gr.Dropdown(
                [],
                label="Recipe",
                info="Whose base, training method and lengths the rows are read for.",
                interactive=True,
                elem_classes="field",
                min_width=240,
            )
            file = gr.Textbox(
                label="File",
                info="JSON Lines, JSON, CSV, Parquet, an Arrow directory, a folder of text, or hub:org/name:split.",
                max_lines=1,
                elem_classes="field",
                scale=2,
                min_width=320,
            )
        with gr.Row(equal_height=True):
            form = gr.Dropdown(
                formats,
                value="auto",
                label="Format",
                info="auto: each row is recognised by its columns.",
                interactive=True,
                filterable=False,
                elem_classes="field",
                min_width=240,
            )
            columns = gr.Textbox(
                label="Columns",
                info="With other names, as ours=theirs: prompt=question, completion=answer.",
                max_lines=1,
                elem_classes="field",
                scale=2,
                min_width=320,
            )
        with gr.Row(elem_classes="actions", equal_height=True):
            show(el("p", "The whole file is read; nothing is trained."), elem_classes="status")
            stop = gr.Button("Stop", interactive=False, scale=0, min_width=120)
            start = gr.Button("Inspect", variant="primary", scale=0, min_width=190)
    report = show(elem_classes="data-report")
    return Page(places, source, file, form, columns, start, stop, report)
