"""The life of a job, with real processes: its end is always written, or found out from the lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from studio import job_files as files
from studio.errors import DataError, JobError, OutputExistsError
from studio.jobs import Job, list_jobs, open_job, start_worker, submit
from studio.worker import launch_command
from tests.unit.conftest import SLEEPING, Jobs, recipe_at, wait_for, wait_for_end

SUCCEEDING = "job.write_result({'steps': 3}); job.update(status='succeeded', phase='done', step=3)"
UNTIL_RELEASED = "job.update(phase='training')\nwhile not (job.path / 'go').exists(): time.sleep(0.01)\n" + SUCCEEDING
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPING
WITH_GRANDCHILD = (
    "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); " + SLEEPING
)


def worker_of(job: Job) -> int:
    (worker,) = [pid for pid in files.lock_holders(job.path / "lock") if os.getsid(pid) == pid]
    return worker


def others_of(job: Job) -> list[int]:
    worker = worker_of(job)
    return [pid for pid in files.lock_holders(job.path / "lock") if pid != worker]


# -------------------------------------------------------------------- ends


def test_a_job_that_succeeds_keeps_what_it_wrote(jobs: Jobs) -> None:
    job = jobs.start(SUCCEEDING)
    assert wait_for_end(job) == "succeeded"
    state = job.state()
    assert state.step == 3 and state.error is None
    assert state.created_at <= (state.started_at or 0) <= (state.ended_at or 0)
    assert job.result() == {"steps": 3}
    assert job.plan() == jobs.plan and job.recipe() == jobs.recipe()
    wait_for(lambda: not job.is_alive(), job)


def test_a_training_process_that_fails_leaves_its_exit_code_and_last_words(jobs: Jobs) -> None:
    job = jobs.start("print('the disk is on fire'); sys.exit(3)")
    assert wait_for_end(job) == "failed"
    error = job.state().error
    assert error and error.type == "TrainingError"
    assert "exit code 3" in error.message and "the disk is on fire" in error.message


def test_an_error_that_the_training_process_recorded_is_kept(jobs: Jobs) -> None:
    job = jobs.start("job.update(status='failed', error={'type': 'DataError', 'message': 'mine'}); sys.exit(1)")
    assert wait_for_end(job) == "failed"
    error = job.state().error
    assert error and error.message == "mine"


def test_an_exit_without_a_result_is_a_failure(jobs: Jobs) -> None:
    job = jobs.start("pass")
    assert wait_for_end(job) == "failed"
    error = job.state().error
    assert error and "without a result" in error.message


def test_a_killed_training_process_is_a_failure_that_names_the_signal(jobs: Jobs) -> None:
    job = jobs.running()
    (child,) = others_of(job)
    os.kill(child, signal.SIGKILL)
    assert wait_for_end(job) == "failed"
    error = job.state().error
    assert error and "killed by SIGKILL" in error.message


def test_a_command_that_cannot_start_is_a_failure(jobs: Jobs) -> None:
    job = jobs.make()
    lock = files.open_lock(job.path / "lock")
    code = f"from studio.worker import work; work({str(job.path)!r}, ['/no/such/program'])"
    start_worker(job, lock, [sys.executable, "-c", code])
    assert wait_for_end(job) == "failed"
    error = job.state().error
    assert error and error.type == "FileNotFoundError"


# -------------------------------------------------------------------- cancel


@pytest.mark.parametrize(("child", "grace"), [(SLEEPING, 5.0), (DEAF, 0.2), (WITH_GRANDCHILD, 5.0)])
def test_cancel_ends_every_process_of_a_running_job(jobs: Jobs, child: str, grace: float) -> None:
    job = jobs.running(child, grace_seconds=grace)
    assert others_of(job)
    assert job.cancel().status == "cancelled"
    assert files.lock_holders(job.path / "lock") == []
    assert "the training process ended with exit code -" in job.log_tail(1)[0], "the worker did not see to it"
    assert job.cancel().status == "cancelled"  # once more does no harm


def test_cancel_of_a_queued_job_leaves_the_running_one_alone(jobs: Jobs) -> None:
    first = jobs.running(name="first")
    second = jobs.start(SUCCEEDING, name="second")
    wait_for(lambda: "waiting for its turn" in "\n".join(second.log_tail()), second)
    assert second.state().status == "queued"
    assert second.cancel().status == "cancelled"
    assert first.state().status == "running"
    first.cancel()


def test_cancel_right_after_the_start_is_not_lost(jobs: Jobs) -> None:
    job = jobs.start(SLEEPING)
    assert job.cancel().status == "cancelled"
    assert not job.is_alive()


def test_an_ended_job_cannot_be_cancelled(jobs: Jobs) -> None:
    job = jobs.start(SUCCEEDING)
    wait_for_end(job)
    with pytest.raises(JobError, match="it has succeeded"):
        job.cancel()


# -------------------------------------------------------------------- kill -9


def test_a_worker_killed_alone_leaves_a_running_job_that_ends_by_itself(jobs: Jobs) -> None:
    job = jobs.running(UNTIL_RELEASED)
    os.kill(worker_of(job), signal.SIGKILL)
    waiting = jobs.start(SUCCEEDING, name="waiting")
    wait_for(lambda: "waiting for its turn" in "\n".join(waiting.log_tail()), waiting)
    assert job.state().status == "running"
    assert waiting.state().status == "queued", "two jobs on one device"
    (job.path / "go").touch()
    assert wait_for_end(job) == "succeeded"
    assert wait_for_end(waiting) == "succeeded"


def test_a_job_without_its_worker_can_still_be_cancelled(jobs: Jobs) -> None:
    job = jobs.running()
    os.kill(worker_of(job), signal.SIGKILL)
    assert job.cancel().status == "cancelled"
    assert not job.is_alive()


def test_a_job_killed_whole_is_lost_and_makes_room(jobs: Jobs) -> None:
    job = jobs.running()
    for pid in [worker_of(job), *others_of(job)]:
        os.kill(pid, signal.SIGKILL)
    assert wait_for_end(job) == "lost"
    error = job.state().error
    assert error and "gone without a last word" in error.message
    with pytest.raises(JobError, match="lost its processes"):
        job.cancel()
    assert wait_for_end(jobs.start(SUCCEEDING, name="next")) == "succeeded"


def test_state_is_whole_whenever_its_writer_is_killed(jobs: Jobs) -> None:
    job = jobs.make()
    code = f"from studio.jobs import Job\njob = Job({str(job.path)!r})\nfor i in range(10**9): job.update(step=i)"
    for _ in range(4):
        before = files.read_json(job.path / "state.json")["step"]
        writer = subprocess.Popen([sys.executable, "-c", code])
        wait_for(lambda before=before: job.state().step not in (before, 0), job)  # type: ignore[misc]
        writer.kill()
        writer.wait()
        assert json.loads((job.path / "state.json").read_text())["status"] == "queued"


# -------------------------------------------------------------------- turns


def test_jobs_of_a_root_run_one_at_a_time_in_order(jobs: Jobs) -> None:
    first = jobs.running(UNTIL_RELEASED, name="z-first")
    second, third = jobs.create("y-second"), jobs.create("x-third")
    for (job, lock), turn in ((third, 0.01), (second, 0.3)):  # the older job comes late and looks seldom: still first
        jobs.launch(job, lock, SUCCEEDING, turn_seconds=turn)
        wait_for(lambda job=job: "waiting for its turn" in "\n".join(job.log_tail()), job)  # type: ignore[misc]
    (first.path / "go").touch()
    later = [second[0], third[0]]
    for job in (first, *later):
        assert wait_for_end(job) == "succeeded"
    states = [job.state() for job in (first, *later)]
    for one, next_one in pairwise(states):
        assert one.ended_at is not None and next_one.started_at is not None
        assert one.ended_at <= next_one.started_at


def test_one_job_has_one_worker(jobs: Jobs) -> None:
    job = jobs.running()
    second = subprocess.run(
        [sys.executable, "-m", "studio.worker", str(job.path)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert "has a living worker already" in second.stdout
    assert job.state().status == "running"
    job.cancel()


def test_the_training_process_is_started_by_accelerate_as_one_process(jobs: Jobs) -> None:
    job = jobs.make()
    command = " ".join(launch_command(job))
    assert "-m accelerate.commands.launch" in command
    assert "--num_processes 1 --num_machines 1" in command
    assert command.endswith(f"-m studio.run_job {job.path}")
    assert f"--config_file {job.path / 'launch.yaml'}" in command  # not the user's own


# -------------------------------------------------------------------- submit, list, open


def test_submit_starts_a_worker_that_outlives_its_caller(jobs: Jobs) -> None:
    blocker = jobs.running(name="blocker")
    code = (
        "from pathlib import Path; from studio.jobs import submit; from tests.unit.conftest import recipe_at;"
        f"submit(recipe_at(Path({str(jobs.data)!r}), Path({str(jobs.root / 'job')!r})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    job = open_job(jobs.root / "job")
    assert job.state().status == "queued"
    assert job.state().total_steps == jobs.plan.total_steps
    assert job.is_alive()
    assert job.cancel().status == "cancelled"
    blocker.cancel()


def test_submit_with_bad_data_makes_nothing(jobs: Jobs, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(DataError):
        submit(recipe_at(bad, jobs.root / "job"))
    assert not jobs.root.exists()


def test_an_existing_output_is_refused_before_anything_starts(jobs: Jobs) -> None:
    (jobs.root / "job").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        submit(jobs.recipe())
    assert list(jobs.root.iterdir()) == [jobs.root / "job"]


def test_overwrite_replaces_an_ended_job_whole(jobs: Jobs) -> None:
    old = jobs.start(SUCCEEDING)
    wait_for_end(old)
    new = jobs.make(overwrite=True)
    assert new.result() is None
    assert [path.name for path in jobs.root.iterdir() if path.name != ".device.lock"] == ["job"]


def test_overwrite_waits_for_a_job_that_has_ended_to_clear_up(jobs: Jobs) -> None:
    old = jobs.start(SUCCEEDING + "\ntime.sleep(0.5)")
    wait_for_end(old)
    assert old.is_alive()
    assert jobs.make(overwrite=True).result() is None


def test_overwrite_never_deletes_what_is_no_job(jobs: Jobs) -> None:
    precious = jobs.root / "job" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("ten years")
    with pytest.raises(OutputExistsError, match="never overwritten"):
        jobs.make(overwrite=True)
    link = jobs.root / "link"
    link.symlink_to(precious.parent)
    with pytest.raises(OutputExistsError, match="never overwritten"):
        jobs.make("link", overwrite=True)
    assert precious.read_text() == "ten years"


def test_overwrite_refuses_a_living_job(jobs: Jobs) -> None:
    job = jobs.running()
    with pytest.raises(OutputExistsError, match="cancel it first"):
        jobs.make(overwrite=True)
    assert job.state().status == "running"
    job.cancel()


def test_an_output_that_cannot_be_made_is_an_error_of_ours(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the root should be")
    with pytest.raises(JobError, match="cannot be made"):
        jobs.make()


def test_jobs_are_listed_newest_first_and_only_jobs(jobs: Jobs) -> None:
    assert list_jobs(jobs.root) == []
    made = [jobs.make(name) for name in ("b", "a", "c")]
    (jobs.root / ".hidden").mkdir()
    (jobs.root / "notes").mkdir()
    damaged = jobs.make("damaged")
    (damaged.path / "state.json").write_text("{")
    assert [job.name for job in list_jobs(jobs.root)] == [job.name for job in reversed(made)]
    with pytest.raises(JobError, match=r"state\.json cannot be read"):
        open_job(damaged.path)


def test_opening_what_is_no_job_names_the_jobs_there(jobs: Jobs) -> None:
    jobs.make("quickstart")
    with pytest.raises(JobError, match="jobs there: quickstart"):
        open_job(jobs.root / "quikstart")


# -------------------------------------------------------------------- files


def test_an_end_is_final(jobs: Jobs) -> None:
    job = jobs.make()
    job.update(status="cancelled")
    with pytest.raises(JobError, match="already cancelled"):
        job.update(status="succeeded")


def test_a_torn_last_line_of_metrics_is_passed_over_and_closed(jobs: Jobs) -> None:
    job = jobs.make()
    assert job.metrics() == []
    job.log_metrics({"kind": "train", "step": 1, "loss": float("nan")})
    with (job.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert job.metrics() == [{"kind": "train", "step": 1, "loss": None}]
    job.log_metrics({"kind": "train", "step": 2})
    assert [row["step"] for row in job.metrics()] == [1, 2]


def test_the_log_tail_keeps_the_last_state_of_a_progress_bar(jobs: Jobs) -> None:
    job = jobs.make()
    (job.path / "log.txt").write_bytes(b"first\n 10%\r 50%\r100%\n\nl\xff st\n")
    assert job.log_tail(2) == ["100%", "l� st"]


def test_two_that_ask_whether_a_job_lives_do_not_mistake_each_other(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    os.close(files.open_lock(lock))
    look = f"for _ in range(2000): assert not files.is_held(Path({str(lock)!r}))"
    code = f"from pathlib import Path\nfrom studio import job_files as files\n{look}"
    other = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while other.poll() is None and time.monotonic() < deadline:
        assert not files.is_held(lock)
    assert other.returncode == 0
