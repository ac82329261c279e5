"""Owns how what a run reads is known again: files that moved are the same, changed ones are not.

A file is known by its size and a hash: of all of it, or of blocks from everywhere in a large one.
Does not know what the files hold, nor what follows from a change.
"""

import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatglm.loading import default_model_folder

FOLDER_KEYS = ("model", "adapter", "reward_model")
FUNCTION_KEY = "reward_function"  # "file.py:function"
DATA_ENDING = "_data"
# Of a model's folder these count; settings and cards name places.
WEIGHT_ENDINGS = (".safetensors", ".bin", ".model")
BLOCK_BYTES, NUM_BLOCKS = 2**20, 64
Mark = list[Any]  # size and hash of a file


def mark_sources(values: Mapping[str, Any]) -> dict[str, list[list[Mark]]]:
    """Return the marks of all files that the keys of a run name, by key and entry.

    A key with an entry that names no file or folder is left out: its text alone can be compared.

    Args:
        values: of the settings.
    """
    marks: dict[str, list[list[Mark]]] = {}
    for key, value in values.items():
        if key not in (*FOLDER_KEYS, FUNCTION_KEY) and not key.endswith(DATA_ENDING):
            continue
        entries = list_entries(key, value)
        if key == FUNCTION_KEY:
            entries = [entry.rpartition(":")[0] for entry in entries]
        found = [_list_files(entry, key in FOLDER_KEYS) for entry in entries]
        if found and all(found):
            marks[key] = [[mark_file(file) for file in files] for files in found]
    return marks


def list_entries(key: str, value: Any) -> list[str]:
    """Return the paths of a key, which has one or a list; the default model is one too."""
    if key == "model" and not value:
        return [str(default_model_folder())]
    entries = value if isinstance(value, list) else [value] if value else []
    return [entry for entry in entries if isinstance(entry, str)]


def _list_files(entry: str, is_model: bool) -> list[Path]:
    """Return the files of an entry: itself, those of a folder, or those of a pattern."""
    path = Path(entry)
    if path.is_file():
        return [path]
    if is_model:
        files = path.iterdir() if path.is_dir() else []
        return sorted(file for file in files if file.suffix in WEIGHT_ENDINGS and file.is_file())
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(entry, recursive=True))
    return sorted(file for file in found if file.is_file())


def mark_file(file: Path) -> Mark:
    """Return size and hash of a file."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            digest.update(opened.read())
        else:
            for number in range(NUM_BLOCKS):
                opened.seek(number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
                digest.update(opened.read(BLOCK_BYTES))
    return [size, digest.hexdigest()]


def is_moved(key: str, before: Any, now: Any) -> bool:
    """Whether two values of a key can be the same files in two places, but for what they hold."""
    then, here = list_entries(key, before), list_entries(key, now)
    if key in FOLDER_KEYS:
        return len(then) == len(here)
    if key == FUNCTION_KEY:
        return [e.rpartition(":")[2] for e in then] == [e.rpartition(":")[2] for e in here]
    return [Path(entry).suffix for entry in then] == [Path(entry).suffix for entry in here]


__all__ = ["is_moved", "mark_file", "mark_sources"]
