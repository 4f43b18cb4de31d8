"""Recipes whose parts are right one by one, and wrong together."""

from __future__ import annotations

import pytest

from studio.errors import RecipeError
from studio.recipe import parse_recipe


@pytest.mark.parametrize(
    ("sections", "inside"),
    [
        ("data: {train: /r/job/rows.jsonl}", "data.train"),
        ("data: {train: /d, eval: /r/job}", "data.eval"),
        ("data: {train: /d}\nadapter: {start_from: /r/job/adapter}", "adapter.start_from"),
        (
            "data: {train: /d}\ntraining: {method: grpo}\nrewards: [{function: reward_model, job: /r/job}]",
            "rewards.0.job",
        ),
    ],
)
def test_a_job_does_not_go_where_it_would_replace_what_it_reads(sections: str, inside: str) -> None:
    with pytest.raises(RecipeError, match=rf"output\.dir: received /r/job, where {inside} lies"):
        parse_recipe(f"{sections}\noutput: {{dir: /r/job}}")
    parse_recipe(f"{sections}\noutput: {{dir: /r/job-2}}")


def test_what_only_tasks_read_needs_tasks() -> None:
    for read in ("task_examples: 8", "task_chat_template: true"):
        with pytest.raises(RecipeError, match="is given, but tasks lists none"):
            parse_recipe(f"data: {{train: a}}\noutput: {{dir: b}}\nevaluation: {{{read}}}")
        parse_recipe(f"data: {{train: a}}\noutput: {{dir: b}}\nevaluation: {{tasks: [t], {read}}}")


def test_a_gate_may_be_on_the_reward_of_one_function() -> None:
    text = "data: {train: a, eval: b}\noutput: {dir: c}\ntraining: {method: grpo}\nrewards: [{function: exact_match}]\n"
    parse_recipe(f"{text}evaluation: {{gate: [{{metric: reward/exact_match, max_drop: 0.1}}]}}")
