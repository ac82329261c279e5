"""Owns what every command asks of a model folder before it loads: is it one, and is it whole?

Reads configurations, tables of contents and beginnings of files, and no weights: seconds at most,
and no memory. A folder that has not changed is not looked at twice.
"""

from functools import lru_cache
from pathlib import Path

from chatglm import door
from chatglm.adapters.bases import read_base_names
from chatglm.checking.files import find_settings_problems, find_weight_problems
from chatglm.checking.oddities import find_mixed_generations
from chatglm.checking.problems import PROBLEM, Problem, gather
from chatglm.checking.tensors import find_fit_problems, open_all
from chatglm.checkpoints.prefixes import is_prefix
from chatglm.checkpoints.reading import check_fit, list_weight_files
from chatglm.checkpoints.recognize import (
    CONFIG_FILE,
    describe_stranger,
    read_object,
    recognize_folder,
    refuse_foreign_format,
)

FOLDERS_REMEMBERED = 8
Fingerprint = tuple[tuple[str, int, int], ...]


def require_model(folder: Path) -> None:
    """Refuse a folder that is no whole model of the family, before anything of it is loaded.

    Args:
        folder: on this machine.

    Raises:
        ValueError: with the first problem, and how many more there are; `chatglm check` tells all.
    """
    found = recognize_folder(folder)
    if not found.is_first_family:
        raise ValueError(describe_stranger(folder, found))
    problems = _find_again(folder, _take_fingerprint(folder), door.runs_folder_code())
    if problems:
        first, *others = problems
        more = f" ({len(others)} more: run chatglm check {folder})" if others else ""
        raise ValueError(f"{first}{more}")


def require_text(folder: Path) -> None:
    """Refuse a folder whose model gives scores and no text.

    Raises:
        ValueError: saying so.
    """
    if recognize_folder(folder).is_scorer:
        raise ValueError(
            f"{folder} is a reward model or classifier, which gives scores and no text: name the "
            "folder of a language model"
        )


def find_model_problems(folder: Path) -> list[Problem]:
    """Return what keeps a folder of the family from being loaded, all of it."""
    weights = find_weight_problems(folder)
    tensors, unreadable = ({}, []) if weights else open_all(folder, list_weight_files(folder))
    if is_prefix(tensors):
        return [explain_prefix(folder)]
    problems = [*weights, *unreadable, *find_settings_problems(folder)]
    fields = read_object(folder / CONFIG_FILE)
    foreign = gather("foreign-format", CONFIG_FILE, lambda: refuse_foreign_format(folder, fields))
    is_readable = not (weights or unreadable or foreign)
    problems += [*foreign, *find_fit_problems(folder, tensors if is_readable else {})]
    return problems or find_mixed_generations(folder, fields)


def explain_prefix(folder: Path) -> Problem:
    """Return the fault of a P-Tuning prefix in the place of a model."""
    what = f"{folder} is a P-Tuning prefix and no model, it has the tensors of the prefix alone"
    base = next(iter(read_base_names(folder)), "MODEL")
    remedy = (
        "name the folder of the model that it was trained for, in the terminal `chatglm chat "
        f"{base} --adapter {folder}`"
    )
    return Problem("prefix-alone", PROBLEM, "", what, remedy)


def _find_by_folder_code(folder: Path) -> list[Problem]:
    """What can be said of a folder whose own Python files say what its model is."""
    problems = find_weight_problems(folder)
    return problems or gather("tensors", "", lambda: check_fit(folder))


@lru_cache(maxsize=FOLDERS_REMEMBERED)
def _find_again(folder: Path, fingerprint: Fingerprint, is_trusted: bool) -> tuple[Problem, ...]:
    """Return the problems of a folder, once for each state of its files."""
    return tuple(_find_by_folder_code(folder) if is_trusted else find_model_problems(folder))


def _take_fingerprint(folder: Path) -> Fingerprint:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    states = ((path.name, path.stat()) for path in files)
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


__all__ = ["explain_prefix", "find_model_problems", "require_model", "require_text"]
