"""The command line: exit codes, messages, JSON, and how fast it answers."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from studio.cli import app
from studio.follow import LiveView, PlainView
from studio.jobs import Job, JobState, open_job
from studio.models import packed_cache
from studio.plan import Plan
from studio.progress import phase_counts
from studio.quantities import as_bytes, as_count, as_duration, as_percent, sparkline
from studio.terminal import clean, job_table, job_view, plan_view, result_view
from tests.unit.conftest import SLEEPING, Jobs, wait_for, wait_for_end

COMMANDS = (
    ["validate"],
    ["plan"],
    ["shapes"],
    ["run"],
    ["merge"],
    ["convert"],
    ["combine"],
    ["verify"],
    ["push"],
    ["cache"],
    ["schema"],
    ["ui"],
    ["jobs"],
)
COMMANDS += (
    ["export"],
    ["jobs", "list"],
    ["jobs", "show"],
    ["jobs", "cancel"],
    ["data", "inspect"],
    ["data", "formats"],
    ["data", "score"],
)
RESULT: dict[str, Any] = {
    "before": {"loss": 4.0, "exact_match": 0.0, "examples": 200},
    "after": {"loss": 0.5, "exact_match": 0.715, "examples": 200},
    "generations": [{"prompt": "pump leaks", "reference": '{"a": 1}', "base": "\x1b[31mred", "tuned": '{"a": 1}'}],
    "memory": {"predicted_bytes": 900_000_000, "measured_bytes": 855_000_000},
    "seconds": {"load": 4.0, "train": 90.0, "total": 95.2},
    "steps": 450,
    "files": {"adapter": "/runs/x/adapter"},
}
SUCCEEDING = f"job.write_result({RESULT!r}); job.update(status='succeeded', phase='done')"
WATCH = "import sys; from studio.cli_jobs import watch; from studio.jobs import open_job; "


def studio(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_studio(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "studio.cli", *arguments], capture_output=True, text=True)


@pytest.fixture
def recipe_file(tmp_path: Path, data_file: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{train: '{data_file}'}}\noutput: {{dir: '{tmp_path / 'runs' / 'job'}'}}\n")
    return path


def shown(renderable: Any, width: int = 110) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


# -------------------------------------------------------------------- help and speed


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = studio(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: studio {command[0]}" in result.output


def test_help_and_validate_take_little_work(recipe_file: Path) -> None:
    """Seconds of processor time, which a busy machine hardly changes; torch alone takes more."""
    for arguments, most in ((["--help"], 0.8), (["validate", str(recipe_file)], 1.8)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_studio(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < most


def test_wrong_usage_exits_with_2() -> None:
    assert studio("validate").exit_code == 2
    assert studio("no-such-command").exit_code == 2
    assert studio("ui", "--host", "0.0.0.0").exit_code == 2


def test_the_version_is_shown() -> None:
    assert re.fullmatch(r"studio \d+\.\d+\.\d+\n", studio("--version").output)


# -------------------------------------------------------------------- validate, plan, schema


def test_validate_says_what_is_there(recipe_file: Path) -> None:
    assert "is valid: 4 training examples, 0 held out" in studio("validate", recipe_file).output
    answer = json.loads(studio("validate", recipe_file, "--json").output)
    assert answer["valid"] is True and answer["train_examples"] == 4
    assert answer["recipe"]["training"]["batch_size"] == 16


def test_validate_counts_the_rows_that_are_dropped(recipe_file: Path, tmp_path: Path) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    rows = tmp_path / "some-bad.jsonl"
    rows.write_text(good + '{"prompt": "a"}\n' * 3 + good)
    recipe = tmp_path / "drop.yaml"
    recipe.write_text(f"data: {{train: '{rows}', bad_rows: drop}}\noutput: {{dir: '{tmp_path}/o'}}\n")
    said = studio("validate", recipe).output
    assert "2 training examples" in said and "3 bad rows are dropped" in said
    assert json.loads(studio("validate", recipe, "--json").output)["dropped_rows"] == 3


def test_errors_are_one_message_on_stderr_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {train: none.jsonl}\noutput: {dir: x}\nadapter: {alpah: 1}\n")
    result = run_studio("validate", str(path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f'error: {path}: 1 problem\n  - line 3, adapter.alpah: unknown key; did you mean "alpha"?\n'
    )


def test_errors_are_json_where_json_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {train: none.jsonl}\noutput: {dir: x}\n")
    result = studio("validate", path, "--json")
    assert result.exit_code == 1
    error = json.loads(result.output)["error"]
    assert error["type"] == "DataError"
    assert error["problems"][0]["message"] == "cannot be read: no such file"


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_a_missing_recipe_is_an_error_of_ours(command: str, tmp_path: Path) -> None:
    result = studio(command, tmp_path / "none.yaml")
    assert result.exit_code == 1
    assert "no such file" in result.stderr


def test_plan_shows_every_class_of_tensors(recipe_file: Path, any_plan: Plan) -> None:
    output = studio("plan", recipe_file).output
    for entry in any_plan.classes:
        assert entry.name.replace("_", " ") in output
    assert "Predicted peak memory" in output
    assert json.loads(studio("plan", recipe_file, "--json").output)["parameters"] == any_plan.parameters


def test_schema_is_json_schema() -> None:
    schema = json.loads(studio("schema").output)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"data", "output"}


# -------------------------------------------------------------------- run and jobs


def test_run_refuses_an_existing_output(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "job").mkdir(parents=True)
    result = studio("run", recipe_file)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr


def test_run_detached_returns_at_once_and_the_job_can_be_cancelled(jobs: Jobs, recipe_file: Path) -> None:
    blocker = jobs.running(name="blocker")
    answer = json.loads(studio("run", recipe_file, "--detach", "--json").output)
    assert (answer["job"], answer["status"]) == (str(jobs.root / "job"), "queued")
    result = studio("jobs", "cancel", "job", "--root", jobs.root)
    assert (result.exit_code, result.output) == (0, "job is cancelled\n")
    blocker.cancel()


def watch(job: Job, *, as_json: bool = False) -> subprocess.Popen[str]:
    """`studio run` after its submission, in a process of its own."""
    code = WATCH + f"watch(open_job({str(job.path)!r}), {as_json})"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_job_that_succeeds_is_followed_in_plain_lines(jobs: Jobs) -> None:
    rows = "".join(f"job.log_metrics({{'kind': 'train', 'step': {i}, 'loss': {3.0 / i}}})\n" for i in range(1, 4))
    child = f"job.update(phase='training', total_steps=3, step=3)\n{rows}{SUCCEEDING}"
    follower = watch(jobs.start(child))
    output, _ = follower.communicate(timeout=30)
    assert "\x1b" not in output and "\r" not in output
    for text in (
        "training\n",
        "step 2/3 · loss 1.5000",
        "71.5 %",
        "-88 %",
        "✓ matches",
        "✗ differs",
        "/runs/x/adapter",
    ):
        assert text in output
    assert "900 MB predicted, 855 MB measured (-5 %)" in output


def test_a_job_that_fails_ends_the_command_with_its_error_and_log(jobs: Jobs) -> None:
    job = jobs.start("print('the disk is on fire'); sys.exit(3)")
    follower = watch(job)
    output, _ = follower.communicate(timeout=30)
    assert follower.returncode == 1
    assert "the disk is on fire" in output and str(job.path / "log.txt") in output


def test_a_failed_job_as_json(jobs: Jobs) -> None:
    follower = watch(jobs.start("sys.exit(3)"), as_json=True)
    output, _ = follower.communicate(timeout=30)
    assert follower.returncode == 1
    answer = json.loads(output)
    assert (answer["status"], answer["error"]["type"]) == ("failed", "TrainingError")


def test_ctrl_c_cancels_the_job_and_waits(jobs: Jobs) -> None:
    job = jobs.start(SLEEPING)
    follower = watch(job)
    assert follower.stdout
    while (line := follower.stdout.readline()).strip() != "training":
        assert line, "the follower ended early"
    follower.send_signal(signal.SIGINT)
    output, _ = follower.communicate(timeout=30)
    assert follower.returncode == 1
    assert "Cancelling" in output and "cancelled" in output
    assert job.state().status == "cancelled" and not job.is_alive()


def test_a_terminal_gets_a_live_view(jobs: Jobs) -> None:
    job = jobs.start(f"job.update(phase='training', total_steps=8, step=4)\ntime.sleep(0.5)\n{SUCCEEDING}")
    code = WATCH + f"watch(open_job({str(job.path)!r}), False)"
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    output = b""
    while chunk := read_or_end(leader):
        output += chunk
    assert process.wait() == 0
    assert b"\x1b[" in output and "✓".encode() in output and "━".encode() in output


def read_or_end(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other side is closed
        return b""


def test_jobs_are_listed_and_shown(jobs: Jobs) -> None:
    assert "No jobs in" in studio("jobs", "list", "--root", jobs.root).output
    job = jobs.start(SUCCEEDING)
    wait_for_end(job)
    assert re.search(r"job +succeeded", studio("jobs", "list", "--root", jobs.root).output)
    assert "succeeded" in studio("jobs", "--root", jobs.root).output
    assert "succeeded" in studio("jobs", "--root", jobs.root, "list").output
    (row,) = json.loads(studio("jobs", "list", "--root", jobs.root, "--json").output)
    assert row["status"] == "succeeded"
    assert "71.5 %" in studio("jobs", "show", "job", "--root", jobs.root).output
    assert json.loads(studio("jobs", "show", job.path, "--json").output)["result"]["steps"] == 450
    result = studio("jobs", "cancel", job.path)
    assert result.exit_code == 1 and "it has succeeded" in result.stderr
    result = studio("jobs", "show", "jbo", "--root", jobs.root)
    assert result.exit_code == 1 and "jobs there: job" in result.stderr


def test_following_a_job_waits_for_its_end(jobs: Jobs) -> None:
    job = jobs.running("job.update(phase='training')\ntime.sleep(0.3)\n" + SUCCEEDING)
    output = studio("jobs", "show", job.path, "--follow").output
    assert "71.5 %" in output
    assert open_job(job.path).state().status == "succeeded"


def test_a_lost_job_says_so(jobs: Jobs) -> None:
    job = jobs.running()
    os.killpg(os.getsid(job_worker(job)), signal.SIGKILL)
    for pid in holders(job):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: job.state().ended, job)
    output = studio("jobs", "show", job.path).output
    assert "lost" in output and "gone without a last word" in output


def holders(job: Job) -> list[int]:
    from studio.job_files import lock_holders

    return lock_holders(job.path / "lock")


def job_worker(job: Job) -> int:
    return next(pid for pid in holders(job) if os.getsid(pid) == pid)


def test_merge_reports_a_missing_adapter(tmp_path: Path) -> None:
    result = studio("merge", tmp_path / "none", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["error"]["type"] == "AdapterFileError"
    assert not (tmp_path / "out").exists()


def test_merge_says_what_it_can_be_merged_into(tmp_path: Path) -> None:
    result = studio("merge", tmp_path, "--out", tmp_path / "out", "--into", "8-bit", "--base", "embedded")
    assert result.exit_code == 1 and "allowed are auto, original, quantized" in result.output
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------- cache


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two quantised bases, of 1,000 bytes of weights each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, quantize in (("qwen-01", "nf4"), ("scout-02", "int8")):
        entry = tmp_path / "moe-studio" / "packed" / name
        entry.mkdir(parents=True)
        (entry / "model.safetensors").write_bytes(bytes(1000))
        settings = {"quantize": quantize, "double_quant": True, "int8_experts": [], "dtype": "torch.bfloat16"}
        source = "/hub/models--Qwen--Qwen3/snapshots/0123" if quantize == "nf4" else "/models/scout"
        manifest = {"source": source, "settings": settings, "sources": {}, "hashes": {}}
        (entry / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "moe-studio" / "packed"


def test_the_cache_is_listed(packed: Path) -> None:
    listed = json.loads(studio("cache", "--json").stdout)
    sizes = [sum(file.stat().st_size for file in (packed / name).iterdir()) for name in ("qwen-01", "scout-02")]
    assert [entry["name"] for entry in listed["entries"]] == ["qwen-01", "scout-02"]
    assert [entry["size_bytes"] for entry in listed["entries"]] == sizes
    assert listed["directory"] == str(packed) and listed["size_bytes"] == sum(sizes)
    table = studio("cache").stdout
    for text in (
        "qwen-01",
        "Qwen/Qwen3 ",
        "/models/scout",
        "nf4, double quantisation, bfloat16",
        "int8, bfloat16",
        as_bytes(sum(sizes)),
    ):
        assert text in table


def test_one_or_all_of_the_cache_is_removed(packed: Path) -> None:
    wrong = studio("cache", "--remove", "../packed")
    assert wrong.exit_code == 1 and "allowed: all, qwen-01, scout-02" in wrong.stderr
    assert json.loads(studio("cache", "--remove", "qwen-01", "--json").stdout)["removed"] == ["qwen-01"]
    assert [path.name for path in packed.iterdir()] == ["scout-02"]
    assert "Removed 1 of 1 quantised bases, 1." in studio("cache", "--remove", "all").stdout
    assert list(packed.iterdir()) == []
    assert f"No quantised bases in {packed}" in studio("cache").stdout
    assert "Removed 0 of 0" in studio("cache", "--remove", "all").stdout


def test_the_cache_is_listed_without_torch(packed: Path) -> None:
    code = "import sys; from studio.cli import app; app(['cache'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "qwen-01" in done.stdout, done.stderr


def test_small_and_unquantised_bases_are_not_kept(packed: Path) -> None:
    assert packed_cache("nf4", 1_000_000_000) == packed
    assert packed_cache("nf4", 1_000_000) is None
    assert packed_cache("none", 1_000_000_000) is None


# -------------------------------------------------------------------- what is rendered


def test_quantities_read_well() -> None:
    assert [as_bytes(n) for n in (0, 999, 1000, 65_536, 999_600, 58_700_000_000)] == [
        "0 B", "999 B", "1.00 kB", "65.5 kB", "1.00 MB", "58.7 GB",
    ]  # fmt: skip
    assert [as_count(n) for n in (12, 5_330_000, 107_800_000_000)] == ["12", "5.33 M", "108 B"]
    assert [as_percent(f) for f in (0, 0.0004, 0.171, 1)] == ["0.0 %", "0.04 %", "17.1 %", "100.0 %"]
    assert [as_duration(s) for s in (0.04, 59, 75.2, 3725)] == ["0.0 s", "59 s", "1 min 15 s", "1 h 02 min"]


def test_a_sparkline_follows_the_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([3, 2, 1, 0], width=2) == "█▁"
    assert len(sparkline(list(range(1000)), width=40)) == 40


def test_text_of_models_and_markup_is_shown_and_never_interpreted() -> None:
    assert clean("a\x1b[31mb\tc\n") == "a�[31mb\tc\n"
    row = {"prompt": "[bold]p[/bold]", "reference": "r", "base": "\x1b]0;x\x07", "tuned": "[red]t"}
    output = shown(result_view(Job("/runs/x"), {**RESULT, "generations": [row]}))
    assert "[bold]p[/bold]" in output and "[red]t" in output and "\x1b" not in output


def test_a_result_without_held_out_data_is_shown() -> None:
    output = shown(result_view(Job("/runs/x"), {**RESULT, "before": None, "after": None, "generations": []}))
    assert "Held-out" not in output and "/runs/x/adapter" in output


def test_tables_fit_into_80_columns(any_plan: Plan) -> None:
    state = JobState(status="running", phase="evaluating tuned", created_at=0.0, started_at=1.0, ended_at=90.0)
    for view in (plan_view(any_plan), job_table([(Job("/runs/quickstart"), state)])):
        assert "…" not in shown(view, width=80)


def test_progress_of_every_phase_is_counted() -> None:
    rows = [
        {"kind": "progress", "phase": "loading", "done": 5, "total": 10},
        {"kind": "progress", "phase": "evaluating base", "done": 7, "total": 8},
    ]
    state = JobState(status="running", phase="training", step=3, total_steps=9, created_at=0.0)
    assert phase_counts(state, rows) == {"loading": (5, 10), "evaluating base": (7, 8), "training": (3, 9)}


@pytest.mark.parametrize("view", [LiveView, PlainView])
def test_views_take_rows_as_they_come(view: type[LiveView] | type[PlainView]) -> None:
    states = [
        JobState(created_at=0.0),
        JobState(created_at=0.0, status="running", phase="loading"),
        JobState(created_at=0.0, status="running", phase="training", step=1, total_steps=0),
        JobState(created_at=0.0, status="failed", phase="training"),
    ]
    rows = [{"kind": "train", "step": 1, "loss": None}, {"kind": "train"}, {"kind": "new"}, {}]
    console = Console(file=open(os.devnull, "w"), force_terminal=view is LiveView)  # noqa: SIM115
    with view(console) as shown_view:
        for state in states:
            shown_view.show(state, rows, waits_for="other")


def warning(step: int) -> dict[str, Any]:
    return {"kind": "warning", "step": step, "message": f"at step {step}, layer 1: too busy\x1b[31m"}


@pytest.mark.parametrize("view", [LiveView, PlainView])
def test_each_warning_is_printed_once_as_it_comes(view: type[LiveView] | type[PlainView]) -> None:
    console = Console(width=110, record=True, file=open(os.devnull, "w"), force_terminal=view is LiveView)  # noqa: SIM115
    state = JobState(created_at=0.0, status="running", phase="training", step=1, total_steps=9)
    rows: list[dict[str, Any]] = []
    with view(console) as shown_view:
        shown_view.show(state, rows, None)
        for step in (2, 3):
            rows.append(warning(step))
            shown_view.show(state, rows, None)
            shown_view.show(state, rows, None)
            seen = console.export_text(clear=False)
            assert [seen.count(f"warning: at step {n}, layer 1: too busy") for n in (2, 3)] == [1, int(step == 3)]
    assert "\x1b[31m" not in console.export_text(clear=False)


def test_the_live_line_shows_the_worst_layers_of_the_router() -> None:
    console = Console(width=110, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    state = JobState(created_at=0.0, status="running", phase="training", step=1, total_steps=9)
    row = {"kind": "router", "step": 3, "layers": [1, 3, 5], "kl": [0.01, 0.25, 0.1], "load_entropy": [0.9, 0.8, 0.412]}
    with LiveView(console) as view:
        for rows in ([], [{**row, "kl": [], "load_entropy": [0.9, 0.8, 0.7]}], [row, {**row, "kl": [0.1, 0.3, None]}]):
            view.show(state, rows, None)
            console.print(view._render())
    text = console.export_text()
    assert "lowest load entropy 0.700 (layer 5)" in text and "lowest load entropy 0.412 (layer 5)" in text
    assert "largest KL not finite (layer 5)" in text and text.count("largest KL") < text.count("lowest load entropy")
    with LiveView(console) as view:
        view.show(state, [row], None)
        console.print(view._render())
    assert "largest KL 0.25 nats (layer 3) · lowest load entropy 0.412 (layer 5)" in console.export_text()


def test_the_warnings_stand_at_the_end_of_a_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    state = JobState(created_at=0.0, status="failed", phase="training", step=9, total_steps=9)
    views = (lambda: shown(job_view(job, state, [])), lambda: shown(result_view(job, RESULT)))
    assert not any("Warning" in view() for view in views)
    for step in range(1, 15):
        job.log_metrics(warning(step))
    for view in views:
        said = view()
        assert [n for n in range(1, 15) if f"at step {n}, layer 1: too busy" in said] == list(range(5, 15))
        assert "4 earlier ones" in said and "metrics.jsonl" in said and "\x1b" not in said


def test_a_result_says_where_the_pictures_are(tmp_path: Path) -> None:
    assert "Pictures" not in shown(result_view(Job(tmp_path), RESULT), width=300)
    (tmp_path / "pictures").mkdir()
    assert re.search(rf"Pictures +{tmp_path}/pictures", shown(result_view(Job(tmp_path), RESULT), width=300))
