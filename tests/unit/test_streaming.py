"""Rows that are read while training: shuffled in a bounded buffer, mixed, and refused where one is bad."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.data import Example, Labelled, Message, Place, PlainText, Preference, Row, both_rows
from studio.data.formats import convert
from studio.data.mixture import Phase
from studio.data.of_recipe import SAMPLE_ROWS
from studio.data.reading import Reading
from studio.data.rows import row_of
from studio.data.streaming import (
    count_rows,
    endless,
    endless_rows,
    first_rows,
    good_rows,
    plain_conversation,
    shuffled,
    trl_characters,
    trl_rows,
)
from studio.errors import DataError
from studio.plan import make_plan
from studio.profile import sample_fingerprint
from studio.recipe import Recipe, parse_recipe
from studio.recipe_mixture import DataSource

EXAMPLES = ("example",)


def write(path: Path, count: int, bad: int | None = None) -> Path:
    rows = [json.dumps({"prompt": f"{path.stem} {n}", "completion": "yes"}) for n in range(count)]
    if bad is not None:
        rows[bad] = '{"prompt": "no answer"}'
    path.write_text("\n".join(rows) + "\n")
    return path


def recipe(train: str, more: str = "") -> Recipe:
    return parse_recipe(
        f"data: {{train: {train}, streaming: true{more}}}\ntraining: {{max_steps: 10, batch_size: 4}}\n"
        "output: {dir: x}\n"
    )


def prompt(row: dict[str, Any]) -> str:
    return str(row["prompt"][0]["content"])


def characters(row: Row) -> int:
    assert isinstance(row, PlainText)
    return len(row.text)


def file_of(row: dict[str, Any]) -> str:
    """The name of the file that `write` gave a row's question."""
    return str(row["prompt"][0]["content"]).split()[0]


# -------------------------------------------------------------------- rows at a glance

TEXTS = st.sampled_from(
    ["hi", "héllo", " ", "", "a\0b", "\ud800", "<think>x</think>y", "<think>open", "[1]", '[{"role": "user"}]', None, 3]
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "User", 1, None, ["user"]])
TURNS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "human", "User", 1, None, ["user"]]),
        "content": TEXTS,
    },
    optional={"name": st.just("x"), "reasoning_content": TEXTS},
)
GOOD_TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.sampled_from(["hi", "héllo", "[1]"])}
)
VALUES = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(GOOD_TURNS, max_size=4) | st.lists(TURNS, max_size=4) | TEXTS},
        optional={"source": TEXTS, "system": TEXTS, "tools": st.just([]), "chosen": TEXTS},
    ),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}, optional={"source": TEXTS, "label": st.booleans()}),
    st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "text", "source"]), TEXTS),
)


@settings(max_examples=600)
@given(VALUES)
def test_what_is_taken_at_a_glance_is_what_the_whole_way_makes_of_it(values: dict[str, Any]) -> None:
    if (quick := plain_conversation(values)) is not None:
        assert convert(values, EXAMPLES)[1].as_row() == quick


def test_plain_rows_are_taken_at_a_glance() -> None:
    turns = [{"role": role, "content": "hi"} for role in ("system", "user", "assistant")]
    assert plain_conversation({"messages": turns}) == {"prompt": turns[:2], "completion": turns[2:]}
    assert plain_conversation({"prompt": "a", "completion": "b", "source": "x"}) is not None
    assert plain_conversation({"messages": turns[1:2]}) is None
    assert plain_conversation({"messages": [turns[1], *turns]}) is None  # a system turn can only come first


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 20), st.integers(1, 100))
def test_a_shuffle_gives_every_row_once_and_holds_no_more_than_it_may(
    sizes: list[int], most_rows: int, most_characters: int
) -> None:
    rows: list[Row] = [PlainText("x" * size, str(number)) for number, size in enumerate(sizes)]
    taken, given_out = 0, 0

    def watched() -> Iterator[Row]:
        nonlocal taken
        for row in rows:
            assert taken - given_out <= most_rows
            taken += 1
            yield row

    out: list[Row] = []
    for row in shuffled(watched(), random.Random(0), characters, most_rows, most_characters):
        given_out += 1
        out.append(row)
    assert Counter(map(id, out)) == Counter(map(id, rows))


def test_the_buffer_is_bounded_by_characters_too_and_a_huge_row_passes() -> None:
    rows: list[Row] = [PlainText("x" * size) for size in (10, 10, 10, 1000, 10)]
    held: list[int] = []
    source = iter(rows)

    def watched() -> Iterator[Row]:
        for row in source:
            assert sum(held) <= 30
            held.append(characters(row))
            yield row

    for row in shuffled(watched(), random.Random(1), characters, 100, 30):
        held.remove(characters(row))
    assert not held


def test_a_shuffle_mixes_and_is_the_same_for_one_seed() -> None:
    rows: list[Row] = [PlainText(str(n)) for n in range(1000)]
    orders = [list(shuffled(rows, random.Random(seed), characters, 200)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    moved = [abs(int(row.text) - place) for place, row in enumerate(orders[0]) if isinstance(row, PlainText)]
    assert sum(moved) / len(moved) > 100


def test_a_stream_goes_on_pass_after_pass_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 30)
    rows = endless(lambda: trl_rows(path, EXAMPLES, Reading()), trl_characters, "0")
    read = [prompt(row) for row in islice(rows, 90)]
    passes = [read[start : start + 30] for start in (0, 30, 60)]
    assert all(sorted(each) == sorted(passes[0]) for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_sources_are_mixed_in_their_shares_and_phases(tmp_path: Path) -> None:
    sources = [DataSource(path=write(tmp_path / f"{name}.jsonl", 5), name=name.upper()) for name in "ab"]
    phases = [Phase((1.0, 0.0), until_rows=4), Phase((0.25, 0.75))]
    read = [file_of(row) for row in islice(endless_rows(sources, phases, EXAMPLES, Reading(), seed=0), 24)]
    assert read[:4] == ["a"] * 4
    assert all(Counter(read[start : start + 4]) == {"a": 1, "b": 3} for start in range(4, 24, 4))


def test_phases_end_by_the_tokens_that_were_read(tmp_path: Path) -> None:
    sources = [DataSource(path=write(tmp_path / f"{name}.jsonl", 5)) for name in "ab"]
    phases = [Phase((1.0, 0.0), until_tokens=25), Phase((0.0, 1.0))]
    rows = endless_rows(sources, phases, EXAMPLES, Reading(), seed=0, tokens_of=lambda row: 10)
    assert [file_of(row) for row in islice(rows, 5)] == ["a", "a", "a", "b", "b"]


def test_rows_as_trl_reads_them_are_the_rows_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>why</think>yes"}]
    lines = [{"prompt": "Why?", "completion": "So."}, {"messages": turns}, {"instruction": "Do", "output": "done"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = [{**row.as_row(), "place": row.place} for row in good_rows(path, EXAMPLES, Reading())]
    assert list(trl_rows(path, EXAMPLES, Reading())) == whole and len(whole) == 3
    sizes = [trl_characters(row) for row in whole]
    assert sizes[0] == 7 and sizes[1] >= 8 and sizes[2] == 6 and trl_characters({"text": "four"}) == 4


ASK, YES, NO = ((Message(role, text),) for role, text in (("user", "a?"), ("assistant", "yes"), ("assistant", "no")))
CALL = Message("assistant", "", "because", ({"type": "function", "function": {"name": "f", "arguments": {"n": 1}}},))
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
ROWS: list[Row] = [
    Example((*ASK, CALL, Message("tool", "3", name="f")), YES, tools=TOOLS, place=Place("x", 1)),
    Preference(ASK, YES, NO, tools=TOOLS, place=Place("x", 2, "row")),
    Labelled(ASK, NO, False, place=Place("x", 3)),
    PlainText("text", place=Place("x", 4)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_what_trl_reads_says_what_the_row_was(row: Row) -> None:
    back = row_of({**row.as_row(), "place": row.place})
    assert (back, back.place) == (row, row.place)


def test_rows_with_tools_and_calls_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "3?"}, {"role": "assistant", "tool_calls": [TOOL_CALL]}]
    path.write_text("".join(json.dumps({"messages": turns, "tools": TOOLS}) + "\n" for _ in range(3)))
    (row,) = islice(endless_rows([DataSource(path=path)], [Phase((1.0,))], EXAMPLES, Reading(), seed=0), 1)
    assert row["tools"] == list(TOOLS) and row["completion"][0]["tool_calls"] == [TOOL_CALL]
    assert trl_characters(row) > len("3?")


TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}


def test_the_sides_of_a_pair_are_streamed_apart(tmp_path: Path) -> None:
    path, pairs = tmp_path / "a.jsonl", ("preference", "labelled")
    lines = [{"prompt": f"a{n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = endless_rows([DataSource(path=path)], [Phase((1.0,))], pairs, Reading(), seed=0, apart=True)
    found = Counter((prompt(row), row["completion"][0]["content"], row["label"]) for row in islice(rows, 6))
    assert found == {(f"a{n}", said, said == "yes"): 1 for n in range(3) for said in ("yes", "no")}


def test_a_bad_row_stops_the_stream_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 30, bad=20)
    assert len(first_rows(path, 20, EXAMPLES)) == 20
    with pytest.raises(DataError, match=r"a\.jsonl.*\n.*line 21, completion: is missing"):
        list(good_rows(path, EXAMPLES))
    with pytest.raises(DataError, match="line 21"):
        list(trl_rows(path, EXAMPLES, Reading()))
    with pytest.raises(DataError, match="line 21"):
        count_rows(recipe(str(path)))


def test_an_empty_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    for read in (lambda: first_rows(path, 3, EXAMPLES), lambda: next(trl_rows(path, EXAMPLES, Reading()))):
        with pytest.raises(DataError, match="the file is empty"):
            read()


def test_a_plan_reads_a_sample_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", SAMPLE_ROWS + 500)
    wanted = recipe(str(path))
    assert len(both_rows(wanted)[0]) == SAMPLE_ROWS
    plan = make_plan(wanted)
    assert plan.sampled and plan.total_steps == 10 and plan.train_examples == SAMPLE_ROWS
    assert any("the data is streamed" in warning for warning in plan.warnings)
    assert count_rows(wanted) == SAMPLE_ROWS + 500


def test_the_plan_of_a_streamed_mixture_says_the_shares_as_wanted(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", 50)
    sources = f"[{{path: '{tmp_path / 'a.jsonl'}'}}, {{path: '{tmp_path / 'b.jsonl'}'}}]"
    phases = ", phases: [{until_steps: 5, weights: {a: 1}}, {weights: {a: 1, b: 1}}]"
    mixed = make_plan(recipe(sources, phases)).mixture
    assert mixed is not None
    assert [(s.name, s.rows, s.read, s.share) for s in mixed.sources] == [("a", None, 30, 0.75), ("b", None, 10, 0.25)]
    assert [(p.steps, p.rows) for p in mixed.phases] == [(5, 20), (5, 20)]
    by_tokens = ", phases: [{until_tokens: 200, weights: {a: 1}}, {weights: {b: 1}}]"
    mixed = make_plan(recipe(sources, by_tokens)).mixture
    assert mixed is not None and 0 < mixed.phases[0].rows < 20


def test_the_fingerprint_of_a_stream_changes_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 30)
    before = sample_fingerprint(recipe(str(path)), 100)
    assert before == sample_fingerprint(recipe(str(path)), 100)
    write(path, 31)
    assert before != sample_fingerprint(recipe(str(path)), 100)
