"""The page Fine-tune: open a recipe, edit it as a form or as YAML, see its plan, start its job.

The YAML text is the one truth. Every edit leads to a new Draft, and `_follow` turns a Draft into what the page shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

import studio
from studio import OutputExistsError, Plan, ProfileError, Recipe, StudioError
from ui import drafts, fields
from ui.draft_views import status_view, verdict_view
from ui.drafts import Draft
from ui.form import NOTHING_SHOWN, Form, Shown, build_form, shown_of
from ui.html import el
from ui.look import show
from ui.places import Places, Source
from ui.profiling import profile_in_child, whole_percents
from ui.routing_panel import RoutingPanel, build_routing_panel
from ui.views import error_note, meter, note, page_head, plan_view

TITLE = "Fine-tune"
PATH = ""

FIRST = "recipe:quickstart"
TO_JOB = "(name) => { if (name) window.location.assign('jobs?job=' + encodeURIComponent(name)); }"
TO_PLAN = "() => setTimeout(() => document.querySelector('.plan-panel')?.scrollIntoView({behavior: 'smooth'}), 150)"
FORGET_QUESTION = (
    "() => { if (location.search.includes('recipe=')) history.replaceState(null, '', location.pathname); }"
)
"""Once opened, so that a reload shows the edits and not the recipe again."""

NOT_YET = "This recipe cannot be trained yet"
NEEDS_PROFILE = "This rule has to know where your data goes"
PROFILE_NEEDED = "Profiling sends a sample of your training data through the base once, without training."
PROFILE_OFFERED = "Profile the data to see which experts it uses, and how much of it this placement covers."

Updates = dict[Any, Any]


@dataclass
class Page:
    """The components, and what their handlers do. `origin` is the source that the text came from."""

    places: Places
    form: Form
    source: Any
    undo: Any
    text: Any
    verdict: Any
    panel: Any
    plan: Any
    profile_box: Any
    profile_text: Any
    profile: Any
    profiled: Any
    routing: RoutingPanel
    exists: Any
    exists_text: Any
    rename: Any
    replace: Any
    back: Any
    status: Any
    see_plan: Any
    start: Any
    origin: Any
    shown: Any
    seen: Any
    planned: Any
    replaced: Any
    kept: Any
    started: Any

    @property
    def state(self) -> list[Any]:
        """What every edit needs to know."""
        return [self.origin, self.text, self.shown, self.planned, *self.form.inputs]

    @property
    def outputs(self) -> list[Any]:
        """Everything that a handler may change."""
        own = [value for name, value in vars(self).items() if name not in ("places", "form", "routing")]
        return [*own, *self.form.outputs, *self.routing.outputs]

    # ---------------------------------------------------------------- editing

    def on_form(self, seen: dict[str, Any], origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """An edit in the form: what differs from `seen`, the values that were last here or sent from here."""
        values = self.form.values(given)
        edits = {path: value for path, value in values.items() if value != seen[path]}
        if not edits:
            return {self.seen: gr.skip()}
        after = drafts.from_form(text, edits)
        changed = {self.text: after} if after != text else {}
        follow = self._follow(origin, after, shown, planned, *given)
        untouched = {field: update for field, update in follow.items() if field not in self.form.inputs}
        return changed | untouched | self.form.errors(shown, follow[self.shown]) | {self.seen: values}

    def on_text(self, origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """An edit in the YAML: the form follows."""
        return self._follow(origin, text, shown, planned, *given)

    def on_open(self, source: str, origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """Another recipe: its text replaces what is there, which can be brought back."""
        try:
            after = drafts.opened(Source.parse(source), self.places)
        except StudioError as error:
            gr.Warning(str(error))
            return {self.source: origin}
        follow = self._follow(source, after, shown, planned, *given)
        return {self.text: after, self.replaced: [origin, text], self.undo: gr.update(visible=True), **follow}

    def on_undo(self, replaced: list[str], origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """The text that was there before another recipe was opened."""
        source, before = replaced
        follow = self._follow(source, before, shown, planned, *given)
        return {self.text: before, self.source: source, self.undo: gr.update(visible=False), **follow}

    def on_load(self, request: gr.Request, kept: Any, *given: Any) -> Updates:
        """The recipe in the address (?recipe=job:NAME), else the last edits in this browser, else the first recipe."""
        choices = self.places.sources()
        asked, last = self._asked(request.query_params.get("recipe")), self._last(kept)
        origin, text = asked or last or self._asked(FIRST) or (FIRST, "")
        known = origin in [value for _, value in choices]
        covered = {self.replaced: last, self.undo: gr.update(visible=True)} if asked and last else {}
        return {
            **covered,
            self.source: gr.update(choices=choices, value=origin if known else None),
            self.text: text,
            **self._follow(origin, text, NOTHING_SHOWN, "", *given),
        }

    def _asked(self, source: str | None) -> tuple[str, str] | None:
        try:
            return (source, drafts.opened(Source.parse(source), self.places)) if source else None
        except StudioError as error:
            gr.Warning(str(error))
            return None

    def _last(self, kept: Any) -> tuple[str, str] | None:
        """The edits that this browser kept; a job that was started from them keeps its name for itself."""
        try:
            origin, text = str(Source.parse(kept["source"])), str(kept["text"])
            return origin, drafts.with_free_name(text, self.places) if kept["submitted"] else text
        except (StudioError, KeyError, TypeError, AttributeError):  # nothing kept, or not by this version
            return None

    def _follow(
        self, origin: str, text: str, shown: Shown, planned: str, *given: Any, submitted: bool = False
    ) -> Updates:
        """What the page shows of this text."""
        draft = drafts.check(text, Source.parse(origin), self.places)
        after = shown_of(draft, shown)
        return {
            **self.form.updates(draft, self.form.values(given), shown, after),
            self.seen: draft.values or self.form.values(given),
            **self._next_step(draft, planned),
            self.verdict: verdict_view(draft),
            self.origin: origin,
            self.shown: after,
            self.kept: {"source": origin, "text": text, "submitted": submitted},
        }

    def _next_step(self, draft: Draft, planned: str) -> Updates:
        """The line and the one primary button at the foot of the page."""
        ready = draft.recipe is not None and planned == draft.text
        label = "See the new plan" if planned else "See the plan"
        return {
            self.status: status_view(draft, planned),
            self.see_plan: gr.update(value=label, visible=not ready, interactive=draft.recipe is not None),
            self.start: gr.update(visible=ready),
            self.exists: gr.update(visible=False),
            self.panel: gr.update(elem_classes=["card", "plan-panel"] + ([] if ready else ["stale"])),
        }

    # ---------------------------------------------------------------- plan and profile

    def on_plan(self, origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """The plan of the text, or why there can be none."""
        draft = drafts.check(text, Source.parse(origin), self.places)
        if draft.recipe is None:
            return self._follow(origin, text, shown, planned, *given)
        panel = {self.panel: gr.update(visible=True, elem_classes=["card", "plan-panel"])}
        try:
            plan = studio.make_plan(draft.recipe)
        except StudioError as error:
            told = el("p", "This recipe cannot be trained yet: see the plan.", cls="bad")
            follow = self._follow(origin, text, shown, "", *given)
            return {**follow, **panel, **self._no_plan(error), self.planned: "", self.status: told}
        follow = self._follow(origin, text, shown, text, *given)
        return {**follow, **panel, self.plan: plan_view(plan), self.planned: text, **self._routing(draft.recipe, plan)}

    def _no_plan(self, error: StudioError) -> Updates:
        """Why there is none; where a profile is all that is missing, the way to make it."""
        hidden = self.routing.updates(None, None)
        if not isinstance(error, ProfileError):
            return {**hidden, self.plan: error_note(NOT_YET, error), self.profile_box: gr.update(visible=False)}
        words = el("p", str(error), cls="words")
        return {**hidden, self.plan: note("warning", NEEDS_PROFILE, words), **self._offer(PROFILE_NEEDED)}

    def _routing(self, recipe: Recipe, plan: Plan) -> Updates:
        """Where the data goes, if that has been looked at, and the ranks of the plan."""
        try:
            profile = studio.find_profile(recipe) if plan.experts else None
        except StudioError as error:
            return {**self.routing.updates(studio.plan_routing(plan, None), plan), **self._offer(str(error))}
        pictures = self.routing.updates(studio.plan_routing(plan, profile), plan)
        if profile is None and plan.experts:
            return {**pictures, **self._offer(PROFILE_OFFERED)}
        return {**pictures, self.profile_box: gr.update(visible=False)}

    def _offer(self, words: str) -> Updates:
        text = el("p", words, cls="quiet-text")
        return {
            self.profile_box: gr.update(visible=True),
            self.profile_text: text,
            self.profile: gr.update(visible=True),
        }

    def on_profile(self, origin: str, text: str) -> Iterator[Updates]:
        """Routes a sample of the data through the base, with its progress; `profiled` says whether it is made."""
        recipe = drafts.check(text, Source.parse(origin), self.places).recipe
        if recipe is None:
            yield {self.profiled: False}
            return
        yield {
            self.profile_text: meter("Loading the libraries", 0, 0),
            self.profile: gr.update(visible=False),
            self.profiled: False,
        }
        try:
            yield from ({self.profile_text: view} for view in whole_percents(profile_in_child(recipe)))
        except StudioError as error:
            yield {
                self.profile_text: error_note("The data could not be profiled", error),
                self.profile: gr.update(visible=True),
            }
            return
        yield {self.profile_text: meter("Done", 1, 1), self.profiled: True}

    def on_profiled(self, profiled: bool, origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """The plan of what the editor holds now, with the profile that has just been made."""
        return self.on_plan(origin, text, shown, planned, *given) if profiled else {self.profiled: False}

    # ---------------------------------------------------------------- start

    def on_start(self, origin: str, text: str, overwrite: bool = False) -> Updates:
        """Starts the job; its name goes into `started`, from where the browser opens its page."""
        draft = drafts.check(text, Source.parse(origin), self.places)
        if draft.recipe is None:
            return {self.verdict: verdict_view(draft)}
        try:
            job = studio.submit(draft.recipe, overwrite=overwrite)
        except OutputExistsError as error:
            return self._ask_about(draft.recipe.output.dir.name, error, overwrite)
        except StudioError as error:
            return {self.plan: error_note("The job was not started", error), self.started: ""}
        kept = {"source": origin, "text": text, "submitted": True}
        return {self.started: job.name, self.kept: kept, self.exists: gr.update(visible=False)}

    def on_replace(self, origin: str, text: str) -> Updates:
        return self.on_start(origin, text, overwrite=True)

    def _ask_about(self, name: str, error: OutputExistsError, overwrite: bool) -> Updates:
        """Overwrite, or another name?"""
        free = self.places.free_name(name)
        words = f"Use the name {free}, or replace the old job: its adapter, log and results are deleted."
        view = (
            error_note("It cannot be replaced", error)
            if overwrite
            else note("warning", f"A job named {name} exists already", el("p", words))
        )
        return {
            self.exists: gr.update(visible=True),
            self.exists_text: view,
            self.rename: f"Start as {free}",
            self.replace: gr.update(visible=not overwrite),
            self.started: "",
            self.start: gr.update(visible=False),
            self.status: el("p", "One thing to decide before it starts."),
        }

    def on_rename(self, origin: str, text: str, shown: Shown, planned: str, *given: Any) -> Updates:
        """A name that is free, written into the recipe; nothing else of the plan changes with it."""
        after = drafts.with_free_name(text, self.places)
        follow = self._follow(origin, after, shown, after if planned == text else planned, *given)
        return {self.text: after, self.planned: after if planned == text else planned, **follow}


def build(places: Places) -> None:
    """Builds the page in the current Gradio context."""
    page = _layout(places)
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {"show_progress": "hidden", **private}
    typed: dict[str, Any] = {
        "trigger_mode": "always_last",
        "concurrency_id": "typing",
        "concurrency_limit": 1,
        **quiet,
    }
    outputs = page.outputs
    gr.on([entry.input for entry in page.form.inputs], page.on_form, [page.seen, *page.state], outputs, **typed)
    page.text.input(page.on_text, page.state, outputs, **typed)
    page.source.input(page.on_open, [page.source, *page.state], outputs, **quiet)
    page.undo.click(page.on_undo, [page.replaced, *page.state], outputs, **quiet)
    page.see_plan.click(page.on_plan, page.state, outputs, **quiet).then(None, js=TO_PLAN, **private)

    profiling: dict[str, Any] = {"concurrency_id": "profiling", "concurrency_limit": 1, **quiet}
    made = page.profile.click(page.on_profile, [page.origin, page.text], outputs, **profiling)
    made.then(page.on_profiled, [page.profiled, *page.state], outputs, **quiet)

    start: dict[str, Any] = {"inputs": [page.origin, page.text], "outputs": outputs, **quiet}
    follow: dict[str, Any] = {"fn": None, "inputs": page.started, "js": TO_JOB, **private}
    page.start.click(page.on_start, **start).then(**follow)
    page.replace.click(page.on_replace, **start).then(**follow)
    page.rename.click(page.on_rename, page.state, outputs, **quiet).then(page.on_start, **start).then(**follow)
    page.back.click(page.on_text, page.state, outputs, **quiet)

    block = gr.context.Context.root_block
    assert block is not None
    loaded = block.load(page.on_load, [page.kept, *page.form.inputs], outputs, **quiet)
    loaded.then(None, js=FORGET_QUESTION, **private)


def _layout(places: Places) -> Page:
    with gr.Row(elem_classes="opener"):
        with gr.Column(scale=1, min_width=380):
            show(
                page_head(
                    "Fine-tune a Mixture-of-Experts model", "Open a recipe, change what you need, see its plan, start."
                )
            )
        undo = gr.Button("Bring back my edits", visible=False, scale=0, min_width=190)
        source = gr.Dropdown(
            [("quickstart", FIRST)], value=FIRST, label="Open a recipe", interactive=True, scale=0, min_width=320
        )
    with gr.Row(elem_classes="editors"):
        with gr.Column(scale=11, min_width=380):
            form = build_form()
        with gr.Column(scale=9, min_width=320, elem_classes="yaml"):
            text = gr.Code(label="The same recipe as YAML", language="yaml", lines=24, interactive=True)
            verdict = show()
    with gr.Column(visible=False, elem_classes=["card", "plan-panel"]) as panel:
        show(el("h2", "Plan"))
        plan = show()
        routing = build_routing_panel(kinds=("use", "rank"))
        with gr.Row(visible=False, elem_classes="profile", equal_height=True) as profile_box:
            profile_text = show(elem_classes="profile-text")
            profile = gr.Button("Profile the data", scale=0, min_width=170)
    with gr.Column(elem_classes="foot"):
        with gr.Column(visible=False, elem_classes="exists") as exists:
            exists_text = show()
            with gr.Row():
                rename = gr.Button("Start under another name", variant="primary", size="md")
                replace = gr.Button("Replace the old job", variant="stop", size="md")
                back = gr.Button("Back", size="md")
        with gr.Row(elem_classes="actions", equal_height=True):
            status = show(elem_classes="status")
            see_plan = gr.Button("See the plan", variant="primary", scale=0, min_width=190)
            start = gr.Button("Start training", variant="primary", visible=False, scale=0, min_width=190)
    return Page(
        places=places,
        form=form,
        source=source,
        undo=undo,
        text=text,
        verdict=verdict,
        panel=panel,
        plan=plan,
        profile_box=profile_box,
        profile_text=profile_text,
        profile=profile,
        profiled=gr.State(False),
        routing=routing,
        exists=exists,
        exists_text=exists_text,
        rename=rename,
        replace=replace,
        back=back,
        status=status,
        see_plan=see_plan,
        start=start,
        origin=gr.State(FIRST),
        shown=gr.State(NOTHING_SHOWN),
        seen=gr.State(fields.shown({})),
        planned=gr.State(""),
        replaced=gr.State(None),
        kept=gr.BrowserState(None, storage_key="moe-studio-draft", secret="moe-studio"),
        started=gr.Textbox(visible="hidden", label="Started job"),
    )
