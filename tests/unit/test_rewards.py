"""Rewards: what each gives, what it refuses, and a failing one that is an error and never a zero."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from studio.data import Example, Message, read_examples, read_rows
from studio.data.formats import convert
from studio.data.json_text import RowProblems
from studio.errors import DataError, RecipeError, RewardError
from studio.generations import check_prompts
from studio.methods import METHODS
from studio.plan import make_plan
from studio.recipe import Recipe, parse_recipe
from studio.recipe_training import RewardSettings
from studio.rewards import REWARDS, Attempt, Reward, answer_of, check_rewards, rewards_of, score_all
from studio.rewards.choosing import choose
from studio.rewards.samples import as_sample, reward_measures
from studio.rewards.scoring import Scored, each

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/name"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string"}},
}


def row(reference: str = "yes", prompt: str = "ask", tests: tuple[str, ...] = ()) -> Example:
    return Example((Message("user", prompt),), (Message("assistant", reference),), "file", tests=tests)


def reward(function: str, **options: Any) -> Reward:
    settings = RewardSettings.model_validate({"function": function, **options})
    kind = REWARDS[function]
    return Reward(function, settings.weight, kind.low, kind.high, kind.build(settings))


def one(function: str, completion: str, reference: str = "yes", **options: Any) -> float:
    return reward(function, **options)([Attempt(completion, row(reference))])[0]


def recipe_with(rewards: str, data: Path | str = "train.jsonl", more: str = "") -> Recipe:
    return parse_recipe(
        f"data: {{train: '{data}'}}\noutput: {{dir: runs/x}}\ntraining: {{method: grpo}}\nrewards: {rewards}\n{more}"
    )


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("plain", "plain"),
        ("<think>hm</think> yes ", "yes"),
        ("hm</think>\nyes", "yes"),  # the template wrote the opening tag
        ("<think>a</think>b</think>c", "c"),
        ("<think>never closed: yes", ""),
        ("says <think> in the middle", "says <think> in the middle"),
    ],
)
def test_the_answer_is_what_comes_after_the_thinking(completion: str, answer: str) -> None:
    assert answer_of(completion) == answer


@pytest.mark.parametrize(
    ("normalise", "completion", "reference", "value"),
    [
        ("ends", " yes\n", "yes", 1),
        ("ends", "Yes", "yes", 0),
        ("ends", "<think>no</think>yes", "yes", 1),
        ("ends", "<think>yes</think>no", "yes", 0),
        ("lenient", "  YES.  ", "yes", 1),
        ("lenient", "a  b", "a b", 1),
        ("lenient", "ﬁne", "fine", 1),
        ("lenient", "a.b", "ab", 0),
        ("json", '{"b":1,"a":[1,2]}', '{"a": [1, 2], "b": 1}', 1),
        ("json", '{"a": 1.0}', '{"a": 1}', 0),
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("json", "not json", "not json", 1),
    ],
)
def test_exact_match_says_what_it_passes_over(normalise: str, completion: str, reference: str, value: float) -> None:
    assert one("exact_match", completion, reference, normalise=normalise) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"a": 1, "b": "x"}', 1.0),
        ('{"a": 1, "b": "y"}', 0.5),
        ('{"a": 1}', 0.5),
        ('{"a": 1, "b": "x", "c": 0}', 0.0),
        ('{"a": 1, "a": 1, "b": "x"}', 0.0),
        ("[1]", 0.0),
        ("{", 0.0),
    ],
)
def test_json_fields_is_the_share_of_fields_that_are_right(completion: str, value: float) -> None:
    assert one("json_fields", completion, '{"a": 1, "b": "x"}') == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"a": 1, "b": "x"}', 1),
        (' {"a": 1}\n', 1),
        ('<think>{"x"}</think>{"a": 1}', 1),
        ('{"a": "1"}', 0),
        ('{"a": 1, "b": 2}', 0),
        ('{"a": 1, "a": 1}', 0),
        ('{"a": NaN}', 0),
        ('{"a": 1} and more', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_schema_accepts_what_the_schema_does(completion: str, value: float, tmp_path: Path) -> None:
    assert one("json_schema", completion, json_schema=SCHEMA) == value
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert one("json_schema", completion, json_schema=file) == value


def test_the_shipped_schema_accepts_the_shipped_records() -> None:
    folder = Path(__file__).parents[2] / "recipes" / "data"
    rows = read_examples(folder / "tickets-eval.jsonl")
    score = reward("json_schema", json_schema=folder / "ticket.schema.json")
    assert set(score([Attempt(row.completion[0].content, row) for row in rows])) == {1.0}
    assert set(score([Attempt(row.completion[0].content.replace("priority", "prio"), row) for row in rows])) == {0.0}


def test_regex_length_and_thinking() -> None:
    assert one("regex", "the answer is 42", pattern=r"\b\d+$") == 1
    assert one("regex", "<think>42</think>none", pattern="42") == 0
    assert one("regex", "<think>42</think>none", pattern="42", part="completion") == 1
    assert [one("length", "x" * n, longest_characters=10) for n in (10, 15, 20, 99)] == [1, 0.5, 0, 0]
    thought = {"<think>a</think>b": 1, "a</think>b": 1, "b": 0, "<think>a</think>": 0}
    assert {text: one("thinking", text) for text in thought} == thought
    assert one("thinking", "b<think>a</think>b") == one("thinking", "<think>a</think>b</think>c") == 0


def test_the_total_is_the_weighted_sum_and_each_function_keeps_its_own_value() -> None:
    penalty = "{function: length, weight: -0.5, longest_characters: 9}"
    rewards = rewards_of(recipe_with(f"[{{function: exact_match, weight: 2}}, {penalty}]"))
    (scored,) = score_all(rewards, [Attempt("yes", row())])
    assert scored.each == {"exact_match": 1.0, "length": 1.0} and scored.total == 1.5
    found = reward_measures(rewards, [row(), row()], ["yes", "no"])
    values = {name: measure.metric.value for name, measure in found.items()}
    assert values == {"reward": 0.5, "reward/exact_match": 0.5, "reward/length": 1.0}


def test_a_function_that_a_recipe_has_twice_gets_two_names() -> None:
    rewards = rewards_of(recipe_with("[{function: regex, pattern: a}, {function: regex, pattern: b}]"))
    assert [reward.name for reward in rewards] == ["regex_1", "regex_2"]


def test_a_reward_that_fails_is_an_error_with_the_row_and_never_a_zero() -> None:
    def broken(_attempt: Attempt) -> float:
        raise KeyError("column")

    with pytest.raises(RewardError, match=r"the reward mine failed: KeyError.*prompt 'ask'.*completion 'said'"):
        Reward("mine", 1.0, 0, 1, each(broken))([Attempt("said", row())])
    for value in (math.nan, math.inf, 2.0, -0.1):
        with pytest.raises(RewardError, match=r"allowed: 0 to 1.*prompt 'ask'"):
            Reward("mine", 1.0, 0, 1, each(lambda _, value=value: value))([Attempt("said", row())])
    with pytest.raises(RewardError, match="0 values for 1"):
        Reward("mine", 1.0, 0, 1, lambda _: [])([Attempt("said", row())])
    with pytest.raises(RewardError, match=r"json_fields failed.*no JSON object"):
        one("json_fields", "{}", "not json")


# -------------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ("[]", "training.method grpo needs a reward"),
        ("[{function: regex}]", "the reward regex needs pattern"),
        ("[{function: regex, pattern: '('}]", "no regular expression"),
        ("[{function: exact_match, pattern: a}]", "pattern is read by regex"),
        ("[{function: exact_match, weight: 0}]", "would count for nothing"),
        ("[{function: json_schema, json_schema: {type: strin}}]", "no JSON Schema: at type"),
        ("[{function: json_schema, json_schema: {$ref: 'https://x/y.json'}}]", "nothing is fetched"),
        ("[{function: exactmatch}]", "exact_match | json_fields"),
        ("[{function: regex, pattern: a, patern: b}]", 'did you mean "pattern"'),
        ("[{function: exact_match}]\nsampling: {completions: 7}", "multiple of sampling.completions, 7"),
    ],
)
def test_what_cannot_work_is_refused_with_the_recipe(rewards: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(rewards)
    assert said in str(caught.value)


def test_rewards_without_a_method_that_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"training.method is sft; rewards are read by grpo, rloo, rejection"):
        parse_recipe("data: {train: a}\noutput: {dir: b}\nrewards: [{function: exact_match}]")


def test_dropout_is_refused_where_it_would_be_taken_for_a_change_of_the_policy() -> None:
    """With 0.1, 37 % of the sequences were clipped in the first step of RLOO, and none without."""
    recipe = "data: {{train: a}}\noutput: {{dir: b}}\nadapter: {{dropout: 0.1}}\ntraining: {{method: {}}}\n"
    recipe += "rewards: [{{function: exact_match}}]"
    with pytest.raises(RecipeError, match="dropout is not 0, and rloo compares"):
        parse_recipe(recipe.format("rloo"))
    assert parse_recipe(recipe.format("grpo")).adapter.dropout == 0.1


def test_what_the_files_lack_is_refused_with_the_plan(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "{\\"x\\": 1}"}\n' * 8)

    def refused(rewards: str, error: type[Exception] = RewardError) -> str:
        with pytest.raises(error) as caught:
            make_plan(recipe_with(rewards, data, "sampling: {completions: 4}"))
        return str(caught.value)

    assert "no such file" in refused(f"[{{function: json_schema, json_schema: '{tmp_path}/none.json'}}]")
    (tmp_path / "list.json").write_text("[1]")
    assert "is no JSON object" in refused(f"[{{function: json_schema, json_schema: '{tmp_path}/list.json'}}]")
    assert "reward_model" in refused(f"[{{function: reward_model, job: '{tmp_path}/none'}}]")
    data.write_text('{"prompt": "a", "completion": "{\\"x\\": 1}"}\n' * 7 + '{"prompt": "a", "completion": "b"}\n')
    assert "1 problem\n  - line 8: its completion is no JSON object" in refused("[{function: json_fields}]", DataError)
    tested = '{"prompt": "a", "completion": "b", "tests": ["assert f() == 1"]}\n'
    data.write_text(tested + '{"prompt": "a", "completion": "b"}\n' * 7)
    assert 'lines 2, 3, 4, 5, 6, … (7 rows), tests: has no "tests"' in refused("[{function: code}]", DataError)
    make_plan(recipe_with("[{function: code, tests: [assert f()]}]", data, "sampling: {completions: 4}"))


def test_rows_may_have_tests(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "tests": ["assert f() == 1", "f()"]}\n')
    (example,) = read_examples(data)
    assert example.tests == ("assert f() == 1", "f()")
    check_rewards(recipe_with("[{function: code}]"), [example])
    for tests in ("[]", "[1]", '[" "]'):
        data.write_text(f'{{"prompt": "a", "completion": "b", "tests": {tests}}}\n')
        with pytest.raises(DataError, match="line 1, tests: is a list of Python statements"):
            read_examples(data)


PROMPTS = [
    {"prompt": "ask"},
    {"prompt": [{"role": "user", "content": "ask"}]},
    {"messages": [{"role": "user", "content": "ask"}]},
    {"conversations": [{"from": "human", "value": "ask"}]},
    {"instruction": "ask", "output": None},
]


@pytest.mark.parametrize("values", PROMPTS)
def test_a_prompt_alone_is_a_row_where_the_model_answers_itself(values: dict[str, Any]) -> None:
    assert convert(values, METHODS["grpo"].rows) == (
        "prompt",
        Example((Message("user", "ask"),), (), kind="prompt"),
    )
    for method in ("sft", "kto"):
        with pytest.raises(RowProblems):
            convert(values, METHODS[method].rows)


def test_a_prompt_alone_cannot_be_learned_and_sft_says_so() -> None:
    with pytest.raises(RowProblems, match="is missing; prompts alone are for grpo"):
        convert({"prompt": "ask"}, METHODS["sft"].rows)
    with pytest.raises(RowProblems, match="needs a user turn and, last, an assistant turn"):
        convert({"messages": [{"role": "user", "content": "ask"}]}, METHODS["sft"].rows)
    for method in ("sft", "grpo"):  # an empty answer is a mistake and no prompt
        with pytest.raises(RowProblems, match="is empty"):
            convert({"prompt": "ask", "completion": ""}, METHODS[method].rows)


def test_prompts_alone_are_refused_by_rewards_that_compare_and_read_by_all_others(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "{}"}\n' + '{"prompt": "a"}\n' * 7)
    sizes = "sampling: {completions: 4}"
    for function in ("exact_match", "json_fields"):
        with pytest.raises(
            DataError, match=rf"lines 2, 3.*: is a prompt alone.*{function} compares.*one of json_schema"
        ):
            make_plan(recipe_with(f"[{{function: {function}}}]", data, sizes))
    others = "{function: regex, pattern: a}, {function: json_schema, json_schema: {}}, {function: thinking}"
    others = f"[{others}, {{function: length, longest_characters: 9}}, {{function: code}}]"
    plan = make_plan(recipe_with(others, data, sizes))
    assert plan.train_examples == 8 and plan.total_steps > 0
    choosing = recipe_with(others, data, sizes)
    held_out = choosing.model_copy(update={"evaluation": choosing.evaluation.model_copy(update={"every_steps": 1})})
    rows = read_rows(data, METHODS["grpo"].rows)
    with pytest.raises(DataError, match=r"line 2: is a prompt alone.*every_steps measures a loss"):
        check_prompts(held_out, rows, rows[1:])
    check_prompts(held_out, rows, rows)  # one of them has a completion
    easiest = choosing.model_copy(update={"data": choosing.data.model_copy(update={"drop_easiest": 0.5})})
    with pytest.raises(DataError, match=r"line 2: is a prompt alone.*drop_easiest"):
        check_prompts(easiest, rows, [])


def test_what_no_prompt_answers_is_no_reference(tmp_path: Path) -> None:
    alone = Example((Message("user", "ask"),), (), kind="prompt")
    (sample,) = score_all([reward("regex", pattern="y")], [Attempt("yes", alone)])
    assert as_sample(sample) == {
        "prompt": "ask", "completion": "yes", "reference": None, "reward": 1.0, "rewards": {"regex": 1.0}
    }  # fmt: skip
    with pytest.raises(RewardError, match=r"is a prompt alone.*no reference"):
        reward("exact_match")([Attempt("", alone)])


# -------------------------------------------------------------------- what rejection sampling keeps


def test_choosing_keeps_the_best_of_each_prompt_once() -> None:
    texts = ["a", "b", "a", "c", "", "d", "e"]
    totals = [1.0, 2.0, 1.0, 0.5, 3.0, 9.0, 1.0]
    group = [Scored(Attempt(text, row()), {}, total) for text, total in zip(texts, totals, strict=True)]
    clipped = [text == "d" for text in texts]
    fates = [judged.fate for judged in choose(group, clipped, threshold=1.0, keep=2)]
    assert fates == ["kept", "kept", "duplicate", "below the threshold", "empty", "clipped", "not among the best"]
    assert {judged.fate for judged in choose(group, clipped, threshold=10.0, keep=2)} == {
        "below the threshold",
        "empty",
        "clipped",
    }
