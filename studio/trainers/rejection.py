"""Rejection-sampling fine-tuning: sample answers, keep what the rewards accept, and train on that by SFT.

One round is what RFT (arXiv 2308.01825, section 3.3) and the rejection sampling of Llama 2 (arXiv 2307.09288, section
3.2.3) do; with several, each samples from the model as the rounds before left it (as STaR, arXiv 2203.14465, but
without starting over from the base).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Example, Message
from studio.errors import TrainingError
from studio.job_files import append_line, to_json
from studio.jobs import Job
from studio.recipe import Recipe
from studio.rewards import Attempt, Reward, answer_of, rewards_of, score_all
from studio.rewards.choosing import Judged, choose
from studio.rewards.samples import SAMPLES
from studio.sampling import draw
from studio.trainers import sft

PROGRESS_SHARE = 0.02


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Example], job: Job
) -> dict[str, Any]:
    """Trains the adapters of `model` in place on the best of what it writes itself.

    Every sampled completion goes to `samples.jsonl` in the job directory, with its rewards and its fate.

    Returns:
        {"steps", "loss": of the last round, "rounds": [{"sampled", "kept", "acceptance", "prompts", "reward"}]}.

    Raises:
        TrainingError: a round kept nothing; or as `studio.trainers.sft.train`.
        RewardError: a reward could not be computed.
    """
    rewards, rounds, steps = rewards_of(recipe), [], 0
    outcome: dict[str, Any] = {}
    for number in range(1, recipe.sampling.rounds + 1):
        judged = _judged(model, tokenizer, recipe, rows, rewards, job, number)
        rounds.append(_report(judged, recipe, job, number))
        kept = [_as_example(one, tokenizer) for one in judged if one.fate == "kept"]
        outcome = sft.train(model, tokenizer, recipe, kept, job)
        steps += outcome["steps"]
    return {**outcome, "steps": steps, "rounds": rounds}


def _judged(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rows: Sequence[Example],
    rewards: Sequence[Reward],
    job: Job,
    number: int,
) -> list[Judged]:
    job.update(phase="sampling")
    drawn = draw(
        cast(PreTrainedModel, model),
        tokenizer,
        rows,
        recipe.sampling,
        rows=4 * recipe.training.batch_size,
        seed=recipe.training.seed + number,
        progress=_progress(job),
    )
    judged = []
    for row, group in zip(rows, drawn, strict=True):
        scored = score_all(rewards, [Attempt(one.text, row) for one in group])
        clipped = [one.clipped for one in group]
        judged += choose(scored, clipped, recipe.sampling.threshold, recipe.sampling.keep)
    for one in judged:
        append_line(job.path / SAMPLES, to_json({"round": number, **one.as_row()}))
    return judged


def _progress(job: Job) -> Callable[[int, int], None]:
    last = 0

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or done - last >= PROGRESS_SHARE * total:
            last = done
            job.log_metrics({"kind": "progress", "phase": "sampling", "done": done, "total": total})

    return report


def _report(judged: Sequence[Judged], recipe: Recipe, job: Job, number: int) -> dict[str, Any]:
    """Logs the round.

    Raises:
        TrainingError: nothing was kept.
    """
    fates = Counter(one.fate for one in judged)
    accepted = fates["kept"] + fates["duplicate"] + fates["not among the best"]
    best = max(one.scored.total for one in judged)
    row = {
        "round": number,
        "sampled": len(judged),
        "kept": fates["kept"],
        "acceptance": accepted / len(judged),
        "reward": sum(one.scored.total for one in judged) / len(judged),
        "prompts_with_kept": len({id(one.scored.attempt.row) for one in judged if one.fate == "kept"}),
        "fates": dict(fates),
    }
    job.log_metrics({"kind": "rejection", **row})
    if not fates["kept"]:
        said = ", ".join(f"{count} {fate}" for fate, count in fates.most_common())
        raise TrainingError(
            f"round {number}: none of the {len(judged)} sampled completions was accepted ({said}; the best total "
            f"reward was {best:g}, sampling.threshold is {recipe.sampling.threshold:g}). Nothing was trained in this "
            f"round and no adapter was written. Look at {job.path / SAMPLES}; a lower threshold, more completions, a "
            "gentler reward beside the strict one, or a base that can do some of the task already would help"
        )
    return row


def _as_example(one: Judged, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The row with the completion in the place of its own; thinking goes where the template reads it."""
    attempt = one.scored.attempt
    text = attempt.completion.strip()
    message = Message("assistant", text)
    if "</think>" in text and "reasoning_content" in str(tokenizer.chat_template):
        thought = text.rpartition("</think>")[0].removeprefix("<think>").strip()
        message = Message("assistant", answer_of(text), thinking=thought)
    return replace(attempt.row, completion=(message,), kind="example")
