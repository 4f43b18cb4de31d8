"""`studio data inspect`: what it counts, on a file whose contents are known, and what it shows as learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import studio
from studio.cli import app
from studio.data import inspection
from studio.data.duplicates import Duplicates, NearDuplicates, pieces
from studio.data.inspection import DataReport
from studio.data.scripts import Scripts, script_of
from studio.data_view import report_view
from studio.errors import DataError

SENTENCE = (
    "the quick brown fox jumps over the lazy dog while eleven other animals watch it from a hill far away and wonder "
    "what all of this haste may be good for on so warm a day in early spring"
)
WORDS = SENTENCE.split()


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(contents)
    turns += [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": turns}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DataReport:
    near = [*WORDS[:-1], "off"]
    path = written(
        tmp_path_factory.mktemp("data") / "rows.jsonl",
        chat("hi", "ho"),
        chat("Привет", "да", "ещё", "нет"),
        chat("hi", "ho"),
        '{"prompt": 3, "completion": "a"}',
        chat(" ".join(WORDS), "yes", system="be brief"),
        {"prompt": " ".join(near), "completion": "yes", "system": "be brief"},
        chat("hi", "<think>hm</think>ho"),
        chat("x " * 400, "long"),
        chat("hi", "y " * 400),
        {"text": "hi", "prompt": "a", "completion": "b", "instruction": "c"},
        "{",
    )
    return studio.inspect_data(path)


def test_rows_are_counted_by_what_they_are(report: DataReport) -> None:
    assert (report.kind, report.rows, report.good_rows, report.bad_rows) == ("json lines", 11, 8, 3)
    assert report.kinds == {"example": 8}
    assert {entry.name: entry.rows for entry in report.formats} == {"messages": 7, "prompt_completion": 1}
    assert report.traits == {"system prompt": 2, "several turns": 1, "reasoning": 1}
    assert report.roles == {"user": 9, "assistant": 9, "system": 2}
    assert report.sources == {"rows": 8}


def test_the_format_is_said_with_the_share_of_rows_that_fit_it_and_no_other(report: DataReport) -> None:
    assert (report.format, report.detected_rows) == ("messages", 11)
    assert report.sure == pytest.approx(7 / 11)


def test_bad_rows_have_their_lines(report: DataReport) -> None:
    assert [(problem["line"], problem["field"]) for problem in report.problems] == [(4, "prompt"), (10, ""), (11, "")]
    assert report.hidden_problems == 0


def test_lengths_are_the_plans_and_the_long_rows_are_counted(report: DataReport) -> None:
    assert report.truncated_rows == 2 and report.long_prompts == 1
    (long,) = report.long_prompt_problems
    assert long["line"] == 8 and "allowed: fewer than data.max_length_tokens, 256" in long["message"]
    quantiles = [count for name, count in report.tokens.items() if name != "total"]
    assert quantiles == sorted(quantiles) and len(quantiles) == 8
    assert quantiles[-1] > 256 >= report.tokens["50 %"]


def test_equal_and_similar_rows_are_named(report: DataReport) -> None:
    assert (report.duplicate_rows, report.near_duplicate_rows, report.near_rows) == (1, 1, 8)
    (equal,), (alike,) = report.duplicates, report.near_duplicates
    assert (equal.line, equal.earlier_line) == (3, 1)
    assert (alike.line, alike.earlier_line) == (6, 5)


def test_columns_that_are_passed_over_are_named(tmp_path: Path) -> None:
    row = {"question": "Where?", "context": "In Ashdown.", "answer": "Ashdown", "id": 3, "source": "x", "tools": []}
    path = written(tmp_path / "rows.jsonl", row, {**row, "context": "", "system": "be brief"})
    report = studio.inspect_data(path)
    assert report.unread == {"id": 2, "context": 1}
    console = Console(width=120, record=True)
    console.print(report_view(report))
    assert "columns, in how many of the first 2 rows: id 2 · context 1" in console.export_text()
    columns = f"{{train: '{path}', columns: {{input: context, instruction: question, output: answer}}}}"
    recipe = studio.parse_recipe(f"data: {columns}\noutput: {{dir: x}}\n")
    report = studio.inspect_data(path, recipe=recipe)
    assert report.unread == {"id": 2} and (report.format, report.sure) == ("alpaca", 1)


def test_scripts_are_shares_of_letters(report: DataReport) -> None:
    assert list(report.scripts) == ["Latin", "Cyrillic"] and sum(report.scripts.values()) == pytest.approx(1)
    scripts = Scripts()
    scripts.add("ab 日本 12")
    assert scripts.shares() == {"Latin": 0.5, "Han": 0.5}
    assert [script_of(c) for c in "aяπあア가ن1 "] == [
        *("Latin", "Cyrillic", "Greek", "Hiragana", "Katakana", "Hangul", "Arabic"),
        *("", ""),
    ]


def test_what_is_shown_as_learned_is_what_training_learns(report: DataReport) -> None:
    from transformers import AutoTokenizer

    from studio.base import EMBEDDED_DIR
    from studio.data import read_rows
    from studio.encoding import IGNORED, encode

    assert len(report.examples) == 3 and report.examples[0].line == 1
    assert [example.line for example in report.examples] == sorted({example.line for example in report.examples})
    first = report.examples[0]
    assert [(segment.text, segment.trained) for segment in first.segments] == [
        (
            "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n",
            False,
        ),
        ("ho<|eot|>", True),
    ]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    path = written(Path(report.file).with_name("one.jsonl"), chat("hi", "ho"))
    ids, labels = encode(tokenizer, read_rows(path, ("example",))[0], 256)  # type: ignore[arg-type]
    assert (first.tokens, first.trained_tokens) == (len(ids), sum(label != IGNORED for label in labels))


def test_the_recipe_says_what_is_learned_and_what_is_good(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", chat("a", "b", "c", "d"), {"prompt": "p", "chosen": "c", "rejected": "d"})
    recipe = studio.parse_recipe(
        f"data: {{train: {path}, max_length_tokens: 16}}\ntraining: {{loss_on: all}}\noutput: {{dir: {tmp_path}/o}}"
    )
    report = studio.inspect_data(path, recipe=recipe)
    assert (report.good_rows, report.bad_rows, report.other_rows, report.loss_on) == (2, 0, 1, "all")
    told = "1 of 2 rows: each is a preference pair, which sft does not read; dpo, kto, orpo, cpo, reward do"
    assert report.other_method == told
    console = Console(width=160, record=True)
    console.print(report_view(report))
    assert told in console.export_text()
    example, *_ = report.examples
    assert example.cut and example.tokens == example.trained_tokens == 16
    assert studio.inspect_data(path).bad_rows == 0, "without a recipe rows for every method are good"
    sides = [example.title for example in studio.inspect_data(path).examples]
    assert sides == ["", "chosen", "rejected"]


def test_a_file_without_rows_is_refused_in_the_readers_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: 1 problem\n  - cannot be read: no such file"):
        studio.inspect_data(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="the file is empty"):
        studio.inspect_data(written(tmp_path / "a.jsonl"))


def test_the_terminal_shows_all_of_it_and_no_control_characters(report: DataReport, tmp_path: Path) -> None:
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    console.print(report_view(report))
    text = console.export_text()
    for shown in (
        "64% of the first 11 rows fit it and no other",
        "11, 3 of them bad: 8 conversations",
        "system prompt 2",
        "1 row as an earlier one, 12.5 %; lines 3 = 1",
        "2 of 8 rows (25.0 %) have more than 256 tokens",
        "Of 1 the prompt alone fills that, which training refuses: line 8",
        "line 4",
        "⟦ho<|eot|>⟧",
    ):
        assert shown in text, text
    path = written(tmp_path / "a.jsonl", {"prompt": "\x1b[31mred", "completion": "b"})
    console.print(report_view(studio.inspect_data(path)))
    assert "\x1b" not in console.export_text(styles=False)


def test_the_command_answers_with_tables_or_json(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", chat("a", "b"))
    shown = CliRunner().invoke(app, ["data", "inspect", str(path)])
    assert shown.exit_code == 0 and "messages (ChatML)" in shown.output
    said = CliRunner().invoke(app, ["data", "inspect", str(path), "--json"])
    assert json.loads(said.stdout)["format"] == "messages"
    failed = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "none"), "--json"])
    assert failed.exit_code == 1 and "no such file" in json.loads(failed.stdout)["error"]["message"]
    bad = written(tmp_path / "bad.jsonl", {"prompt": 3, "completion": "b"})
    assert CliRunner().invoke(app, ["data", "inspect", str(bad)]).exit_code == 1, "no row can be used"
    written(bad, {"prompt": 3, "completion": "b"}, chat("a", "b"))
    assert CliRunner().invoke(app, ["data", "inspect", str(bad)]).exit_code == 0
    formats = CliRunner().invoke(app, ["data", "formats", "--json"])
    assert {entry["name"] for entry in json.loads(formats.stdout)} >= {"messages", "sharegpt", "alpaca", "kto"}


def test_equal_rows_are_found_whatever_their_distance() -> None:
    same = Duplicates()
    texts = [str(number % 30_000) for number in range(60_000)]
    for text in texts:
        same.add(text)
    assert same.found().T.tolist() == [[30_000 + number, number] for number in range(30_000)]


def test_rows_are_alike_from_four_fifths_of_their_pieces_on() -> None:
    near = NearDuplicates()
    words = [f"w{number}" for number in range(200)]
    near.add(" ".join(words))
    near.add(" ".join([*words[:-1], "other"]))
    near.add(" ".join([f"x{word}" if number % 10 == 0 else word for number, word in enumerate(words)]))
    near.add(" ".join(words).upper())
    assert near.found(np.array([3])).T.tolist() == [[1, 0]], "the third shares about half of its three-word pieces"
    assert near.found(np.array([9])).T.tolist() == [[1, 0], [3, 0]]
    assert NearDuplicates().found(np.array([], dtype=int)).shape == (2, 0)


def test_a_source_in_every_row_costs_no_memory_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MOST_SOURCES", 3)
    rows = [{"prompt": f"a{n}", "completion": "b", "source": f"s{n % 9}"} for n in range(18)]
    report = studio.inspect_data(written(tmp_path / "rows.jsonl", *rows))
    assert report.sources == {"(other sources)": 12, "s0": 2, "s1": 2, "s2": 2}


def test_completions_with_opposite_labels_are_not_equal_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    report = studio.inspect_data(written(tmp_path / "rows.jsonl", *rows))
    assert report.duplicate_rows == 1 and [(p.line, p.earlier_line) for p in report.duplicates] == [(3, 1)]


def test_pieces_are_runs_of_words_or_of_letters() -> None:
    assert pieces("One two").tolist() == pieces("one  TWO").tolist() and len(pieces("one two")) == 1
    assert pieces("a b c d")[1:].tolist() == pieces("b c d").tolist() and len(pieces("")) == 1
    han = "春江潮水连海平海上明月共潮生滟滟随波千万里何处春江无月明"
    assert len(pieces(han)) == len(han) - 7 and len(set(pieces(han).tolist())) == len(han) - 7
    assert len(pieces("a " * 5000)) == len(pieces("a b " * 2500)) == 1998


def test_what_is_found_alike_is_what_an_exact_comparison_finds() -> None:
    rng = random.Random(0)
    texts: list[list[str]] = []
    for _ in range(120):
        texts.append(rng.choices([f"w{number}" for number in range(3000)], k=120))
        for changed in (0, 1, 4, 30):
            copy = list(texts[-1])
            for place in rng.sample(range(120), changed):
                copy[place] = "changed"
            texts.append(copy)
    near, same = NearDuplicates(), Duplicates()
    for words in texts:
        near.add(" ".join(words))
        same.add(" ".join(words))
    sets = [{tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in texts]
    exact = {
        later: max(len(sets[later] & sets[earlier]) / len(sets[later] | sets[earlier]) for earlier in range(later))
        for later in range(1, len(texts))
    }
    found = set(near.found(same.found()[0])[0].tolist())
    assert not found & set(same.found()[0].tolist())
    assert {row for row, similarity in exact.items() if 0.95 <= similarity < 1} <= found
    assert found <= {row for row, similarity in exact.items() if similarity > 0.6} and len(found) > 150


def test_a_column_that_looks_like_labels_is_named_with_what_reads_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{n}", "completion": "b", "Rating": "up"} for n in range(3)]
    (note,) = studio.inspect_data(written(tmp_path / "rows.jsonl", *rows)).notes
    assert note.startswith("a column Rating is not read") and note.endswith("data.columns: {label: Rating}")


def test_rows_of_one_line_are_counted_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    same, bad = {"prompt": "a", "completion": "b"}, {"prompt": 3, "completion": "b"}
    path.write_text(json.dumps([same, {"prompt": "c", "completion": "d"}, same, bad]))
    report = studio.inspect_data(path)
    assert [(p.counted, p.line, p.earlier_line) for p in report.duplicates] == [("row", 3, 1)]
    assert [(p["counted"], p["line"]) for p in report.problems] == [("row", 4)]
    assert [(shown.counted, shown.line) for shown in report.examples] == [("row", 1), ("row", 2), ("row", 3)]
    console = Console(width=120, record=True)
    console.print(report_view(report))
    assert "; rows 3 = 1" in console.export_text()


@pytest.mark.parametrize("text", ['[{"prompt": "a", "completion": "b"}, {"prom', '[{"prompt": "a", "completion": "b"}'])
def test_a_file_that_was_cut_is_said_to_be_read_in_part(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    report = studio.inspect_data(path)
    assert report.good_rows == 1 and "is not valid JSON" in report.problems[0]["message"]
    assert report.notes[0].startswith("the rest of the file was not read")


def test_columns_that_fit_no_format_are_told_how_to_be_mapped_and_can_be(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text("nr,customer_text,our_reply\n" + "".join(f"{n},a{n},b\n" for n in range(300)))
    shown = CliRunner().invoke(app, ["data", "inspect", str(path)])
    assert shown.exit_code == 1 and shown.output.count("needs messages") == 1
    words = " ".join(shown.output.split())
    assert "lines 2, 3, 4, 5, 6, … (300 rows)" in words and "300, 300 of them bad" in words
    assert "columns nr, customer_text, our_reply" in words and "--columns prompt=NAME" in words
    mapped = ["--columns", "prompt=customer_text", "--columns", "completion=our_reply"]
    report = json.loads(CliRunner().invoke(app, ["data", "inspect", str(path), *mapped, "--json"]).stdout)
    assert (report["good_rows"], report["format"]) == (300, "prompt_completion")
    for wrong, said in (("prompt", "ours=theirs"), ("ask=customer_text", "unknown column 'ask'")):
        failed = CliRunner().invoke(app, ["data", "inspect", str(path), "--columns", wrong])
        assert failed.exit_code == 1 and said in failed.stderr
    typo = CliRunner().invoke(app, ["data", "inspect", str(path), "--columns", "prompt=custom_text"])
    assert "did you mean customer_text?" in " ".join(typo.output.split())
