"""One job, from its directory to its adapter, in a process of its own: `accelerate launch -m studio.run_job JOB_DIR`.

    load base (4-bit experts) ─▶ attach(placement) ─▶ evaluate base ─▶ train ─▶ evaluate tuned ─▶ save_adapter ─▶ result

Everything it says goes into the job directory; the terminal and the browser read it there.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio.errors import StudioError
from studio.jobs import Job, open_job

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
    """
    clock = _Clock(job)
    with clock.phase("loading", "load"):
        model, tokenizer, placement, recipe = _load(job)
    from studio.data import both_rows, sequences, wanted_sequences
    from studio.encoding import check_lengths
    from studio.evaluation import evaluate
    from studio.methods import METHODS
    from studio.pairs import check_pairs
    from studio.preference import evaluate_preferences
    from studio.trainers import trainer_for

    scores = METHODS[recipe.training.method].scores

    train_rows, held_out = both_rows(recipe)
    held_out = held_out[: recipe.evaluation.examples]

    for rows, file in ((train_rows, recipe.data.train), (held_out, recipe.data.eval)):
        prompts = [sequences([row])[0] for row in rows]  # both sides of a pair have the same
        check_lengths(tokenizer, prompts, recipe.data.max_length_tokens, str(file))
        check_pairs(tokenizer, rows, recipe.data.max_length_tokens, str(file))

    def measure(when: str, phase: str) -> Any:
        if not held_out:
            return None
        found, preferred = None, None
        with clock.phase(phase, f"evaluate_{when}"):
            if wanted_sequences(held_out) and not scores:
                found = evaluate(
                    model,
                    tokenizer,
                    held_out,
                    max_length_tokens=recipe.data.max_length_tokens,
                    max_new_tokens=recipe.evaluation.max_new_tokens,
                    batch_size=recipe.training.batch_size,
                    progress=clock.progress(phase),
                )
            preferred = evaluate_preferences(
                model,
                tokenizer,
                held_out,
                max_length_tokens=recipe.data.max_length_tokens,
                batch_size=recipe.training.batch_size,
                scores=scores,
                progress=clock.progress(phase),
            )
        numbers = {"loss": found.loss, "exact_match": found.exact_match} if found else {}
        numbers |= preferred.as_metrics() if preferred else {}
        job.log_metrics({"kind": "eval", "when": when, **numbers})
        return found, numbers

    profile = _profiler(job, model, tokenizer, recipe, sequences(train_rows))
    with clock.phase("evaluating base", "profile"):
        profile("profile", tuned=False)
    before = measure("before", "evaluating base")
    with clock.phase("training", "train"):
        trained = trainer_for(recipe.training.method)(model, tokenizer, recipe, train_rows, job)
    after = measure("after", "evaluating tuned")
    with clock.phase("saving", "save"):
        saved = _save(job, model, placement, recipe)
    with clock.phase("saving", "pictures"), _not_worth_the_job():
        profile("profile_after", tuned=True)
        _picture(job, model)
    job.write_result(_result(job, clock, held_out, before, after, trained, saved, recipe))
    job.update(status="succeeded", phase="done", step=trained["steps"])


def _load(job: Job) -> tuple[Any, Any, Any, Any]:
    import torch

    from adapters.loading import check_quantized
    from adapters.lora import attach
    from adapters.routed import set_expert_path
    from studio.base_model import load_recipe_base
    from studio.methods import METHODS
    from studio.placing import read_placement
    from studio.reward_model import add_reward_head

    recipe = job.recipe()
    placement = read_placement(job.path / "placement.json")
    base, tokenizer = load_recipe_base(recipe, _Clock(job).progress("loading"))
    torch.manual_seed(recipe.training.seed)
    model = attach(base, placement)
    set_expert_path(model, job.plan().expert_path)
    if recipe.model.quantization != "none":
        check_quantized(model)
    if METHODS[recipe.training.method].scores:
        add_reward_head(model, recipe.training.seed)
    return model, tokenizer, placement, recipe


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
    from studio.job_files import write_atomic
    from studio.models import compute_dtype, resolve_base
    from studio.reward_model import save_reward_head

    base = resolve_base(recipe.model.base)
    name = str(base) if recipe.model.base == "embedded" else recipe.model.base
    held = recipe.model.model_dump(mode="json", exclude={"base"}) | {"dtype": compute_dtype(recipe.model.dtype)}
    saved = save_adapter(model, placement, job.path / "adapter", base_name=name, base=base, held=held)
    if hasattr(model, "reward_head"):
        save_reward_head(model, job.path / "adapter")
    write_atomic(job.path / "adapter" / "placement.json", (job.path / "placement.json").read_text(encoding="utf-8"))
    return saved


def _result(
    job: Job, clock: _Clock, held_out: list[Any], before: Any, after: Any, trained: Any, saved: Any, recipe: Any
) -> dict[str, Any]:
    base, tuned = (measured[0] if measured else None for measured in (before, after))
    summaries = [{**measured[1], "examples": len(held_out)} if measured else None for measured in (before, after)]
    return {
        "before": summaries[0],
        "after": summaries[1],
        "generations": _generations(base, tuned, recipe.evaluation.generations) if base and tuned else [],
        "memory": {
            "predicted_bytes": job.plan().memory.peak_bytes,
            "measured_bytes": peak_bytes(),
            "peak_bytes_after": clock.peak_bytes,
        },
        "seconds": {**clock.seconds, "total": time.monotonic() - clock.start},
        "steps": trained["steps"],
        "adapter": saved,
        "files": {
            "job": str(job.path),
            "adapter": str(job.path / "adapter"),
            "metrics": str(job.path / "metrics.jsonl"),
            "log": str(job.path / "log.txt"),
            "pictures": str(job.path / "pictures"),
        },
    }


def _generations(base: Any, tuned: Any, most: int) -> list[dict[str, str]]:
    """The first held-out prompts with their answers; `base` and `tuned` are Evaluations."""
    columns = (tuned.prompts, tuned.references, base.answers, tuned.answers)
    rows = list(zip(*columns, strict=True))[:most]
    return [dict(zip(("prompt", "reference", "base", "tuned"), row, strict=True)) for row in rows]


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
