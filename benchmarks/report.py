"""Writes docs/benchmarks.md and its plots from benchmarks/results.csv, and from nothing else.

    python -m benchmarks.report [--check]

The newest figure of each thing on each machine is shown, a disturbed one only where there is no
other; the file keeps them all. The tables
go between the markers of the page, whose own text stays as it is. `--check` only says whether page
and plots are what the file gives.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.aims import format_aims
from benchmarks.plots import draw_panels
from benchmarks.results import RESULTS, Row, read_rows
from benchmarks.workers import QUIET_LOAD

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = "benchmarks.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
FULL_LAYERS = 28
NO_ROWS = "No run is recorded yet."
# The heads of columns by unit, in their order; the first of a row's carries its ratios.
UNITS = (
    "tokens/s",
    "ms/token",
    "ms/step",
    "steps of one row",
    "of its products",
    "s",
    "later prompts",
    "imports alone",
    "GB",
    "GB beyond weights and cache",
    "equal first tokens",
    "equal answers",
    "ms",
    "GB/token",
    "GB/s",
    "of the probe",
    "GOP/s",
    "error",
)


class Section(NamedTuple):
    """A table of the page.

    Attributes:
        title: its head.
        command: repeats all of it; with fewer sizes or cases named, a line of it.
        size: what the sizes of its rows are called.
        takes: whether a row belongs to it.
    """

    title: str
    command: str
    size: str
    takes: Callable[[Row], bool]


def _is_generate(*cases: str, many: bool = False) -> Callable[[Row], bool]:
    """Return a test for the cases that begin so, one row at a time or several."""
    return lambda row: (
        row.bench == "bench_generate"
        and row.layers == FULL_LAYERS
        and (row.batch > 1) == many
        and row.case.startswith(cases)
    )


PEERS = "--chatglm-cpp PYTHON --fastllm PYTHON"
GENERATE = "python -m benchmarks.bench_generate"
SECTIONS = (
    Section(
        "Reading a prompt",
        f"{GENERATE} --only prefill --prompts 64 512 1984 {PEERS}",
        "tokens",
        _is_generate("prefill"),
    ),
    Section(
        "A token behind a context",
        f"{GENERATE} --only decode --contexts 64 512 2000 8192 {PEERS}",
        "context",
        _is_generate("decode"),
    ),
    Section(
        "Many rows at once",
        f"{GENERATE} --only rows {PEERS}",
        "context",
        lambda row: _is_generate("rows")(row) or _is_generate("rows", many=True)(row),
    ),
    Section(
        "Beside busy programs",
        f"{GENERATE} --only company {PEERS}",
        "context",
        _is_generate("beside"),
    ),
    Section(
        "Drafts from the prompt",
        f"{GENERATE} --only lookup",
        "prompt",
        _is_generate("lookup"),
    ),
    Section(
        "Batches",
        f"{GENERATE} --only batch --batches 8 32",
        "tokens",
        _is_generate("prefill", "decode", many=True),
    ),
    Section(
        "A token beyond the kernels",
        f"{GENERATE} --only overhead",
        "context",
        _is_generate("overhead"),
    ),
    Section(
        "Start and memory",
        f"{GENERATE} --only first start memory",
        "tokens",
        _is_generate("first", "start", "imports", "peak memory"),
    ),
    Section(
        "The model of this repository",
        f"{GENERATE} --only own",
        "tokens",
        _is_generate("own model"),
    ),
    Section(
        "Which peers answer as the original does",
        f"python -m benchmarks.check_peers {PEERS}",
        "prompt",
        lambda row: row.bench == "check_peers",
    ),
    Section(
        "Training",
        "python -m benchmarks.bench_train",
        "tokens",
        lambda row: row.bench == "bench_train",
    ),
    Section(
        "Roll-outs",
        "python -m benchmarks.bench_rollouts",
        "answers",
        lambda row: row.bench == "bench_rollouts",
    ),
    Section(
        "Single products",
        "python -m benchmarks.bench_kernels --shapes 4096x12288 4096x130528",
        "rows",
        lambda row: row.bench == "bench_kernels",
    ),
    Section(
        "Tokenizer",
        "python -m benchmarks.bench_tokenizer --vocabulary FILE",
        "pieces of the vocabulary",
        lambda row: row.bench == "bench_tokenizer",
    ),
)


def is_disturbed(row: Row) -> bool:
    """Tell whether other programs took a noticeable part of the processors."""
    return row.load is not None and row.load > QUIET_LOAD


def keep_newest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each thing that was measured, in the order of first appearance.

    A disturbed row takes the place of disturbed ones only. A curve's points belong together: those
    of another run than the one whose curve is kept are dropped.
    """
    newest: dict[tuple[object, ...], Row] = {}
    curves: dict[tuple[object, ...], Row] = {}
    for row in rows:
        machine = (*row.machine, row.layers)
        place = (row.bench, row.contender, row.case, row.size, row.batch, row.unit, row.baseline)
        _keep(newest, (*machine, *place), row)
        if row.case == "memory over time":
            _keep(curves, (*machine, row.contender), row)
    return [
        row
        for row in newest.values()
        if row.case != "memory over time"
        or row.date == curves[(*row.machine, row.layers, row.contender)].date
    ]


def _keep(kept: dict[tuple[object, ...], Row], place: tuple[object, ...], row: Row) -> None:
    if place not in kept or is_disturbed(kept[place]) or not is_disturbed(row):
        kept[place] = row


def list_machines(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Return the processors, features and threads of the rows, the latest run's first."""
    machines = {row.machine: None for row in sorted(rows, key=lambda row: row.date)}
    return list(reversed(machines))


def format_number(value: float) -> str:
    """Return a figure with three digits that count."""
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3
    return f"{value:,.{max(digits, 0)}f}"


def format_figure(row: Row) -> str:
    """Return a figure and, where it spreads, from where to where."""
    text = format_number(row.value)
    if row.p20 == row.p80:
        return text
    return f"{text} ({format_number(row.p20)} to {format_number(row.p80)})"


def format_ratios(rows: Iterable[Row]) -> str:
    """Return the ratios of one figure to its baselines."""
    return "; ".join(
        f"{format_number(row.ratio)} x {row.baseline}" for row in rows if row.ratio is not None
    )


def format_table(section: Section, rows: Sequence[Row]) -> str:
    """Return a section's table: a line for each contender, case and size."""
    lines: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for row in rows:
        place = (row.case, row.size, row.batch, row.contender)
        lines.setdefault(place, {}).setdefault(row.unit, []).append(row)
    units = [unit for unit in UNITS if any(unit in line for line in lines.values())]
    has_batches = any(row.batch > 1 for row in rows)
    has_ratios = any(row.ratio is not None for row in rows)
    head = ["case", section.size, *(["batch"] * has_batches), "contender", *units]
    head += ["times as fast as"] * has_ratios
    table = [head, ["---"] * len(head)]
    for (case, size, batch, contender), figures in lines.items():
        cells = [str(case), str(size or ""), *([str(batch)] * has_batches), str(contender)]
        cells += [format_figure(figures[unit][0]) if unit in figures else "" for unit in units]
        ratios = format_ratios(row for same in figures.values() for row in same)
        table.append([*cells, *([ratios] * has_ratios)])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def describe_runs(rows: Sequence[Row]) -> str:
    """Return where a table's figures come from."""
    runs = sorted({(row.date, row.commit) for row in rows})
    versions = sorted({row.versions for row in rows if row.versions})
    measured = ", ".join(f"{date} at {commit or 'no commit'}" for date, commit in runs)
    load = max((row.load for row in rows if row.load is not None), default=0.0)
    warning = f" Disturbed: other programs used up to {load:g} processors." * (load > QUIET_LOAD)
    return f"Measured {measured}; {'; '.join(versions)}.{warning}"


def format_results(rows: Sequence[Row]) -> str:
    """Return the generated part of the page."""
    rows, parts = keep_newest(rows), []
    for machine in list_machines(rows):
        here = [row for row in rows if row.machine == machine]
        tables = [(s, [row for row in here if s.takes(row)]) for s in SECTIONS]
        if not any(found for _, found in tables):
            continue
        cpu, features, threads = machine
        parts += [
            f"## {cpu}, threads: {threads}",
            *([f"Processor: {features}."] if features else []),
        ]
        if aims := format_aims(here):
            parts += ["### Aims, and what was got", aims]
        for section, found in tables:
            if found:
                parts += [f"### {section.title}", format_table(section, found)]
                parts += [f"`{section.command}`", describe_runs(found)]
    return "\n\n".join(parts or [NO_ROWS])


# The plots


def draw_contexts(rows: Sequence[Row]) -> str | None:
    """Return the time of a token against its context, a panel for each contender."""
    takes = _is_generate("decode")
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if takes(row) and row.unit == "ms/token":
            lines.setdefault(row.contender, {})[float(row.size)] = row.value
    points = {name: sorted(line.items()) for name, line in lines.items()}
    return draw_panels(("tokens of context", "ms per token"), points) if points else None


def draw_memory(rows: Sequence[Row]) -> str | None:
    """Return the memory of a chat's process over time."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.case == "memory over time" and row.layers == FULL_LAYERS:
            lines.setdefault(row.contender, []).append((row.size / 1000, row.value))
    points = {name: sorted(line) for name, line in lines.items()}
    return draw_panels(("seconds", "GB resident"), points) if points else None


def draw_rows(rows: Sequence[Row]) -> str | None:
    """Return the price of a step of many rows, in steps of one, a panel for each contender."""
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if (row.case, row.unit, row.layers) == ("rows", "steps of one row", FULL_LAYERS):
            lines.setdefault(row.contender, {})[float(row.batch)] = row.value
    points = {name: sorted(line.items()) for name, line in lines.items()}
    return draw_panels(("rows at once", "steps of one row"), points) if points else None


def draw_roofline(rows: Sequence[Row]) -> str | None:
    """Return operations a second against operations a byte, under what the memory allows.

    A panel for each back end, and the fastest product and the bandwidth as a roof over all.
    """
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row.bench == "bench_kernels":
            cells.setdefault((row.contender, row.case, row.size), {})[row.unit] = row.value
    dots: dict[str, list[tuple[float, float]]] = {}
    limits, best = [], 0.0
    for (name, _, _), cell in cells.items():
        if {"GOP/s", "GB/s", "of the probe"} <= cell.keys():
            dots.setdefault(name, []).append((cell["GOP/s"] / cell["GB/s"], cell["GOP/s"]))
            limits.append(cell["GB/s"] / cell["of the probe"])
            best = max(best, cell["GOP/s"])
    if not dots:
        return None
    limit = sorted(limits)[len(limits) // 2]
    places = [x for points in dots.values() for x, _ in points]
    roof = [(x, min(limit * x, best)) for x in sorted({min(places), best / limit, max(places)})]
    labels = (f"operations per byte; dashed: what {limit:.0f} GB/s allow", "GOP/s")
    return draw_panels(labels, dots, roof, is_log=True, has_lines=False)


PLOTS: Mapping[str, tuple[str, Callable[[Sequence[Row]], str | None]]] = {
    "bench_context.svg": ("Time of a token against its context", draw_contexts),
    "bench_rows.svg": ("Price of a step of many rows", draw_rows),
    "bench_memory.svg": ("Memory of a chat over time", draw_memory),
    "bench_roofline.svg": ("Roofline of the matrix products", draw_roofline),
}


def draw_plots(rows: Sequence[Row]) -> dict[str, str]:
    """Return the plots of the latest machine that there are figures for, by file name."""
    rows = keep_newest(rows)
    plots = {}
    for name, (_, draw) in PLOTS.items():
        for machine in list_machines(rows):
            here = [row for row in rows if row.machine == machine]
            if plot := draw(here):
                plots[name] = plot
                break
    return plots


def build_files(rows: Sequence[Row], page: str) -> dict[str, str]:
    """Return the page and its plots as the rows give them, by file name.

    Raises:
        ValueError: if the page has not one of each marker, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{PAGE} needs one line {BEGIN} and, below it, one line {END}")
    plots = draw_plots(rows)
    pictures = [f"![{PLOTS[name][0]}]({name})" for name in plots]
    generated = "\n\n".join([*pictures, format_results(rows)])
    return {PAGE: f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}", **plots}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or say which are not what the results give."""
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    args = parser.parse_args(argv)
    try:
        page = (args.docs / PAGE).read_text(encoding="utf-8")
        files = build_files(read_rows(args.results), page)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    stale = [name for name, text in files.items() if _read(args.docs / name) != text]
    if args.check:
        print("\n".join(f"{name} is not what the results give" for name in stale), end="")
        return 1 if stale else 0
    for name in stale:
        (args.docs / name).write_text(files[name], encoding="utf-8", newline="\n")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
