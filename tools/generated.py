"""Owns what becomes of a generated document: it is written, or compared with what would be written.

Standard library only, as the scripts beside it. Does not know what a document says.
"""

import sys
from pathlib import Path


def write_or_check(path: Path, text: str, is_check: bool, command: str) -> int:
    """Write a document, or say on standard error that it is not what it would be.

    Args:
        path: of the document.
        text: what it has to be.
        is_check: whether to write nothing.
        command: that writes it, for people.

    Returns:
        The exit code: 1 for a document that is out of date, else 0.
    """
    if not is_check:
        path.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{path.name} is out of date: run `{command}`\n")
    return 1


__all__ = ["write_or_check"]
