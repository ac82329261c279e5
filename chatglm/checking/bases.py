"""Owns what a look at an adapter tells of its base: which it is, and whether both fit.

The base is looked for where the adapter says, and where it may have been moved. Of one that is not
there, only the name is told. Does not know what else is wrong with an adapter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatglm.adapters.acting import check_prefix, check_shapes
from chatglm.adapters.bases import (
    Foundation,
    check_base,
    find_below,
    look_for_base,
    read_base_names,
    read_foundations,
)
from chatglm.adapters.digest import name_digest
from chatglm.adapters.kinds import LORA, PREFIX, PTUNING, read_kind
from chatglm.checking.problems import ODD, PROBLEM, Problem, gather
from chatglm.checkpoints.complete import complete_fields
from chatglm.checkpoints.reading import build_skeleton
from chatglm.checkpoints.recognize import CONFIG_FILE, read_object, recognize_folder

Facts = dict[str, Any]


def compare_with_base(folder: Path) -> tuple[Facts, list[Problem]]:
    """Return the facts of an adapter's base, and what is wrong between both.

    Args:
        folder: of an adapter of peft or of a P-Tuning prefix, its weights whole.
    """
    known: list[list[Foundation] | None] = []
    problems = gather("base-record", "", lambda: known.append(read_foundations(folder)))
    if problems:
        return {}, problems
    bases: list[Foundation] = known[0] or []
    place = look_for_base(folder)
    named = next(iter(read_base_names(folder)), None)
    facts: Facts = {
        "base": {
            "name": bases[0].path if bases else named,
            "digest": name_digest(bases[0].digest) if bases else None,
            "on_top_of": [mark.path for mark in bases[0].adapters] if bases else [],
            "found": None if place is None else str(place),
        }
    }
    stranger = _find_stranger(folder, Path(named).expanduser()) if named else []
    return facts, stranger if place is None or stranger else _compare(folder, place)


def _find_stranger(folder: Path, base: Path) -> list[Problem]:
    """Return what is wrong with a base that is no model of the family, whole or not."""
    if not (base / CONFIG_FILE).is_file():
        return []
    of_what = recognize_folder(base)
    if of_what.is_first_family:
        return []
    what = f"{folder} is for {base}, which is {of_what.name}"
    return [Problem("base", PROBLEM, "", what, "name an adapter of the first ChatGLM-6B")]


def _compare(folder: Path, base: Path) -> list[Problem]:
    notes: list[str | None] = []

    def look() -> None:
        notes.append(check_base(folder, base, find_below(folder)))

    problems = gather("base", "", look)
    for note in (note for note in notes if note):
        remedy = "nothing to be done if you know that it is"
        problems.append(Problem("base-unknown", ODD, "", note, remedy))
    return problems + gather("tensors", "", _choose_fit(folder, base))


def _choose_fit(folder: Path, base: Path) -> Callable[[], object]:
    """Return what checks the sizes of an adapter's tensors against the model's."""
    kind = read_kind(folder).kind

    def check() -> None:
        model = build_skeleton(complete_fields(read_object(base / CONFIG_FILE)))
        if kind == LORA:
            check_shapes(model, folder)
        elif kind in (PREFIX, PTUNING):
            check_prefix(model.config, folder)

    return check


__all__ = ["compare_with_base"]
