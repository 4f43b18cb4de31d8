"""Held-out rows: split from the training rows with equal prompts on one side, and looked for among them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.data import Example, Message, PlainText, Row, both_rows, held_out_rows, training_rows
from studio.data.leakage import MOST_NEAR_ROWS, find_leaks, jaccard, leak_plan, shingles
from studio.data.reading import Reading, read_rows
from studio.data.rows import Labelled, Place, Preference
from studio.data.split import prompt_of, split
from studio.errors import DataError
from studio.plan import make_plan
from studio.recipe import Recipe, parse_recipe

TEXT = "the quick brown fox jumps over the lazy dog and then goes home to sleep in its warm den until the next morning"


def example(prompt: str, completion: str = "yes") -> Example:
    return Example((Message("user", prompt),), (Message("assistant", completion),), place=Place("rows.jsonl", 1))


def recipe(folder: Path, rows: list[tuple[str, str]], more: str, name: str = "train") -> Recipe:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return parse_recipe(f"data: {{train: '{path}', {more}}}\noutput: {{dir: '{folder / 'job'}'}}\n")


# -------------------------------------------------------------------- the split


@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(numbers: list[int], fraction: float) -> None:
    rows: list[Row] = [example(f"Question {number}", str(i)) for i, number in enumerate(numbers)]
    train, held_out = split(rows, fraction)
    assert not {prompt_of(row) for row in train} & {prompt_of(row) for row in held_out}
    assert sorted(map(id, [*train, *held_out])) == sorted(map(id, rows))
    assert train and bool(held_out) == (len(set(numbers)) > 1)


def test_the_fraction_is_met_where_prompts_differ() -> None:
    rows: list[Row] = [example(f"Question {number}") for number in range(1000)]
    assert [len(split(rows, fraction)[1]) for fraction in (0.001, 0.1, 0.5)] == [1, 100, 500]


def test_case_and_white_space_make_no_other_prompt() -> None:
    rows: list[Row] = [example(f"{'  ' * (n % 2)}QUESTION{' ' * (1 + n % 3)}{n // 4}".title()) for n in range(80)]
    assert len({prompt_of(row) for row in rows}) == 20
    held_out = split(rows, 0.25)[1]
    assert len(held_out) == 20 and len({prompt_of(row) for row in held_out}) == 5


def test_a_larger_fraction_holds_out_what_a_smaller_one_did_and_the_order_of_the_file_is_kept() -> None:
    rows: list[Row] = [example(f"Question {number}") for number in range(100)]
    small, large = split(rows, 0.1)[1], split(rows, 0.3)[1]
    assert {id(row) for row in small} < {id(row) for row in large}
    assert [rows.index(row) for row in large] == sorted(rows.index(row) for row in large)
    mixed = rows[:]
    random.Random(0).shuffle(mixed)
    assert {id(row) for row in split(mixed, 0.1)[1]} == {id(row) for row in small}


def test_a_recipe_splits_its_training_file(tmp_path: Path) -> None:
    rows = [(f"Question {number // 2}", f"answer {number}") for number in range(200)]
    wanted = recipe(tmp_path, rows, "eval_fraction: 0.1")
    train, held_out = both_rows(wanted)
    assert (len(train), len(held_out)) == (180, 20)
    assert held_out_rows(wanted) == held_out and training_rows(wanted) == train
    other_seed = wanted.model_copy(update={"training": wanted.training.model_copy(update={"seed": 5})})
    assert both_rows(other_seed)[1] == held_out
    plan = make_plan(wanted)
    assert (plan.train_examples, plan.eval_examples) == (180, 20)
    assert plan.leaks is not None and plan.leaks.same_prompt == 0


def test_rows_of_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, [("Question", str(n)) for n in range(5)], "eval_fraction: 0.2")
    with pytest.raises(DataError, match=r"all rows have the same prompt: 5 rows cannot be split by data.eval_fraction"):
        both_rows(wanted)


# -------------------------------------------------------------------- leaks


def test_a_held_out_row_leaks_by_its_prompt_or_by_nearly_all_its_words() -> None:
    train: list[Row] = [example(TEXT), example("Something else"), PlainText(TEXT.replace("fox", "cat") + " or noon")]
    held_out: list[Row] = [
        example("SOMETHING \n else", "another answer"),
        PlainText(TEXT.replace("fox", "cat") + " or night"),
        example("Of its own"),
        PlainText(" ".join(reversed(TEXT.split()))),
    ]
    found = find_leaks(train, held_out)
    assert [(held_out.index(leak.held_out), train.index(leak.train), leak.near) for leak in found] == [
        (0, 1, False),
        (1, 2, True),
    ]
    assert found[1].similarity == pytest.approx(22 / 24)  # 23 word triples each, 22 in common


def test_similarity_is_measured_and_below_the_limit_nothing_is_reported() -> None:
    words = [f"w{n}" for n in range(100)]
    for changed, leaks in ((2, True), (5, False)):
        other = words[:]
        for place in range(0, 3 * changed, 3):
            other[place] = "new"
        similarity = jaccard(shingles(" ".join(words)), shingles(" ".join(other)))
        assert (similarity >= 0.8) == leaks
        found = find_leaks([PlainText(" ".join(words))], [PlainText(" ".join(other))])
        assert [leak.similarity for leak in found] == ([similarity] if leaks else [])


def test_candidates_are_found_as_an_exhaustive_search_finds_them() -> None:
    rng = random.Random(0)
    train: list[Row] = [PlainText(" ".join(f"w{rng.randrange(50)}" for _ in range(60))) for _ in range(150)]
    held_out: list[Row] = []
    for row in train[:60]:
        assert isinstance(row, PlainText)
        words = row.text.split()
        for _ in range(rng.randrange(1, 7)):
            words[rng.randrange(60)] = "new"
        held_out.append(PlainText(" ".join(words)))
    sets = [[shingles(row.text) for row in side if isinstance(row, PlainText)] for side in (train, held_out)]
    wanted = {n for n, mine in enumerate(sets[1]) if max(jaccard(mine, other) for other in sets[0]) >= 0.8}
    found = {next(n for n, row in enumerate(held_out) if row is leak.held_out) for leak in find_leaks(train, held_out)}
    assert 15 < len(wanted) < 60 and found <= wanted
    assert len(found) >= 0.9 * len(wanted)  # hashing may miss what lies just above the limit


def test_texts_without_spaces_are_compared_by_letters() -> None:
    text = "".join(chr(0x4E00 + n * 7) for n in range(200))
    assert [leak.near for leak in find_leaks([PlainText(text)], [PlainText(text[:195] + "和平")])] == [True]


def test_of_a_pair_the_preferred_side_is_compared_and_of_a_labelled_row_its_answer() -> None:
    question, answer = (Message("user", "Question"),), (Message("assistant", TEXT),)
    pair = Preference((Message("user", "Another"),), answer, (Message("assistant", "no"),))
    unwanted = Labelled((Message("user", "A third one"),), (Message("assistant", "no way"),), label=False)
    assert [leak.near for leak in find_leaks([pair], [Example(question, answer)])] == [True]
    assert not find_leaks([pair], [unwanted, example("short")])


def test_the_plan_lists_leaks_by_line_and_a_switch_refuses_them(tmp_path: Path) -> None:
    rows = [(f"Question {number}", "yes") for number in range(30)]
    recipe(tmp_path, [("Of its own", "x"), ("question  7", "no")], "", name="held")
    held = tmp_path / "held.jsonl"
    held.write_text("\n" + held.read_text())  # a blank line counts as a line
    plan = make_plan(recipe(tmp_path, rows, f"eval: '{held}'"))
    assert plan.leaks is not None and (plan.leaks.held_out, plan.leaks.same_prompt, plan.leaks.near) == (2, 1, 0)
    assert plan.leaks.shown == ("held.jsonl line 3: the same prompt as train.jsonl line 8",)
    assert "1 of 2 held-out rows occur in the training data" in plan.warnings[0]
    with pytest.raises(DataError, match=r"held.jsonl line 3: the same prompt as train.jsonl line 8\n.*data.leakage"):
        make_plan(recipe(tmp_path, rows, f"eval: '{held}', leakage: refuse"))
    assert make_plan(recipe(tmp_path, rows, f"eval: '{held}', leakage: 'off'")).leaks is None
    wanted = recipe(tmp_path, rows, f"eval: '{held}'")
    swapped = wanted.data.model_copy(update={"columns": {"prompt": "completion", "completion": "prompt"}})
    plans = [make_plan(each) for each in (wanted, wanted.model_copy(update={"data": swapped}))]
    found = [each.leaks.found for each in plans if each.leaks]
    assert found == [1, 0], "the same files, read in another way"
    changed = recipe(tmp_path, [*rows[:7], *rows[8:]], f"eval: '{held}'")
    assert make_plan(changed).leaks.found == 0  # type: ignore[union-attr]  # what was found before is not reused


def test_a_plan_looks_through_so_many_rows_for_near_duplicates_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    train: list[Row] = [example("Other"), PlainText(TEXT, place=Place("rows.jsonl", 2))]
    held_out: list[Row] = [PlainText(TEXT + " again", place=Place("held.jsonl", 1))]
    assert len(find_leaks(train, held_out, None)) == 1 and not find_leaks(train, held_out, 1)
    assert MOST_NEAR_ROWS >= 10_000


def test_the_shipped_tickets_do_not_leak() -> None:
    tickets = Path(__file__).parents[2] / "recipes" / "data"
    wanted = parse_recipe(
        f"data: {{train: '{tickets / 'tickets-train.jsonl'}', eval: '{tickets / 'tickets-eval.jsonl'}'}}\n"
        "output: {dir: x}\n"
    )
    train, held_out = both_rows(wanted)
    assert leak_plan(train, held_out, None).found == 0


def test_held_out_rows_of_another_shape_are_read_as_they_are(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text('{"ask": "a", "reply": "b"}\n')
    turns = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    wanted = parse_recipe(
        f"data: {{train: '{train}', eval: '{held_out}', format: prompt_completion, "
        f"columns: {{prompt: ask, completion: reply}}}}\noutput: {{dir: '{tmp_path / 'job'}'}}\n"
    )
    for row in ({"messages": turns}, {"prompt": "c", "completion": "d"}, {"ask": "c", "reply": "d"}):
        held_out.write_text(json.dumps(row))
        for rows in (held_out_rows(wanted), both_rows(wanted)[1]):
            assert [prompt_of(found) for found in rows] == [prompt_of(example("c", "d"))]
    held_out.write_text('{"ask": "c"}\n')
    with pytest.raises(DataError, match=r"reply: is mapped in data\.columns and missing"):
        held_out_rows(wanted)
    held_out.write_text('{"prompt": "c", "chosen": "d", "rejected": "e"}\n')
    pairs = Reading.of(wanted)
    assert isinstance(read_rows(held_out, ("preference",), pairs.for_other(held_out))[0], Preference)
