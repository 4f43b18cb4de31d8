"""Intervals against published values and against simulation; the gate; JSON answers."""

from __future__ import annotations

import json
import math
import random
import statistics
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from studio.data import Example, Message
from studio.errors import DataError, GateError, RecipeError, TrainingError
from studio.gate import check_gate, judge, raise_failed
from studio.json_answers import is_json, read_schema
from studio.metric_view import metric_table
from studio.metrics import (
    Measure,
    Metric,
    Scores,
    as_json,
    changed,
    changes,
    from_error,
    measure,
    measured,
    newcombe,
    scores_of,
    wilson,
)
from studio.progress import gate_text, metric_rows
from studio.ranking import auc
from studio.recipe import parse_recipe
from studio.recipe_evaluation import GateRule
from studio.rewards import Reward
from studio.rewards.samples import reward_measures


def test_wilson_as_published() -> None:
    """Newcombe, 1998, Stat. Med. 17, 857-872, table I, method 3."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def pairs(both: int, only_tuned: int, only_base: int, neither: int) -> tuple[list[float], list[float]]:
    cells = [(1.0, 1.0)] * both + [(0.0, 1.0)] * only_tuned + [(1.0, 0.0)] * only_base + [(0.0, 0.0)] * neither
    return [base for base, _ in cells], [tuned for _, tuned in cells]


def test_newcombes_paired_interval_covers_what_it_says() -> None:
    """The true difference lies in it in about 95 of 100 samples, at the ends of the scale too."""
    rng = random.Random(0)
    for base, tuned, together in ((0.5, 0.7, 0.4), (0.02, 0.9, 0.02), (0.9, 0.9, 0.85)):
        cells = {(1.0, 1.0): together, (1.0, 0.0): base - together, (0.0, 1.0): tuned - together}
        cells[0.0, 0.0] = 1 - sum(cells.values())
        inside = 0
        for _ in range(600):
            drawn = rng.choices(list(cells), weights=list(cells.values()), k=60)
            low, high = newcombe([first for first, _ in drawn], [second for _, second in drawn])
            inside += low <= tuned - base <= high
        assert 0.92 <= inside / 600 <= 0.995, (base, tuned, inside / 600)


def test_marks_that_go_together_make_the_paired_interval_narrower() -> None:
    base, tuned = pairs(both=85, only_tuned=5, only_base=3, neither=7)
    low, high = newcombe(base, tuned)
    (l1, u1), (l2, u2) = wilson(90, 100), wilson(88, 100)
    apart = math.hypot(0.90 - l1, u2 - 0.88), math.hypot(u1 - 0.90, 0.88 - l2)  # Newcombe's for two samples
    assert 0.3 * apart[0] < 0.02 - low < 0.9 * apart[0] and 0.3 * apart[1] < high - 0.02 < 0.9 * apart[1]
    assert newcombe(tuned, base) == pytest.approx((-high, -low))


def test_all_wrong_before_and_all_right_after_is_no_certainty() -> None:
    change = changed(scores_of("exact_match", [0] * 50), scores_of("exact_match", [1] * 50))
    assert change.value == 1 and change.high == pytest.approx(1) and 0.85 < change.low < 0.95


def test_the_interval_of_a_loss_covers_what_it_says_though_lengths_vary() -> None:
    rng = random.Random(1)
    inside = 0
    for _ in range(400):
        values, tokens = [], []
        for _ in range(80):
            count = rng.choice((3, 10, 40))
            level = rng.gauss(1.0 + 0.01 * count, 0.3)  # tokens of an example are alike: they are not independent
            values.append(level * count)
            tokens.append(count)
        true = sum(count * (1.0 + 0.01 * count) for count in (3, 10, 40)) / 53
        found = measured(scores_of("loss", values, tokens))
        inside += found.low <= true <= found.high
    assert 0.91 <= inside / 400 <= 0.985, inside / 400


def test_a_paired_change_is_narrower_than_two_intervals_and_perplexity_follows_the_loss() -> None:
    rng = random.Random(2)
    tokens = [rng.randint(5, 30) for _ in range(100)]
    base = [count * rng.uniform(1, 3) for count in tokens]
    tuned = [0.93 * value for value in base]
    losses = [scores_of("loss", values, tokens) for values in (base, tuned)]
    change = changed(*losses)
    apart = [measured(side) for side in losses]
    assert change.high < 0 and apart[1].high > apart[0].low
    powers = [measured(scores_of("perplexity", values, tokens)) for values in (base, tuned)]
    assert powers[0].value == pytest.approx(math.exp(apart[0].value)) and powers[0].low == math.exp(apart[0].low)
    assert changed(*(scores_of("perplexity", v, tokens) for v in (base, tuned))).high < 0


def test_one_example_has_a_value_and_no_interval() -> None:
    assert as_json({"loss": measure(scores_of("loss", [2.0], [4]))}) == {
        "loss": {"value": 0.5, "low": None, "high": None, "n": 1}
    }


def test_a_metric_without_examples_changes_by_its_errors() -> None:
    sides = [{"t/bleu": Measure(from_error(value, 3.0, 50), "higher", None, 3.0)} for value in (10.0, 30.0)]
    change = changes(*sides)["t/bleu"]
    assert change.value == 20 and change.high - change.value == pytest.approx(1.96 * math.sqrt(18), rel=1e-3)


# -------------------------------------------------------------------- gate


def sides(base: list[float], tuned: list[float]) -> tuple[dict[str, Measure], dict[str, Measure]]:
    return tuple({"exact_match": measure(scores_of("exact_match", side))} for side in (base, tuned))  # type: ignore[return-value]


def verdict(rule: GateRule, before: dict[str, Measure], after: dict[str, Measure]) -> bool:
    return judge([rule], {"base": before}, after)[0].passed


def test_a_gate_fails_past_its_limit_alone() -> None:
    before, after = sides([1] * 80 + [0] * 20, [1] * 70 + [0] * 30)
    for limit, passed in ((0.05, False), (0.1, True), (0.2, True)):
        assert verdict(GateRule(metric="exact_match", max_drop=limit), before, after) is passed
    assert verdict(GateRule(metric="exact_match", max_drop=0.12, relative=True), before, after) is False  # 12.5 %
    assert verdict(GateRule(metric="exact_match", max_drop=0.13, relative=True), before, after) is True
    assert verdict(GateRule(metric="exact_match", max_drop=0.0), after, before) is True
    loss = [{"loss": measure(scores_of("loss", [value], [1]))} for value in (1.0, 1.5)]
    assert verdict(GateRule(metric="loss", max_rise=0.4), loss[0], loss[1]) is False
    assert verdict(GateRule(metric="loss", max_rise=0.0), loss[1], loss[0]) is True


def test_a_gate_is_held_against_the_base_or_the_adapter_that_was_given() -> None:
    base, start = sides([0, 0, 0, 0], [1, 1, 1, 1])
    tuned = {"exact_match": measure(scores_of("exact_match", [1, 0, 0, 0]))}
    rules = [GateRule(metric="exact_match", max_drop=0.5, against=against) for against in ("base", "start")]
    of_base, of_start = judge(rules, {"base": base, "start": start}, tuned)
    assert (of_base.passed, of_base.base, of_start.passed, of_start.base) == (True, 0.0, False, 1.0)
    assert gate_text(vars(of_start)) == "exact_match: 0.25, was 1 (start); allowed drop 0.5"
    relative = GateRule(metric="exact_match", max_drop=0.5, relative=True)
    (of_share,) = judge([relative], {"base": start, "start": start}, tuned)
    assert gate_text(vars(of_share)).endswith("allowed drop 50 % of the base's value (0.5)")


def test_a_limit_on_what_gets_better_is_refused() -> None:
    for metric, limit, other in (("loss", "max_drop", "max_rise"), ("exact_match", "max_rise", "max_drop")):
        with pytest.raises(ValueError, match=f"{metric} is better when it is .*; write {other}"):
            GateRule(metric=metric, **{limit: 0.1})
    falls = {"t/word_perplexity": Measure(Metric(5.0, None, None, 4), "lower")}
    check_gate([GateRule(metric="t/word_perplexity", max_rise=1.0)], falls)
    with pytest.raises(TrainingError, match=r"t/word_perplexity is better when it is lower.*Nothing was trained"):
        check_gate([GateRule(metric="t/word_perplexity", max_drop=1.0)], falls)


def test_no_interval_reaches_where_no_value_can_be() -> None:
    loss = measured(scores_of("loss", [0.0, 0.0, 5.0], [1, 1, 1]))
    assert loss.low == 0.0 and loss.high is not None and loss.high > loss.value
    assert measured(scores_of("perplexity", [0.0, 0.0, 5.0], [1, 1, 1])).low == 1.0
    rows = [Example((Message("user", "q"),), (Message("assistant", "a"),))] * 20
    regex = Reward("regex", 1.0, 0, 1, lambda attempts: [1.0] * len(attempts))
    found = reward_measures([regex], rows, ["a"] * 20)["reward/regex"].metric
    assert found.value == 1.0 and found.low == pytest.approx(wilson(20, 20)[0]) and found.low < 0.9


def test_a_job_that_goes_on_shows_its_change_from_the_start() -> None:
    base, start, tuned = (
        {"metrics": {"loss": {"value": v, "low": None, "high": None, "n": 9}}} for v in (3.0, 2.0, 1.5)
    )
    change = {"loss": {"value": -1.5, "low": None, "high": None}}
    console = Console(width=200, record=True, file=StringIO())
    console.print(metric_table(base, tuned, change, start, {"loss": {"value": -0.5, "low": -0.6, "high": -0.4}}))
    shown = console.export_text()
    assert "change from base" in shown and "change from start" in shown and "-0.5, -25 %  -0.6 to -0.4" in shown


def test_a_certain_gate_waits_for_the_whole_interval() -> None:
    before, after = sides([1, 1, 1, 0], [1, 1, 0, 0])  # a fall by 25 points, of four examples
    assert verdict(GateRule(metric="exact_match", max_drop=0.1), before, after) is False
    assert verdict(GateRule(metric="exact_match", max_drop=0.1, certain=True), before, after) is True
    before, after = sides([1] * 75 + [0] * 25, [1] * 25 + [0] * 75)
    assert verdict(GateRule(metric="exact_match", max_drop=0.1, certain=True), before, after) is False


def test_a_value_that_is_no_number_fails_the_gate() -> None:
    loss = Scores("per_token", "lower", (math.nan, 1.0), (1, 1))
    before, after = {"loss": measure(scores_of("loss", [1.0, 1.0], [1, 1]))}, {"loss": measure(loss)}
    assert verdict(GateRule(metric="loss", max_rise=9.0), before, after) is False


def test_a_failed_gate_says_what_and_where_the_adapter_is() -> None:
    before, after = sides([1, 1], [0, 1])
    verdicts = judge([GateRule(metric="exact_match", max_drop=0.1)], {"base": before}, after)
    with pytest.raises(
        GateError, match=r"failed: exact_match: 0\.5, was 1 \(base\); allowed drop 0\.1\. .*runs/a/adapter"
    ):
        raise_failed(verdicts, "runs/a/adapter")
    with pytest.raises(
        TrainingError, match="asks for json_valid, which this job does not measure; measured: exact_match"
    ):
        check_gate([GateRule(metric="json_valid", max_drop=0.1)], before)


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ("gate: [{metric: los, max_drop: 1}]", 'did you mean "loss"'),
        ("gate: [{metric: loss}]", "one of max_drop and max_rise"),
        ("gate: [{metric: loss, max_drop: 1}]", "write max_rise"),
        ("gate: [{metric: loss, max_rise: 1, against: start}]", "start_from names no adapter"),
        ("gate: [{metric: loss, max_drop: 1, max_rise: 1}]", "one of max_drop and max_rise"),
        ("gate: [{metric: exact_match, max_drop: -1}]", "max_drop"),
        ("gate: [{metric: domains/acc, max_drop: 1}]", "tasks lists none"),
        ("gate: [{metric: schema_valid, max_drop: 1}]", "set it"),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused(evaluation: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"data: {{train: a, eval: b}}\noutput: {{dir: c}}\nevaluation: {{{evaluation}}}")


def test_a_gate_and_a_task_file_need_what_they_read() -> None:
    with pytest.raises(RecipeError, match=r"gate \(loss\), every_steps needs held-out examples"):
        parse_recipe(
            "data: {train: a}\noutput: {dir: c}\nevaluation: {every_steps: 5, gate: [{metric: loss, max_rise: 1}]}"
        )
    recipe = parse_recipe(
        "data: {train: a}\noutput: {dir: c}\nevaluation: {tasks: [x/t.yaml, arc_easy]}", Path("/r/recipe.yaml")
    )
    assert recipe.evaluation.tasks == ("/r/x/t.yaml", "arc_easy")


# -------------------------------------------------------------------- answers that are JSON


@pytest.mark.parametrize("text", ['{"a": 1}', " [1, 2]\n", "{}"])
def test_objects_and_arrays_are_json(text: str) -> None:
    assert is_json(text)


@pytest.mark.parametrize("text", ["", "12", '"a"', "{'a': 1}", '{"a": NaN}', '{"a": 1} tail', "[" * 100_000])
def test_what_is_no_json_record(text: str) -> None:
    assert not is_json(text)


def test_a_schema_is_read_once_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"enum": [1, 2]}}}))
    fits = read_schema(path)
    assert [fits(text) for text in ('{"a": 1}', '{"a": 3}', "{}", "[]", "no")] == [True, False, False, False, False]
    for bad, said in (
        ("{", "is no JSON Schema"),
        ('{"type": "thing"}', "is no JSON Schema"),
        ("[1]", "is no JSON Schema"),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match=said):
            read_schema(path)
    asked = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path.write_text(json.dumps({"$ref": f"http://127.0.0.1:{server.server_port}/other.json"}))
        with pytest.raises(DataError, match="refers to another schema, which is not followed"):
            read_schema(path)
        server.shutdown()
    assert not asked
    with pytest.raises(DataError, match="cannot be read"):
        read_schema(tmp_path / "none.json")


# -------------------------------------------------------------------- in words


def test_results_of_older_jobs_are_shown_without_intervals() -> None:
    before, after = ({"loss": loss, "exact_match": match, "examples": 200} for loss, match in ((2.0, 0.0), (1.0, 0.5)))
    loss, match = metric_rows(before, after, None)
    assert (loss.base, loss.base_interval, loss.tuned, loss.change, loss.verdict) == ("2", "", "1", "-1, -50 %", "")
    assert (match.tuned, match.change) == ("50.0 %", "+50.0 points")


def test_a_change_is_a_share_of_the_base_only_where_nought_means_none() -> None:
    before = {"metrics": {name: {"value": -0.5, "low": None, "high": None} for name in ("preference_margin", "reward")}}
    after = {"metrics": {name: {"value": 17.5, "low": None, "high": None} for name in ("preference_margin", "reward")}}
    assert [row.change for row in metric_rows(before, after, None)] == ["+18", "+18"]


def test_a_tasks_numbers_that_are_all_0_on_one_side_are_compared_as_means() -> None:
    base, tuned = Scores("share", "higher", (0.0, 0.0, 0.0)), Scores("mean", "higher", (0.5, 0.25, 0.0))
    sides = [{"t/f1": Measure(measured(each), "higher", each)} for each in (base, tuned)]
    change = changes(*sides)["t/f1"]
    assert change.value == 0.25 and change.low is not None and change.low < 0.25 < change.high
    assert changes(*sides[::-1])["t/f1"].value == -0.25


# -------------------------------------------------------------------- ranking


@given(wanted=st.lists(st.integers(-3, 3), min_size=1, max_size=8), unwanted=st.lists(st.integers(-3, 3), min_size=1))
def test_the_area_is_the_share_of_pairs_that_are_right(wanted: list[int], unwanted: list[int]) -> None:
    found = auc(wanted, unwanted)
    assert found is not None
    pairs = [(a > b) + (a == b) / 2 for a in wanted for b in unwanted]
    metric = found.metric
    assert metric.value == pytest.approx(sum(pairs) / len(pairs)) and metric.n == len(wanted) + len(unwanted)
    if len({*wanted, *unwanted}) == 1:
        assert (metric.low, metric.high, found.error) == (None, None, 0.0)
    else:
        assert metric.low is not None and metric.high is not None and metric.low < metric.high
        assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_the_interval_of_an_area_holds_it_as_often_as_it_says() -> None:
    """Normal scores one standard deviation apart: an area of Phi(1 / sqrt 2). 1,000 samples of 20 and 30 rows."""
    rng = random.Random(0)
    true = statistics.NormalDist().cdf(1 / math.sqrt(2))
    held = 0
    for _ in range(1000):
        found = auc([rng.gauss(1, 1) for _ in range(20)], [rng.gauss(0, 1) for _ in range(30)])
        assert found is not None and found.metric.low is not None and found.metric.high is not None
        held += found.metric.low <= true <= found.metric.high
    assert 0.93 <= held / 1000 <= 0.975
    perfect = auc([2.0] * 5, [1.0] * 5)
    assert perfect is not None and perfect.metric.high == pytest.approx(1) and 0.4 < (perfect.metric.low or 0) < 0.9
    assert auc([], [1.0]) is None
