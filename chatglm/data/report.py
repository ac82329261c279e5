"""Owns what is told of data that were read: which files, how many rows, what was left out and why.

Does not know how files are read, and shows nothing itself.
"""

from dataclasses import dataclass, field

SHOWN = 3
# Reasons beyond so many are counted together: a run's report is read by people.
MOST_REASONS = 20
OTHER_REASONS = "other reasons"


@dataclass
class FileReport:
    """What was read of a file.

    Attributes:
        path: as it was named, or found in a folder.
        kind: as "JSON lines", "JSON array", "csv", "parquet", "text", "JSON lines, gzip".
        encoding: as "UTF-8", "UTF-8 with BOM", "gb18030"; "" where a kind has none.
        rows: that were kept.
        records: what they teach: a row of messages has one for each answer.
        skipped: rows that were left out because they are bad.
    """

    path: str
    kind: str
    encoding: str
    rows: int = 0
    records: int = 0
    skipped: int = 0


@dataclass
class DataReport:
    """What was read of some files, and what was not.

    Attributes:
        files: one by one, in the order they were read.
        kept: rows that are used, those too long not yet left out.
        skipped: how many bad rows were left out, by the reason.
        shown: the first of them of each reason, "file:line: reason".
        too_long: examples that were left out for their length.
        dialects: how many rows are of which form, by `Record.dialect`.
        warnings: what was read as it was asked for, and is odd: a file twice, say, or a file beside
            the data that is none.
    """

    files: list[FileReport] = field(default_factory=list)
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    too_long: int = 0
    dialects: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        """How many bad rows were left out."""
        return sum(self.skipped.values())

    def skip(self, source: str, reason: str) -> None:
        """Count a bad row that is left out; the first ones of a reason are shown too.

        Args:
            source: "file:line".
            reason: what is wrong with it.
        """
        name = name_reason(reason)
        if name not in self.skipped and len(self.skipped) >= MOST_REASONS:
            name = OTHER_REASONS
        self.skipped[name] = self.skipped.get(name, 0) + 1
        if self.skipped[name] <= SHOWN:
            self.shown.append(f"{source}: {reason}")

    def describe(self) -> list[str]:
        """Return the report as lines for people."""
        lines = [
            f"{file.path}: {file.kind}{', ' if file.encoding else ''}{file.encoding}, "
            f"{file.rows:,} rows, {file.records:,} examples" + _tell_skipped(file.skipped)
            for file in self.files
        ]
        forms = ", ".join(f"{name} ({count:,})" for name, count in self.dialects.items())
        lines += [f"rows are read as {forms}"] if forms else []
        lines += [f"{count:,} rows left out: {reason}" for reason, count in self.skipped.items()]
        lines += [f"  {shown}" for shown in self.shown]
        lines += [f"{self.too_long:,} examples left out: too long"] if self.too_long else []
        return lines + [f"warning: {warning}" for warning in self.warnings]


def _tell_skipped(count: int) -> str:
    return f", {count:,} left out" if count else ""


def name_reason(reason: str) -> str:
    """Return the part of a reason that rows share, without what a colon or a bracket adds."""
    return reason.partition(":")[0].partition(" (")[0].strip()[:100]


__all__ = ["DataReport", "FileReport", "name_reason"]
