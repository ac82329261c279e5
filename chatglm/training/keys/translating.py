"""Owns how names of other programs become keys of a stage: by the table of `names`, and said aloud.

What is renamed, what has no effect and what is refused is told for all names at once; two names of
one key that say different things are refused. Does not read files or words.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatglm.training.keys.names import (
    ANYTHING,
    CUTOFF,
    FIRST,
    FOLDER_KEYS,
    NAMES,
    STAGE_KEYS,
    STAGES_OF_OTHERS,
    Name,
    find_name,
)
from chatglm.training.keys.values import guess_number

# Keys that are lists of files or layers, which some programs write in one word with commas.
COMMA_KEYS = ("train_data", "eval_data", "lora_targets")
DATA_KEYS = ("train_data", "eval_data")
ALL_OF_PEFT = "all-linear"  # every layer, in peft's word for it


@dataclass
class Translated:
    """What some keys of whatever program are here.

    Attributes:
        keys: of the stage, and those that nobody knows.
        defaults: keys that hold unless they are set.
        notes: what a person should know, a line each.
        problems: why names are refused.
        origins: the name under which a key was given.
        turned: what was typed that turned into defaults, and those.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    turned: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)


def translate(
    given: Mapping[str, Any], stage: str, own: Collection[str], library: Collection[str]
) -> Translated:
    """Return what names of other programs mean in a stage.

    Args:
        given: keys and values of one file or one command line.
        stage: as people type it.
        own: the keys of the stage that are ours.
        library: those that are a library's.
    """
    made, known = Translated(), {*own, *library}
    for name, value in given.items():
        if name in own or (name in library and name not in FIRST):
            _set(made, name, name, value)
        elif name in STAGE_KEYS:
            _check_stage(made, name, value, stage)
        elif name == CUTOFF:
            made.defaults["long_rows"] = "cut"
            made.turned.append((f"{name} {value}", {"long_rows": "cut"}))
            _set(made, name, "max_length", value)
        elif name not in FOLDER_KEYS:
            _read_name(made, name, value, find_name(name, stage), known)
    _join_folder(made, given, known)
    renamed = {k: n for k, n in made.origins.items() if n != k}
    if renamed:
        pairs = ", ".join(f"{name} as {key}" for key, name in renamed.items())
        made.notes.insert(0, f"read {pairs}")
    return made


def _read_name(
    made: Translated, name: str, value: Any, found: Name | None, known: Collection[str]
) -> None:
    if found is None:
        made.keys[name] = value  # Nobody's key, and told as such.
    elif found.key and found.key not in known:
        told = f"{name} (of {found.whose}) is {found.key} here, which this stage does not have"
        made.problems.append(f"{told}: leave it out")
    elif found.is_share and not (_is_number(value) and 0 <= float(value) < 1):
        made.problems.append(f"{name} (of {found.whose}) must be in [0, 1), got {value!r}")
    elif found.key:
        _set(made, name, found.key, value)
    elif str(value).lower() in found.turns:
        _turn(made, name, value, found, known)
    elif found.accepts == (ANYTHING,) or _is_among(value, found.accepts):
        made.notes.append(f"{name} has no effect: {found.why}")
    else:
        told = "" if not found.accepts and not found.turns else f" cannot be {value!r}"
        why = found.why or f"it can be {' or '.join(found.turns)}"
        made.problems.append(f"{name} (of {found.whose}){told}: {why}")


def _turn(made: Translated, name: str, value: Any, found: Name, known: Collection[str]) -> None:
    """Take the keys that a value turns into."""
    turned = found.turns[str(value).lower()]
    missing = [key for key in turned if key not in known]
    if missing:
        problem = (
            f"{name} (of {found.whose}) is {', '.join(missing)}, which this stage does not have"
        )
        made.problems.append(problem)
        return
    made.defaults |= turned
    made.turned.append((f"{name} {value}", turned))


def _is_number(value: Any) -> bool:
    return isinstance(guess_number(value), (int, float)) and not isinstance(value, bool)


def _is_among(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether a value is one of some, where 1 is not true."""
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in accepted
    )


def _set(made: Translated, name: str, key: str, value: Any) -> None:
    """Set a key, unless another name of it says something else."""
    if name != key:
        value = _convert(name, key, value)
    if key in made.keys and _as_list(made.keys[key]) != _as_list(value):
        other = made.origins[key]
        made.problems.append(
            f"{other} is {made.keys[key]!r} and {name} is {value!r}, which are one key, {key}: "
            "leave one out"
        )
        return
    made.keys[key], made.origins[key] = value, name


def _as_list(value: Any) -> list[Any]:
    """Return a value as it is where it may be one of several or several."""
    return value if isinstance(value, list) else [value]


def _convert(name: str, key: str, value: Any) -> Any:
    """Return a value as our key has it, where programs write it otherwise."""
    if key in COMMA_KEYS and isinstance(value, str) and not Path(value).exists():
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return ["all" if part == ALL_OF_PEFT else part for part in parts]
    return guess_number(value) if key.endswith(("_ratio", "_steps")) else value


def _check_stage(made: Translated, name: str, value: Any, stage: str) -> None:
    """Accept a stage that is named once more, and refuse another one."""
    named = STAGES_OF_OTHERS.get(str(value), str(value))
    if named != stage:
        made.problems.append(
            f"{name} is {value!r}, and the stage here is {stage}: run chatglm "
            f"train {named}, or leave {name} out"
        )


def _join_folder(made: Translated, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Look for data files in the folder that some programs name beside."""
    for name in FOLDER_KEYS:
        if name not in given or name in known:
            continue
        folder = Path(str(given[name]))
        for key in (key for key in DATA_KEYS if key in made.keys):
            files = _as_list(made.keys[key])
            joined = [str(folder / f) if (folder / str(f)).exists() else f for f in files]
            made.keys[key] = joined
        if not any(key in made.keys for key in DATA_KEYS):
            made.keys["train_data"] = [str(folder)]
            made.origins["train_data"] = name
        else:
            made.notes.append(f"{name} {folder} is where files are looked for")


def find_contradictions(keys: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return what keys say that were set, against what a name of another program asks for.

    Args:
        keys: that were set.
        defaults: that a name turned into.
    """
    return [
        f"{key} is {keys[key]!r}, and another key asks for {wanted!r}: leave one of the two out"
        for key, wanted in defaults.items()
        if key in keys and keys[key] != wanted and bool(keys[key]) != bool(wanted)
    ]


def merge_defaults(
    keys: Mapping[str, Any], parts: Sequence[Translated]
) -> tuple[dict[str, Any], list[str]]:
    """Return the defaults that names turned into and that hold, and lines that say so.

    Args:
        keys: that were set.
        parts: of the file and of the command line, whose defaults go before the file's.
    """
    # Adapters to go on from have a rank of their own.
    hidden = {*keys, *(("lora_rank",) if keys.get("adapter") else ())}
    merged: dict[str, Any] = {}
    notes: list[str] = []
    for part in parts:
        for typed, turned in part.turned:
            holding = {key: value for key, value in turned.items() if key not in hidden}
            merged |= holding
            if holding:
                told = ", ".join(f"{key}: {value}" for key, value in holding.items())
                notes.append(f"{typed} means {told}")
    return merged, notes


def rename(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys under our names, where a name means one whatever the stage is."""
    plain = {name: found[0].key for name, found in NAMES.items() if found[0].key}
    return {plain.get(name, name): value for name, value in given.items()}


__all__ = ["Translated", "find_contradictions", "merge_defaults", "rename", "translate"]
