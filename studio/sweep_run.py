"""Running a sweep: Optuna asks for values, a job trains with them, its held-out losses prune it, its metric is told.

    run_sweep(plan, shown) ─▶ results

Trials run one after the other; a trial whose held-out loss is behind the median of the earlier ones at the same share
of its steps is cancelled (Optuna's MedianPruner). Everything is on disk (Optuna's journal and the jobs): a sweep that
was killed goes on where it was, and the job that ran meanwhile is followed, not lost. No torch.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import job_files as files
from studio.errors import JobError, StudioError
from studio.sweep import JOURNAL, SETTINGS, SweepPlan
from studio.sweep_space import Choices, value_of, with_values

if TYPE_CHECKING:
    import optuna

    from studio.jobs import Job

RESULTS = "results.json"
PARTS = 10
"""Held-out losses of a trial that are compared, at these parts of its steps."""

NO_NUMBER = 1e30
"""What Optuna is told of a held-out loss that is none."""

LOOK_SECONDS = 0.5
MOST_FAILED = 3
"""Trials that fail one after the other before the sweep gives up."""

Shown = Callable[[dict[str, Any], Any], None]


def run_sweep(plan: SweepPlan, shown: Shown | None = None) -> dict[str, Any]:
    """Runs trials until there are as many as wanted; returns the results.

    Args:
        shown: called at every look with the results so far and the job that runs, or None.

    KeyboardInterrupt cancels the running trial, whose values are tried again when the sweep goes on.

    Raises:
        StudioError: the sweep runs already, or trial after trial fails.
    """
    study = _study(plan)
    try:
        lock = files.open_lock(plan.folder / "lock")
    except BlockingIOError:
        raise JobError(f"the sweep in {plan.folder} runs already in another process") from None
    try:
        _write_settings(plan)  # with the number of trials that is wanted now
        _go_on(plan, study)
        while (trial := _next(plan, study)) is not None:
            _run_trial(plan, study, trial, shown)
            _stop_where_all_fail(plan, study)
        results = write_results(plan, study)
        if shown:
            shown(results, None)  # the last trial is over now
        _draw(plan.folder)
        return results
    finally:
        os.close(lock)


def sweep_results(plan: SweepPlan) -> dict[str, Any]:
    """The results so far, from the journal."""
    return _results(plan, _study(plan))


def _draw(folder: Path) -> None:
    """sweep.png, by a process of its own; what goes wrong with it is not worth the results."""
    command = [sys.executable, "-m", "studio.hyper_pictures", "sweep", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        print(f"the picture of the sweep could not be made: {made.stderr.strip()[-300:]}", file=sys.stderr)


def _study(plan: SweepPlan) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    new = not plan.folder.exists()
    plan.folder.mkdir(parents=True, exist_ok=True)
    if new:
        _write_settings(plan)
    storage = JournalStorage(JournalFileBackend(str(plan.folder / JOURNAL)))
    settings = plan.settings
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=settings.prune_after, n_warmup_steps=1)
        if settings.prune_after
        else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction=plan.direction, load_if_exists=True, pruner=pruner
    )
    study.sampler = _sampler(plan, len(study.trials))
    if not study.trials:
        for values in _first(plan):
            study.enqueue_trial(values)
    return study


def _first(plan: SweepPlan) -> list[dict[str, Any]]:
    """What is tried before the sampler is asked: every combination of a grid; else the recipe as it is."""
    if plan.settings.sampler == "grid":  # Optuna's own GridSampler cannot be asked trial by trial: it stops the study
        every = product(*(entry.ends() for entry in plan.space.values()))
        return [dict(zip(plan.space, values, strict=True)) for values in every]
    own = {field: value_of(plan.recipe, field) for field in plan.space}
    return [own] if all(plan.space[field].holds(value) for field, value in own.items()) else []


def _sampler(plan: SweepPlan, trials: int) -> optuna.samplers.BaseSampler:
    import optuna

    seed = plan.settings.seed + trials  # else a sweep that goes on would propose its first values again
    if plan.settings.sampler in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, plan.settings.trials // 3)))


def _write_settings(plan: SweepPlan) -> None:
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    YAML().dump(plan.settings.model_dump(mode="json"), text)
    files.write_atomic(plan.folder / SETTINGS, text.getvalue())


def _go_on(plan: SweepPlan, study: optuna.Study) -> None:
    """What a sweep that was killed left: a trial whose job lives or has a result is followed, others are queued."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        job = _job_of(plan, trial.number)
        if job is None or job.state().status in ("lost", "cancelled"):
            study.tell(trial.number, state=TrialState.FAIL)
            _again(plan, study, trial)


def _again(plan: SweepPlan, study: optuna.Study, trial: Any) -> None:
    """Queues the values of a trial once more: those that it had drawn, or those with which it was queued itself."""
    queued = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("fixed_params", {})
    values = {**queued, **trial.params}
    if values.keys() == plan.space.keys():
        study.enqueue_trial(values, user_attrs={"again": trial.number})


def _next(plan: SweepPlan, study: optuna.Study) -> optuna.trial.Trial | None:
    """A trial that was left running, else a new one, else None where there are enough."""
    import optuna
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    if running:
        return optuna.trial.Trial(study, running[0]._trial_id)
    done = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) or _failed_itself(t)]
    if len(done) >= plan.settings.trials or _grid_is_done(plan, len(done)):
        return None
    return study.ask()


def _failed_itself(trial: Any) -> bool:
    """A trial whose training failed counts; one that was cancelled from outside is tried again."""
    return "error" in trial.user_attrs


def _grid_is_done(plan: SweepPlan, done: int) -> bool:
    return plan.settings.sampler == "grid" and done >= math.prod(len(entry.ends()) for entry in plan.space.values())


def _suggested(plan: SweepPlan, trial: optuna.trial.Trial) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, entry in plan.space.items():
        if isinstance(entry, Choices):
            values[field] = trial.suggest_categorical(field, list(entry.values))
        elif entry.whole:
            step = int(entry.step or 1)
            values[field] = trial.suggest_int(field, int(entry.low), int(entry.high), step=step, log=entry.log)
        else:
            value = trial.suggest_float(field, entry.low, entry.high, step=entry.step, log=entry.log)
            values[field] = value
    return values


def _run_trial(plan: SweepPlan, study: optuna.Study, trial: optuna.trial.Trial, shown: Shown | None) -> None:
    """Follows one trial to its end and tells Optuna what became of it."""
    from optuna.trial import TrialState

    job = _job_of(plan, trial.number)
    try:
        job = job or _start(plan, trial)
    except StudioError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return
    try:
        pruned = _follow(plan, study, trial, job, shown)
    except KeyboardInterrupt:
        _cancel(job)
        study.tell(trial, state=TrialState.FAIL)
        _again(plan, study, trial)
        write_results(plan, study)
        raise
    _tell(plan, study, trial, job, pruned)
    write_results(plan, study)


def _start(plan: SweepPlan, trial: optuna.trial.Trial) -> Job:
    from studio.data import both_rows
    from studio.jobs import submit
    from studio.methods import METHODS
    from studio.plan import total_steps

    recipe = with_values(plan.recipe, _suggested(plan, trial))
    folder = plan.folder / f"{trial.number:03d}"
    output = recipe.output.model_copy(update={"dir": folder})
    every = recipe.evaluation.every_steps
    if every is None and not METHODS[recipe.training.method].scores:  # a reward model has no held-out loss
        every = max(1, math.ceil(total_steps(recipe, len(both_rows(recipe)[0])) / PARTS))
    evaluation = recipe.evaluation.model_copy(update={"every_steps": every, "gate": ()})
    return submit(recipe.model_copy(update={"output": output, "evaluation": evaluation}), overwrite=folder.exists())


def _follow(plan: SweepPlan, study: optuna.Study, trial: optuna.trial.Trial, job: Job, shown: Shown | None) -> bool:
    """Reports the held-out losses as they come; True where the job was pruned."""
    reported: set[int] = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    while True:
        state = job.state()
        rows = job.metrics()
        for part, value in parts_of(rows, state.total_steps):
            if part not in reported:
                reported.add(part)
                trial.report(value if plan.direction == "minimize" else -value, part)
        if shown:
            shown(_results(plan, study), job)
        if state.ended:
            return False
        if reported and state.phase == "training" and trial.should_prune():
            _cancel(job)
            return job.state().status == "cancelled"
        time.sleep(LOOK_SECONDS)


def parts_of(rows: list[dict[str, Any]], total_steps: int) -> list[tuple[int, float]]:
    """(part, loss): of each tenth of the steps the first held-out loss in or after it; no number is a large one."""
    found: dict[int, float] = {}
    for row in rows:
        if row.get("kind") == "held_out" and total_steps:
            loss = row.get("loss")
            found.setdefault(PARTS * row["step"] // total_steps, NO_NUMBER if loss is None else float(loss))
    return sorted((part, loss) for part, loss in found.items() if part)


def _tell(plan: SweepPlan, study: optuna.Study, trial: optuna.trial.Trial, job: Job, pruned: bool) -> None:
    from optuna.trial import TrialState

    state, result = job.state(), job.result()
    metric = ((result or {}).get("after") or {}).get("metrics", {}).get(plan.settings.metric)
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
    elif state.status == "succeeded" and metric and metric["value"] is not None:
        trial.set_user_attr("interval", [metric["low"], metric["high"]])
        study.tell(trial, metric["value"])
    elif state.status in ("cancelled", "lost"):
        study.tell(trial, state=TrialState.FAIL)
        _again(plan, study, trial)
        raise JobError(f"trial {job.name} was {state.status}, not by the sweep; go on with: studio sweep {plan.folder}")
    else:
        reason = state.error.message if state.error else f"the job does not measure {plan.settings.metric}"
        trial.set_user_attr("error", reason)
        study.tell(trial, state=TrialState.FAIL)


def _stop_where_all_fail(plan: SweepPlan, study: optuna.Study) -> None:
    last = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()][-MOST_FAILED:]
    if len(last) == MOST_FAILED and all(_failed_itself(trial) for trial in last):
        raise JobError(
            f"{MOST_FAILED} trials failed one after the other, the last with: {last[-1].user_attrs['error']}\n"
            f"The sweep stays in {plan.folder}"
        )


def _cancel(job: Job) -> None:
    try:
        job.cancel()
    except JobError:  # it ended by itself meanwhile
        return


def _job_of(plan: SweepPlan, number: int) -> Job | None:
    from studio.jobs import open_job

    try:
        return open_job(plan.folder / f"{number:03d}")
    except JobError:
        return None


# -------------------------------------------------------------------- results


def write_results(plan: SweepPlan, study: optuna.Study) -> dict[str, Any]:
    """The results, in results.json too."""
    results = _results(plan, study)
    files.write_atomic(plan.folder / RESULTS, files.to_json(results, indent=2))
    return results


def _results(plan: SweepPlan, study: optuna.Study) -> dict[str, Any]:
    """{"sweep", "metric", "direction", "params", "wanted", "best", "trials": [{"number", "state", "value", …}]}; "last"
    of a trial is its newest held-out loss, whatever the metric is."""
    from optuna.trial import TrialState

    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
    trials, sign = [], 1 if plan.direction == "minimize" else -1
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        state = names.get(trial.state, "failed" if _failed_itself(trial) else "stopped")
        last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
        seconds = trial.duration.total_seconds() if trial.duration else None
        trials.append(
            {
                "number": trial.number,
                "state": state,
                "value": trial.value if state == "complete" else None,
                "interval": trial.user_attrs.get("interval"),
                "last": None if last is None or abs(last) >= NO_NUMBER else sign * last,
                "part": max(trial.intermediate_values, default=0) / PARTS,
                "params": trial.params,
                "seconds": seconds,
                "error": trial.user_attrs.get("error"),
                "job": str(plan.folder / f"{trial.number:03d}"),
            }
        )
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))  # a pruned one has a value too: its last
    values = [(float(trial.values[0]), trial.number) for trial in done]
    best = (min if plan.direction == "minimize" else max)(values)[1] if values else None
    return {
        "sweep": str(plan.folder),
        "metric": plan.settings.metric,
        "direction": plan.direction,
        "params": {field: entry.as_json() for field, entry in plan.space.items()},
        "wanted": plan.settings.trials,
        "best": best,
        "trials": trials,
    }
