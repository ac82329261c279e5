"""Owns what is said of keys and values that cannot be: one problem raised, or all that there are.

Does not know any key.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar


class KeyProblem(ValueError):
    """A key or a value that a stage cannot take."""


_collected: ContextVar[list[str] | None] = ContextVar("chatglm_key_problems", default=None)


def require(is_fine: bool, key: str, value: object, wanted: str) -> None:
    """Refuse the value of a key; inside `collect_problems` only note it down.

    Raises:
        KeyProblem: unless `is_fine`.
    """
    if is_fine:
        return
    problem, notes = f"{key} must be {wanted}, got {value!r}", _collected.get()
    if notes is None:
        raise KeyProblem(problem)
    notes.append(problem)


@contextmanager
def collect_problems(problems: list[str]) -> Iterator[None]:
    """Add what is refused inside to a list, all of it, instead of raising the first.

    What is raised inside ends the statements, and is the last problem of the list.
    """
    token = _collected.set(problems)
    try:
        yield
    except KeyProblem as problem:
        problems.append(str(problem))
    finally:
        _collected.reset(token)


def refuse_all(problems: Sequence[str]) -> None:
    """Raise all problems as one; nothing if there are none.

    Raises:
        KeyProblem: naming each of them.
    """
    if problems:
        raise KeyProblem("; ".join(dict.fromkeys(problems)))


def either(values: Sequence[str]) -> str:
    """Return what is possible, in words."""
    return f"{', '.join(values[:-1])} or {values[-1]}"


__all__ = ["KeyProblem", "collect_problems", "either", "refuse_all", "require"]
