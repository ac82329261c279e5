"""Owns the kinds of data files: told by what is in them first, by their names where that is open.

What is packed, in another encoding or in columns is copied to a plain file first, whose lines are
those of the original; a row is then known by where it stands in it. Does not know what a row means.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.data import copies, encodings
from chatglm.data.json_rows import (
    DECODER,
    WRAPPERS,
    JsonLines,
    JsonValues,
    find_list,
    parse_row,
)
from chatglm.data.records import RowProblem
from chatglm.data.rows import BytesProblem, FileProblem
from chatglm.data.table_rows import LISTS, PlainText, Table, find_separator

HEAD = 1 << 16
LINES = 20
# A file has a row on each line if more of its first lines are one.
MOSTLY = 2 / 3
# What people name as data by mistake, by its first bytes, and what they should do instead.
REFUSED = {
    b"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it with zstd -d, or pack it with gzip",
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or save it as csv (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an old Excel or Word file: save it as csv or text (UTF-8)",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
    b"rar!": "is a rar archive: unpack it",
    b"%pdf": "is a PDF file: save its text as .txt",
    b"\x89png": "is a picture",
    b"\xff\xd8\xff": "is a picture",
    b"sqlite format": "is a database: write its rows as JSON lines",
    b"version https://git-lfs": "is the pointer to a file and not the file: run git lfs pull",
    b"<!doctype": "is a web page: was a download refused?",
    b"<html": "is a web page: was a download refused?",
}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
TEXT_SUFFIXES = (".txt", ".text", ".md")
COLUMNAR_SUFFIXES = (".parquet", ".arrow", ".feather")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
KINDS = (
    "JSON lines, JSON arrays, csv, tsv, parquet, arrow and text, packed by gzip, bzip2 or xz too"
)


@dataclass(frozen=True)
class FileOptions:
    """How files are read, where they do not say it themselves.

    Attributes:
        encoding: of texts that are not UTF-8; "" for UTF-8.
        sample_by: what of a plain text is a row, as of `PlainText`.
        header: names of the columns of tables without a header.
        field: key of the list of rows in a JSON object, "" for the usual ones.
        lists: names of columns of tables that hold lists.
    """

    encoding: str = ""
    sample_by: str = "document"
    header: tuple[str, ...] = ()
    field: str = ""
    lists: tuple[str, ...] = LISTS


@dataclass
class OpenedFile:
    """A file whose rows can be read.

    Attributes:
        path: of the file that was named.
        plain: of what is read: itself, or its plain copy.
        start: bytes of a mark at the head.
        kind, encoding: as of `FileReport`.
        form: reads the rows; None of an empty file.
        note: what is odd about it, "" for nothing.
    """

    path: Path
    plain: Path
    start: int = 0
    kind: str = "empty"
    encoding: str = ""
    form: Any = None
    note: str = ""

    def read(self, offset: int, size: int) -> dict[str, Any]:
        """Return the columns of the row at a place."""
        # Opened each time: worker processes would share a place in an open file.
        with self.plain.open("rb") as file:
            file.seek(offset)
            return self.form.parse(file.read(size))


def open_file(path: Path, options: FileOptions, make_path: Callable[[], Path]) -> OpenedFile:
    """Return a file as its rows can be read.

    Args:
        path: of the file.
        options: for what it does not say itself.
        make_path: names a new file, for a plain copy.

    Raises:
        FileProblem: for a file that is not read, with its remedy.
    """
    opened = OpenedFile(path, path)
    head = _read_head(path)
    packing = copies.name_packing(head)
    if packing:
        opened.plain = make_path()
        copies.unpack(path, packing, opened.plain)
        head = _read_head(opened.plain)
    if columnar := copies.name_columnar(head):
        copy = make_path()
        copies.copy_columns(path, opened.plain, columnar, copy)
        opened.plain, opened.kind, opened.form = copy, columnar, JsonLines()
    else:
        refuse_strangers(path, head)
        _settle_encoding(opened, head, options.encoding, make_path)
        _settle_form(opened, options)
    opened.kind += f", {packing}" if packing else ""
    return opened


def find_suffix(path: Path) -> str:
    """Return a file's suffix in small letters, that of its packing left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((s for s in reversed(suffixes) if s not in PACKED_SUFFIXES), "")


def is_data(path: Path) -> bool:
    """Whether a file's name is that of rows; plain texts are not meant."""
    return find_suffix(path) in (*JSON_SUFFIXES, *TABLE_SUFFIXES, *COLUMNAR_SUFFIXES)


def is_text(path: Path) -> bool:
    """Whether a file's name is that of a plain text."""
    return find_suffix(path) in TEXT_SUFFIXES[:2]


def refuse_strangers(path: Path, head: bytes) -> None:
    """Refuse what is known to be no data file.

    Raises:
        FileProblem: naming what it is, and the remedy.
    """
    start = head.lstrip().lower()
    for magic, words in REFUSED.items():
        if start.startswith(magic.lower()):
            raise FileProblem(f"{path} {words}")
    if head[257:262] == b"ustar":
        raise FileProblem(f"{path} is a tar archive: unpack it and name the files in it")


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _settle_encoding(
    opened: OpenedFile, head: bytes, encoding: str, make_path: Callable[[], Path]
) -> None:
    """Find out how a text is encoded, and copy one that is not UTF-8.

    Raises:
        FileProblem: for an encoding that was not named.
    """
    mark, marked = encodings.find_mark(head)
    name = marked or encodings.check_name(encoding)
    if name in ("", "utf-8"):
        opened.start = len(mark)
        opened.encoding = "UTF-8 with BOM" if mark else "UTF-8"
        if not encodings.is_utf8(head) and not encodings.is_damaged_utf8(opened.plain):
            raise encodings.refuse_bytes(opened.path, opened.plain)
        return
    if not marked:
        encodings.check_other(head, name, opened.path)
    copy = make_path()
    encodings.copy_as_utf8(opened.path, opened.plain, copy, name)
    opened.plain, opened.encoding = copy, name


def _settle_form(opened: OpenedFile, options: FileOptions) -> None:
    """Find out how a text has its rows.

    Raises:
        FileProblem: if it has none that are known.
    """
    head = _read_lines(opened)
    if not head.strip():
        opened.note = f"{opened.path} is empty"
        return
    suffix = find_suffix(opened.path)
    opened.form = _choose_json(head, suffix, options)
    if opened.form is not None:
        if suffix not in (*JSON_SUFFIXES, ""):
            opened.note = f"{opened.path} holds JSON rows in spite of its name, and is read as such"
    elif suffix in TABLE_SUFFIXES:
        separator = find_separator(head.splitlines()[0].decode("utf-8", "replace"), suffix)
        opened.form = Table(separator, options.header, options.lists)
    elif suffix in TEXT_SUFFIXES:
        opened.form = PlainText(options.sample_by)
    else:
        raise _refuse_form(opened, head)
    opened.kind = opened.form.kind


def _refuse_form(opened: OpenedFile, head: bytes) -> FileProblem:
    begin = head.lstrip()[:30].decode("utf-8", "replace")
    return FileProblem(
        f"{opened.path}:1: no row begins with {begin!r}; what is read are {KINDS}, told by what is "
        "in a file and by a name as .jsonl, .csv or .txt"
    )


def _read_lines(opened: OpenedFile) -> bytes:
    """Return the head of a text from its first sign on, the first line of JSON whole."""
    with opened.plain.open("rb") as file:
        file.seek(opened.start)
        head = file.read(HEAD).lstrip()
        while not head and (piece := file.read(HEAD)):
            head = piece.lstrip()
        if head.startswith(b"{") and b"\n" not in head:
            head += file.readline()
    return head


def _choose_json(head: bytes, suffix: str, options: FileOptions) -> Any:
    """Return what reads JSON, line by line or value by value; None if a file holds none."""
    sign, is_open = head[:1], suffix not in (*TABLE_SUFFIXES, *TEXT_SUFFIXES)
    # The last line may be half of one.
    lines = [line for line in head.split(b"\n") if line.strip()]
    lines = (lines[:-1] if len(lines) > 1 and len(head) >= HEAD else lines)[:LINES]
    are_rows = [_is_row(line) for line in lines]
    text = head.decode("utf-8", "replace")
    share = sum(are_rows) / len(lines)
    is_lined = are_rows[0] or share > MOSTLY or (share >= 0.5 and not _is_value(text))
    is_wrapped = len(lines) == 1 and sign == b"{" and find_list(text, 0, WRAPPERS) is not None
    if is_lined and not options.field and not is_wrapped:
        return JsonLines()
    # Texts and cells may begin with a bracket: there it has to be the beginning of a row.
    if sign in (b"{", b"[") and (is_open or are_rows[0] or _is_value(text)):
        return JsonValues(options.field, "JSON array" if sign == b"[" else "JSON objects")
    return None


def _is_row(line: bytes) -> bool:
    """Whether a line is a JSON object; one that is refused for what is in it is one too."""
    try:
        parse_row(line)
    except RowProblem as problem:
        words = str(problem)
        return not (isinstance(problem, BytesProblem) or words.startswith(("no JSON", "lists")))
    return True


def _is_value(text: str) -> bool:
    """Whether a text begins with a JSON object, or with a list of them."""
    text = text[1:].lstrip() if text.startswith("[") else text
    try:
        value, _ = DECODER.raw_decode(text)
    except RowProblem:
        return True
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)


__all__ = ["FileOptions", "OpenedFile", "find_suffix", "is_data", "is_text", "open_file"]
