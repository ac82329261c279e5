"""Owns which folders may be changed where they are, and which only as a copy.

Reads no file: what a folder holds is not known here.
"""

import os
from collections.abc import Iterable
from pathlib import Path

ELSEWHERE = "name a new folder (--out DIR)"
BLOBS = "blobs"  # where huggingface_hub keeps the files that the folders of its cache link to


def find_folder(path: str | Path) -> Path:
    """Resolve a folder.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(path).expanduser().resolve()
    if folder.is_file():
        raise ValueError(f"{path} is a file: name the folder that it lies in")
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder: name a model folder on this machine")
    return folder


def check_changeable(folder: Path) -> None:
    """Refuse to change a folder that is not the user's own, or that the user may not change.

    Raises:
        ValueError: saying so.
    """
    if is_cached(folder):
        raise ValueError(
            f"{folder} belongs to the cache of huggingface_hub, whose files are shared: {ELSEWHERE}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written to: {ELSEWHERE}, or change its rights")


def is_cached(folder: Path) -> bool:
    """Whether a folder is a snapshot in huggingface_hub's cache, or looks like one."""
    if folder.parent.name == "snapshots" and (folder.parent.parent / BLOBS).is_dir():
        return True
    links = (path for path in folder.iterdir() if path.is_symlink())
    return any(path.resolve().parent.name == BLOBS for path in links)


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse to put files in the place of links, behind which are somebody's files.

    Raises:
        ValueError: with the first one.
    """
    for name in sorted(names):
        if (folder / name).is_symlink():
            raise ValueError(
                f"{folder / name} is a link to {(folder / name).resolve()}: put a copy of the file "
                f"in its place (cp --dereference), or {ELSEWHERE}"
            )
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, and a file must go there: rename it")


__all__ = ["check_changeable", "check_links", "find_folder", "is_cached"]
