"""From a path to raw rows: JSON Lines, JSON, CSV, TSV, Parquet, Arrow directories, folders of text, the hub's cache.

    raw_rows(path) ─▶ Raw(file, line, values) …     one row, or one record batch, in memory at a time

Text may be compressed with gzip or zstd, which its first bytes say. A row that cannot be read is a `RowProblems` in the
place of its values; a `Broken` ends a file, and with it the reading.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from adapters.fingerprint import file_sha256
from studio.data.json_text import (
    LONGEST_ROW_BYTES,
    OF_ROWS,
    PIECE_BYTES,
    TOO_LONG,
    Broken,
    RowProblems,
    as_object,
    decode,
    elements,
    lines,
    not_utf8,
    without_bom,
)

HUB = "hub:"
COMPRESSED = (".gz", ".zst")
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}
TEXTS = (".txt", ".md")
JSON = (".jsonl", ".json", ".ndjson")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
FOLDERS = (
    "an Arrow directory (datasets' save_to_disk), or a folder of one kind of .jsonl, .json, .parquet, .csv, .tsv, .txt"
)

Progress = Callable[[int, int], None]
"""(done, total): bytes of the files, compressed as they are; rows where there are no bytes to count."""


class Raw(NamedTuple):
    """A row as its file has it.

    Attributes:
        line: 1-based line that it begins at, or row, as `counted` says.
        values: column → value, or why there is none.
    """

    file: str
    line: int
    values: dict[str, Any] | RowProblems
    counted: str = "line"


def is_hub(path: Path | str) -> bool:
    """Whether `path` is "hub:org/name" or "hub:org/name:split"."""
    return str(path).startswith(HUB)


def source_name(path: Path | str) -> str:
    """What the rows of a file are called where they name no source: the file's name without its endings."""
    if is_hub(path):
        return str(path).removeprefix(HUB).split(":")[0]
    path = Path(path)
    return Path(_uncompressed(path)).stem if path.suffix in COMPRESSED else path.stem


def data_sha256(path: Path) -> str:
    """Of a data file; of a folder that of its files' names and hashes; of a hub data set that of its fetched version.

    Raises:
        OSError, Broken: it cannot be read.
    """
    if is_hub(path):
        from studio.data.tables import fetched

        return hashlib.sha256(f"{path} {fetched(str(path)).name}".encode()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if files == [path]:
        return file_sha256(path)
    facts = [f"{file.relative_to(path)} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def kind_of(path: Path) -> str:
    """ "json lines", "json", "csv", "tsv", "parquet", "text", "arrow", "folder of …" or "hub".

    Raises:
        OSError, Broken: it is not there, or a folder of nothing that is read.
    """
    if is_hub(path):
        return "hub"
    if path.is_dir():
        return "arrow" if (path / "state.json").is_file() else f"folder of {_folder(path)[0]}"
    name = _uncompressed(path)
    suffix = Path(name).suffix.lower()
    if suffix in TEXTS:
        return "text"
    return TABLES.get(suffix) or _json_kind(path, suffix)


def raw_rows(path: Path | str, progress: Progress | None = None) -> Iterator[Raw]:
    """Every row at `path`, in order.

    Raises:
        OSError: it cannot be read.
        Broken: from here on it cannot be read.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "hub":
        from studio.data.tables import hub_rows

        yield from hub_rows(str(path), progress)
    elif kind == "arrow":
        from studio.data.tables import arrow_rows

        yield from arrow_rows(path, progress)
    elif kind.startswith("folder"):
        yield from _of_folder(_folder(path)[1], progress)
    else:
        yield from _of_file(path, kind, progress)


def _of_folder(files: Sequence[Path], progress: Progress | None) -> Iterator[Raw]:
    total, before = sum(file.stat().st_size for file in files), 0
    for file in files:
        yield from _of_file(file, kind_of(file), _shifted(progress, before, total))
        before += file.stat().st_size
        if progress:
            progress(before, total)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return (lambda done, _: progress(before + done, total)) if progress else None


def _of_file(path: Path, kind: str, progress: Progress | None) -> Iterator[Raw]:
    if kind == "parquet":
        from studio.data.tables import parquet_rows

        yield from parquet_rows(path, progress)
        return
    readers = {"json": _json_rows, "json lines": _json_line_rows, "text": _text_row}
    with path.open("rb") as file:
        text = _Watched(file, path.stat().st_size, progress)
        rows = readers[kind](text.opened, str(path)) if kind in readers else _csv_rows(text.opened, str(path), kind)
        try:
            for row in rows:
                yield row
                text.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
            raise Broken(f"its compressed data are damaged or end early: {error}") from None


class _Watched:
    """A file as text bytes, decompressed where its first bytes say so, and how far it has been read."""

    def __init__(self, file: BinaryIO, size_bytes: int, progress: Progress | None):
        self.file, self.size_bytes, self.progress, self.said = file, size_bytes, progress, 0
        start = file.read(4)
        file.seek(0)
        self.opened: BinaryIO = file
        if start.startswith(GZIP):
            self.opened = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif start.startswith(ZSTD):
            import zstandard

            whole = cast(Any, _WithEnd(file))
            reader = zstandard.ZstdDecompressor().stream_reader(whole, read_across_frames=True)
            self.opened = cast(BinaryIO, io.BufferedReader(cast(Any, reader), PIECE_BYTES))

    def tell(self) -> None:
        if self.progress and self.file.tell() - self.said >= PIECE_BYTES:
            self.said = self.file.tell()
            self.progress(self.said, self.size_bytes)


class _WithEnd:
    """A zstd file with bytes after it that are passed over as a frame, or break off a frame that has not ended.

    The library ends in silence where a file was cut, and the rows of the rest would be missing. What follows here is a
    frame to be skipped (RFC 8878, 3.1.2), longer than a block, of bytes that no block can begin with.
    """

    END = b"\x50\x2a\x4d\x18" + (2**18).to_bytes(4, "little") + b"\xff" * 2**18

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, self.END

    def read(self, size: int) -> bytes:
        if data := self.file.read(size):
            return data
        data, self.left = self.left[:size], self.left[size:]
        return data


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _uncompressed(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix.lower() in COMPRESSED else path.name


# -------------------------------------------------------------------- which kind


def _json_kind(path: Path, suffix: str) -> str:
    """JSON in a .json file may be one value or lines, and one list is a list whatever the file is called."""
    with path.open("rb") as file:
        opened = _Watched(file, 0, None).opened
        with suppress(EOFError, OSError, zlib.error, _zstd_error()):  # said when the rows are read
            start = opened.read(PIECE_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
            if start.startswith(b"["):
                return "json"
            if start and suffix == ".json" and not _one_object_a_line(start):
                return "json"
    return "json lines"


def _one_object_a_line(start: bytes) -> bool:
    first, _, rest = start.partition(b"\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(rest.strip() or not _holds_a_list(value))


def _holds_a_list(value: dict[str, Any]) -> bool:
    """Whether an object holds rows, and is not one itself."""
    lists = [name for name, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return bool(lists) and not any(name in OF_ROWS for name in lists)


def _folder(path: Path) -> tuple[str, list[Path]]:
    """(kind, files in order of their names) of a folder: data files of one kind, or text where there are none."""
    if (path / "dataset_dict.json").is_file():
        splits = [entry.name for entry in sorted(path.iterdir()) if (entry / "state.json").is_file()]
        raise Broken(f"holds several data sets: {', '.join(splits)}; name one of them, as {path.name}/{splits[0]}")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        suffix = Path(_uncompressed(file)).suffix.lower()
        if file.is_file() and not hidden and suffix in (*JSON, *TABLES, *TEXTS):
            found.setdefault("text" if suffix in TEXTS else suffix, []).append(file)
    data = [suffix for suffix in found if suffix != "text"]
    if len(data) > 1:
        raise Broken(f"holds files of several kinds: {', '.join(data)}; name one file, or keep one kind in the folder")
    if not found:
        raise Broken(f"is a folder without data; expected {FOLDERS}")
    if data:
        _check_one_split([file.relative_to(path) for file in found[data[0]]])
    kind = data[0] if data else "text"
    return kind, found[kind]


SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./0-9]|$)")


def _check_one_split(files: Sequence[Path]) -> None:
    """Refuses a folder as hubs have them, with the rows to be tested on beside those to be trained on."""
    splits = {match.group(1) for file in files if (match := SPLIT.search(file.as_posix().lower()))}
    if "train" in splits and len(splits) > 1:
        listed = ", ".join(sorted(splits))
        raise Broken(
            f"holds several splits by the names of its files: {listed}; name one file, or keep one split in it"
        )


# -------------------------------------------------------------------- text


def _json_line_rows(file: BinaryIO, name: str) -> Iterator[Raw]:
    for number, line in lines(file):
        try:
            if line is None:
                raise RowProblems(("", TOO_LONG))
            yield Raw(name, number, decode(line))
        except RowProblems as problems:
            yield Raw(name, number, problems)


def _json_rows(file: BinaryIO, name: str) -> Iterator[Raw]:
    for place, value, counted in _placed(elements(file)):
        try:
            yield Raw(name, place, value if isinstance(value, RowProblems) else as_object(value), counted)
        except RowProblems as problems:
            yield Raw(name, place, problems, counted)


def _placed(found: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any, str]]:
    """(place, value, what the place counts) of a list's elements: rows where the second stands on the first one's line,
    as in a file that is one line; else lines.
    """
    first = list(islice(found, 1))
    failed: Exception | None = None
    try:
        first += islice(found, 1)
    except Exception as error:  # whatever ends the file after its first row: that row comes before
        failed = error
    by_row = len(first) == 2 and first[0][0] == first[1][0]
    for number, (line, value) in enumerate(chain(first, found), 1):
        yield (number, value, "row") if by_row else (line, value, "line")
    if failed:
        raise failed


def _text_row(file: BinaryIO, name: str) -> Iterator[Raw]:
    """A file of text is one row."""
    data = file.read(LONGEST_ROW_BYTES + 1)
    if len(data) > LONGEST_ROW_BYTES:
        yield Raw(name, 1, RowProblems(("", TOO_LONG)))
        return
    try:
        yield Raw(name, 1, {"text": without_bom(data).decode("utf-8")})
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        yield Raw(name, line, RowProblems(("", not_utf8(error.object, error.start, "of the file"))))


def _csv_rows(file: BinaryIO, name: str, kind: str) -> Iterator[Raw]:
    csv.field_size_limit(LONGEST_ROW_BYTES)
    feed = _CsvLines(file)
    first = next(feed, "")
    delimiter = _delimiter(first, kind)
    try:
        names = [cell.strip() for row in csv.reader([first], delimiter=delimiter) for cell in row]
    except csv.Error as error:
        raise Broken(f"its first line names the columns; it is not valid {kind.upper()}: {error}", 1) from None
    if first and (len(set(names)) < len(names) or not all(names) or not names):
        listed = ", ".join(map(repr, names[:8])) or "an empty line"
        raise Broken(f"its first line names the columns; received {listed}", 1)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        line = feed.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            said = f"is not valid {kind.upper()}: {error}; a quote may be missing in the row that begins here"
            raise Broken(said, line) from None
        if not cells:
            continue
        problems, feed.problems = feed.problems, []
        if not problems and len(cells) != len(names):
            problems = [("", f"has {len(cells)} cells, the first line names {len(names)} columns")]
        yield Raw(name, line, RowProblems(*problems) if problems else dict(zip(names, cells, strict=True)))


def _delimiter(first: str, kind: str) -> str:
    """What parts the cells, by the first line: files called .csv have semicolons or tabs where there is no comma."""
    if kind == "tsv":
        return "\t"
    return next((sign for sign in ",;\t" if sign in first), ",")


class _CsvLines:
    """Decoded lines for csv.reader, and what is wrong with those of the row that is being read."""

    def __init__(self, file: BinaryIO):
        self.file, self.number = file, 0
        self.problems: list[tuple[str, str]] = []

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = without_bom(line)
        if len(line) > LONGEST_ROW_BYTES:
            raise Broken(TOO_LONG, self.number)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problems.append(("", not_utf8(line, error.start, "of the line")))
            return line.decode("utf-8", errors="replace")
