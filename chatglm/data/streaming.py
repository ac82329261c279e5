"""Owns the records of sets that are too big to be looked at first: read one behind the other.

A row is checked when its turn comes; the first rows of each entry are checked before anything is
trained (`RecordStream.head`). Does not know what is made of records.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

from chatglm.data.columns import build_columns
from chatglm.data.dialects import read_texts
from chatglm.data.files import (
    BadRows,
    Copies,
    RecordFiles,
    get_options,
    prepare_source,
    read_row,
)
from chatglm.data.kinds import open_file
from chatglm.data.records import Reader, Record, RowProblem
from chatglm.data.settings import DataSettings
from chatglm.data.sources import list_sources

# So many rows of each entry are looked at before the training.
HEAD_ROWS = 1000


class RecordStream:
    """The records of some files, in a new order of files each time.

    Args:
        paths: entries of data; weights and numbers of rows need a set that is looked at first.
        reader: makes records of a row.
        settings: say how files are read, and what happens to bad rows.

    Attributes:
        head: the first records of each entry; its report is what is told of the data.

    Raises:
        ValueError: as `RecordFiles`, for the first rows; for entries that cannot be streamed.
    """

    def __init__(self, paths: Sequence[Any], reader: Reader, settings: DataSettings) -> None:
        self.reader, self.options = reader, get_options(settings)
        self.columns = build_columns(settings)
        sources = list_sources(paths, wants_texts=reader is read_texts)
        for source in sources:
            if source.weight != 1 or source.max_samples:
                raise ValueError(
                    f"the data entry {source.path} has a weight or max_samples, which need a set "
                    "that is looked at first: leave streaming out"
                )
        self.inputs = [(source, path) for source in sources for path in source.files]
        head = dataclasses.replace(self.options, max_samples=HEAD_ROWS)
        self.head = RecordFiles(paths, reader, self.columns, options=head)
        self.head.report.warnings.append(
            f"streaming: only the first {HEAD_ROWS:,} rows of each entry were looked at, others "
            "are read when their turn comes"
        )

    def read(self, rng: random.Random) -> Iterator[Record]:
        """Yield every record once.

        Args:
            rng: of the order of the files.

        Raises:
            ValueError: for a file or a row that cannot be used, when its turn comes.
        """
        for source, path in rng.sample(self.inputs, len(self.inputs)):
            options, columns = prepare_source(self.options.files, self.columns, source)
            copies = Copies()  # until the file is over
            opened = open_file(path, options, copies.make_path)
            if opened.form is None:
                continue
            bad, good = BadRows(opened, self.head.report, self.options), 0
            for row in opened.form.scan(opened.plain, opened.start, str(path)):
                records = read_row(row, self.reader, columns)
                if isinstance(records, RowProblem):
                    bad.add(row, records)
                    if not self.options.skips:
                        bad.check(good)
                    continue
                good += 1
                for record in records:
                    yield record._replace(source=f"{path}:{row.line}")
            bad.check(good)


__all__ = ["RecordStream"]
