"""Owns the list of a stage's keys for people: ours first, each with its default and its meaning.

Does not know which stages there are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from chatglm.training.keys.library import LibraryKey, find_default, list_fields
from chatglm.training.keys.meanings import read_meanings, shorten
from chatglm.training.keys.problems import KeyProblem

KEY_COLUMNS, LINE_COLUMNS = 40, 120
UNSAID = "the library does not say"


def list_own(settings_class: type) -> dict[str, LibraryKey]:
    """Return the keys of a dataclass of ours, with the meanings of the classes it is built on."""
    meanings: dict[str, str] = {}
    for parent in reversed(settings_class.__mro__):
        meanings |= read_meanings(parent.__dict__.get("__doc__"))
    return {
        name: key._replace(meaning=meanings.get(name, ""))
        for name, key in list_fields(settings_class).items()
    }


def describe_keys(own: Mapping[str, LibraryKey], library: Mapping[str, LibraryKey]) -> str:
    """Return one line for each key.

    Args:
        own: keys of ours.
        library: those of a library; none that is ours too.
    """
    lines = ["keys, each with its default:", *map(_describe, own.items())]
    theirs = {n: k for n, k in library.items() if n not in own}
    if theirs:
        lines += ["", "keys of the library that trains:", *map(_describe, theirs.items())]
    return "\n".join(lines) + "\n"


def describe_whole(keys: Mapping[str, LibraryKey], asked: Sequence[str]) -> str:
    """Return all that is known of some keys.

    Raises:
        KeyProblem: for a name that is none of them.
    """
    missing = [name for name in asked if name not in keys]
    if missing:
        raise KeyProblem(f"there is no key {', '.join(missing)}: --help alone lists them")
    return "".join(
        f"--{name} {keys[name].default}  ({keys[name].kind})\n    {keys[name].meaning or UNSAID}\n"
        for name in asked
    )


def _describe(item: tuple[str, LibraryKey]) -> str:
    name, key = item
    head = f"  --{name} {key.default}".rstrip()
    room = LINE_COLUMNS - max(len(head), KEY_COLUMNS) - 2
    meaning = f"{key.kind}: {key.meaning or UNSAID}"
    return f"{head.ljust(KEY_COLUMNS)}  {shorten(meaning, max(room, KEY_COLUMNS))}"


def list_values(settings: Any) -> dict[str, Any]:
    """Return what differs from the defaults in a dataclass."""
    pairs = ((f, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    return {f.name: value for f, value in pairs if value != find_default(f)}


__all__ = ["describe_keys", "describe_whole", "list_own", "list_values"]
