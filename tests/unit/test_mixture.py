"""Mixtures and curricula: shares, the order of the rows, what the plan says of them, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from studio.cli import app
from studio.data import both_rows
from studio.data.curriculum import contributions, in_training_order
from studio.data.mixture import Chooser, Phase, mixed_order, passes, shares
from studio.errors import DataError, RecipeError
from studio.plan import make_plan, row_tokens
from studio.profile import sample_fingerprint
from studio.recipe import Recipe, load_recipe, parse_recipe, recipe_to_yaml

WEIGHTS = st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=6).filter(lambda w: max(w) > 0.01)


def write_rows(path: Path, count: int, words: int = 3) -> Path:
    rows = ({"prompt": f"{path.stem} question {n}", "completion": " ".join(["word"] * words)} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixture(folder: Path, data: dict[str, Any], **training: Any) -> Recipe:
    """A recipe on the sources a (60 rows), b (20 rows) and c (10 long rows), as `data` mixes them."""
    for name, count, words in (("a", 60, 3), ("b", 20, 3), ("c", 10, 60)):
        write_rows(folder / f"{name}.jsonl", count, words)
    sources = [{"path": f"{name}.jsonl", **more} for name, more in data.pop("sources").items()]
    text = {
        "data": {"train": sources, **data},
        "training": {"batch_size": 4, "max_steps": 30, **training},
        "output": {"dir": str(folder / "job")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return load_recipe(folder / "recipe.yaml")


# -------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("temperature", "wanted"),
    [(1.0, (0.9, 0.1)), (2.0, (0.75, 0.25)), (1e9, (0.5, 0.5)), (0.5, (81 / 82, 1 / 82))],
)
def test_temperature_flattens_sizes_by_their_root(temperature: float, wanted: tuple[float, ...]) -> None:
    assert shares([900, 100], temperature=temperature) == pytest.approx(wanted)


def test_tiny_temperatures_and_huge_sizes_do_not_overflow() -> None:
    assert shares([10**12, 1], temperature=0.001) == (1.0, 0.0)


def test_weights_go_before_sizes() -> None:
    assert shares([900, 100], [1, 3], temperature=2) == (0.25, 0.75)


@given(WEIGHTS, st.integers(1, 400))
def test_at_every_moment_each_source_has_had_its_share(weights: list[float], rows: int) -> None:
    parts = shares([1] * len(weights), weights)
    chooser = Chooser([Phase(parts)])
    for number in range(1, rows + 1):
        chooser.next()
        for count, part in zip(chooser.drawn[0], parts, strict=True):
            assert count - part * number < 1
            assert part * number - count < max(1, len(parts) - 1)
            assert part > 0 or count == 0


@given(st.integers(1, 30), st.integers(0, 3))
def test_no_row_comes_twice_in_a_pass(size: int, seed: int) -> None:
    read = list(islice(passes(size, str(seed)), 3 * size))
    for start in range(0, 3 * size, size):
        assert sorted(read[start : start + size]) == list(range(size))


def test_passes_differ_and_so_do_seeds() -> None:
    read = list(islice(passes(50, "0"), 100))
    assert read[:50] != read[50:] and read[:50] != list(range(50))
    assert read != list(islice(passes(50, "1"), 100))


# -------------------------------------------------------------------- phases


def test_phases_end_at_their_row_or_token() -> None:
    phases = [Phase((1.0, 0.0), until_rows=3), Phase((0.0, 1.0))]
    assert [place // 10 for place in mixed_order([10, 10], phases, 6, seed=0).places] == [0, 0, 0, 1, 1, 1]
    by_tokens = [Phase((1.0, 0.0), until_tokens=25), Phase((0.0, 1.0))]
    found = mixed_order([10, 10], by_tokens, 6, seed=0, tokens_of=lambda place: 10)
    assert [place // 10 for place in found.places] == [0, 0, 0, 1, 1, 1]  # 20 tokens are too few, 30 are enough
    assert found.tokens == (30, 30) and found.drawn == ((3, 0), (0, 3))


def test_a_recipe_mixes_by_size_by_temperature_and_by_weight(tmp_path: Path) -> None:
    wanted = {
        '{"sources": {"a": {}, "b": {}}}': {"a": 90, "b": 30},
        '{"sources": {"a": {}, "b": {}}, "temperature": 2}': {"a": 76, "b": 44},
        '{"sources": {"a": {"weight": 1}, "b": {"weight": 2}}}': {"a": 40, "b": 80},
    }
    for text, counts in wanted.items():
        recipe = mixture(tmp_path, json.loads(text))
        read = Counter(row.source for row in in_training_order(recipe, both_rows(recipe)[0]))
        assert read == counts


def test_the_plan_says_what_each_source_gives_and_the_order_keeps_to_it(tmp_path: Path) -> None:
    phases = [{"until_steps": 10, "weights": {"a": 1}}, {"weights": {"a": 1, "more": 3}}]
    recipe = mixture(tmp_path, {"sources": {"a": {}, "b": {"name": "more"}}, "phases": phases})
    rows = both_rows(recipe)[0]
    order = [row.source for row in in_training_order(recipe, rows)]
    assert len(order) == 120 and order[:40] == ["a"] * 40
    batches = [Counter(order[start : start + 4]) for start in range(40, 120, 4)]
    assert all(batch == {"a": 1, "more": 3} for batch in batches)  # each batch is mixed alike
    plan = make_plan(recipe)
    assert plan.total_steps == 30 and plan.mixture is not None
    assert {s.name: (s.rows, s.read) for s in plan.mixture.sources} == {"a": (60, 60), "more": (20, 60)}
    assert [s.share for s in plan.mixture.sources] == [0.5, 0.5] and [s.epochs for s in plan.mixture.sources] == [1, 3]
    assert [(p.steps, p.rows) for p in plan.mixture.phases] == [(10, 40), (20, 80)]
    assert plan.mixture.phases[1].shares == {"a": 0.25, "more": 0.75}


def test_a_source_of_which_every_row_is_dropped_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    sources = {"a": {"weight": 1}, "b": {"weight": 1}}
    recipe = mixture(tmp_path, {"sources": sources, "bad_rows": "drop", "max_length_tokens": 32})
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "long " * 99, "completion": "x"}) + "\n")
    with pytest.raises(DataError, match=r"b\.jsonl: 1 problem\n.*has no row left to train on"):
        make_plan(recipe)


def test_plan_and_validate_show_sources_phases_and_leaks(tmp_path: Path) -> None:
    phases = [{"until_steps": 10, "weights": {"a": 1}}, {"weights": {"a": 1, "b": 3}}]
    mixture(tmp_path, {"sources": {"a": {}, "b": {}}, "phases": phases, "eval": "a.jsonl"})
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml")]).output
    assert "Source  b: 50.0 % of the rows read, 60, of 20 rows: 3.00 epochs" in shown
    assert "Phase 2 20 steps, 80 rows: a 25.0 % · b 75.0 %" in shown
    assert "60 of 60 held-out rows occur in the training data (60 with the same prompt, 0 nearly the same)" in shown
    said = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")]).output
    assert "a.jsonl line 3: the same prompt as a.jsonl line 3" in said and "… and 40 more" in said


def test_no_row_of_a_source_comes_again_before_all_others_did(tmp_path: Path) -> None:
    recipe = mixture(tmp_path, {"sources": {"a": {"weight": 1}, "b": {"weight": 1}}})
    order = [
        row.place.line for row in in_training_order(recipe, both_rows(recipe)[0]) if row.source == "b" and row.place
    ]
    assert len(order) == 60
    assert all(sorted(order[start : start + 20]) == list(range(1, 21)) for start in (0, 20, 40))


def test_epochs_of_a_mixture_are_passes_over_as_many_rows_as_all_sources_have(tmp_path: Path) -> None:
    recipe = mixture(tmp_path, {"sources": {"a": {"weight": 1}, "b": {"weight": 1}}}, max_steps=None, epochs=2)
    plan = make_plan(recipe)
    assert plan.mixture is not None and plan.total_steps == 40
    assert [s.read for s in plan.mixture.sources] == [80, 80]


def test_phases_by_tokens_count_as_the_plan_does(tmp_path: Path) -> None:
    phases = [{"until_tokens": 600, "weights": {"c": 1}}, {"weights": {"a": 1}}]
    recipe = mixture(tmp_path, {"sources": {"a": {}, "c": {}}, "phases": phases})
    rows = both_rows(recipe)[0]
    order = in_training_order(recipe, rows)
    long = [row for row in order if row.source == "c"]
    assert order[: len(long)] == long
    tokens = row_tokens(recipe, long)
    assert sum(tokens) >= 600 > sum(tokens[:-1])
    planned = contributions(recipe, rows)
    assert planned is not None and planned.sources[1].read == len(long)


def test_the_same_seed_gives_the_same_order_and_another_another(tmp_path: Path) -> None:
    def order(seed: int) -> list[Any]:
        recipe = mixture(tmp_path, {"sources": {"a": {}, "b": {}}}, seed=seed)
        return [row.place for row in in_training_order(recipe, both_rows(recipe)[0])]

    assert order(0) == order(0) != order(1)


def test_a_phase_that_is_never_reached_is_said(tmp_path: Path) -> None:
    phases = [{"until_steps": 10, "weights": {"a": 1}}, {"until_steps": 40, "weights": {"a": 2}}, {"weights": {"b": 1}}]
    recipe = mixture(tmp_path, {"sources": {"a": {}, "b": {}}, "phases": phases})
    assert make_plan(recipe).warnings == (
        "phase 3 of data.phases never begins: the training ends before it",
        "no row of b is read",
    )


def test_the_profile_of_one_mixture_is_not_taken_for_that_of_another(tmp_path: Path) -> None:
    found = []
    for data in (
        {"sources": {"a": {}, "b": {}}},
        {"sources": {"a": {}, "b": {}}, "temperature": 3},
        {"sources": {"a": {"weight": 1}, "b": {"weight": 2}}},
        {"sources": {"a": {}, "b": {"name": "other"}}},
        {"sources": {"a": {}, "c": {}}},
        {"sources": {"a": {}, "b": {}}, "eval_fraction": 0.1},
    ):
        found.append(sample_fingerprint(mixture(tmp_path, data), 1000))
    assert len(set(found)) == len(found)
    assert found[0] == sample_fingerprint(mixture(tmp_path, {"sources": {"a": {}, "b": {}}, "leakage": "off"}), 1000)


# -------------------------------------------------------------------- the recipe

TWO = "train: [{path: a.jsonl}, {path: b.jsonl}]"


@pytest.mark.parametrize(
    ("data", "more", "field", "said"),
    [
        ("train: []", "", "data.train", "is an empty list"),
        ("train: [{path: a.jsonl}, {path: x/a.jsonl}]", "", "data.train", "two sources are called a"),
        ("train: [{path: a.jsonl, weight: 1}, {path: b.jsonl}]", "", "data.train", "some sources have a weight"),
        ("train: [{path: a.jsonl, weight: 0}]", "", "data.train", "every weight is 0"),
        ("train: [{path: a.jsonl, weight: -1}]", "", "data.train.0.weight", "at least 0"),
        ("train: [a.jsonl]", "", "data.train.0", "allowed: a mapping"),
        ("train: [{path: a.jsonl, nam: x}]", "", "data.train.0.nam", 'did you mean "name"?'),
        ("train: [{path: a.jsonl, name: all}]", "", "data.train.0.name", 'received "all"'),
        ("train: a.jsonl, temperature: 2", "", "data.temperature", "several sources"),
        ("train: [{path: a.jsonl, weight: 1}], temperature: 2", "", "data.temperature", "mixes by size"),
        ("train: a.jsonl, phases: [{weights: {a: 1}}]", "", "data.phases", "several sources"),
        (f"{TWO}, phases: [{{weights: {{c: 1}}}}]", "", "data.phases", "c is no source; the sources are a, b"),
        (f"{TWO}, phases: [{{weights: {{a: 0}}}}]", "", "data.phases.0", "every weight is 0"),
        (f"{TWO}, phases: [{{until_steps: 5, weights: {{a: 1}}}}]", "", "data.phases", "the last phase goes on"),
        (
            f"{TWO}, phases: [{{weights: {{a: 1}}}}, {{weights: {{b: 1}}}}]",
            "",
            "data.phases",
            "each phase but the last",
        ),
        (
            f"{TWO}, phases: [{{until_steps: 5, weights: {{a: 1}}}}, {{until_steps: 5, weights: {{a: 1}}}}, "
            "{weights: {b: 1}}]",
            "",
            "data.phases",
            "received 5, 5",
        ),
        (
            f"{TWO}, phases: [{{until_steps: 5, weights: {{a: 1}}}}, {{weights: {{b: 1}}}}]",
            "trl: {packing: true}",
            "data.phases",
            "trl.packing",
        ),
        ("train: a.jsonl, streaming: true", "", "data.streaming", "set training.max_steps"),
        (
            "train: a.jsonl, streaming: true",
            "training: {method: orpo, max_steps: 5}",
            "data.streaming",
            "is read by sft, dpo, kto, reward; TRL's trainer for orpo needs all rows before its first step",
        ),
        (
            "train: a.jsonl, streaming: true",
            "training: {method: dpo, max_steps: 5}\ntrl: {precompute_ref_log_probs: true}",
            "data.streaming",
            "leave trl.precompute_ref_log_probs out",
        ),
        (f"{TWO}, streaming: true", "training: {max_steps: 5}", "data.streaming", "give each source a weight"),
        ("train: a.jsonl, streaming: true, eval_fraction: 0.1", "", "data.eval_fraction", "all rows at once"),
        ("train: a.jsonl, streaming: true, drop_easiest: 0.1", "", "data.drop_easiest", "all rows at once"),
        ("train: a.jsonl, streaming: true, bad_rows: drop", "", "data.bad_rows", "nothing lists the dropped ones"),
        ("train: a.jsonl, eval: b.jsonl, eval_fraction: 0.1", "", "data.eval_fraction", "and so is eval"),
        ("train: a.jsonl, drop_easiest: 0.5, drop_hardest: 0.5", "", "data.drop_hardest", "leave no row"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(data: str, more: str, field: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"data: {{{data}}}\n{more}\noutput: {{dir: x}}\n")
    (problem,) = caught.value.problems
    assert problem.field == field and said in problem.message and problem.line == 1


def test_a_mixture_reads_back_from_its_yaml(tmp_path: Path) -> None:
    phases = [{"until_tokens": 10, "weights": {"a": 1}}, {"weights": {"b": 0.5}}]
    recipe = mixture(tmp_path, {"sources": {"a": {}, "b": {"name": "b"}}, "phases": phases})
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    assert all(source.path.is_absolute() for source in recipe.data.sources)


def test_shares_add_up_to_one() -> None:
    for size in range(1, 6):
        assert math.isclose(sum(shares(list(range(1, size + 1)), temperature=1.7)), 1)
    assert all(later < earlier for earlier, later in pairwise(shares([3, 2, 1])))
