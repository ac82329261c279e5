"""Owns the rows of tables as text (csv, tsv) and of plain texts.

Both are read line by line, so that a row is known by where it stands. Bytes are UTF-8 without a
mark. Does not know what a row means.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from chatglm.data.records import RowProblem
from chatglm.data.rows import BytesProblem, FileProblem, Row, decode

SEPARATORS = (",", "\t", ";", "|")
# A cell may be as long as this; Python's own limit is 131,072 letters.
LONGEST_CELL = 1 << 24
csv.field_size_limit(LONGEST_CELL)
# A document is read in parts of so many bytes, so that none is held whole.
LONGEST_TEXT = 1 << 16
# These columns of a table hold a list, written as JSON, if they hold anything.
LISTS = ("history", "answers")


class Table:
    """Rows of cells, one a line but for line breaks in quotes.

    Args:
        separator: of cells.
        header: the columns' names; empty if the first line has them.
        lists: names of columns that hold lists.
    """

    def __init__(
        self, separator: str, header: Sequence[str] = (), lists: Sequence[str] = LISTS
    ) -> None:
        self.separator, self.header, self.lists = separator, list(header), set(lists)
        self.kind = {",": "csv", "\t": "tsv"}.get(separator, f"csv with {separator!r}")

    def scan(self, path: Path, start: int, name: str) -> Iterator[Row]:
        """Yield the rows of a file.

        Args:
            path: of plain UTF-8.
            start: bytes to leave out at its head.
            name: of the file, for messages.

        Raises:
            FileProblem: for a header that is none, or a quote that is never closed.
        """
        with path.open("rb") as file:
            lines = _Lines(file, start)
            if not self.header:
                self.header = self._read_header(name, lines)
            while True:
                offset, line = lines.offset, lines.number + 1
                try:
                    cells = next(csv.reader(lines, delimiter=self.separator, strict=True), None)
                    content: Any = cells and self._name(cells)
                except csv.Error as error:
                    if "unexpected end" in str(error) or "limit" in str(error):
                        words = "a quote is opened and never closed"
                        raise FileProblem(f"{name}:{line}: {words}") from error
                    content = RowProblem(f"no row of a table ({error})")
                except RowProblem as problem:
                    content = problem
                if content:
                    yield Row(offset, lines.offset - offset, line, content)
                elif lines.offset == offset:
                    return

    def parse(self, data: bytes) -> dict[str, Any]:
        """Return the columns of a row, of its bytes."""
        return self._name(next(csv.reader([decode(data)], delimiter=self.separator, strict=True)))

    def _read_header(self, file_name: str, lines: "_Lines") -> list[str]:
        try:
            cells = next(csv.reader(lines, delimiter=self.separator, strict=True), [])
        except (csv.Error, BytesProblem) as error:
            raise FileProblem(f"{file_name}:1: no header of a table: {error}") from error
        names = [cell.strip() for cell in cells]
        for name in names:
            if name and names.count(name) > 1:
                raise FileProblem(
                    f"{file_name}:1: two columns are called {name!r}; if the file has no header, "
                    "name its columns with header: [...]"
                )
        return names

    def _name(self, cells: list[str]) -> dict[str, Any]:
        if len(cells) != len(self.header):
            raise RowProblem(f"{len(cells)} cells where the header has {len(self.header)}")
        return {name: self._read_cell(name, cell) for name, cell in zip(self.header, cells) if name}

    def _read_cell(self, name: str, cell: str) -> Any:
        """Return a cell's text, None if it is empty, or its list where one can be meant."""
        if cell.startswith("[") and cell.rstrip().endswith("]"):
            try:
                items = json.loads(cell)
            except (ValueError, RecursionError):
                return cell
            if name in self.lists or _are_messages(items):
                return items
        return cell or None


def _are_messages(items: list[Any]) -> bool:
    forms = ({"role", "content"}, {"from", "value"})
    return bool(items) and all(
        isinstance(item, dict) and any(form <= set(item) for form in forms) for item in items
    )


class _Lines:
    """The lines of a file as csv's reader takes them, counted with their bytes."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        file.seek(start)
        self.file, self.offset, self.number = file, start, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        return decode(line)


def find_separator(line: str, suffix: str) -> str:
    """Return what separates the cells of a header: what there is most of.

    Args:
        line: the first one.
        suffix: of the file, which decides where nothing else does.
    """
    own = "\t" if suffix in (".tsv", ".tab") else ","
    candidates = sorted(SEPARATORS, key=lambda separator: separator != own)
    return max(candidates, key=lambda sign: len(next(csv.reader([line], delimiter=sign), [])))


class PlainText:
    """Texts, each a row with the column `text`.

    Args:
        sample_by: what is a row: "document" (the file, long ones in parts that end with a line),
            "paragraph" (what empty lines part) or "line".
    """

    kind = "text"

    def __init__(self, sample_by: str = "document") -> None:
        self.sample_by = sample_by

    def scan(self, path: Path, start: int, name: str) -> Iterator[Row]:
        """Yield the texts of a file; arguments as of `Table`."""
        text, offset, begin, first = b"", start, start, 1
        with path.open("rb") as file:
            file.seek(start)
            for number, piece in _read_pieces(file):
                if text and self._ends(text, piece):
                    yield self._make_row(text, begin, first)
                    text = b""
                if text or not piece.isspace():
                    begin, first = (begin, first) if text else (offset, number)
                    text += piece
                offset += len(piece)
        if text:
            yield self._make_row(text, begin, first)

    def _ends(self, text: bytes, piece: bytes) -> bool:
        """Whether a text is whole before a further piece."""
        is_apart = self.sample_by == "paragraph" and piece.isspace()
        return is_apart or self.sample_by == "line" or len(text) + len(piece) > LONGEST_TEXT

    def _make_row(self, text: bytes, begin: int, line: int) -> Row:
        try:
            content: Any = self.parse(text)
        except RowProblem as problem:
            content = problem
        return Row(begin, len(text), line, content)

    def parse(self, data: bytes) -> dict[str, Any]:
        """Return the text of a row, of its bytes.

        Raises:
            BytesProblem: if they are no UTF-8.
        """
        return {"text": decode(data).strip()}


def _read_pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers, very long ones in pieces that end with a character."""
    number, rest = 1, b""
    while piece := rest + file.readline(LONGEST_TEXT - len(rest)):
        rest = b""
        if len(piece) == LONGEST_TEXT and not piece.endswith(b"\n"):
            end = len(piece)
            while end > len(piece) - 4 and piece[end - 1] & 0xC0 == 0x80:
                end -= 1
            if piece[end - 1] >= 0xC0:
                end -= 1
            piece, rest = piece[:end], piece[end:]
        yield number, piece
        number += piece.endswith(b"\n")


__all__ = ["PlainText", "Table", "find_separator"]
