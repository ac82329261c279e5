"""Owns `chatglm check`: what a folder is, whether it is whole, what is odd; a table, or JSON.

    chatglm check ../chatglm-6b
    chatglm check ../chatglm-6b --deep --json

Does not know what is looked at (`inspection`).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatglm.cli import open_parser, run_command

if TYPE_CHECKING:
    from chatglm.checking.inspection import Report

DESCRIPTION = """\
Say what a folder is, whether it is whole and what is odd about it, without loading it: all faults
at once, each with its remedy. Exit code 0: nothing is wrong, though something may be odd; 1: there
is a problem; 2: no such folder, or a wrong option."""
WIDTH = 12  # of the table's first column
MOST_LISTED = 3
FOUND = 1
SIZES = {"bytes", "float64", "float32", "float16", "bfloat16", "int8", "uint8"}


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm check`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "check", DESCRIPTION)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="any folder: a model, an adapter, a prefix")
    deep = "read all weights too: finite values, check sums of archives, SHA256SUMS"
    add("--deep", action="store_true", help=deep)
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Look at a folder and print what there is to say of it.

    Args:
        args: what `make_parser` parsed.

    Returns:
        0, or 1 if there is a problem.

    Raises:
        ValueError: if there is no such folder.
    """
    from chatglm.checkpoints.place import find_folder

    folder = find_folder(args.folder)
    from chatglm.checking.inspection import inspect_folder
    from chatglm.checking.problems import PROBLEM

    report = inspect_folder(folder, args.deep)
    sys.stdout.write(format_json(report) if args.json else format_table(report))
    return FOUND if report.count(PROBLEM) else 0


def format_json(report: "Report") -> str:
    """Return a report as one line of JSON."""
    fields = {
        "folder": str(report.folder),
        "kind": report.kind,
        "name": report.name,
        "facts": report.facts,
        "problems": [problem._asdict() for problem in report.problems],
    }
    return json.dumps(fields) + "\n"


def format_table(report: "Report") -> str:
    """Return a report for people: what it is, what it consists of, what is wrong or odd."""
    rows = [("folder", str(report.folder)), ("it is", report.name), *list_rows(report.facts)]
    for problem in report.problems:
        rows.append((problem.severity, _shorten(str(problem), report.folder)))
    lines = [f"{name:<{WIDTH}} {' '.join(text.split())}" for name, text in rows]
    return "\n".join([*lines, count_problems(report), ""])


def _shorten(text: str, folder: Path) -> str:
    """Return a line that names the folder's files without the folder, which stands above it."""
    return text.replace(f"{folder}/", "").replace(str(folder), "the folder")


def list_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts as rows of a table; what is not known, or not there, has none."""
    for name, value in facts.items():
        text = _show(name, value)
        if text:
            yield name, text


def _show(name: str, value: Any) -> str:
    """Return a fact as text, "" for what is not known or not there."""
    if isinstance(value, dict):
        parts = cast(dict[str, Any], value).items()
        shown = ((key.replace("_", " "), _show(key, part)) for key, part in parts)
        return ", ".join(f"{key} {text}" for key, text in shown if text)
    if isinstance(value, list):
        return _show_list([str(entry) for entry in cast(list[Any], value)])
    if isinstance(value, bool):
        return "yes" if value else ""
    if not value:
        return ""
    is_size = isinstance(value, int) and name in SIZES
    return f"{value / 1e6:,.1f} MB" if is_size else str(value)


def _show_list(entries: list[str]) -> str:
    if len(entries) <= MOST_LISTED:
        return ", ".join(entries)
    return f"{len(entries)}, {entries[0]} to {entries[-1]}"


def count_problems(report: "Report") -> str:
    """Return the last line of a table."""
    counts = [report.count(severity) for severity in ("problem", "odd")]
    problems, oddities = counts
    return f"{problems or 'no'} problem{'s' * (problems != 1)}, {oddities or 'nothing'} odd"


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
