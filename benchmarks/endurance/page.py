"""Writes docs/reliability.md from docs/reliability.json, and that from the runs of this machine.

python -m benchmarks.endurance.page            # take finished runs over, and write the page
python -m benchmarks.endurance.page --check    # exit with 1 if the page is not what it would be
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.endurance.campaign import RUNS
from benchmarks.records import read_json, take_records
from benchmarks.results import ROOT
from recipes.mini.report import insert_report

PAGE = ROOT / "docs" / "reliability.md"
RECORD = ROOT / "docs" / "reliability.json"
MARKS = ("<!-- figures:begin -->", "<!-- figures:end -->")


def format_runs(record: dict[str, Any]) -> str:
    """Return the generated part of the page: a table, and what was found."""
    if not record:
        return "No run is recorded yet."
    rows = [["what", "how many", "ended", "seed", "time", "date", "commit"], ["---"] * 7]
    for name, run in record.items():
        ended = ", ".join(f"{number:,} {word}" for word, number in sorted(run["outcomes"].items()))
        many = f"{run['done']:,} {run['unit']}"
        time = f"{run['seconds'] / 60:.1f} min"
        title = f"{run['title']} (`{name}`)"
        rows.append([title, many, ended, str(run["key"]["seed"]), time, run["date"], run["commit"]])
    machines = sorted({f"{run['cpu']}; {run['versions']}" for run in record.values()})
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, f"Run on: {'; '.join(machines)}.", format_findings(record)])


def format_findings(record: dict[str, Any]) -> str:
    """Return what these runs found, which is not mended, or that it is nothing."""
    total = sum(run["num_findings"] for run in record.values())
    if not total:
        return "These runs found nothing."
    lines = [f"These runs found {total}, each the first line of what it says:"]
    for name, run in record.items():
        lines += [
            f"- `{name}`, case {finding['case']}: `{_first_line(finding['text'])}`"
            for finding in run["findings"]
        ]
    return "\n".join(lines)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:160].replace("`", "'").replace("|", "/")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/reliability.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    is_check = parser.parse_args(argv).check
    record = read_json(RECORD) if is_check else take_records(RUNS, RECORD)
    old = PAGE.read_text(encoding="utf-8")
    new = insert_report(old, format_runs(record), MARKS)
    if is_check and new != old:
        sys.stderr.write("reliability.md is out of date: python -m benchmarks.endurance.page\n")
    elif not is_check:
        PAGE.write_text(new, encoding="utf-8", newline="\n")
    return int(is_check and new != old)


if __name__ == "__main__":
    sys.exit(main())
