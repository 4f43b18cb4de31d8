"""Data files: every kind gives the same rows, and whatever cannot be read is named with its place."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.data import check_rows, iter_rows, read_rows
from studio.data.files import kind_of, source_name
from studio.data.json_text import LONGEST_ROW_BYTES, PIECE_BYTES
from studio.data.rows import PlainText
from studio.errors import FileProblem, Problem

ROWS = [{"prompt": f'question {i},\n"quoted"', "completion": f"answer {i} — ü"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
KINDS = ("example", "text", "preference", "labelled")
GOOD = b'{"prompt": "2 + 2 =", "completion": "4"}\n'


def table(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def arrow(path: Path) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_list([*ROWS, ROWS[0]]).select(range(5)).save_to_disk(path)


WRITERS = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.ndjson": lambda path: path.write_bytes(LINES),
    "without_suffix": lambda path: path.write_bytes(LINES),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES[:99]) + zstandard.compress(LINES[99:])),
    "named_wrongly.jsonl": lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "list.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1.5, "rows": ROWS, "more": {"a": 1}})),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), mtime=0)),
    "rows.csv": table,
    "semicolons.csv": lambda path: table(path, ";"),
    "rows.tsv": lambda path: table(path, "\t"),
    "rows.parquet": parquet,
    "arrow": arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS["rows.jsonl"](tmp_path / "expected.jsonl")
    WRITERS[name](tmp_path / name)
    expected = read_rows(tmp_path / "expected.jsonl", ("example",))
    rows, problems = check_rows(tmp_path / name)
    assert problems == [] and len(rows) == 5
    assert [row.as_row() for row in rows] == [row.as_row() for row in expected]
    lines = [row.place.line for row in rows if row.place]
    assert lines == sorted(lines) and len(lines) == 5
    assert {row.source for row in rows} == {source_name(tmp_path / name)}


def test_a_folder_holds_files_of_one_kind_or_text(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "inner").mkdir(parents=True)
    (texts / "b.txt").write_text("zwei")
    (texts / "a.md.gz").write_bytes(gzip.compress(b"# eins", mtime=0))
    (texts / "inner" / "c.txt").write_text("drei\r\n")
    (texts / ".hidden.txt").write_text("no")
    (texts / "picture.png").write_bytes(b"no")
    rows = read_rows(texts, ("text",))
    assert rows == [PlainText("# eins", "texts"), PlainText("zwei", "texts"), PlainText("drei\r\n", "texts")]
    assert [Path(row.place.file).name for row in rows if row.place] == ["a.md.gz", "b.txt", "c.txt"]
    for number in range(2):
        (texts / f"{number}.jsonl").write_bytes(GOOD)
    assert len(read_rows(texts, ("example",))) == 2, "data files count, and the text beside them is a README"
    (texts / "x.csv").write_text("a,b\n")
    (problem,) = check_rows(texts)[1]
    assert "holds files of several kinds: .jsonl, .csv; name one file" in problem.message


def test_a_folder_with_the_test_rows_beside_the_training_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        (tmp_path / "data" / name).write_bytes(LINES)
    assert len(read_rows(tmp_path, ("example",))) == 2 * len(ROWS)
    (tmp_path / "data" / "test-00000-of-00001.jsonl").write_bytes(LINES)
    ((problem,), rows) = reversed(check_rows(tmp_path, ("example",)))
    assert not rows and "holds several splits by the names of its files: test, train" in problem.message
    (tmp_path / "texts").mkdir()
    for name in ("train-driver.md", "test-plan.md"):
        (tmp_path / "texts" / name).write_text("text")
    assert len(read_rows(tmp_path / "texts", ("text",))) == 2


def test_a_zstd_file_that_was_cut_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    """The library itself ends in silence, so that with rows cut at their ends nobody would miss the others."""
    frame = zstandard.compress(b"".join(b'{"text": "row %d"}\n' % number for number in range(300)))
    path = tmp_path / "rows.jsonl.zst"
    for cut in (*range(5, len(frame), 17), len(frame) - 1, len(frame) + 1, len(frame) + 30):
        path.write_bytes((frame * 2)[:cut])
        assert isinstance(check_rows(path, ("text",))[1][-1], FileProblem), cut
    path.write_bytes(frame * 2)
    assert len(read_rows(path, ("text",))) == 600


def test_one_of_several_data_sets_must_be_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "both")
    (problem,) = check_rows(tmp_path / "both")[1]
    assert problem.message == "holds several data sets: test, train; name one of them, as both/test"
    assert len(read_rows(tmp_path / "both" / "test", ("example",))) == 1


def test_a_hub_data_set_is_read_from_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "datasets--me--sums" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--me--sums" / "refs").mkdir()
    (tmp_path / "datasets--me--sums" / "refs" / "main").write_text("abc")
    (snapshot / "train.jsonl").write_bytes(LINES)
    (snapshot / "test.jsonl").write_bytes(GOOD)
    code = (
        "import sys; from studio.data import check_rows\n"
        "for name in sys.argv[1:]:\n"
        "    rows, problems = check_rows(name)\n"
        "    print(len(rows), {row.source for row in rows}, *(str(p) for p in problems))"
    )
    names = ["hub:me/sums", "hub:me/sums:test", "hub:me/sums:none", "hub:me/other"]
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["5 {'me/sums'}", "1 {'me/sums'}"], done.stderr
    assert "cannot be read by datasets: Bad split: none" in lines[2] and "train" in lines[2]
    assert "Fetch it: hf download me/other --repo-type dataset" in lines[3]


# -------------------------------------------------------------------- bad input


def problems_of(path: Path, content: bytes) -> list[Problem]:
    path.write_bytes(content)
    return check_rows(path)[1]


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.jsonl", GOOD + b'{"prompt": "a", "completion": "b", "prompt": "c"}', 2, 'has the key "prompt" twice'),
        ("a.jsonl", GOOD + b'{"prompt": "a\0", "completion": "b"}', 2, "holds a NUL byte (byte 14 of the line)"),
        ("a.jsonl", GOOD + rb'{"prompt": "a\u0000", "completion": "b"}', 2, "holds a NUL character (character 2)"),
        ("a.jsonl", GOOD + rb'{"prompt": "a", "completion": "\ud83d"}', 2, "half of a surrogate pair (character 1)"),
        ("a.jsonl", GOOD + "ä".encode("latin-1"), 2, "(byte 1 of the line is 0xE4); if it is Windows text, convert it: "
         "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW_FILE"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), 1, "is UTF-16 text, expected UTF-8; convert it: iconv -f UTF-16"),
        ("a.csv", "prompt,completion\n".encode("utf-32"), 1, "is UTF-32 text"),
        ("a.json", b'[{"prompt": "a", "completion": "b"},\n{"prompt": "a", "prompt": "b"}]', 2, "twice in one object"),
        ("a.json", b'[{"prompt": "a", "completion": "b"},\n3]', 2, "is one JSON object, received the number 3"),
        ("a.json", b'[{"prompt": "a", "completion": "b"},\n{"prompt": }]', 2, "is not valid JSON: Expecting value"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}\n', 2, "expected a comma or ], received the end of the file"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}]\n[]', 2, "has more text after the end of its JSON value"),
        ("a.json", b'{"x":\n3}', 1, "is one JSON object without a list of rows"),
        ("a.json", b'[{"prompt": "\xe4"}]', 1, "(byte 14 of the file is 0xE4)"),
        ("a.json", b'{"a": [' + GOOD.strip() + b'],\n"b": []}', 2, "holds several lists: a, b"),
        ("a.json", b"[" * 100_000, 1, "is not valid JSON"),
        ("a.csv", b"prompt,completion\na,b\na\n", 3, "has 1 cells, the first line names 2 columns"),
        ("a.csv", b'prompt,completion\na,b\n"a\nb,c\n', 3, "a quote may be missing in the row that begins here"),
        ("a.csv", b"prompt,prompt\na,b\n", 1, "its first line names the columns; received 'prompt', 'prompt'"),
        ("a.csv", b"prompt,completion\n\xe4,b\na,b", 2, "(byte 1 of the line is 0xE4)"),
        ("a.txt", b"one\ntw\xf6", 2, "(byte 7 of the file is 0xF6)"),
        ("a.parquet", b"no parquet", None, "cannot be read as Parquet"),
        ("a.jsonl", gzip.compress(GOOD * 99, mtime=0)[:-20], None, "its compressed data are damaged or end early"),
        ("a.jsonl", zstandard.compress(GOOD * 99)[:-9] + b"x" * 9, None, "its compressed data are damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, line: int | None, said: str
) -> None:
    (problem,) = problems_of(tmp_path / name, content)
    assert (problem.file, problem.line) == (str(tmp_path / name), line)
    assert said in problem.message


@pytest.mark.parametrize(
    "text", ["prompt, completion\na,b\n", "prompt\tcompletion\na\tb\n", "prompt;completion\na;b\n"]
)
def test_names_of_columns_may_have_spaces_and_other_signs_between_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert len(read_rows(tmp_path / "a.csv", ("example",))) == 1


def test_a_table_that_begins_with_an_empty_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\nprompt,completion\na,b\n")
    ((problem,), _) = reversed(check_rows(tmp_path / "a.csv", ("example",)))
    assert problem.line == 1 and "received an empty line" in problem.message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_an_empty_file_of_any_kind_is_refused(tmp_path: Path, name: str) -> None:
    (problem,) = problems_of(tmp_path / name, b"")
    assert isinstance(problem, FileProblem) and "the file is empty" in problem.message


def test_rows_before_the_place_where_a_file_breaks_are_read_and_the_break_cannot_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "a", "completion": "b"}, {"prompt": "a",\n')
    rows, problems = check_rows(tmp_path / "a.json")
    assert len(rows) == 1 and isinstance(problems[0], FileProblem)


def test_a_row_of_a_hundred_megabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * 100_000_000 + b'", "completion": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(GOOD + long + GOOD)
    code = (
        "import resource, sys\n"
        "from studio.data import iter_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(*(getattr(found, 'message', 'good') for found in iter_rows(sys.argv[1])), sep='\\n')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jsonl"], capture_output=True, text=True)
    first, second, third, grown_mib = done.stdout.splitlines()
    assert (first, third) == ("good", "good"), done.stderr
    assert second.startswith("is longer than 16 MiB, the longest that a row may be")
    assert int(grown_mib) < 60


def test_rows_up_to_the_limit_are_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    frame = len('{"text": ""}')
    for size, good in ((LONGEST_ROW_BYTES, True), (LONGEST_ROW_BYTES + 1, False)):
        (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * (size - frame) + '"}')
        (found,) = iter_rows(tmp_path / "a.jsonl", ("text",))
        assert isinstance(found, PlainText) is good
        (tmp_path / "a.json").write_text('[{"text": "' + "x" * (size - frame) + '"}, {"text": "y"}]')
        rows, problems = check_rows(tmp_path / "a.json", ("text",))
        assert len(rows) == 1 + good and len(problems) == 1 - good


def test_long_values_in_tables_are_refused_by_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["a", "x" * (LONGEST_ROW_BYTES + 1), "b"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows, (problem,) = check_rows(tmp_path / "a.parquet", ("text",))
    assert len(rows) == 2 and str(problem).startswith("row 2: is longer than 16 MiB")
    (tmp_path / "a.txt").write_text(texts[1])
    (problem,) = problems_of(tmp_path / "a.txt", texts[1].encode())
    assert "is longer than 16 MiB" in problem.message


def test_progress_goes_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD.replace(b"4", b"4" * 1000) * 4_000)
    seen: list[tuple[int, int]] = []
    for _ in iter_rows(tmp_path / "a.jsonl", progress=lambda *done: seen.append(done)):
        pass
    size = (tmp_path / "a.jsonl").stat().st_size
    assert len(seen) >= size // PIECE_BYTES - 1 and seen == sorted(seen)
    assert all(total == size and done <= size for done, total in seen)


# -------------------------------------------------------------------- properties

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(rows=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 1]), piece=st.sampled_from([1, 3, 64]))
def test_a_json_list_gives_each_of_its_elements_whatever_the_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[Any], indent: int | None, piece: int
) -> None:
    import io

    from studio.data import json_text

    monkeypatch.setattr(json_text, "PIECE_BYTES", piece)
    text = json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8", errors="surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    found = list(json_text.elements(io.BytesIO(text)))
    assert [value for _, value in found] == rows
    if indent:
        starts = [text.decode().split("\n")[line - 1].strip()[:1] for line, _ in found]
        assert starts == [json.dumps(row, ensure_ascii=False)[:1] for row in rows]


PARTS = [GOOD, b"[", b"{}\n", b'{"a":', b"\xff", b"\0", b"\n", b",", b"]", b'"']


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200) | st.lists(st.sampled_from(PARTS)).map(b"".join),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.bin", "a.jsonl.gz"]),
)
def test_any_bytes_are_rows_or_problems_and_never_an_error(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    rows, problems = check_rows(tmp_path / name, ("example", "text"))
    assert rows or problems
    if name == "a.jsonl" and not any(isinstance(problem, FileProblem) for problem in problems):
        lines = [n for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        assert sorted({row.place.line for row in rows if row.place} | {p.line for p in problems if p.line}) == lines


@pytest.mark.parametrize(
    "row", [{"messages": TURNS}, {"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "x"}]}]
)
def test_a_file_of_one_conversation_is_one_row_and_no_list_of_texts(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row))
    assert [found.kind for found in read_rows(path, KINDS)] == ["example" if "messages" in row else "preference"]
    path.write_text(json.dumps(row, indent=1))
    rows, (problem,) = check_rows(path, KINDS)
    assert not rows and "is one row, whose" in problem.message and problem.line == 2
    path.write_text(json.dumps({"data": [row]}))
    assert len(read_rows(path, KINDS)) == 1


def test_kinds_have_names(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "list.json", "rows.csv", "rows.parquet"):
        WRITERS[name](tmp_path / name)
    names = ("rows.jsonl", "list.json", "rows.csv", "rows.parquet")
    assert [kind_of(tmp_path / name) for name in names] == ["json lines", "json", "csv", "parquet"]
