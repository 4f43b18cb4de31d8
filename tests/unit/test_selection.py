"""Rows chosen by the base's loss on them: what is dropped, from which source, and what is written to look at."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.data import Example, Message, both_rows, recipe_rows
from studio.data.hard_examples import Scored, choose, find_scores, keep_scores, scores_path, summary, write_rows
from studio.data.rows import Place
from studio.errors import ProfileError
from studio.mixture_view import histogram
from studio.pictures import draw_scores
from studio.plan import make_plan
from studio.profile import sample_fingerprint
from studio.recipe import Recipe, parse_recipe


def row(score: float, source: str = "rows", line: int = 1) -> Scored:
    turns = ((Message("user", f"Question {line}"),), (Message("assistant", "yes"),))
    return Scored(Example(*turns, source, place=Place("rows.jsonl", line)), score)


def recipe(folder: Path, more: str = "", rows: int = 10) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {n}", "completion": "yes"}) + "\n" for n in range(rows)))
    return parse_recipe(f"data: {{train: '{path}'{more}}}\noutput: {{dir: '{folder / 'job'}'}}\n")


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.floats(0, 0.5), st.floats(0, 0.49))
def test_the_least_and_the_largest_are_dropped_and_none_is_lost(scores: list[float], low: float, high: float) -> None:
    rows = [row(score, line=number) for number, score in enumerate(scores)]
    kept, dropped = choose(rows, low, high)
    easiest = [r.score for r in dropped if r.why == "easiest"]
    hardest = [r.score for r in dropped if r.why == "hardest"]
    assert (len(easiest), len(hardest)) == (int(low * len(rows)), int(high * len(rows)))
    assert len(kept) + len(dropped) == len(rows) and kept
    assert max(easiest, default=0) <= min(r.score for r in kept)
    assert max(r.score for r in kept) <= min(hardest, default=math.inf)
    assert [r.row.place for r in kept] == [r.row.place for r in rows if r in kept]


def test_each_source_gives_its_share() -> None:
    rows = [row(n, "hard") for n in range(100, 110)] + [row(n, "easy") for n in range(10)]
    kept, _ = choose(rows, 0.5, 0.0)
    assert [r.score for r in kept] == [105, 106, 107, 108, 109, 5, 6, 7, 8, 9]


def test_scores_that_are_not_finite_count_as_hopeless() -> None:
    kept, dropped = choose([row(math.nan), row(1), row(2), row(3)], 0.25, 0.25)
    assert [r.score for r in kept] == [2, 3] and [r.why for r in dropped] == ["hardest", "easiest"]


def test_a_recipe_that_drops_needs_scores_of_its_own_base_and_data(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, ", drop_easiest: 0.3, drop_hardest: 0.1")
    with pytest.raises(ProfileError, match="run studio data score RECIPE"):
        both_rows(wanted)
    keep_scores(wanted, [[float(n % 5) for n in range(10)]])
    found = recipe_rows(wanted)
    assert [r.place.line for r in found.train if r.place] == [3, 4, 5, 7, 8, 9]
    left_out = [(r.row.place.line, r.why) for r in found.left_out if r.row.place]
    assert left_out == [(1, "easiest"), (2, "easiest"), (6, "easiest"), (10, "hardest")]
    assert [r.row for r in found.kept] == found.train
    plan = make_plan(wanted)
    assert (plan.train_examples, plan.left_out_examples) == (6, 4)


def test_scores_are_bound_to_base_data_and_cut(tmp_path: Path) -> None:
    wanted = recipe(tmp_path)
    keep_scores(wanted, [[1.0] * 10])
    assert find_scores(wanted) == [[1.0] * 10]
    same = recipe(tmp_path, ", drop_easiest: 0.5, eval_fraction: 0.2")
    assert scores_path(same) == scores_path(wanted) and sample_fingerprint(same, 9) != sample_fingerprint(wanted, 9)
    others = [recipe(tmp_path, ", max_length_tokens: 100"), recipe(tmp_path, rows=11)]
    others.append(wanted.model_copy(update={"model": wanted.model.model_copy(update={"quantization": "int8"})}))
    assert scores_path(others[0]) != scores_path(wanted)
    assert all(find_scores(other) is None for other in others[1:])


def test_torn_scores_are_made_anew(tmp_path: Path) -> None:
    wanted = recipe(tmp_path)
    path = keep_scores(wanted, [[math.nan] * 10])
    assert all(map(math.isnan, (find_scores(wanted) or [[]])[0])) and find_scores(wanted)
    path.write_text(path.read_text()[:-3])
    assert find_scores(wanted) is None


def test_held_out_rows_are_neither_dropped_nor_asked_for_scores(tmp_path: Path) -> None:
    from studio.data import held_out_rows

    wanted = recipe(tmp_path, ", drop_easiest: 0.5, eval_fraction: 0.2")
    assert len(held_out_rows(wanted)) == 2
    keep_scores(wanted, [[float(n) for n in range(10)]])
    train, held_out = both_rows(wanted)
    assert (len(train), len(held_out)) == (4, 2) and held_out == held_out_rows(wanted)


def test_what_was_chosen_is_written_the_hardest_first(tmp_path: Path) -> None:
    kept, dropped = choose([row(float(n), line=n + 1) for n in range(4)], 0.25, 0.25)
    lines = [json.loads(line) for line in write_rows(tmp_path / "out" / "kept.jsonl", kept).read_text().splitlines()]
    assert [(line["score"], line["line"], line["source"]) for line in lines] == [(2.0, 3, "rows"), (1.0, 2, "rows")]
    assert lines[0]["prompt"] == [{"role": "user", "content": "Question 3"}]
    (left, _) = [json.loads(line) for line in write_rows(tmp_path / "x.jsonl", dropped).read_text().splitlines()]
    assert left["dropped"] == "hardest"
    found = summary(kept, dropped)
    assert found == [{"source": "rows", "rows": 4, "easiest": 1, "hardest": 1,
                      "kept": {"least": 1.0, "median": 2.0, "largest": 2.0}}]  # fmt: skip


def test_the_histogram_counts_every_score() -> None:
    low, high, strip = histogram([0.0, 0.0, 0.0, 4.0])
    assert (low, high, len(strip)) == (0.0, 4.0, 40)
    assert strip[0] == "█" and strip[-1] not in "·█" and set(strip[1:-1]) == {"·"}
    assert histogram([]) == (0.0, 0.0, "·" * 40) and histogram([1.0])[2].strip("·") == "█"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = draw_scores(tmp_path / "scores.png", [(0.1, "easiest"), (1.0, ""), (9.0, "hardest"), (math.nan, "hardest")])
    assert path.read_bytes().startswith(b"\x89PNG")
