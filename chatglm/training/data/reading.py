"""Owns what a run reads before its model is loaded: the rows that are trained on and held out.

Does not know what rows are for, or how they are rendered.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from chatglm.training.data.rendering import Renderer
from chatglm.training.settings import Settings


class Data(NamedTuple):
    """The rows of a run.

    Attributes:
        renderer: that makes ids of them.
        train: what is trained on.
        held_out: None if nothing is.
        beside: plain answers that are learned beside (`sft_data`); None if none are.
    """

    renderer: Renderer
    train: Any
    held_out: Any = None
    beside: Any = None


def read_both(settings: Settings, read: Callable[[Sequence[Any]], Any]) -> tuple[Any, Any]:
    """Return what is trained on and what is held out, None if nothing is.

    Args:
        settings: name the files.
        read: makes a dataset of files.

    Raises:
        ValueError: for files and rows of either that cannot be used, those of every file.
    """
    found: list[Any] = []
    problems: list[str] = []
    for paths, is_needed in ((settings.train_data, True), (settings.held_out_data, False)):
        try:
            found.append(read(paths) if paths or is_needed else None)
        except ValueError as problem:
            problems += _list_problems(paths, read, problem)
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return found[0], found[1]


def _list_problems(
    paths: Sequence[Any], read: Callable[[Sequence[Any]], Any], first: ValueError
) -> list[str]:
    """Return what is wrong with each of some files; what is wrong with all of them if with none."""
    problems: list[str] = []
    for path in paths if len(paths) > 1 else []:
        try:
            read([path])
        except ValueError as problem:
            problems.append(str(problem))
    return problems or [str(first)]


__all__ = ["Data", "read_both"]
