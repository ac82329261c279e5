"""Owns the records of data files: which rows are kept, which are left out, and access to each.

Rows are not held in memory: what is kept of a record is where its row stands. Does not know kinds
of files (`kinds`), what entries name (`sources`) nor what a row means (`dialects`).
"""

import copy
import dataclasses
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.data import encodings, sampling
from chatglm.data.columns import build_columns, check_named, read_roles
from chatglm.data.dialects import read_texts
from chatglm.data.kinds import FileOptions, OpenedFile, open_file
from chatglm.data.records import ColumnProblem, Columns, Reader, Record, RowProblem
from chatglm.data.report import DataReport, FileReport
from chatglm.data.rows import BytesProblem, FileProblem, Row
from chatglm.data.settings import HELD_OUT, DataSettings
from chatglm.data.sources import Source, list_sources
from chatglm.data.table_rows import PlainText, Table

# So many bad rows are no sign of a wrong file, unless they are most of its rows.
FEW_BAD_ROWS = 3
# So many rows behind a bad one are looked at, to tell a bad row from a file of another form.
ROWS_AHEAD = 20
# What is kept of a record: file, place and size of its row, its line, which of its records it is.
FIELDS = 5


@dataclass(frozen=True)
class ReadingOptions:
    """How files are read, and how much may be wrong with them.

    Attributes:
        skips: whether bad rows are counted and left out.
        max_bad_share: of the rows of a file, and of all.
        max_long_share: of the examples, that may be left out for their length.
        max_samples: rows of each entry; 0 is all.
        files: what files do not say themselves.
    """

    skips: bool = False
    max_bad_share: float = 0.1
    max_long_share: float = 1.0
    max_samples: int = 0
    files: FileOptions = dataclasses.field(default_factory=FileOptions)


class Copies:
    """A folder of plain copies, made when it is needed and gone when nobody holds it any more."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.count = 0

    def make_path(self) -> Path:
        """Return the path of a new copy."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="chatglm-data-"))
            weakref.finalize(self, _remove, self.folder, os.getpid())
        self.count += 1
        return self.folder / str(self.count)


def _remove(folder: Path, owner: int) -> None:
    # A process that was forked off holds the same object, and is not to take the files away.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class RecordFiles(Sequence[Record]):
    """The records of some files, read from the disk whenever they are asked for.

    Every row is read once at first, so that a bad one is reported before anything is trained.

    Args:
        paths: entries as of `sources`: files, folders, globs, mappings.
        reader: makes records of a row.
        columns: what is told of rows.
        skips: whether bad rows are counted and left out.
        options: how files are read; None for the defaults with `skips`.

    Attributes:
        report: what was read, and what was left out.

    Raises:
        ValueError: for files that are not there or cannot be read, a bad row (with file, line and
            reason) unless they are skipped, too many of them, or no usable row at all.
    """

    def __init__(
        self,
        paths: Sequence[Any],
        reader: Reader,
        columns: Columns | None = None,
        skips: bool = False,
        options: ReadingOptions | None = None,
    ) -> None:
        self.options = options or ReadingOptions(skips)
        self.reader, self.skips = reader, self.options.skips
        self.sources = list_sources(paths, wants_texts=reader is read_texts)
        self.report = DataReport()
        self.opened: list[OpenedFile] = []
        self._columns: list[Columns] = []
        self._copies = Copies()
        self._places = array("Q")
        self._chosen: array[int] | None = None
        self._source_of: list[int] = []
        for number, source in enumerate(self.sources):
            self._read_source(number, source, columns or Columns())
        self._check_all()

    @property
    def files(self) -> list[Path]:
        """The files, in the order they were read."""
        return [opened.path for opened in self.opened]

    @property
    def problems(self) -> list[str]:
        """The first rows that were left out, with the reason."""
        return self.report.shown

    @property
    def num_skipped(self) -> int:
        """How many bad rows were left out."""
        return self.report.num_skipped

    def __len__(self) -> int:
        return len(self._places) // FIELDS if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        """Return a record, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = index % len(self)
        start = FIELDS * (number if self._chosen is None else self._chosen[number])
        file, offset, size, line, item = self._places[start : start + FIELDS]
        opened = self.opened[file]
        records = list(self.reader(opened.read(offset, size), self._columns[file]))
        return records[item]._replace(source=f"{opened.path}:{line}")

    def select(self, chosen: Any) -> "RecordFiles":
        """Return some of the records, by their numbers, which may stand in it more than once."""
        view = copy.copy(self)
        view.report = copy.deepcopy(self.report)
        view._chosen = array("Q")
        view._chosen.frombytes(chosen.astype("uint64").tobytes())
        view.report.kept = sampling.count_rows(self._places, view._chosen)
        return view

    def list_rows(self) -> sampling.Rows:
        """Return which records are of one row, and which rows of one entry."""
        return sampling.find_rows(self._places, self._source_of)

    def _read_source(self, number: int, source: Source, columns: Columns) -> None:
        self.report.warnings += source.warnings
        options, own = prepare_source(self.options.files, columns, source)
        left = source.max_samples or self.options.max_samples or -1
        keys: set[str] = set()
        for path in source.files:
            opened = open_file(path, options, self._copies.make_path)
            if isinstance(opened.form, PlainText) and self.reader is not read_texts:
                raise FileProblem(
                    f"{path} is a plain text, from which only the stage pretrain learns: give rows "
                    "with questions and answers"
                )
            self.opened.append(opened)
            self._columns.append(own)
            self._source_of.append(number)
            self.report.warnings += [opened.note] if opened.note else []
            tally = FileReport(str(path), opened.kind, opened.encoding)
            self.report.files.append(tally)
            if opened.form is not None:
                self._scan(opened, own, tally, left, keys)
            left -= tally.rows if left > 0 else 0
            if left == 0:
                return
        check_named(own, keys)

    def _scan(
        self,
        opened: OpenedFile,
        columns: Columns,
        tally: FileReport,
        limit: int,
        keys: set[str],
    ) -> None:
        """Read every row of a file; note where records stand, and the columns if some are named."""
        file, note = len(self.opened) - 1, self._places.extend
        dialects = self.report.dialects
        bad = BadRows(opened, self.report, self.options)
        for row in opened.form.scan(opened.plain, opened.start, str(opened.path)):
            if tally.rows == limit or bad.is_sure:
                break
            if columns.named and isinstance(row.content, dict):
                keys.update(row.content)
            records = read_row(row, self.reader, columns)
            if isinstance(records, RowProblem):
                bad.add(row, records)
                continue
            bad.pass_one()
            tally.rows += 1
            tally.records += len(records)
            name = records[0].dialect
            dialects[name] = dialects.get(name, 0) + 1
            for item in range(len(records)):
                note((file, row.offset, row.size, row.line, item))
        self.report.kept += tally.rows
        tally.skipped = bad.count
        bad.check(tally.rows)

    def _check_all(self) -> None:
        """Refuse too many bad rows, and none that is good; tell files that are read twice."""
        if not len(self):
            raise ValueError(f"there is no usable row in {', '.join(map(str, self.files))}")
        seen: set[Path] = set()
        for path in self.files:
            if path.resolve() in seen:
                self.report.warnings.append(f"{path} is named twice: its rows are read twice")
            seen.add(path.resolve())
        bad, good = self.num_skipped, self.report.kept
        if is_too_much(bad, bad + good, self.options.max_bad_share):
            raise ValueError(
                f"{bad} of {bad + good} rows cannot be used, which is more than max_bad_share "
                f"({self.options.max_bad_share:g}): {'; '.join(self.problems)}"
            )


class BadRows:
    """The bad rows of a file, and what is to be said of them.

    Args:
        opened: the file.
        report: that is written to.
        options: say how many there may be.

    Attributes:
        count: of bad rows.
        is_sure: whether enough was seen to say what is wrong.
    """

    def __init__(self, opened: OpenedFile, report: DataReport, options: ReadingOptions) -> None:
        self.opened, self.report, self.options = opened, report, options
        self.count = self.ahead = 0
        self.first: list[tuple[str, str]] = []
        self.is_misnamed = self.is_damaged = False

    @property
    def is_sure(self) -> bool:
        return bool(self.count) and not self.options.skips and self.ahead >= ROWS_AHEAD

    def add(self, row: Row, problem: RowProblem) -> None:
        """Count a bad row.

        Raises:
            FileProblem: if it is the file that is wrong.
        """
        if isinstance(problem, BytesProblem) and not self.is_damaged:
            self.is_damaged = encodings.is_damaged_utf8(self.opened.plain)
            if not self.is_damaged:
                raise encodings.refuse_bytes(self.opened.path, self.opened.plain, row.line)
        source = f"{self.opened.path}:{row.line}"
        self.ahead += bool(self.count)
        self.count += 1
        self.is_misnamed |= isinstance(problem, ColumnProblem)
        if self.options.skips:
            self.report.skip(source, str(problem))
        if len(self.first) < FEW_BAD_ROWS:
            self.first.append((source, str(problem)))

    def pass_one(self) -> None:
        """Count a good row."""
        self.ahead += bool(self.count)

    def check(self, num_good: int) -> None:
        """Refuse bad rows, or more of them than may be left out.

        Args:
            num_good: rows of the file that are good, as far as it was read.

        Raises:
            FileProblem: naming the first ones, and the remedy.
        """
        total = self.count + num_good
        if not self.count or not (
            not self.options.skips or is_too_much(self.count, total, self.options.max_bad_share)
        ):
            return
        (source, reason), *others = self.first
        # What is wrong with several rows alike is said once.
        told = [place if words == reason else f"{place}: {words}" for place, words in others]
        seen = f"; {self.count} of {total} rows cannot be used, also {'; '.join(told)}"
        raise FileProblem(f"{source}: {reason}{seen if told else ''}; {self._name_remedy(total)}")

    def _name_remedy(self, total: int) -> str:
        form = self.opened.form
        told = f" (its columns: {', '.join(form.header)})" if isinstance(form, Table) else ""
        if self.is_misnamed:
            return "name the column as the file has it"
        if 2 * self.count > total:
            return f"the file has another form{told} than is known: docs/training.md has them all"
        if self.options.skips:
            share = f"max_bad_share ({self.options.max_bad_share:g})"
            return f"that is more than {share}: mend the rows, or raise it"
        return "mend the row, or leave such rows out with bad_rows: skip"


def is_too_much(count: int, total: int, share: float) -> bool:
    """Whether so many bad rows of so many are more than may be left out."""
    is_few = count <= FEW_BAD_ROWS and 2 * count <= total
    return count > share * total and not is_few


def read_row(row: Row, reader: Reader, columns: Columns) -> list[Record] | RowProblem:
    """Return the records of a row, or what is wrong with it."""
    if isinstance(row.content, RowProblem):
        return row.content
    try:
        return list(reader(row.content, columns)) or RowProblem("no answer")
    except RowProblem as problem:
        return problem


def prepare_source(
    options: FileOptions, columns: Columns, source: Source
) -> tuple[FileOptions, Columns]:
    """Return how the files of a source are read: its own keys go before those of all.

    Raises:
        ValueError: for columns that cannot be named.
    """
    told = dataclasses.replace(columns, **read_roles(source.columns))
    own = {
        name: getattr(source, name)
        for name in ("encoding", "field", "header", "sample_by")
        if getattr(source, name)
    }
    lists = (*options.lists, told.history) if told.history else options.lists
    return dataclasses.replace(options, lists=lists, **own), told


def open_records(paths: Sequence[Any], reader: Reader, settings: DataSettings) -> RecordFiles:
    """Return the records of some files as a stage's settings say.

    Args:
        paths: entries of data: `settings.train_data`, `settings.held_out_data` or others.
        reader: makes records of a row.
        settings: say what the columns are called, what happens to bad rows, and what is held out.

    Raises:
        ValueError: as `RecordFiles`.
    """
    is_held_out = list(paths) == [HELD_OUT]
    is_train = list(paths) == settings.train_data
    entries = settings.train_data if is_held_out else paths
    records = RecordFiles(entries, reader, build_columns(settings), options=get_options(settings))
    ratio = settings.val_ratio if is_held_out or is_train else 0.0
    if is_train and settings.eval_data:
        records.report.warnings += _find_shared(records, settings.eval_data)
    weights = [1.0 if is_held_out else source.weight for source in records.sources]
    if not ratio and set(weights) == {1.0}:
        return records
    rows = records.list_rows()
    return records.select(
        sampling.choose_records(rows, weights, ratio, is_held_out, settings.split_seed)
    )


def _find_shared(records: RecordFiles, entries: Sequence[Any]) -> list[str]:
    """Return a warning for each file that is trained on and held out."""
    held_out = {path.resolve() for source in list_sources(entries, True) for path in source.files}
    return [
        f"{path} is in train_data and in eval_data: what is held out is learned too"
        for path in records.files
        if path.resolve() in held_out
    ]


def get_options(settings: DataSettings) -> ReadingOptions:
    """Return how settings have files read."""
    return ReadingOptions(
        settings.bad_rows == "skip",
        settings.max_bad_share,
        settings.max_long_share,
        settings.max_samples,
        FileOptions(settings.encoding, settings.sample_by, tuple(settings.header)),
    )


__all__ = ["ReadingOptions", "RecordFiles", "open_records"]
