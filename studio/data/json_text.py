"""JSON read one row at a time, from text of any size: JSON Lines, and one list that fills a file.

    lines(file)      each line, at most LONGEST_ROW_BYTES of it in memory; longer ones come as a problem
    elements(file)   each element of the list in a JSON file, or of the one list in the object that it is
    decode(text)     one JSON object; two equal keys, of which JSON readers keep one in silence, are an error

A problem of one row is a `RowProblems`; what makes the rest of a file unreadable is a `Broken`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from studio.recipe_text import describe

LONGEST_ROW_BYTES = 16 * 2**20
"""A row may have this many bytes in its file: 16 MiB, more than a million tokens. Nothing longer is held in memory."""

PIECE_BYTES = 2**20
OF_ROWS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "tools")
"""Lists that a row has, so that an object with one of them is a row and no file of rows."""
BOM = codecs.BOM_UTF8
OTHER_BOMS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"} | {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
TOO_LONG = f"is longer than {LONGEST_ROW_BYTES // 2**20} MiB, the longest that a row may be; split it into several rows"


class RowProblems(Exception):
    """What is wrong with one row, as (field, message) pairs; whoever reads the file adds file and line."""

    def __init__(self, *problems: tuple[str, str]):
        self.problems = problems


class Broken(Exception):
    """Why a file cannot be read any further.

    Attributes:
        message: what was found and what to do.
        line: where, or None.
    """

    def __init__(self, message: str, line: int | None = None):
        self.message, self.line = message, line


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder()


def decode(text: bytes) -> dict[str, Any]:
    """The JSON object that the UTF-8 `text` is.

    Raises:
        RowProblems: it is none, or has a key twice.
    """
    try:
        return as_object(_DECODER.decode(text.decode("utf-8").strip()))
    except UnicodeDecodeError as error:
        raise RowProblems(("", not_utf8(error.object, error.start, "of the line"))) from None
    except json.JSONDecodeError as error:
        if (place := text.find(b"\0")) >= 0:
            raise RowProblems(("", f"holds a NUL byte (byte {place + 1} of the line); text has none")) from None
        raise RowProblems(("", f"is not valid JSON: {error.msg}, column {error.colno}")) from None
    except _DuplicateKeyError as error:
        raise RowProblems(("", twice(error))) from None
    except (ValueError, RecursionError) as error:
        raise RowProblems(("", f"is not valid JSON: {error}")) from None


def as_object(row: Any) -> dict[str, Any]:
    """The row, which must be an object."""
    if not isinstance(row, dict):
        raise RowProblems(("", f"each row is one JSON object, received {describe(row)}"))
    return row


def twice(key: object) -> str:
    return f'has the key "{key}" twice in one object; keep one of them'


def not_utf8(data: bytes, place: int, where: str, before: int = 0) -> str:
    """What is said of a byte that is no UTF-8, and how the file is converted."""
    return (
        f"is not UTF-8 text (byte {before + place + 1} {where} is 0x{data[place]:02X}); if it is Windows text, "
        "convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW_FILE"
    )


def without_bom(start: bytes) -> bytes:
    """The first bytes of a file without the mark of UTF-8.

    Raises:
        Broken: they are of another encoding.
    """
    for mark, name in OTHER_BOMS.items():
        if start.startswith(mark):
            raise Broken(f"is {name} text, expected UTF-8; convert it: iconv -f {name} -t UTF-8 FILE > NEW_FILE", 1)
    return start.removeprefix(BOM)


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(1-based number, line) of each line that is not blank; None for one that is too long.

    Raises:
        Broken: the file begins as text of another encoding.
    """
    number = 0
    while line := file.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = without_bom(line)
        if len(line) > LONGEST_ROW_BYTES and not line.endswith(b"\n"):
            _pass_over_line(file)
            yield number, None
        elif not line.isspace() and line:
            yield number, line


def _pass_over_line(file: BinaryIO) -> None:
    while (piece := file.readline(PIECE_BYTES)) and not piece.endswith(b"\n"):
        pass


def elements(file: BinaryIO) -> Iterator[tuple[int, Any | RowProblems]]:
    """(line that it begins at, value) of each element of the list that the JSON `file` is, or that its object holds.

    Raises:
        Broken: the text is not valid JSON from some place on, has no list or several, or an element is too long.
    """
    text = _Text(file)
    if text.peek() == "[":
        yield from _list(text)
    else:
        yield from _list_in_object(text)
    if text.peek():
        raise Broken("has more text after the end of its JSON value; JSON Lines has one object a line", text.line)


def _list_in_object(text: _Text) -> Iterator[tuple[int, Any | RowProblems]]:
    lists: list[str] = []
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if text.peek() == "[":
            if key in OF_ROWS:
                raise Broken(
                    f"is one row, whose {key} is a list; put [ ] around it, or write it as one line", text.line
                )
            lists.append(str(key))
            if len(lists) > 1:
                raise Broken(
                    f"holds several lists: {', '.join(lists)}; keep the one that is meant in a file of its own",
                    text.line,
                )
            yield from _list(text)
        else:
            text.value()
        if text.peek() == ",":
            text.take(",")
        elif text.peek() != "}":
            raise Broken(text.expected("a comma or }"), text.line)
    text.take("}")
    if not lists:
        raise Broken("is one JSON object without a list of rows; expected a list, or an object that holds one", 1)


def _list(text: _Text) -> Iterator[tuple[int, Any | RowProblems]]:
    text.take("[")
    while text.peek() != "]":
        line = text.line
        yield line, text.value()
        if text.peek() == ",":
            text.take(",")
        elif text.peek() != "]":
            raise Broken(text.expected("a comma or ]"), text.line)
    text.take("]")


class _Text:
    """JSON text in a window that moves on: values are parsed as soon as they are whole."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.window, self.at, self.line = "", 0, 1
        self.read_bytes, self.ended = 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.window):
                char = self.window[self.at]
                if char not in " \t\r\n":
                    return char
                self.line += char == "\n"
                self.at += 1
            if not self._more(PIECE_BYTES):
                return ""

    def take(self, char: str) -> None:
        if self.peek() != char:
            raise Broken(self.expected(char), self.line)
        self.at += 1

    def expected(self, what: str) -> str:
        received = repr(self.peek()) if self.peek() else "the end of the file"
        return f"is not valid JSON: expected {what}, received {received}"

    def value(self) -> Any | RowProblems:
        """The value that begins here; `RowProblems` for one that was passed over."""
        self.peek()
        while True:
            try:
                found, end = self._parse()
            except json.JSONDecodeError as error:
                if len(self.window) - self.at > LONGEST_ROW_BYTES:
                    raise Broken(f"the row that begins here is not valid JSON, or {TOO_LONG}", self.line) from None
                if not self._more(max(PIECE_BYTES, len(self.window) - self.at)):
                    line = self.line + self.window.count("\n", self.at, error.pos)
                    raise Broken(f"is not valid JSON: {error.msg}", line) from None
                continue
            except (ValueError, RecursionError) as error:
                raise Broken(f"is not valid JSON: {error}", self.line) from None
            if end == len(self.window) and not self.ended:  # a number may go on
                self._more(PIECE_BYTES)
                continue
            self.line += self.window.count("\n", self.at, end)
            long, self.at = end - self.at > LONGEST_ROW_BYTES, end
            return RowProblems(("", TOO_LONG)) if long else found

    def _parse(self) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self.window, self.at)
        except _DuplicateKeyError as error:
            _, end = _LENIENT.raw_decode(self.window, self.at)
            return RowProblems(("", twice(error))), end

    def _more(self, count: int) -> bool:
        if self.ended:
            return False
        piece = self.file.read(count)
        first, self.ended = self.read_bytes == 0, not piece
        pending = len(self.decoder.getstate()[0])
        try:
            text = self.decoder.decode(without_bom(piece) if first else piece, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.window.count("\n", self.at) + error.object[: error.start].count(b"\n")
            before = self.read_bytes - pending
            raise Broken(not_utf8(error.object, error.start, "of the file", before), line) from None
        self.read_bytes += len(piece)
        self.window, self.at = self.window[self.at :] + text, 0
        return not self.ended or bool(text)
