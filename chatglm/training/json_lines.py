"""Owns files of JSON lines that grow with a run, and are cut back where it goes on.

Does not know what a line is about, but for its `step`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add an object to a JSONL file, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False) + "\n")


def write_lines(lines: Iterable[dict[str, Any]], path: Path) -> None:
    """Write objects into a new JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def cut_lines(path: Path, begun: int | None) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file up to a step, and take the others out of it.

    Args:
        path: of the file, which need not be there.
        begun: the last step to keep; None keeps nothing.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            # The run was killed while it wrote this line, which is the last one.
            break
    kept = [line for line in lines if begun is not None and line["step"] <= begun]
    part = path.with_name(f"part-{path.name}")
    write_lines(kept, part)
    os.replace(part, path)
    return kept


__all__ = ["append_line", "cut_lines", "write_lines"]
