"""Owns JSON rows: one a line, or objects and arrays that are laid out in any other way.

Both kinds of files are read piece by piece, so that a row is known by where it stands. Bytes are
UTF-8 without a mark. Does not know what a row means.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from chatglm.data import encodings
from chatglm.data.records import RowProblem
from chatglm.data.rows import FileProblem, Row, decode

WINDOW = 1 << 20
# The key of the rows is looked for in so many letters.
HEAD = 1 << 16
# Names under which an object may hold the rows of a file.
WRAPPERS = ("data", "train", "rows", "examples", "instances", "items", "samples", "records")
# A value that breaks off has its fault so many signs before the end at most, in half an escape.
LONGEST_ESCAPE = 12
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile("[ \t\r\n]*")
_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's columns: of two with one name json would keep the last without a word."""
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise RowProblem(f"a key stands twice in one object: {name!r}")
    return columns


def _read_constant(name: str) -> None:
    """Read NaN, which tables write for an empty cell, as null; JSON has none of these."""
    if name != "NaN":
        raise RowProblem(f"a number that is none: {name}")


_LENIENT = json.JSONDecoder(parse_int=str)
DECODER = json.JSONDecoder(object_pairs_hook=_refuse_twice, parse_constant=_read_constant)


def parse_row(data: bytes) -> dict[str, Any]:
    """Return the columns of an object.

    Raises:
        RowProblem: if it is none, or holds what no text can.
    """
    text = decode(data)
    try:
        row = DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise name_fault(error, text) from error
    return check_row(row, text)


def check_row(row: Any, text: str) -> dict[str, Any]:
    """Return what was decoded, if it is a row.

    Raises:
        RowProblem: if it is no object, or half of a character stands in it.
    """
    if not isinstance(row, dict):
        raise RowProblem(f"no JSON object ({type(row).__name__})")
    if _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowProblem("half of a character (a surrogate without its pair)") from error
    return row


def name_fault(error: Exception, text: str) -> RowProblem:
    """Return in words why a text is no JSON."""
    if isinstance(error, RowProblem):
        return error
    if isinstance(error, RecursionError):
        return RowProblem("lists or objects in one another, too deep to be read")
    if not isinstance(error, json.JSONDecodeError):
        return RowProblem(f"no JSON object ({str(error)[:80]})")
    rest = text[error.pos :]
    words = error.msg
    if not rest.strip():
        words = "it breaks off"
    elif rest.startswith("'"):
        words = "single quotes, as Python writes them"
    elif rest.startswith(("//", "/*", "#")):
        words = "a comment, which JSON does not have"
    return RowProblem(f"no JSON object on a line of its own ({words})")


class JsonLines:
    """Rows of one line each; one that is bad does not hurt the next."""

    kind = "JSON lines"

    def scan(self, path: Path, start: int, name: str) -> Iterator[Row]:
        """Yield the rows of a file.

        Args:
            path: of plain UTF-8.
            start: bytes to leave out at its head.
            name: of the file, for messages.
        """
        offset = start
        with path.open("rb") as lines:
            lines.seek(start)
            for number, line in enumerate(lines, start=1):
                size = len(line)
                if not line.isspace():
                    try:
                        content: Any = parse_row(line)
                    except RowProblem as problem:
                        content = problem
                    yield Row(offset, size, number, content)
                offset += size

    def parse(self, data: bytes) -> dict[str, Any]:
        """Return the columns of a row, of its bytes."""
        return parse_row(data)


class JsonValues:
    """Objects in any layout: an array, arrays, one object after another, or a list under a key.

    What is no JSON ends the reading: where the next row would begin, nobody can say.

    Args:
        field: the key under which the rows of a file are; "" is any of `WRAPPERS`.
        kind: what the layout is called.
    """

    def __init__(self, field: str = "", kind: str = "JSON array") -> None:
        self.field, self.kind = field, kind

    def scan(self, path: Path, start: int, name: str) -> Iterator[Row]:
        """Yield the rows of a file; arguments as of `JsonLines`.

        Raises:
            FileProblem: for what is no JSON, with its line.
        """
        with path.open("rb") as file:
            file.seek(start)
            yield from _Scan(file, start, path, name).read_rows(self.field)

    def parse(self, data: bytes) -> dict[str, Any]:
        """Return the columns of a row, of its bytes."""
        return parse_row(data)


class _Scan:
    """A window that slides over a file of JSON."""

    def __init__(self, file: BinaryIO, start: int, plain: Path, name: str) -> None:
        self.file, self.plain, self.name = file, plain, name
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.place = "", 0
        self.offset, self.line = start, 1
        self.is_over = False

    def read_rows(self, field: str) -> Iterator[Row]:
        """Yield all rows, those of arrays and those that stand alone."""
        wrapped = self._find_wrapped(field)
        if wrapped is not None:
            yield from self._read_wrapped(wrapped, field)
        # Among objects that stand alone a list is no array of rows, but a row that is none.
        are_arrays = self.peek() == "["
        while sign := self.peek():
            if sign == "[" and are_arrays:
                yield from self._read_array()
            else:
                yield self._read_row()
            if self.peek() == ",":
                self.skip(1)

    def _read_array(self) -> Iterator[Row]:
        begin = self.line
        self.skip(1)
        while (sign := self.peek()) != "]":
            if not sign:
                raise self._fault(f"the array of line {begin} never ends: was the file cut off?")
            yield self._read_row()
            sign = self.peek()
            if sign == ",":
                self.skip(1)
            elif sign not in ("]", ""):
                raise self._fault(f"{sign!r} where a comma or ] was due")
        self.skip(1)

    def _read_row(self) -> Row:
        offset, line = self.offset, self.line
        try:
            value, text = self.take()
            content: Any = check_row(value, text)
        except RowProblem as problem:
            text, content = self._pass_over(), problem
        self.skip(len(text))
        return Row(offset, self.offset - offset, line, content)

    def take(self) -> tuple[Any, str]:
        """Return the value that begins here, and its text.

        Raises:
            FileProblem: if it is no JSON, or the file ends in it.
            RowProblem: if it is JSON, and no such value is read.
        """
        try:
            value, end = self._decode(DECODER)
        except RowProblem:
            raise
        except RecursionError as error:
            raise self._fault("lists or objects in one another, too deep to be read") from error
        except json.JSONDecodeError as error:
            raise self._fault_at(error) from error
        except ValueError as error:
            raise RowProblem(f"no JSON object ({str(error)[:80]})") from error
        return value, self.text[self.place : end]

    def _pass_over(self) -> str:
        """Return the text of a value that is JSON, but not such as is read."""
        try:
            _, end = self._decode(_LENIENT)
        except json.JSONDecodeError as error:
            raise self._fault_at(error) from error
        return self.text[self.place : end]

    def _decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """Return the value that begins here and where it ends; reads on where it goes on."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.place)
                if end < len(self.text) or not self.more():
                    return value, end
            except json.JSONDecodeError as error:
                is_near_end = error.pos > len(self.text) - LONGEST_ESCAPE
                is_open = is_near_end or error.msg.startswith("Unterminated")
                if not is_open or not self.more():
                    raise

    def _find_wrapped(self, field: str) -> int | None:
        """Return where the rows begin that an object has under a key; None if there are none.

        Raises:
            FileProblem: if they should be there.
        """
        is_object = self.peek() == "{"
        while len(self.text) < HEAD and self.more():
            continue
        names = (field,) if field else WRAPPERS
        found = find_list(self.text, self.place, names) if is_object else None
        if field and found is None:
            raise self._fault(f"no object that has a list of rows under {field!r}")
        return found

    def _read_wrapped(self, place: int, field: str) -> Iterator[Row]:
        """Yield the rows under a key, and pass over what stands behind them."""
        self.skip(place - self.place)
        yield from self._read_array()
        while self.peek() == ",":
            self.skip(1)
            self.peek()
            key, text = self.take()
            self.skip(len(text))
            self.peek()
            self.skip(1)
            self.peek()
            value, text = self.take()
            has_rows = isinstance(value, list) and any(isinstance(item, dict) for item in value)
            if has_rows and not field:
                raise self._fault(
                    f"a second list of rows under {key!r}: name the one that is meant, as an entry "
                    "{path: FILE, field: KEY}"
                )
            self.skip(len(text))
        self._expect("}")
        if self.peek():
            raise self._fault("more behind the object that holds the rows")

    def _expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise self._fault(f"{self.peek()!r} where {sign!r} was due: was the file cut off?")
        self.skip(1)

    def peek(self) -> str:
        """Return the next sign that is no white space, "" at the end."""
        while True:
            self.skip(_pass_space(self.text, self.place) - self.place)
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def skip(self, count: int) -> None:
        """Go on by some signs."""
        passed = self.text[self.place : self.place + count]
        self.offset += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        self.line += passed.count("\n")
        self.place += count

    def more(self) -> bool:
        """Read on; whether there was more."""
        if self.is_over:
            return False
        # As much again as is left, so that a value of many windows is not decoded as many times.
        data = self.file.read(max(WINDOW, len(self.text) - self.place))
        self.is_over = not data
        try:
            self.text = self.text[self.place :] + self.decode(data, final=self.is_over)
        except UnicodeDecodeError as error:
            raise encodings.refuse_bytes(self.name, self.plain, self.line) from error
        self.place = 0
        return bool(data)

    def _fault_at(self, error: json.JSONDecodeError) -> FileProblem:
        rest = self.text[error.pos :]
        if not rest.strip():
            return self._fault(
                f"the file ends inside of the row that begins on line {self.line}: was it cut off?"
            )
        line = self.line + self.text.count("\n", self.place, error.pos)
        reason = str(name_fault(error, self.text)).partition(" (")[2].rstrip(")")
        return FileProblem(f"{self.name}:{line}: no JSON: {reason}, at {rest[:30]!r}")

    def _fault(self, words: str) -> FileProblem:
        return FileProblem(f"{self.name}:{self.line}: {words}")


def find_list(text: str, place: int, names: Sequence[str]) -> int | None:
    """Return where the list of objects begins that an object has under one of some keys.

    Args:
        text: in which the object begins; what is beyond its end is not looked at.
        place: of the object's bracket.
        names: of the keys.

    Returns:
        The place of the list's bracket; None if there is no such list.
    """
    decoder = json.JSONDecoder()
    place = _pass_space(text, place + 1)
    try:
        while text[place : place + 1] == '"':
            key, place = decoder.raw_decode(text, place)
            place = _pass_space(text, place)
            if text[place : place + 1] != ":":
                return None
            place = _pass_space(text, place + 1)
            if key in names and _LIST_OF_OBJECTS.match(text, place):
                return place
            _, place = decoder.raw_decode(text, place)
            place = _pass_space(text, place)
            if text[place : place + 1] == ",":
                place = _pass_space(text, place + 1)
    except (ValueError, RecursionError):
        return None
    return None


def _pass_space(text: str, place: int) -> int:
    """Return the next place that is no white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place


__all__ = ["WRAPPERS", "JsonLines", "JsonValues", "find_list", "parse_row"]
