"""Owns records: what a long measurement has found so far, kept so that it goes on where it stopped.

A measurement writes a file of its own below `build`, which is not committed, after every step. A
page takes these files over into a record in `docs`, as the releases' page does with its notes, and
is written from that record alone. Does not know what is measured.
"""

import contextlib
import datetime
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.results import ROOT, name_cpu, read_commit

BUILD = ROOT / "build"


def describe_run() -> dict[str, str]:
    """Return when and on what a run is made."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    versions += f", transformers {transformers.__version__}"
    return {"date": today, "commit": read_commit(), "cpu": name_cpu(), "versions": versions}


def read_json(path: Path) -> Any:
    """Return what a file holds; an empty dictionary for a file that is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: Any) -> None:
    """Write a file whole, or leave the old one: a run may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    draft.write_text(text, encoding="utf-8", newline="\n")
    draft.replace(path)


@contextlib.contextmanager
def progress_of(path: Path, key: Any, is_fresh: bool = False) -> Iterator[dict[str, Any]]:
    """Yield what a run has found so far, which the caller changes and writes.

    Args:
        path: of the run's file.
        key: what the run is of; one of another key is begun anew.
        is_fresh: whether to forget what is there.

    Raises:
        ValueError: if another process is at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process writes {path}: wait for it, or end it.") from None
        found = {} if is_fresh else read_json(path)
        yield found if found.get("key") == key else {"key": key}


def take_records(folder: Path, record: Path) -> dict[str, Any]:
    """Return a record with the runs of a folder in the place of older ones, and keep it."""
    kept = read_json(record)
    for path in sorted(folder.glob("*.json")):
        kept[path.stem] = read_json(path)
    if kept:
        write_json(record, kept)
    return kept
