"""Owns writes that are on the disk when they return, and never under a name before they are whole.

Does not know what is written, nor what a result is made of (`converting.staging`,
`adopting.journal`).
"""

import os
from pathlib import Path

UNFINISHED = ".part"  # of a file's or a folder's name, until it is whole


def write_whole(file: Path, content: bytes) -> None:
    """Give a file a content: all of it or, after an error or a kill, what was there before.

    Raises:
        OSError: if it cannot be written; nothing new is left then.
    """
    unfinished = file.with_name(file.name + UNFINISHED)
    try:
        unfinished.write_bytes(content)
        flush(unfinished)
        unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    flush(file.parent)


def flush(path: Path) -> None:
    """Wait until a file, or on Unix the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    # A file may be one that nobody may write to, as code that was copied from an archive.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["UNFINISHED", "flush", "write_whole"]
