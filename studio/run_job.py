"""One job, from its directory to its adapter, in a process of its own: `accelerate launch -m studio.run_job JOB_DIR`.

    load base (4-bit experts) ─▶ attach(placement) ─▶ evaluate base ─▶ train ─▶ evaluate tuned ─▶ save_adapter ─▶ result

The base is the model with its adapters off, whatever they begin with.

Everything it says goes into the job directory; the terminal and the browser read it there.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from studio.errors import StudioError
from studio.jobs import Job, open_job
from studio.lr_test import is_lr_test

if TYPE_CHECKING:
    from studio.data import Row

PROGRESS_SECONDS = 0.5
WATCHED_TOKENS = 16_384
"""Tokens of the sample whose routing is compared before and after the training."""


def main() -> int:
    job = open_job(Path(sys.argv[1]))
    try:
        run(job)
    except StudioError as error:
        print(error, file=sys.stderr)
        _fail(job, error)
        return 1
    except Exception as error:
        traceback.print_exc()
        _fail(job, error)
        return 1
    return 0


def _fail(job: Job, error: Exception) -> None:
    with _not_worth_the_job():
        _draw(job)
    job.update(status="failed", error={"type": type(error).__name__, "message": str(error)})


def run(job: Job) -> None:
    """Runs the job to its end.

    Raises:
        StudioError: what the studio refuses: bad base weights, non-finite loss, … No adapter is written then.
        GateError: the tuned model is worse than the recipe allows; the adapter and the result are written.
    """
    from studio.data import sequences
    from studio.gate import Verdict, check_gate, raise_failed
    from studio.measuring import Measuring

    clock = _Clock(job)
    with clock.phase("loading", "load"):
        train_rows, held_out = _rows(job)
        measuring = Measuring(job.recipe(), held_out)  # tasks that are not here are refused before the base is loaded
        model, tokenizer, placement, recipe = _load(job)
    from studio.data.curriculum import in_training_order
    from studio.pairs import check_pairs
    from studio.trainers import trainer_for

    for rows in (train_rows, held_out):
        check_pairs(tokenizer, rows, recipe.data.max_length_tokens)
    train_rows = in_training_order(recipe, train_rows, job.plan().total_steps)

    def measure(when: str, phase: str) -> Any:
        if measuring.nothing:
            return None
        with clock.phase(phase, f"evaluate_{when}"), _as_base(model, when == "before"):
            found = measuring.run(model, tokenizer, clock.progress(phase))
        job.log_metrics({"kind": "eval", "when": when, **found.row()})
        return found

    if is_lr_test(job):
        with clock.phase("training", "train"):
            _test_rates(job, lambda: trainer_for(recipe.training.method)(model, tokenizer, recipe, train_rows, job))
        return
    profile = _profiler(job, model, tokenizer, recipe, sequences(train_rows))
    with clock.phase("evaluating base", "profile"), _as_base(model):
        profile("profile", tuned=False)
    before = measure("before", "evaluating base")
    check_gate(recipe.evaluation.gate, before.measures if before else {})
    start = measure("start", "evaluating base") if recipe.adapter.start_from else None
    with clock.phase("training", "train"):
        trained = trainer_for(recipe.training.method)(model, tokenizer, recipe, train_rows, job)
    after = measure("after", "evaluating tuned")
    with clock.phase("saving", "save"):
        saved = _save(job, model, placement, recipe)
    with clock.phase("saving", "pictures"), _not_worth_the_job():
        profile("profile_after", tuned=True)
        _picture(job, model)
    result = _result(job, clock, Measured(before, start, after), trained, saved, recipe)
    job.write_result(result)
    job.update(phase="done", step=trained["steps"])
    raise_failed([Verdict(**entry) for entry in result["gate"]], str(job.path / "adapter"))
    job.update(status="succeeded")


def _rows(job: Job) -> tuple[list[Row], list[Row]]:
    """The rows to train on and to be measured on, each rendered once by the model's template, in a limited child."""
    from studio.chat_template import rendered_rows
    from studio.data.hard_examples import write_rows
    from studio.data.of_recipe import DROPPED, dropped_lines
    from studio.job_files import write_atomic

    rows = rendered_rows(job.recipe())
    if rows.dropped:
        write_atomic(job.path / DROPPED, dropped_lines(rows.dropped))
    for name, chosen in (("kept", rows.kept), ("left_out", rows.left_out)):
        if chosen:
            write_rows(job.path / f"{name}.jsonl", chosen)
    return rows.train, rows.held_out


def _test_rates(job: Job, train: Callable[[], Any]) -> None:
    """A range test: the training is thrown away, and a loss that is not finite is an end like another."""
    from studio.errors import TrainingError
    from studio.lr_test import lr_test_report

    try:
        train()
    except TrainingError as error:
        print(error, file=sys.stderr)
    job.write_result({"lr_test": lr_test_report(job)})
    with _not_worth_the_job():
        subprocess.run([sys.executable, "-m", "studio.hyper_pictures", "lr-test", str(job.path)], check=True)
    job.update(status="succeeded", phase="done")


def _load(job: Job) -> tuple[Any, Any, Any, Any]:
    import torch

    from adapters.continuing import load_adapter
    from adapters.loading import check_quantized
    from adapters.lora import attach, set_lora_plus
    from adapters.routed import set_expert_path
    from studio.base_model import load_recipe_base
    from studio.merging import adapter_directory
    from studio.methods import METHODS, REWARD_HEAD
    from studio.models import resolve_base
    from studio.placing import read_placement
    from studio.reward_model import add_reward_head, load_reward_head

    recipe = job.recipe()
    placement = read_placement(job.path / "placement.json")
    base, tokenizer = load_recipe_base(recipe, _Clock(job).progress("loading"))
    torch.manual_seed(recipe.training.seed)
    directory = resolve_base(recipe.model.base)
    model = attach(base, placement, base=directory, progress=_Clock(job).progress("starting adapters"))
    if recipe.adapter.start_from:
        load_adapter(model, placement, adapter_directory(recipe.adapter.start_from))
    set_lora_plus(model, recipe.training.lora_plus_ratio)
    set_expert_path(model, job.plan().expert_path)
    if recipe.model.quantization != "none":
        check_quantized(model)
    if METHODS[recipe.training.method].scores:
        add_reward_head(model, recipe.training.seed)
        if recipe.adapter.start_from and (head := adapter_directory(recipe.adapter.start_from) / REWARD_HEAD).is_file():
            load_reward_head(model, head.parent)
    return model, tokenizer, placement, recipe


def _as_base(model: Any, off: bool = True) -> AbstractContextManager[Any]:
    """The model with its adapters off: what they begin with, given or made from the weights, is no part of the base."""
    return cast(AbstractContextManager[Any], model.disable_adapter()) if off else nullcontext()


def _profiler(job: Job, model: Any, tokenizer: Any, recipe: Any, examples: list[Any]) -> Callable[..., None]:
    """Writes where the model as it stands sends a small sample, the same one each time; nothing where unwatched."""
    from studio.plan import recipe_base
    from studio.profile import SAMPLE_SEED, fingerprints, sample_fingerprint, shared_count
    from studio.profiling import BATCH_TOKENS, draw_sample, profile_routing

    shapes = recipe_base(recipe)
    if not (recipe.router.watch and shapes.moe):
        return lambda name, tuned: None
    sample = draw_sample(tokenizer, examples, recipe.data.max_length_tokens, WATCHED_TOKENS)
    base, data, shared = fingerprints(recipe)[0], sample_fingerprint(recipe, WATCHED_TOKENS), shared_count(shapes)
    as_in_training = min(BATCH_TOKENS, recipe.training.batch_size * recipe.data.max_length_tokens)

    def write(name: str, tuned: bool) -> None:
        counted = profile_routing(model, sample, tokenizer.pad_token_id, batch_tokens=as_in_training, pairs=False)
        bound = counted.bound_to(
            f"{base} and this job's adapter" if tuned else base, data, SAMPLE_SEED, WATCHED_TOKENS, shared
        )
        bound.save(job.path / f"{name}.safetensors")

    return write


@contextmanager
def _not_worth_the_job() -> Iterator[None]:
    """What goes wrong with pictures is written to the log, and the job goes on: a saved adapter counts for more."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        print("the pictures of this job could not be made", file=sys.stderr)


def _picture(job: Job, model: Any) -> None:
    """How far each expert moved, and the pictures of the job."""
    from adapters.deltas import expert_delta_norms
    from studio.job_files import to_json, write_atomic

    norms = expert_delta_norms(model)
    if norms["layers"]:
        write_atomic(job.path / "delta_norms.json", to_json(norms))
    _draw(job)


def _draw(job: Job) -> None:
    """The pictures that the files of the job allow; by a process of its own, whose memory is not the training's."""
    subprocess.run([sys.executable, "-m", "studio.pictures", str(job.path)], check=True, stdin=subprocess.DEVNULL)


def _save(job: Job, model: Any, placement: Any, recipe: Any) -> dict[str, int]:
    from adapters.peft_files import save_adapter
    from studio.chat_template import chat_template
    from studio.job_files import write_atomic
    from studio.models import compute_dtype, resolve_base
    from studio.reward_model import save_reward_head

    base = resolve_base(recipe.model.base)
    name = str(base) if recipe.model.base == "embedded" else recipe.model.base
    held = recipe.model.model_dump(mode="json", exclude={"base"}) | {"dtype": compute_dtype(recipe.model.dtype)}
    saved = save_adapter(model, placement, job.path / "adapter", base_name=name, base=base, held=held)
    template = chat_template(base)
    if template.is_default:
        write_atomic(job.path / "adapter" / "chat_template.jinja", template.text)
    if hasattr(model, "reward_head"):
        save_reward_head(model, job.path / "adapter")
    write_atomic(job.path / "adapter" / "placement.json", (job.path / "placement.json").read_text(encoding="utf-8"))
    return saved


class Measured(NamedTuple):
    """Evaluations of the base, of the adapter as it was given (`adapter.start_from`), and of the tuned model."""

    base: Any
    start: Any
    tuned: Any

    def report(self, gate: Any, generations: int) -> dict[str, Any]:
        """What result.json says of them."""
        from studio.gate import judge
        from studio.metrics import changes_as_json

        base, start, tuned = (found.measures if found else {} for found in self)
        return {
            "before": self.base.summary() if self.base else None,
            **({"start": self.start.summary(), "change_from_start": changes_as_json(start, tuned)} if start else {}),
            "after": self.tuned.summary() if self.tuned else None,
            "change": changes_as_json(base, tuned),
            "gate": [vars(verdict) for verdict in judge(gate, {"base": base, "start": start}, tuned)],
            "generations": self._generations(generations) if self.tuned else [],
        }

    def _generations(self, most: int) -> list[dict[str, str]]:
        """The first held-out prompts with their answers."""
        named = {"base": self.base, "start": self.start, "tuned": self.tuned}
        columns = {"prompt": self.tuned.prompts, "reference": self.tuned.references}
        columns |= {name: found.answers for name, found in named.items() if found}
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows][:most]


def _result(job: Job, clock: _Clock, measured: Measured, trained: Any, saved: Any, recipe: Any) -> dict[str, Any]:
    return {
        **measured.report(recipe.evaluation.gate, recipe.evaluation.generations),
        "memory": {
            "predicted_bytes": job.plan().memory.peak_bytes,
            "measured_bytes": peak_bytes(),
            "peak_bytes_after": clock.peak_bytes,
        },
        "seconds": {**clock.seconds, "total": time.monotonic() - clock.start},
        "steps": trained["steps"],
        "trained": {name: value for name, value in trained.items() if name != "steps"},
        "adapter": saved,
        "files": {
            "job": str(job.path),
            "adapter": str(job.path / "adapter"),
            "metrics": str(job.path / "metrics.jsonl"),
            "log": str(job.path / "log.txt"),
            "pictures": str(job.path / "pictures"),
        },
    }


def peak_bytes() -> int:
    """Peak memory of this process so far: on the GPU when there is one, else resident memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """Names the phase in state.json, times it, notes the peak so far, and hands out throttled progress reporters."""

    def __init__(self, job: Job):
        self.job, self.start = job, time.monotonic()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str, key: str) -> Iterator[None]:
        self.job.update(phase=name)
        begun = time.monotonic()
        yield
        self.seconds[key] = time.monotonic() - begun
        self.peak_bytes[key] = peak_bytes()

    def progress(self, phase: str) -> Callable[[int, int], None]:
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last >= PROGRESS_SECONDS:
                last = now
                self.job.log_metrics({"kind": "progress", "phase": phase, "done": done, "total": total})

        return report


if __name__ == "__main__":
    sys.exit(main())
