"""Owns which values a key can have by its type, and what people mean who write one otherwise.

Does not know any key.
"""

import types
import typing
from typing import Any, get_args, get_origin

from chatglm.training.keys.problems import KeyProblem

NUMBERS = frozenset({"int", "float"})
SIMPLE_KINDS = NUMBERS | {"bool", "None"}


def coerce(key: str, value: Any, hint: Any) -> Any:
    """Return a value as the type of its field.

    Raises:
        KeyProblem: if it is of another type.
    """
    if is_union(hint):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [coerce(key, item, get_args(hint)[0]) for item in items]
    if get_origin(hint) is dict:
        return coerce_mapping(key, value, get_args(hint)[1])
    value = guess_number(value) if hint in (int, float) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    is_wrong_bool = isinstance(value, bool) and hint is not bool
    if hint in (int, float, str, bool) and (is_wrong_bool or not isinstance(value, hint)):
        raise KeyProblem(_describe_kind(key, hint.__name__, value))
    return value


def coerce_mapping(key: str, value: Any, hint: Any) -> dict[str, Any]:
    """Return names and values, written as a mapping or as words `name=value`.

    Raises:
        KeyProblem: if they are neither, or a name is there twice.
    """
    if isinstance(value, dict):
        return {str(name): coerce(f"{key}: {name}", item, hint) for name, item in value.items()}
    made: dict[str, Any] = {}
    for word in value if isinstance(value, list) else [value]:
        name, _, item = str(word).partition("=")
        if not name or not item or made.get(name, item) != item:
            raise KeyProblem(f"{key} must be pairs as prompt=query response=reply, got {word!r}")
        made[name] = coerce(f"{key}: {name}", item, hint)
    return made


def is_union(hint: Any) -> bool:
    """Whether a type is one of several."""
    return get_origin(hint) in (typing.Union, types.UnionType)


def name_kinds(hint: Any) -> frozenset[str]:
    """Return the names of the types that a type allows."""
    parts = get_args(hint) if is_union(hint) else (hint,)
    names = ("None" if p is type(None) else getattr(p, "__name__", str(p)) for p in parts)
    return frozenset(names)


def guess_number(value: Any) -> Any:
    """Read what YAML takes for text but people mean as a number, as 1e-4."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "e" not in value and "." not in value else number


def check_kind(key: str, value: Any, kinds: Any) -> Any:
    """Return the value of a library's key, if it is one of numbers or switches and this is one.

    Libraries take any value for them, and trip over it long after.

    Args:
        key: its name.
        value: given.
        kinds: a type, or the names of those that are possible.

    Raises:
        KeyProblem: if it is not.
    """
    names = kinds if isinstance(kinds, frozenset) else name_kinds(kinds)
    if value is False and any(name.endswith("Strategy") for name in names):
        return "no"  # what YAML reads `no` as
    if not names <= SIMPLE_KINDS or value is None:
        return value
    if isinstance(value, float) and value.is_integer() and "float" not in names:
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and names & NUMBERS
    if not is_number and type(value).__name__ not in names:
        raise KeyProblem(_describe_kind(key, " or ".join(sorted(names - {"None"})), value))
    return value


def _describe_kind(key: str, kind: str, value: Any) -> str:
    """Say what a value is not."""
    return f"{key} must be of type {kind}, got {value!r}"


__all__ = ["check_kind", "coerce", "guess_number", "is_union", "name_kinds"]
