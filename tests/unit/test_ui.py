"""The browser UI without a browser: form ⇄ YAML, the words at the field, names, escaping, who may talk to the app."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from threading import Event

import gradio as gr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from studio import ExportRequest, JobError, StudioError, parse_recipe
from studio.card import _metrics as card_metrics
from studio.jobs import Job, JobState
from studio.metric_view import metric_table
from ui import drafts, fields
from ui.exporting import Exports, Run
from ui.form import NOTHING_SHOWN, shown_of
from ui.guard import LocalOnly
from ui.html import el
from ui.job_views import _metrics, held_out_points, loss_points, result_view, seconds_left
from ui.pages import data
from ui.pages.export import _layout
from ui.places import RECIPES, Places, Source, checked_name

QUICKSTART = Source("recipe", "quickstart")
LINES = {"probe_examples": "8", "int8_experts": "[5]", "trl": "{neftune_noise_alpha: 5}", "epochs": "7"}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "runs", RECIPES)


@pytest.fixture
def text(places: Places) -> str:
    return drafts.opened(QUICKSTART, places)


def line_of(text: str, start: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), start=1) if line.strip().startswith(start))


# -------------------------------------------------------------------- the page Data


def data_page(places: Places) -> data.Page:
    return data.Page(places, *(name for name in ("source", "file", "format", "columns", "start", "stop", "report")))


def test_one_file_of_a_curriculum_can_be_inspected(places: Places, tmp_path: Path) -> None:
    recipe = data_page(places)._changed("recipe:embedded-sft-curriculum", str(tmp_path / "rows.jsonl"), "auto", "")
    assert recipe.data.train == tmp_path / "rows.jsonl" and not recipe.data.phases


def test_who_stops_an_inspection_stops_the_reading(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 60_000)  # two pieces
    stopped = Event()
    stopped.set()
    with pytest.raises(data._StoppedError):
        data._inspect(parse_recipe(f"data: {{train: '{file}'}}\noutput: {{dir: x}}\n"), [0, 0], stopped)
    told: list[bool] = []
    monkeypatch.setattr(data, "_inspect", lambda recipe, read, stopped: told.append(stopped.wait(20)))
    updates = data_page(places).on_inspect("recipe:quickstart", str(file), "auto", "")
    next(updates), next(updates)
    updates.close()  # type: ignore[attr-defined]
    assert told == [True]


# -------------------------------------------------------------------- form ⇄ YAML


def test_the_form_has_every_field_of_the_schema_and_every_hint() -> None:
    recipe = parse_recipe("data: {train: a.jsonl}\noutput: {dir: runs/a}").model_dump()
    alone = {"trl", "rewards"}
    expected = {f"{s}.{k}" for s, values in recipe.items() if s not in alone for k in values} | alone
    assert {field.path for field in fields.fields()} == expected
    assert all(field.hint and "\n" not in field.hint for field in fields.fields())


def test_the_tables_of_titles_and_essential_fields_name_fields_that_exist() -> None:
    paths = {field.path for field in fields.fields()}
    assert set(fields.TITLES) <= paths | {section.name for section in fields.sections()}
    assert {n if n == s else f"{s}.{n}" for s, names in fields.ESSENTIAL.items() for n in names} <= paths
    assert [section.name for section in fields.sections()] == list(fields.ORDER)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_form_that_nobody_touched_leaves_the_text_alone(path: Path) -> None:
    text = path.read_text()
    assert fields.written(text, fields.shown(fields.load(text))) == text


@pytest.mark.parametrize("name", sorted(LINES))
def test_an_edit_in_the_form_is_one_line_in_the_yaml(text: str, places: Places, name: str) -> None:
    field = next(field for field in fields.fields() if field.name == name)
    after = drafts.from_form(text, {field.path: LINES[name]})
    changed = [(a, b) for a, b in zip(text.splitlines(), after.splitlines(), strict=True) if a != b]
    assert [b.strip() for _, b in changed] == [f"{name}: {LINES[name]}"]
    draft = drafts.check(after, QUICKSTART, places)
    assert not draft.problems and draft.values and draft.values[field.path] == LINES[name]


def test_spelling_and_comments_stay(text: str) -> None:
    after = drafts.from_form(text, {"training.learning_rate": "1.50e-4"})
    assert (
        "learning_rate: 1.50e-4" in after and "p: null # esft_gate, esft_token" in after and after.startswith("# QLoRA")
    )


def test_experts_can_be_typed_without_brackets_and_nothing_means_null(text: str, places: Places) -> None:
    edits = {"placement.rule": "manual", "placement.experts": "0, 3", "training.epochs": "", "training.max_steps": "20"}
    draft = drafts.check(drafts.from_form(text, {**edits, "model.int8_experts": "7"}), QUICKSTART, places)
    assert draft.recipe and draft.recipe.placement.experts == (0, 3)
    assert draft.recipe.model.int8_experts == (7,)
    emptied = drafts.check(drafts.from_form(draft.text, {"model.int8_experts": ""}), QUICKSTART, places)
    assert emptied.recipe and emptied.recipe.model.int8_experts == ()
    assert draft.recipe.training.epochs is None and draft.recipe.training.max_steps == 20


def test_max_steps_alone_shows_no_epochs() -> None:
    assert fields.shown({"training": {"max_steps": 20}})["training.epochs"] == ""
    assert fields.shown({})["training.epochs"] == "3.0"


@given(
    rank=st.integers(-5, 2000),
    rate=st.floats(1e-9, 2.0),
    switch=st.booleans(),
    words=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12),
)
@settings(max_examples=40, deadline=None)
def test_what_is_typed_in_the_form_comes_back_from_the_yaml(rank: int, rate: float, switch: bool, words: str) -> None:
    text = (RECIPES / "quickstart.yaml").read_text()
    words = words.strip()
    edits = {
        "adapter.attention_rank": str(rank),
        "training.learning_rate": repr(rate),
        "model.double_quant": switch,
        "data.train": words,
    }
    shown = fields.shown(fields.load(fields.written(text, edits)))
    assert {path: shown[path] for path in edits} == edits


# -------------------------------------------------------------------- fields that a rule does not read


def rule_of(text: str) -> dict[str, object]:
    return dict(fields.load(text)["placement"])


def test_the_form_leaves_out_what_the_rule_does_not_read(text: str, places: Places) -> None:
    for rule, read in {
        "all_experts": set(),
        "top_fraction": {"fraction", "scope"},
        "esft_token": {"p"},
        "budget": {"parameters", "training_bytes", "min_rank", "rank_step", "max_rank"},
        "manual": {"experts"},
    }.items():
        draft = drafts.check(drafts.from_form(text, {"placement.rule": rule}), QUICKSTART, places)
        hidden = {path.partition(".")[2] for path in shown_of(draft, NOTHING_SHOWN)["hidden"] if "placement" in path}
        assert {"p", "fraction", "scope", "parameters", "experts", "max_rank"} - read <= hidden and not hidden & read


def test_another_rule_lets_go_of_what_only_the_old_one_read(text: str, places: Places) -> None:
    budget = drafts.from_form(text, {"placement.rule": "budget", "placement.parameters": "9000"})
    budget = drafts.from_form(budget, {"placement.max_rank": "32"})
    assert rule_of(budget)["parameters"] == 9000
    draft = drafts.check(drafts.from_form(budget, {"placement.rule": "top_fraction"}), QUICKSTART, places)
    assert draft.recipe is not None, draft.problems
    assert (rule_of(draft.text)["parameters"], rule_of(draft.text)["max_rank"]) == (None, 64)
    kept = drafts.from_form(budget, {"training.epochs": "7"})
    assert rule_of(kept)["parameters"] == 9000


def test_a_value_that_nothing_reads_stays_in_sight_with_the_reason(text: str, places: Places) -> None:
    typed = text.replace("parameters: null", "parameters: 9000", 1)
    shown = shown_of(drafts.check(typed, QUICKSTART, places), NOTHING_SHOWN)
    assert "placement.parameters" not in shown["hidden"]
    assert shown["idle"]["placement.parameters"] == "Not read while placement.rule is all_experts."
    assert "Parameters is given" in shown["errors"]["placement"]


def test_a_text_that_is_no_yaml_changes_nothing_of_what_is_left_out(text: str, places: Places) -> None:
    before = shown_of(
        drafts.check(drafts.from_form(text, {"placement.rule": "manual"}), QUICKSTART, places), NOTHING_SHOWN
    )
    broken = shown_of(drafts.check(text + "\n  [oops", QUICKSTART, places), before)
    assert broken["locked"] and broken["hidden"] == before["hidden"] and broken["idle"] == before["idle"]


# -------------------------------------------------------------------- what is wrong, and where


def test_problems_stand_at_their_field_and_line(text: str, places: Places) -> None:
    edits = {"adapter.attention_rank": "many", "training.epochs": "-1"}
    draft = drafts.check(drafts.from_form(text, edits), QUICKSTART, places)
    found = draft.by_place()
    assert set(found) == set(edits)
    assert found["adapter.attention_rank"] == (
        'Received the text "many"; allowed: a whole number, at least 0, at most 1024'
    )
    assert draft.lines() == [line_of(draft.text, "attention_rank"), line_of(draft.text, "epochs")]
    assert draft.recipe is None


def test_an_unknown_key_stands_at_its_section(text: str, places: Places) -> None:
    draft = drafts.check(text.replace("alpha: ", "alpah: "), QUICKSTART, places)
    assert draft.by_place() == {"adapter": 'Alpah: unknown key; did you mean "alpha"?'}


def test_a_text_that_is_no_yaml_keeps_itself_and_locks_the_form(text: str, places: Places) -> None:
    broken = text + "\n  [oops"
    draft = drafts.check(broken, QUICKSTART, places)
    assert draft.text == broken and draft.values is None and draft.lines()
    assert drafts.from_form(broken, {"training.epochs": "9"}) == broken


@pytest.mark.parametrize("where", ["elsewhere/job", "/etc/job", "runs/a/b", "runs/../job"])
def test_the_job_directory_lies_in_the_jobs_root(
    text: str, places: Places, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places.jobs_root.parent)
    inside = drafts.check(drafts.from_form(text, {"output.dir": "runs/job"}), QUICKSTART, places)
    outside = drafts.check(drafts.from_form(text, {"output.dir": where}), QUICKSTART, places)
    assert inside.recipe and inside.recipe.output.dir == places.jobs_root / "job"
    assert (
        set(outside.by_place()) == {"output.dir"} and "jobs started in the browser" in outside.by_place()["output.dir"]
    )


@given(typed=st.text(max_size=60), at=st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_checking_never_fails_whatever_is_typed(typed: str, at: int) -> None:
    text = (RECIPES / "quickstart.yaml").read_text()
    draft = drafts.check(text[:at] + typed + text[at:], QUICKSTART, Places(Path("/nowhere"), RECIPES))
    assert draft.problems  # at least: the job directory is not in /nowhere


# -------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "/etc", "a\\b", "a\x00b", "a\nb", "x" * 201])
def test_names_that_could_leave_their_folder_are_refused(places: Places, name: str) -> None:
    with pytest.raises(StudioError, match="allowed: a name"):
        checked_name(name)
    for kind in ("job", "recipe"):
        with pytest.raises(StudioError):
            Source.parse(f"{kind}:{name}")


@pytest.mark.parametrize("job", ["{outside}", "../outside", "inside"])
def test_an_export_from_the_browser_reaches_no_job_outside_the_root(places: Places, tmp_path: Path, job: str) -> None:
    (tmp_path / "outside" / "adapter").mkdir(parents=True)
    (tmp_path / "outside" / "recipe.yaml").write_text("model: {base: embedded}")
    places.jobs_root.mkdir()
    (places.jobs_root / "inside").symlink_to(tmp_path / "outside")
    with gr.Blocks():
        page = _layout(places)
    given = job.format(outside=tmp_path / "outside")
    refusals = ("allowed: a name", "leads out of")
    for updates in (
        page.on_start(given, "transformers", "safetensors", "", "auto", False, "a"),
        page.on_choose(given, "transformers", "safetensors", "", "auto", False, "a", True),
    ):
        assert any(words in str(updates[page.plan]) for words in refusals)
    assert page.runs.now() is None


class Broken:
    """The end of a pipe whose other end was killed in mid-message, and a process that has ended."""

    exitcode = -9

    def recv(self) -> dict[str, object]:
        raise OSError("got end of file during message")

    def join(self, seconds: float) -> None: ...


def test_an_export_killed_in_mid_message_has_failed(tmp_path: Path) -> None:
    exports = Exports()
    exports._run = Run(ExportRequest("a", tmp_path / "a"), 0.0)
    exports._follow(Broken(), Broken())  # type: ignore[arg-type]
    run = exports.now()
    assert run and run.status == "failed" and "exit code -9" in run.error


def test_a_link_out_of_the_root_is_no_job(places: Places, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    places.jobs_root.mkdir()
    (places.jobs_root / "inside").symlink_to(tmp_path / "outside")
    with pytest.raises(JobError, match="leads out of"):
        places.job("inside")
    with pytest.raises(JobError, match="There is no job"):
        places.job("other")


def test_free_names_count_up(places: Places) -> None:
    for name in ("a", "a-2", "b-7"):
        (places.jobs_root / name).mkdir(parents=True)
    assert [places.free_name(name) for name in ("c", "a", "a-2", "b-7", "c-3")] == ["c", "a-3", "a-3", "b-2", "c-3"]


# -------------------------------------------------------------------- what is shown


def test_text_is_escaped_wherever_it_stands() -> None:
    evil = "<img src=x onerror=\"alert('x')\">"
    shown = el("p", evil, el("b", evil), title=evil)
    assert "<img" not in shown and shown.count("&lt;img") == 3 and '"alert' not in shown


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    rows = [{"kind": "train", "step": step, "loss": 1000.0 - step} for step in range(1, 1001)]
    assert loss_points(rows, most=1000) == [(step, 1000.0 - step) for step in range(1, 1001)]
    thin = loss_points(rows, most=100)
    assert len(thin) == 100 and thin[-1] == (1000, 4.5) and thin[0] == (10, 994.5)
    assert loss_points([{"kind": "train", "step": 1, "loss": None}]) == []


def test_the_time_left_is_that_of_the_steps_left() -> None:
    rows = [{"kind": "train", "step": step, "time": 100.0 + 2 * step} for step in (1, 5, 11)]
    state = JobState(created_at=0.0, status="running", phase="training", step=11, total_steps=31)
    assert seconds_left(state, rows) == pytest.approx(40.0)
    assert seconds_left(state, rows[:1]) is None
    assert seconds_left(state.model_copy(update={"phase": "saving"}), rows) is None


# -------------------------------------------------------------------- who may talk to the app


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:80"}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example"}, 400),
        ({"host": "[::1"}, 400),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_only_pages_of_this_app_on_this_machine_are_answered(headers: dict[str, str], status: int) -> None:
    app = LocalOnly(Starlette(routes=[Route("/", lambda request: PlainTextResponse("hello"))]))
    answer = TestClient(app, base_url="http://127.0.0.1:7860").get("/", headers=headers)
    assert answer.status_code == status
    if status == 200:
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_metrics_are_shown_with_intervals_and_the_gate_and_names_of_tasks_are_text() -> None:
    def side(value: float) -> dict[str, object]:
        return {"examples": 9, "metrics": {"<b>t</b>/acc": {"value": value, "low": value / 2, "high": 0.9, "n": 9}}}

    gate = {"metric": "loss", "rule": "rise 0.1", "base": 1.0, "tuned": 2.0, "limit": 0.1, "worse": 1.0}
    change = {"<b>t</b>/acc": {"value": -0.25, "low": -0.4, "high": -0.1, "n": 9, "better": "higher"}}
    result = {"before": side(0.5), "after": side(0.25), "change": change, "gate": [{**gate, "passed": False}]}
    shown = str(_metrics(result))
    assert "<b>" not in shown and "&lt;b&gt;t&lt;/b&gt;/acc" in shown
    assert 'class="change worse"' in shown and "0.125 – 0.9" in shown and "-0.4 to -0.1" in shown
    assert "loss: 2, was 1 (base); allowed rise 0.1" in shown and "pill failed" in shown


def test_the_curve_has_a_held_out_line_where_there_were_losses_on_the_way() -> None:
    ends = [{"kind": "eval", "when": when, "loss": loss} for when, loss in (("before", 2.0), ("after", 1.0))]
    assert held_out_points(ends) == []
    during = {"kind": "held_out", "step": 4, "loss": 1.5}
    assert held_out_points([*ends, during]) == [(0, 2.0), (4, 1.5)]
    begun = {"kind": "eval", "when": "start", "loss": 1.75}  # what is trained begins there, and not at the base
    assert held_out_points([ends[0], begun, ends[1], during]) == [(0, 1.75), (4, 1.5)]


def test_the_adapter_that_was_given_stands_between_base_and_tuned_everywhere(tmp_path: Path) -> None:
    def side(value: float) -> dict[str, object]:
        return {"examples": 9, "metrics": {"loss": {"value": value, "low": None, "high": None, "n": 9}}}

    answers = {"prompt": "p", "reference": "r", "base": "bbb", "start": "sss", "tuned": "r"}
    result = {"before": side(3.0), "start": side(2.5), "after": side(2.0), "generations": [answers]}
    page = str(result_view(Job(tmp_path), result))
    console = Console(width=140, record=True, file=StringIO())
    console.print(metric_table(result["before"], result["after"], {}, result["start"]))
    for text in (page, console.export_text(), card_metrics(result)):
        assert re.search(r"\b3\b.*\b2\.5\b.*\b2\b", text, re.DOTALL), text
    assert "base 0 of 1, start 0 of 1, tuned 1 of 1" in page and "sss" in page
    old = {name: entry for name, entry in result.items() if name != "start"}
    assert "Start" not in str(result_view(Job(tmp_path), {**old, "generations": []}))
    assert "| | base | start | tuned |" in card_metrics(result) and "| | base | tuned |" in card_metrics(old)


@pytest.mark.parametrize(
    "sections",
    [
        "training: {method: dpo}\npreference: {beta: 0.2, loss_type: [ipo]}\nadapter: {attention_rank: 4}",
        "training: {method: grpo}\nrewards: [{function: exact_match}]\nsampling: {completions: 4}",
    ],
)
def test_another_method_lets_go_of_what_only_the_old_one_read(sections: str) -> None:
    text = f"data: {{train: a}}\noutput: {{dir: b}}\n{sections}\n"
    parse_recipe(text)
    after = parse_recipe(drafts.from_form(text, {"training.method": "sft"}))
    assert after.rewards == () and after.preference.beta == 0.1 and after.sampling.completions == 8
    assert after.adapter.attention_rank in (4, 16)
    back = parse_recipe(
        drafts.from_form("data: {train: a}\noutput: {dir: b}\ntraining: {loss_on: all}\n", {"training.method": "dpo"})
    )
    assert back.training.loss_on == "completion"


def test_a_rank_that_a_rule_passes_over_is_kept_for_another_rule() -> None:
    text = "data: {train: a}\noutput: {dir: b}\nadapter: {shared_expert_rank: 4}\n"
    after = parse_recipe(drafts.from_form(text, {"placement.rule": "attention"}))
    assert after.adapter.shared_expert_rank == 4
