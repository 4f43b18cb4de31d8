"""Data files: the two row forms, and what is said about every kind of bad row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.data import Example, Message, check_rows, read_all, read_examples
from studio.errors import DataError, Problem

GOOD = '{"prompt": "2 + 2 =", "completion": "4"}'
FOUR = Example((Message("user", "2 + 2 ="),), (Message("assistant", "4"),), "rows")


def problems_of(path: Path, *lines: str | bytes) -> list[Problem]:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    return caught.value.problems


def turns(*pairs: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


def test_both_forms_become_the_same_examples(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    listed = {"prompt": [{"role": "user", "content": "2 + 2 ="}], "completion": [{"role": "assistant", "content": "4"}]}
    path.write_text("\n".join([GOOD, turns(("user", "2 + 2 ="), ("assistant", "4")), "", json.dumps(listed), ""]))
    assert read_examples(path) == [FOUR, FOUR, FOUR]
    assert FOUR.as_row() == listed


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("3", "rows"),
        ('" "', "rows"),
        ('{"url": 1}', "rows"),
        ('"a\\u0000"', "rows"),
        ('"all"', "all (source)"),
        (json.dumps("ü" * 70), "ü" * 60),
    ],
)
def test_other_uses_of_the_key_are_passed_over_and_no_source_is_called_as_all_are(
    tmp_path: Path, source: str, name: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD.replace("{", f'{{"source": {source}, '))
    assert [example.source for example in read_examples(path)] == [name]


def test_a_row_may_name_its_source_and_has_the_files_name_without(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, GOOD.replace("{", '{"source": "sums", '), GOOD.replace("{", '{"source": null, ')]))
    assert [example.source for example in read_examples(path)] == ["rows", "sums", "rows"]


def test_the_last_assistant_turn_is_the_completion(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    (example,) = read_examples(path)
    assert [message.content for message in example.prompt] == ["s", "a", "b", "c"]
    assert example.completion == (Message("assistant", "d"),)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n")
    assert len(read_examples(path)) == 2


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ('{"prompt": "a"', "", "is not valid JSON"),
        ("[1, 2]", "", "received a list of 2"),
        ("null", "", "received nothing (null)"),
        ("[" * 100_000, "", "is not valid JSON"),
        (b'{"prompt": "\xff"}', "", "is not UTF-8 text (byte 13 of the line is 0xFF)"),
        ('{"body": "a"}', "", "needs messages, or prompt and completion; received body"),
        ('{"prompt": "a"}', "completion", "is missing"),
        ('{"completion": "a"}', "prompt", "is missing"),
        ('{"prompt": "a", "completion": "b", "messages": []}', "", "keep one of the two forms"),
        ('{"prompt": "a", "completion": null}', "completion", "received nothing (null)"),
        ('{"prompt": "a", "completion": ""}', "completion", "is empty"),
        ('{"prompt": " \\n", "completion": "b"}', "prompt", "is only white space"),
        ('{"prompt": "a", "completion": 4}', "completion", "received the number 4"),
        ('{"prompt": "a", "completion": "\\ud800"}', "completion", "is not text"),
        ('{"prompt": [], "completion": "b"}', "prompt", "is an empty list"),
        ('{"messages": "a"}', "messages", "is a list of messages"),
        ('{"messages": [3]}', "messages[0]", "received the number 3"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content", "is missing"),
        (turns(("user", None), ("assistant", "b")), "messages[0].content", "received nothing (null)"),
        (
            turns(("user", "a"), ("robot", "b")),
            "messages[1].role",
            'is system, user, assistant or tool, received the text "robot"',
        ),
        (turns(("user", "a")), "messages", "last, an assistant turn"),
        (
            turns(
                ("assistant", "a"),
            ),
            "messages",
            "needs a user turn",
        ),
        (turns(("system", "a"), ("assistant", "b")), "messages", "is the user's, received system"),
        (turns(("user", "a"), ("system", "s"), ("user", "b"), ("assistant", "c")), "messages", "can only come first"),
        (
            '{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}',
            "completion",
            "holds assistant turns alone",
        ),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path: Path, row: str | bytes, field: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    (problem,) = problems_of(path, GOOD, row, GOOD)
    assert (problem.file, problem.line) == (str(path), 2)
    assert problem.field == field
    assert said in problem.message


def test_both_sides_of_a_row_are_reported(tmp_path: Path) -> None:
    problems = problems_of(tmp_path / "rows.jsonl", '{"prompt": "", "completion": null}')
    assert [problem.field for problem in problems] == ["prompt", "completion"]


def test_the_first_twenty_problems_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({f"x{number}": 1}) for number in range(25)))
    with pytest.raises(DataError, match="and 5 more") as caught:
        read_examples(path)
    assert [problem.line for problem in caught.value.problems] == list(range(1, 21))


def test_a_problem_of_many_rows_is_told_once_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"nr": 1}'] * 300 + ['{"prompt": "", "completion": null}', '{"nr": 1}']))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{path}: 303 problems in 302 rows"
    assert lines[0].startswith("  - lines 1, 2, 3, 4, 5, … (301 rows): needs messages")
    assert "data.columns: {prompt: …, completion: …}" in lines[0]
    assert [line[:10] for line in lines[1:]] == ["  - line 3"] * 2
    assert (len(caught.value.problems), caught.value.hidden_count) == (20, 283)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (problem,) = problems_of(tmp_path / "rows.jsonl", content)
    assert "the file is empty" in problem.message


def test_a_missing_file_or_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: 1 problem\n  - cannot be read: no such file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(DataError, match="is a folder without data; expected an Arrow directory"):
        read_examples(tmp_path)


def test_problems_of_both_files_come_in_one_error(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("{}\n")
    with pytest.raises(DataError) as caught:
        read_all(train, held_out)
    assert [problem.file for problem in caught.value.problems] == [str(train), str(held_out)]
    held_out.write_text(GOOD)
    train.write_text(GOOD)
    assert read_all(train, None) == [[replace(FOUR, source="train")], []]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "x"]), json_values))
def test_any_json_object_is_either_an_example_or_named_problems(row: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        examples, problems = check_rows(path)
    assert bool(examples) != bool(problems)
