"""Rows of every dialect, changed in every way, in files of every layout: right, or refused by line.

A file holds six rows of a dialect, filled with texts of any kind; one of them is changed. What is
read must be what the texts say (each stands where the dialect has it, to the last character), and
what the row says where it was changed: read alone, by the standard library's JSON, it gives the
same records. Where it is refused, the message names the file and the row's line, and with
`bad_rows: skip` the other five rows are read as before.
"""

import copy
import gzip
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.endurance.campaign import Campaign, Case, Finding
from benchmarks.endurance.folders import scratch
from benchmarks.endurance.mutations import mutate_json
from chatglm.data.dialects import read_answers, read_pairs, read_prompts, read_texts
from chatglm.data.files import ReadingOptions, RecordFiles
from chatglm.data.kinds import FileOptions
from chatglm.data.records import Columns, Record, RowProblem
from chatglm.data.registry import DIALECTS

READERS: dict[str, Any] = {
    "answers": read_answers,
    "pairs": read_pairs,
    "prompts": read_prompts,
    "texts": read_texts,
}
AIMS = [(dialect, aim) for dialect in DIALECTS for aim in sorted(dialect.aims)]
ROWS = 6
SIGNS = (
    "abc XYZ 019 你好，世界。！ éß ありがと 🙂𠮷 \u2028\u00a0 \\ / \" ' {}[]:, \n\t\r # // %s &lt;"
)
LAYOUTS = ("lines", "array", "lined array", "pretty array", "pretty objects", "under a key")
WRITTEN = ("utf-8", "utf-8-sig", "utf-16", "gb18030", "gzip")


class Filled(NamedTuple):
    """A row with texts of its own, and the records that it means."""

    row: dict[str, Any]
    records: list[Record]


class Written(NamedTuple):
    """A file, and how it is read.

    Attributes:
        path: of the file.
        lines: that each row begins on.
        options: that its encoding needs.
    """

    path: Path
    lines: list[int]
    options: FileOptions


def draw_text(rng: random.Random) -> str:
    """Return a text of any signs; no white space at its ends, which some forms take away."""
    inner = "".join(rng.choice(SIGNS) for _ in range(rng.randrange(40)))
    return f"t{rng.randrange(10**9)}{inner}{rng.choice('.。x')}"


def fill(example: dict[str, Any], aim: str, rng: random.Random) -> Filled:
    """Return a dialect's example with other texts, and what is to be read of it."""
    records = list(READERS[aim](copy.deepcopy(example), Columns()))
    pieces = {piece for record in records for text in list_texts(record) for piece in cut(text)}
    drawn = {piece: draw_text(rng) for piece in sorted(pieces, key=len, reverse=True)}
    marks = {piece: f"\0{number}\0" for number, piece in enumerate(drawn)}

    def put(text: str) -> str:
        """Put the drawn texts in, by marks, so that none is put into another one."""
        for piece, mark in marks.items():
            text = text.replace(piece, mark)
        for piece, mark in marks.items():
            text = text.replace(mark, drawn[piece])
        return text

    filled = [change_record(record, put) for record in records]
    return Filled(change_leaves(example, put), filled)


def list_texts(record: Record) -> list[str]:
    """Return all texts of a record."""
    rounds = [text for pair in record.history for text in pair]
    return [*rounds, record.query, record.answer, record.rejected, record.system]


def cut(text: str) -> list[str]:
    """Return the parts of a text, of which each may have a column of its own."""
    return [piece for piece in text.split("\n") if piece]


def change_leaves(value: Any, put: Callable[[str], str]) -> Any:
    """Return a row with its texts changed."""
    if isinstance(value, dict):
        return {key: change_leaves(item, put) for key, item in value.items()}
    if isinstance(value, list):
        return [change_leaves(item, put) for item in value]
    return put(value) if isinstance(value, str) else value


def change_record(record: Record, put: Callable[[str], str]) -> Record:
    """Return a record with its texts changed."""
    history = [(put(query), put(answer)) for query, answer in record.history]
    names = ("query", "answer", "rejected", "system")
    return record._replace(history=history, **{n: put(getattr(record, n)) for n in names})


def write_rows(rows: Sequence[Any], path: Path, layout: str, rng: random.Random) -> Written:
    """Write rows in a layout, in an encoding."""
    is_ascii = rng.random() < 0.3
    indent = rng.choice((1, 4)) if layout.startswith("pretty") else None
    dumped = [json.dumps(row, ensure_ascii=is_ascii, indent=indent) for row in rows]
    opening, between, closing = {
        "lines": ("", rng.choice(("\n", "\r\n", "\n\n")), "\n"),
        "array": ("[", ", ", "]"),
        "under a key": ('{"version": 1,\n"data": [', ",\n", "]}"),
        "pretty objects": ("", "\n", ""),
    }.get(layout, ("[\n", ",\n", "\n]\n"))
    lines, text = [], opening
    for piece in dumped:
        lines.append(1 + text.count("\n"))
        text += piece + between
    text = text.removesuffix(between) + closing
    encoding = rng.choice(WRITTEN)
    data = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    path.write_bytes(data)
    told = "gb18030" if encoding == "gb18030" and not text.isascii() else ""
    return Written(path, lines, FileOptions(encoding=told))


def read(written: Written, aim: str, skips: bool) -> RecordFiles | ValueError:
    """Return what a file gives, or the refusal."""
    options = ReadingOptions(skips, max_bad_share=1.0, files=written.options)
    try:
        return RecordFiles([str(written.path)], READERS[aim], options=options)
    except ValueError as error:
        return error


def read_alone(row: Any, aim: str) -> list[Record]:
    """Return the records of a row; none if it is refused."""
    try:
        return list(READERS[aim](row, Columns())) if isinstance(row, dict) else []
    except RowProblem:
        return []


def judge(
    found: RecordFiles | ValueError, written: Written, expected: list[list[Record]], skips: bool
) -> str:
    """Return how a reading ended.

    Args:
        found: the records, or the refusal.
        written: the file.
        expected: the records of each row; none of one that is to be refused.
        skips: whether bad rows are left out.

    Raises:
        Finding: if it is another ending than was due.
    """
    bad = [f"{written.path}:{line}" for line, made in zip(written.lines, expected) if not made]
    if isinstance(found, ValueError):
        if not bad or skips or not str(found).startswith(f"{bad[0]}: "):
            raise Finding(f"refused with {str(found)[:300]!r}; due were {bad}")
        return "refused"
    if bad and not skips:
        raise Finding(f"read without a word; due was a refusal of {bad}")
    told = [shown.partition(": ")[0] for shown in found.report.shown]
    if told != bad or found.num_skipped != len(bad):
        raise Finding(f"left out {told}, and {found.num_skipped} rows; due were {bad}")
    due = [
        record._replace(source=f"{written.path}:{line}")
        for line, made in zip(written.lines, expected)
        for record in made
    ]
    if list(found) != due:
        pairs = itertools.zip_longest(found, due)
        seen, wanted = next((a, b) for a, b in pairs if a != b)
        raise Finding(f"read {seen!r}; due was {wanted!r}")
    return "left out and told" if bad else "right"


def try_values(rows: list[Filled], aim: str, path: Path, rng: random.Random) -> str:
    """Change a value or a key of a row, or nothing, in any layout."""
    place = rng.randrange(1, ROWS)
    changed: list[Any] = [filled.row for filled in rows]
    expected = [filled.records for filled in rows]
    if rng.random() < 0.7:
        changed[place] = mutate_json(changed[place], rng)
        expected[place] = read_alone(changed[place], aim)
    layout, skips = rng.choice(LAYOUTS), rng.random() < 0.5
    written = write_rows(changed, path, layout, rng)
    return judge(read(written, aim, skips), written, expected, skips)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with some taken out, put in or changed."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, odd = (
            rng.randrange(len(data) + 1),
            rng.choice((b"", b"\0", b'"', b"}", b"{", b"\xff")),
        )
        odd = odd or bytes([rng.randrange(256)])
        data = data[:place] + rng.choice((b"", odd)) + data[place + rng.randrange(2) :]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data


def parse_alone(line: bytes) -> Any:
    """Return what the standard library reads from a line; None if it is no row."""

    def refuse(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=refuse)
        json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except (ValueError, RecursionError):
        return None


def try_bytes(rows: list[Filled], aim: str, path: Path, rng: random.Random) -> str:
    """Damage the bytes of a row that has a line of its own."""
    lines = [json.dumps(filled.row, ensure_ascii=False).encode() for filled in rows]
    place = rng.randrange(ROWS)
    lines[place] = damage(lines[place], rng)
    path.write_bytes(b"\n".join(lines) + b"\n")
    parts = path.read_bytes().removesuffix(b"\n").split(b"\n")
    numbers = [number for number, part in enumerate(parts, start=1) if part.strip()]
    kept = [part for part in parts if part.strip()]
    expected = [read_alone(parse_alone(part), aim) for part in kept]
    skips = rng.random() < 0.5
    found = read(Written(path, numbers, FileOptions()), aim, skips)
    if isinstance(found, ValueError) and "no UTF-8" in str(found):
        # Few of the file's characters are healthy: the file is refused, and not the row.
        odd = next(n for n, part in zip(numbers, kept) if parse_alone(part) is None)
        if f"{path}:" not in str(found) or not odd >= 1:
            raise Finding(f"refused with {str(found)[:300]!r}")
        return "refused"
    return judge(found, Written(path, numbers, FileOptions()), expected, skips)


def try_arrays(rows: list[Filled], aim: str, path: Path, rng: random.Random) -> str:
    """Damage an array, or a packed file, anywhere."""
    if rng.random() < 0.3:
        text = "".join(json.dumps(filled.row) + "\n" for filled in rows)
        path.write_bytes(damage(gzip.compress(text.encode()), rng))
        whole: list[Any] | None = [filled.row for filled in rows]
    else:
        indent = rng.choice((None, 1))
        text = json.dumps([f.row for f in rows], ensure_ascii=False, indent=indent)
        path.write_bytes(damage(text.encode(), rng))
        whole = parse_alone(path.read_bytes())
    found = read(Written(path, [], FileOptions()), aim, skips=True)
    if isinstance(found, ValueError):
        if str(path) not in str(found) or "bad_rows" in str(found):
            raise Finding(f"refused with {str(found)[:300]!r}")
        return "refused"
    given = whole if isinstance(whole, list) else []
    due = [record for row in given for record in read_alone(row, aim)]
    seen = [record._replace(source="") for record in found]
    # A comma too many, and arrays that end early and begin anew, are read by us alone.
    if whole is not None and seen != due:
        raise Finding(f"read {seen!r:.300}; due was {due!r:.300}")
    known = [record for filled in rows for record in filled.records]
    if whole is None and sum(record not in known for record in seen) > len(rows):
        raise Finding(f"read {seen!r:.300} from what is no JSON: {path.read_bytes()!r:.600}")
    return "right"


def prepare() -> Case:
    """Name the file."""
    path = scratch() / "rows.jsonl"

    def case(rng: random.Random) -> str:
        dialect, aim = rng.choice(AIMS)
        rows = [fill(dialect.example, aim, rng) for _ in range(ROWS)]
        kind = rng.choice((try_values, try_values, try_bytes, try_arrays))
        try:
            return kind(rows, aim, path, rng)
        except Finding as finding:
            words = f"{dialect.name} as {aim}, {kind.__name__}: {finding}"
            raise Finding(words.replace(str(path.parent), "")) from finding

    return case


CAMPAIGN = Campaign("data_rows", "Changed rows of every dialect", "rows", 10_000, 1, prepare)
