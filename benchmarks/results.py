"""Owns `benchmarks/results.csv`: one row a figure, appended by every run, never changed.

A row says what was measured, when, on which commit and machine, the median and the spread over the
rounds, and how many times as good as a baseline it was in the same rounds.
"""

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workers import QUIET_LOAD, Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.csv"
DIGITS = 5  # that a figure keeps
# Of a processor, as the system calls them.
FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
)


class Row(NamedTuple):
    """A figure.

    Attributes:
        date: of the run, UTC.
        commit: checked out at the time, with + if files differed from it.
        bench: the module that measured.
        contender: what was measured.
        case: what it did.
        size: tokens of the prompt or context, rows of a product, or milliseconds; 0 for none.
        batch: rows at once.
        layers: blocks of the model; 0 where there is none.
        value, p20, p80: the figure, and its spread over the rounds.
        unit: of them.
        ratio, ratio_p20, ratio_p80: how many times as fast as the baseline, paired by round.
        baseline: what the ratio is to; empty for none.
        rounds: that were kept.
        load: processors that other programs used during the rounds; None if not observed.
        cpu, threads, versions: what it ran on.
        features: of the processor, which its name may not tell; empty in the rows of old runs.
    """

    date: str
    commit: str
    bench: str
    contender: str
    case: str
    size: int
    batch: int
    layers: int
    value: float
    unit: str
    p20: float
    p80: float
    ratio: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    baseline: str
    rounds: int
    load: float | None
    cpu: str
    threads: int
    versions: str
    features: str = ""

    @property
    def machine(self) -> tuple[str, str, int]:
        """What figures must share to stand in one table: processor, its features, threads."""
        return self.cpu, self.features, self.threads


class Case(NamedTuple):
    """What a figure is of; see `Row`."""

    contender: str
    name: str
    versions: str
    size: int = 0
    batch: int = 1
    rounds: int = 1
    load: float | None = None


class Recorder:
    """Makes the rows of one run, prints them, and appends them to the file at the end.

    Args:
        bench: name of the module that measures.
        layers: of its model.
        threads: of its contenders.
        path: the file; None to print only.
    """

    def __init__(self, bench: str, layers: int, threads: int, path: Path | None) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        self.head = (now.strftime("%Y-%m-%dT%H:%MZ"), read_commit(), bench)
        self.layers, self.threads, self.path = layers, threads, path
        self.cpu, self.features = name_cpu(), list_features()

    def add(
        self,
        case: Case,
        figures: Spread,
        unit: str,
        ratio: Spread | None = None,
        baseline: str = "",
        is_point: bool = False,
    ) -> None:
        """Record a figure at once, so that a run that is stopped keeps what it has.

        Args:
            case: what it is of.
            figures: of the rounds.
            unit: of them.
            ratio: how many times as good as the baseline.
            baseline: its contender.
            is_point: whether it is one of a curve, which is not printed.
        """
        date, commit, bench = self.head
        row = Row(
            date=date,
            commit=commit,
            bench=bench,
            contender=case.contender,
            case=case.name,
            size=case.size,
            batch=case.batch,
            layers=self.layers,
            value=_round(figures.median),
            unit=unit,
            p20=_round(figures.p20),
            p80=_round(figures.p80),
            ratio=None if ratio is None else _round(ratio.median),
            ratio_p20=None if ratio is None else _round(ratio.p20),
            ratio_p80=None if ratio is None else _round(ratio.p80),
            baseline=baseline,
            rounds=case.rounds,
            load=None if case.load is None else round(case.load, 2),
            cpu=self.cpu,
            threads=self.threads,
            versions=case.versions,
            features=self.features,
        )
        if not is_point:
            print(describe_row(row), flush=True)
        if self.path is not None:
            append_rows(self.path, [row])


def describe_row(row: Row) -> str:
    """Return a line for people."""
    size = f" {row.size}" if row.size else ""
    rows = f" x {row.batch}" if row.batch > 1 else ""
    ratio = "" if row.ratio is None else f", {row.ratio:.2f} x {row.baseline}"
    spread = f"{row.value:g} {row.unit} ({row.p20:g} to {row.p80:g}){ratio}"
    load = f" (others used {row.load:g} processors)" if row.load and row.load > QUIET_LOAD else ""
    return f"{row.contender}: {row.case}{size}{rows}: {spread}{load}"


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows, with a head if the file is new."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(Row._fields)
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a file.

    Raises:
        ValueError: if it has other columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    if tuple(head) != Row._fields:
        raise ValueError(f"{path} has the columns {head}, and not {list(Row._fields)}")
    return [_parse(dict(zip(head, line))) for line in lines]


def _parse(cells: dict[str, str]) -> Row:
    values: dict[str, Any] = dict(cells)
    for name in ("size", "batch", "layers", "rounds", "threads"):
        values[name] = int(cells[name])
    for name in ("value", "p20", "p80", "ratio", "ratio_p20", "ratio_p80", "load"):
        values[name] = float(cells[name]) if cells[name] else None
    return Row(**values)


def name_cpu() -> str:
    """Return what the system calls its processor, with how many there are."""
    name = _read_cpu_fields().get("model name")
    return f"{os.cpu_count()} x {name or platform.processor() or 'unknown'}"


def list_features() -> str:
    """Return family and model of the processor, and what it can that products are fast by."""
    fields = _read_cpu_fields()
    if "flags" not in fields:
        return ""
    flags = fields["flags"].split()
    here = " ".join(name for name in FEATURES if name in flags)
    return f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}: {here}"


def _read_cpu_fields() -> dict[str, str]:
    """Return what the system says of its first processor; nothing where there is no /proc."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_commit(checkout: Path = ROOT) -> str:
    """Return the short name of the commit, with + if tracked files differ; "" outside git."""
    try:
        name = _run_git(checkout, "rev-parse", "--short", "HEAD")
        changed = _run_git(checkout, "status", "--porcelain", "--untracked-files=no")
        return name + ("+" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def _run_git(checkout: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", *words]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()
