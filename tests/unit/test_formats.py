"""Formats of rows: what is recognised as what, what becomes of it, and that no row is lost between."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.base import EMBEDDED_DIR
from studio.data import Example, Labelled, Message, PlainText, Preference, Reading, Row, check_rows, iter_rows
from studio.data.files import raw_rows
from studio.data.formats import COLUMNS, FORMATS, KINDS, convert
from studio.data.json_text import RowProblems
from studio.data.of_recipe import written_by_template
from studio.data.reading import WRITTEN
from studio.data.rows import RowKind, row_of
from studio.errors import Problem
from studio.recipe_data import DataSettings

ALL = tuple(KINDS)
USER, SYSTEM = Message("user", "hi"), Message("system", "be brief")
CHAT = Example((USER,), (Message("assistant", "ho"),))
PAIR = Preference((USER,), (Message("assistant", "ho"),), (Message("assistant", "no"),))


def said(role: str, content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def shared(who: str, value: str) -> dict[str, Any]:
    return {"from": who, "value": value}


MORE, BAD = Message("user", "more"), "\ud800"
BOTH = [said("user"), said("assistant", "ho")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = Message("assistant", "", tool_calls=(CALL,))
TOLD = Message("tool", "2", name="add")


@pytest.mark.parametrize(
    ("name", "values", "row"),
    [
        ("messages", {"messages": BOTH}, CHAT),
        ("messages", {"conversation": BOTH, "system": "be brief"}, Example((SYSTEM, USER), CHAT.completion)),
        ("messages", {"messages": json.dumps(BOTH), "id": 7}, CHAT),
        ("messages", {"messages": [said("USER"), said("model", [{"type": "text", "text": "ho"}])]}, CHAT),
        ("messages", {"messages": BOTH, "prompt": "hi", "prompt_id": "x"}, CHAT),
        ("sharegpt", {"conversations": [shared("human", "hi"), shared("gpt", "ho")]}, CHAT),
        (
            "sharegpt",
            {
                "conversations": [
                    shared("human", "hi"),
                    shared("function_call", '{"name": "add", "arguments": {"a": 1}}'),
                    shared("observation", "2"),
                    shared("gpt", "ho"),
                ],
                "tools": '[{"name": "add", "parameters": {}}]',
            },
            Example(
                (USER, CALLING, Message("tool", "2")),
                CHAT.completion,
                tools=({"type": "function", "function": {"name": "add", "parameters": {}}},),
            ),
        ),
        ("alpaca", {"instruction": "hi", "input": "", "output": "ho"}, CHAT),
        (
            "alpaca",
            {"instruction": "add", "input": "1, 2", "output": "3", "text": "Below is an instruction…"},
            Example((Message("user", "add\n\n1, 2"),), (Message("assistant", "3"),)),
        ),
        ("alpaca", {"instruction": "hi", "context": "", "response": "ho", "category": "x"}, CHAT),
        (
            "alpaca",
            {"instruction": "hi", "output": "ho", "history": [["a", "b"]], "system": "be brief"},
            Example((SYSTEM, Message("user", "a"), Message("assistant", "b"), USER), CHAT.completion),
        ),
        ("prompt_completion", {"prompt": "hi", "completion": "ho"}, CHAT),
        ("prompt_completion", {"question": "hi", "answer": "ho"}, CHAT),
        ("prompt_completion", {"prompt": [said("user")], "response": BOTH[1:]}, CHAT),
        ("prompt_completion", {"prompt": json.dumps([said("user")]), "response": json.dumps(BOTH[1:])}, CHAT),
        (
            "prompt_completion",
            {"prompt": "hi", "completion": '[{"asset": "PMP-1"}, {"asset": "PMP-2"}]'},
            Example((USER,), (Message("assistant", '[{"asset": "PMP-1"}, {"asset": "PMP-2"}]'),)),
        ),
        (
            "preference",
            {"prompt": '[{"n": 1}]', "chosen": '[{"n": 2}]', "rejected": "no"},
            Preference((Message("user", '[{"n": 1}]'),), (Message("assistant", '[{"n": 2}]'),), PAIR.rejected),
        ),
        (
            "prompt_completion",
            {"system_prompt": "be brief", "question": "hi", "response": "ho"},
            Example((SYSTEM, USER), CHAT.completion),
        ),
        ("text", {"text": "hi", "meta": {}}, PlainText("hi")),
        ("text", {"content": "hi", "path": "a.py"}, PlainText("hi")),
        ("preference", {"prompt": "hi", "chosen": "ho", "rejected": "no"}, PAIR),
        ("preference", {"question": "hi", "chosen": said("assistant", "ho"), "rejected": [said("gpt", "no")]}, PAIR),
        (
            "preference",
            {
                "conversations": [shared("human", "hi")],
                "chosen": shared("gpt", "ho"),
                "rejected": shared("gpt", "no"),
            },
            PAIR,
        ),
        (
            "preference_implicit",
            {"chosen": BOTH, "rejected": [said("user"), said("assistant", "no")], "prompt": "hi", "score": 1},
            PAIR,
        ),
        (
            "preference_implicit",
            {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
            PAIR,
        ),
        (
            "preference_implicit",
            {
                "chosen": [*BOTH, said("user", "more"), said("assistant", "a")],
                "rejected": [*BOTH, said("user", "more"), said("assistant", "b")],
            },
            Preference((*CHAT.turns, MORE), (Message("assistant", "a"),), (Message("assistant", "b"),)),
        ),
        ("kto", {"prompt": "hi", "completion": "ho", "label": False}, Labelled((USER,), CHAT.completion, False)),
        ("kto", {"question": "hi", "answer": "ho", "label": "True"}, Labelled((USER,), CHAT.completion, True)),
        ("kto", {"instruction": "hi", "output": "ho", "label": 1}, Labelled((USER,), CHAT.completion, True)),
        ("kto", {"messages": BOTH, "label": False}, Labelled((USER,), CHAT.completion, False)),
        (
            "kto",
            {"conversations": [shared("human", "hi"), shared("gpt", "ho")], "label": "true"},
            Labelled((USER,), CHAT.completion, True),
        ),
        ("messages", {"messages": BOTH, "label": 3}, CHAT),
        ("kto", {"prompt": "hi", "completion": "ho", "label": 0.0}, Labelled((USER,), CHAT.completion, False)),
        ("kto", {"prompt": "hi", "completion": "ho", "label": "1.0"}, Labelled((USER,), CHAT.completion, True)),
        (
            "messages",
            {"messages": BOTH, "system": None, "system_prompt": "be brief"},
            Example((SYSTEM, USER), CHAT.completion),
        ),
        (
            "alpaca",
            {"instruction": "add", "input": "", "context": "1, 2", "output": "3"},
            Example((Message("user", "add\n\n1, 2"),), (Message("assistant", "3"),)),
        ),
        (
            "messages",
            {"messages": [said("user"), said("assistant", "ho", weight=0), said("user", "more"), said("model", "a")]},
            Example((USER, Message("assistant", "ho", learned=False), MORE), (Message("assistant", "a"),)),
        ),
        ("messages", {"messages": [said("user"), said("assistant", "ho", weight=1, train=True)]}, CHAT),
    ],
)  # fmt: skip
def test_a_row_is_recognised_and_converted(name: str, values: dict[str, Any], row: Row) -> None:
    assert convert(values, ALL) == (name, row)
    assert convert(values, ALL, name) == (name, row)


@pytest.mark.parametrize(
    ("calls", "content"),
    [
        ([CALL], None),
        ([{**CALL, "id": "call_1"}], ""),
        ([{"name": "add", "arguments": '{"a": 1}'}], ""),
        (json.dumps([CALL]), ""),
    ],
)
def test_tool_calls_come_in_one_form(calls: Any, content: Any) -> None:
    turns = [said("user"), said("assistant", content, tool_calls=calls), said("tool", "2", name="add"), BOTH[1]]
    assert convert({"messages": turns}, ALL)[1] == Example((USER, CALLING, TOLD), CHAT.completion)


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_the_older_form_of_a_call_is_no_less_a_call(content: str | None) -> None:
    older = said("assistant", content, function_call={"name": "add", "arguments": '{"a": 1}'})
    turns = [said("user"), older, said("function", "2", name="add"), BOTH[1]]
    calling = replace(CALLING, content=content or "")
    assert convert({"messages": turns}, ALL)[1] == Example((USER, calling, TOLD), CHAT.completion)


def test_a_turn_that_is_not_learned_is_so_on_the_way_to_trl_and_back() -> None:
    row = Example((USER, Message("assistant", "ho", learned=False), MORE), CHAT.completion)
    assert row_of(row.as_row()) == row and row.as_row()["prompt"][1]["weight"] == 0


@pytest.mark.parametrize("text", ["m['thinking']", "m.thinking", '"thinking" in m', "m.reasoning_content"])
def test_templates_that_write_reasoning_are_told_from_others(tmp_path: Path, text: str) -> None:
    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    for name in files:
        (tmp_path / name).write_bytes((EMBEDDED_DIR / name).read_bytes())
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "chat_template.jinja").write_text(f"{{% for m in messages %}}{{{{ {text} }}}}{{% endfor %}}")
    assert written_by_template(str(tmp_path)) == ("reasoning_content",)
    (tmp_path / "chat_template.jinja").write_text("{% if enable_thinking %}x{% endif %}{{ messages }}")
    assert written_by_template(str(tmp_path)) == ()
    assert Message("assistant", "a", "why").as_turn()["thinking"] == "why"  # under both names that templates have


@pytest.mark.parametrize(
    "turn",
    [
        said("assistant", "<think>hm</think>ho"),
        said("assistant", "\n<think>\nhm\n</think>\n\nho"),
        said("assistant", "ho", reasoning_content="hm"),
        said("assistant", "ho", thinking=" hm\n"),
        said("assistant", "ho", reasoning="hm"),
    ],
)
def test_reasoning_is_told_from_the_answer_and_back(tmp_path: Path, turn: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [said("user"), turn]}))
    (row,), _ = check_rows(tmp_path / "a.jsonl")
    assert isinstance(row, Example) and row.completion == (Message("assistant", "ho", thinking="hm"),)
    (row,), _ = check_rows(tmp_path / "a.jsonl", reading=Reading(written=("tools", "tool_calls")))
    assert isinstance(row, Example) and row.completion == (Message("assistant", "<think>\nhm\n</think>\n\nho"),)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": BOTH},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "chosen": "c", "rejected": "d"},
        {"chosen": BOTH, "rejected": [BOTH[0], said("assistant", "x")]},
        {"prompt": "p", "completion": "c", "label": True},
    ],
)
def test_rows_of_every_kind_hand_their_tools_on(values: dict[str, Any]) -> None:
    _, row = convert({**values, "tools": [{"name": "add"}]}, ALL)
    assert not isinstance(row, PlainText)
    assert row.as_row()["tools"] == [{"type": "function", "function": {"name": "add"}}]
    plain = convert(values, ALL)[1]
    assert not isinstance(plain, PlainText) and "tools" not in plain.as_row()


def test_a_template_that_writes_no_tools_is_not_given_any(tmp_path: Path) -> None:
    turns = [said("user"), said("assistant", "", tool_calls=[CALL]), said("tool", "2"), BOTH[1]]
    rows = [{"messages": turns}, {"messages": BOTH, "tools": [{"name": "add"}]}, {"messages": BOTH}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    good, problems = check_rows(tmp_path / "a.jsonl", reading=Reading(written=()))
    assert len(good) == 1
    assert [str(problem) for problem in problems] == [
        "line 1: calls tools, which this model's chat template does not write",
        "line 2, tools: are given, which this model's chat template does not write",
    ]


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"messages": BOTH, "instruction": "a", "output": "b"}, "", "fits the formats messages and alpaca; keep one"),
        ({"question": "a", "answer": "b", "response": "c"}, "completion", "may be response or answer; say which in"),
        (
            {"messages": [said("user"), said("assistant", "x", reasoning=["why"])]},
            "messages[1].reasoning",
            "is text, received a list",
        ),
        ({"messages": [said("user", thinking="hm"), BOTH[1]]}, "messages[0].thinking", "belongs to an assistant's"),
        ({"messages": [said("user"), said("assistant", "x", weight=0.5)]}, "messages[1].weight", "is 0 or 1, false or"),
        ({"messages": [said("user"), said("assistant", "x", train=False)]}, "messages", "not to be learned (weight 0)"),
        ({"messages": BOTH, "system_prompt": "a", "system_message": "b"}, "system", "may be system_prompt or system_m"),
        ({"messages": [said("user"), said("assistant", "<think> </think>")]}, "messages[1].content", "nothing after"),
        (
            {"messages": [said("user"), said("assistant", None, tool_calls=[{"name": "f", "arguments": "x"}])]},
            "messages[1].tool_calls[0].arguments",
            "is not valid JSON",
        ),
        (said("user", "a message alone"), "", "needs messages, or prompt and completion; received role"),
        ({"messages": [said("system")]}, "messages", "needs a user turn and, last, an assistant turn"),
        ({"messages": [said("system"), said("assistant")]}, "messages", "the turn before the answer is the user's"),
        ({"messages": [said("tool"), said("assistant")]}, "messages", "needs a user turn"),
        ({"messages": [said("user"), said("assistant", "")]}, "messages[1].content", "is empty"),
        ({"messages": [said("user"), said("assistant", None)]}, "messages[1].content", "received nothing (null)"),
        ({"messages": [said("user"), said("assistant", [])]}, "messages[1].content", "is text, received a list of 0"),
        ({"messages": [said("user", [{"type": "image"}]), BOTH[1]]}, "messages[0].content", "has a part that is no"),
        ({"messages": [said("user"), said("assistant", "<think>a")]}, "messages[1].content", "does not close it"),
        ({"messages": [said("user"), said("assistant", "<think>a</think> ")]}, "messages[1].content", "nothing after"),
        (
            {"messages": [said("user"), said("assistant", "<think>a</think>b", thinking="c")]},
            "messages[1].content",
            "keep one of them",
        ),
        ({"messages": [said("user", tool_calls=[CALL]), BOTH[1]]}, "messages[0].tool_calls", "an assistant's turn"),
        (
            {"messages": [said("user"), said("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])]},
            "messages[1].tool_calls[0].arguments",
            "is not valid JSON",
        ),
        (
            {"messages": [said("user"), said("assistant", "", tool_calls=[{"name": "f", "arguments": [1]}])]},
            "messages[1].tool_calls[0].arguments",
            "is a mapping or its JSON text, received a list of 1",
        ),
        ({"messages": [said("system"), *BOTH], "system": "other"}, "system", "differs from the system turn in"),
        (
            {"messages": [said("user"), said("assistant", "", tool_calls=[{"name": "f", "arguments": {"a": BAD}}])]},
            "messages[1].tool_calls[0]",
            "holds half of a surrogate pair",
        ),
        ({"messages": BOTH, "tools": [{"name": "f", "x": float("nan")}]}, "tools[0]", "Out of range float values"),
        ({"messages": BOTH, "tools": [3]}, "tools[0]", "received the number 3"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "rejected", "is the same as chosen"),
        ({"prompt": "p", "chosen": "c"}, "rejected", "is missing"),
        ({"chosen": "c", "rejected": "d"}, "prompt", "is missing"),
        ({"prompt": "p", "chosen": "", "rejected": "d"}, "chosen", "is empty"),
        ({"chosen": BOTH, "rejected": BOTH}, "rejected", "is the same as chosen"),
        ({"chosen": BOTH, "rejected": [said("user", "x"), BOTH[1]]}, "rejected", "no user turn in common with"),
        (
            {"chosen": BOTH, "rejected": [said("user"), said("assistant", "x"), said("user"), said("assistant", "y")]},
            "rejected",
            "assistant turns alone after the start",
        ),
        ({"prompt": "x", "chosen": BOTH, "rejected": [BOTH[0], said("assistant", "x")]}, "prompt", "begin with"),
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "label", "is true or false, or 1 or 0, yes or no"),
        ({"instruction": "", "output": "c"}, "instruction", "is empty"),
        ({"instruction": "a", "input": 3, "output": "c"}, "input", "is text, received the number 3"),
        ({"instruction": "a", "output": "c", "history": ["x"]}, "history", "is a list of [question, answer] pairs"),
        ({"text": ""}, "text", "is empty"),
    ],
)  # fmt: skip
def test_what_no_row_can_be_made_of_is_named(values: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RowProblems) as caught:
        convert(values, ALL)
    ((found, words),) = caught.value.problems
    assert found == field and message in words


@pytest.mark.parametrize(
    ("values", "kinds", "name"),
    [
        ({"prompt": "p", "messages": BOTH, "chosen": "c", "rejected": "d"}, ("preference",), "preference"),
        ({"prompt": "p", "messages": BOTH, "chosen": "c", "rejected": "d"}, ("example",), "messages"),
        ({"text": "a", "instruction": "b", "output": "c"}, ("example", "text"), "alpaca"),
    ],
)
def test_of_several_formats_that_is_read_which_the_method_wants(
    values: dict[str, Any], kinds: tuple[RowKind, ...], name: str
) -> None:
    assert convert(values, kinds)[0] == name


def test_labelled_rows_are_never_taken_for_answers_to_learn() -> None:
    with pytest.raises(RowProblems) as caught:
        convert({"prompt": "p", "completion": "c", "label": False}, ("example",))
    said = "is a labelled completion; this training method reads a conversation; for such rows training.method is kto"
    assert caught.value.problems == (("", said),)


@pytest.mark.parametrize("words", ["up down", "yes no", "Good BAD", "thumbs_up Thumbs-Down", "like dislike", "TRUE 0"])
def test_labels_are_read_in_their_common_words(words: str) -> None:
    for word, wanted in zip(words.split(), (True, False), strict=True):
        for row in ({"prompt": "p", "completion": "c"}, {"messages": BOTH}):
            found = convert({**row, "label": word}, ("labelled", "preference"))[1]
            assert isinstance(found, Labelled) and found.label is wanted
    assert convert({"messages": BOTH, "label": "good"}, ("example",))[0] == "messages", "a class of a conversation"


def test_columns_are_mapped_and_a_format_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ask": "hi", "reply": "ho", "prompt": 3}\n{"ask": "hi"}\n{"prompt": "hi", "completion": "ho"}')
    rows, (problem,) = check_rows(path, reading=Reading(columns={"prompt": "ask", "completion": "reply"}))
    assert rows == [Example((USER,), CHAT.completion, "a")] * 2
    assert str(problem) == "line 2, reply: is mapped in data.columns and missing; received ask"
    _, problems = check_rows(path, reading=Reading(columns={"prompt": "asks", "completion": "replies"}))
    assert problems[0].message.endswith("; did you mean reply?")
    path.write_text('{"text": "hi", "prompt": "a", "completion": "b"}\n')
    (row,), _ = check_rows(path, ALL, Reading(format="text"))
    assert row == PlainText("hi", "a")
    _, (problem,) = check_rows(path, ALL, Reading(format="messages"))
    assert str(problem) == "line 1, messages: is missing"


def test_the_recipe_names_the_formats_of_the_table() -> None:
    assert set(get_args(DataSettings.model_fields["format"].annotation)) == {"auto", *FORMATS}
    assert all(form.kind in KINDS for form in FORMATS.values())
    assert set(COLUMNS) >= {"messages", "prompt", "completion", "chosen", "rejected", "label", "text"}


def test_a_file_may_mix_formats_as_long_as_the_method_reads_them(tmp_path: Path) -> None:
    mixed = [{"messages": BOTH}, {"text": "hi"}, {"prompt": "p", "chosen": "c", "rejected": "d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    rows, (problem,) = check_rows(tmp_path / "a.jsonl", ("example", "text"))
    assert [row.kind for row in rows] == ["example", "text"]
    said = "line 3: is a preference pair; this training method reads a conversation or plain text; "
    assert str(problem) == f"{said}for such rows training.method is dpo, kto, orpo, cpo, reward"


# -------------------------------------------------------------------- properties

texts = st.text(max_size=6) | st.sampled_from(
    ["hi", "<think>a</think>b", "<think>", "\ud800", "\0", "[{}]", "Human: a"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name", "function", "x"]), inner)
    ),
    max_leaves=6,
)
calls = st.lists(
    st.fixed_dictionaries({"name": texts, "arguments": texts | st.dictionaries(texts, anything, max_size=2)})
    | st.fixed_dictionaries({"function": anything}),
    max_size=2,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "robot"]), "content": texts | anything},
    optional={"tool_calls": calls | anything, "thinking": texts, "name": anything},
) | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "function_call"]), "value": texts})
asking = st.fixed_dictionaries({"role": st.just("user"), "content": texts})
answering = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts}, optional={"tool_calls": calls, "thinking": texts}
)
telling = st.fixed_dictionaries({"role": st.just("tool"), "content": texts}, optional={"name": texts})
conversation = st.lists(message, max_size=4) | st.tuples(asking, answering, telling, answering).map(list)
COLUMN_NAMES = sorted(
    {*COLUMNS, "conversations", "question", "answer", "response", "history", "context", "content", "id"}
)
rows_of_any_kind = st.dictionaries(st.sampled_from(COLUMN_NAMES), texts | conversation | anything, max_size=5)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(rows_of_any_kind, min_size=1, max_size=4),
    form=st.sampled_from(["auto", "auto", *FORMATS]),
    columns=st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(COLUMN_NAMES), max_size=2),
    kinds=st.sampled_from([ALL, ("example",), ("preference",), ("example", "text")]),
    written=st.sampled_from([WRITTEN, ()]),
)
def test_no_row_is_lost_and_none_is_an_error(
    rows: list[dict[str, Any]],
    form: str,
    columns: dict[str, str],
    kinds: tuple[RowKind, ...],
    written: tuple[str, ...],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert len(list(raw_rows(path))) == len(rows)
        found = list(iter_rows(path, kinds, Reading(form, columns, written)))
    good = [row.place.line for row in found if not isinstance(row, Problem) and row.place]
    bad = {problem.line for problem in found if isinstance(problem, Problem)}
    assert sorted([*good, *bad]) == list(range(1, len(rows) + 1))
    for row in found:
        if not isinstance(row, Problem | PlainText):
            json.dumps(row.as_row(), ensure_ascii=False).encode()  # text that can be written, and no half surrogates
            assert row.prompt and row.prompt[-1].role in ("user", "tool")


@settings(deadline=None, max_examples=100)
@given(
    asks=st.lists(
        st.text(min_size=1, max_size=20).filter(lambda t: t.strip() and "\0" not in t), min_size=1, max_size=3
    ),
    wrap=st.sampled_from(["messages", "sharegpt", "prompt_completion"]),
)
def test_the_same_conversation_in_three_formats_is_one_row(asks: list[str], wrap: str) -> None:
    try:
        "".join(asks).encode()
    except UnicodeEncodeError:
        return
    turns = [turn for ask in asks for turn in (said("user", ask), said("assistant", f"re: {ask}"))]
    values: dict[str, Any] = {"messages": turns}
    if wrap == "sharegpt":
        values = {"conversations": [shared("human" if t["role"] == "user" else "gpt", t["content"]) for t in turns]}
    if wrap == "prompt_completion":
        values = {"prompt": turns[:-1], "completion": turns[-1]["content"]}
    expected = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    assert convert(values, ALL) == (wrap, Example(expected[:-1], expected[-1:]))
