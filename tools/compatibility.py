"""Writes docs/compatibility.md: on which releases the tests passed, when, and beside what.

    python tools/compatibility.py record REPORT...  # note a run's outcome; tools/noxfile.py does
    python tools/compatibility.py                   # take new notes over and write the page
    python tools/compatibility.py --check           # exit with 1 if the page is out of date

Owns the notes (docs/compatibility.json) and the page. Knows nothing of how the tests are run.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from generated import write_or_check
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "compat"
NOTES = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
SHOWN_PACKAGES = ("transformers", "torch", "peft", "trl", "accelerate", "datasets", "numpy")
SHOWN_FAILURES = 20

HEAD = """\
# Which releases it works with

Written by `python tools/compatibility.py` from what `make compat` noted; a test checks it. All
tests were run with each release of transformers that is supported, and with the newest release of
everything at once ("newest", the canary), which is asked for without upper bounds; "oldest" is
Python 3.10 with the lower bound of every library, on which trl and datasets have no release for the
stages that need them. What the code leans on in those libraries is in [hooks.md](hooks.md).

With a newer transformers than the last one here the model loads and says in one line that nobody
has tried it. To try it: `make compat COMPAT="tests(newest)"`.

"model" are the tests of the model's files, the engine and the package, "rest" those of training,
end to end, benchmarks and recipes. What failed is listed below the table.

"""


def read_report(path: Path) -> dict[str, Any]:
    """Return how a run of pytest ended, from its report in JUnit's form."""
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    cases = [case for case in suite if {"failure", "error"} & {child.tag for child in case}]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(float(suite.get("time", 0))),
        "failures": names[:SHOWN_FAILURES],
    }


def read_versions() -> dict[str, str]:
    """Return the versions of what chatting and training need, in this environment."""
    needed = [Requirement(line) for line in importlib.metadata.requires("chatglm") or []]
    names = [n.name for n in needed if n.marker is None or n.marker.evaluate({"extra": "train"})]
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def read_commit() -> str:
    """Return the short name of the commit; nothing outside of git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_processor() -> str:
    """Return what the system says of its processor, and how many of them there are."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if line.count(":") == 1)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        kind = f"family {found.get('cpu family')} model {found.get('model')}"
        name = f"{found.get('model name', name)} ({kind})"
    return f"{name}, {os.cpu_count()} cores"


def record(reports: list[Path]) -> None:
    """Note the outcome of a run beside its report, with the versions of this environment.

    Args:
        reports: of the run, or of its parts: NAME.xml, or NAME-PART.xml for each.
    """
    parts = [read_report(report) for report in reports]
    found = {key: sum((part[key] for part in parts[1:]), parts[0][key]) for key in parts[0]}
    name = reports[0].stem.partition("-")[0]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    note = {"date": today, "commit": read_commit(), "versions": read_versions()}
    note["processor"] = read_processor()
    note |= found | {"parts": [report.stem.partition("-")[2] for report in reports]}
    reports[0].with_name(f"{name}.json").write_text(json.dumps(note, indent=2), encoding="utf-8")
    sys.stdout.write(f"{name}: {describe(note)}\n")


def describe(note: dict[str, Any]) -> str:
    """Return how a run ended, in words."""
    failed = f", **{note['failed']} failed**" if note["failed"] else ""
    return f"{note['passed']} passed{failed}, {note['skipped']} skipped"


def take_notes() -> dict[str, Any]:
    """Return all notes, with those of new runs in the place of older ones, and keep them."""
    notes = json.loads(NOTES.read_text(encoding="utf-8")) if NOTES.is_file() else {}
    for path in sorted(REPORTS.glob("*.json")):
        notes[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    NOTES.write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return notes


def build_page(notes: dict[str, Any]) -> str:
    """Return the text of the page."""
    columns = ("asked for", "tests", "date", "commit", "result", "time", "python")
    columns += SHOWN_PACKAGES
    rows = [columns, ["---"] * len(columns)]
    order = sorted(notes, key=lambda name: [int(p) if p.isdigit() else 10**6 for p in _parts(name)])
    for name in order:
        note = notes[name]
        versions = [note["versions"].get(package, "-") for package in ("python", *SHOWN_PACKAGES)]
        time = f"{note['seconds'] / 60:.1f} min"
        parts = " + ".join(filter(None, note["parts"])) or "all"
        rows.append([name, parts, note["date"], note["commit"], describe(note), time, *versions])
    page = HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    machines = sorted({note["processor"] for note in notes.values()})
    page += f"\nRun two at a time on: {'; '.join(machines)}.\n"
    for name in order:
        if failures := notes[name]["failures"]:
            page += f"\nFailed with {name}:\n\n" + "".join(f"- `{test}`\n" for test in failures)
    return page


def _parts(name: str) -> list[str]:
    return name.split(".")


def main(argv: list[str] | None = None) -> int:
    """Record a run, or write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/compatibility.md.")
    parser.add_argument("action", nargs="?", choices=["record"], help="note a run's outcome")
    parser.add_argument("reports", nargs="*", type=Path, help="what pytest wrote, in JUnit's form")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args(argv)
    if args.action == "record":
        if not args.reports:
            parser.error("record needs the report's path")
        record(args.reports)
        return 0
    notes = json.loads(NOTES.read_text("utf-8")) if args.check else take_notes()
    return write_or_check(PAGE, build_page(notes), args.check, "python tools/compatibility.py")


if __name__ == "__main__":
    sys.exit(main())
