"""Owns the look at every place that a run names, before anything is read: all faults at once.

Does not know what lies in the places.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chatglm.checkpoints.place import find_folder
from chatglm.data.sources import list_sources
from chatglm.training.models import find_base
from chatglm.training.settings import Settings

DATA_KEYS = ("train_data", "eval_data", "ptx_data", "sft_data")


def check_paths(settings: Settings) -> None:
    """Refuse a run of which places are missing.

    Raises:
        ValueError: naming every folder and file that is not there, or that cannot be written to.
    """
    problems = [*_say(find_base, settings), *_check_output(Path(settings.output))]
    for key in ("reward_model", "adapter"):
        for name in _list(getattr(settings, key, "")):
            problems += _say(find_folder, name, f"{key} ")
    problems += _list_missing(settings)
    for name in _list(getattr(settings, "reward_function", "")):
        file = name.rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            problems.append(f"reward_function {name}: there is no file {file}")
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))


def check_data(settings: Settings) -> None:
    """Refuse files of rows that are not there.

    Raises:
        ValueError: naming every one.
    """
    problems = _list_missing(settings)
    if problems:
        raise ValueError("; ".join(problems))


def _list_missing(settings: Settings) -> list[str]:
    """Say which entries of data cannot be read, or mean files that are not there."""
    problems = []
    for key in DATA_KEYS:
        for entry in _list(getattr(settings, key, [])):
            try:
                list_sources([entry], wants_texts=True)
            except ValueError as problem:
                problems.append(f"{problem} ({key})")
    return problems


def _list(value: Any) -> list[Any]:
    return [item for item in (value if isinstance(value, list) else [value]) if item]


def _say(find: Callable[[Any], Any], name: Any, what: str = "") -> Iterator[str]:
    """Say what is wrong with something that is looked for."""
    try:
        find(name)
    except ValueError as problem:
        yield f"{what}{problem}"


def _check_output(folder: Path) -> Iterator[str]:
    """Look whether the folder can be made or written to; whether it may be is settled later."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        yield f"output {folder} cannot be a folder: {place} is a file; name another one"
    elif not os.access(place, os.W_OK):
        yield f"output {folder}: {place} cannot be written to; change its rights, or name another"


__all__ = ["check_data", "check_paths"]
