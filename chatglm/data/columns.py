"""Owns what the columns of rows are called: keys of a training that name them, names to roles.

Rows whose columns are named are given the names that the dialects know, and whatever else might
have played that part is left out, so that a column that is named is used, once. Does not know
dialects.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from chatglm.data.dialogue import LEARN_TURNS
from chatglm.data.messages import ASSISTANT, CONTENT_KEYS, ROLE_KEYS, SYSTEM, USER
from chatglm.data.records import ROLES, TAGS, ColumnProblem, Columns, RowProblem
from chatglm.data.registry import BY_NAME, DIALECTS
from chatglm.training.keys.problems import KeyProblem, require

# LLaMA-Factory's name of the second part of a question.
ALIASES = {"query": "input"}
# Names of LLaMA-Factory's files for what this model does not know: nothing is lost without them.
UNKNOWN_TAGS = ("observation_tag", "function_tag", "tools", "images", "videos", "audios")
# What else might play the part of a role that is named.
RIVALS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "query", "question"),
    "response": ("response", "output", "completion", "answer", "target", "answers"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation", "chat", "data", "plain_text"),
    "chosen": ("chosen", "response_chosen", "chosen_response", "response_j"),
    "rejected": ("rejected", "response_rejected", "rejected_response", "rejected_messages"),
    "text": ("text", "content"),
}
# A question or an answer in a column goes before messages, and messages before these.
RIVALS["prompt"] += RIVALS["messages"]
RIVALS["response"] += RIVALS["messages"]
RIVALS["messages"] += (*RIVALS["prompt"], *RIVALS["response"])
# No row goes without these, if they are named.
NEEDED = ("prompt", "response", "messages", "chosen", "rejected", "text")
# What messages are found in.
TALKING = ("messages", "prompt", "chosen", "rejected")


def build_columns(settings: Any) -> Columns:
    """Return what a training's settings tell of rows.

    Args:
        settings: with the keys `columns`, `prompt_column` and so on.

    Raises:
        KeyProblem: for a role that there is not, or one column for two of them.
    """
    told = read_roles(settings.columns)
    for role in ("prompt", "response", "history"):
        name = getattr(settings, f"{role}_column")
        if name and told.setdefault(role, name) != name:
            raise KeyProblem(
                f"{role}_column says {name!r} and columns says {role}={told[role]!r}: leave one out"
            )
    named = [(role, name) for role, name in told.items() if role in ROLES]
    for i, (role, name) in enumerate(named):
        for other, same in named[:i]:
            if name == same:
                raise KeyProblem(
                    f"the column {name!r} is named twice, as {other} and as {role}: each has a "
                    "column of its own"
                )
    keys = ("dialect", "learn_turns", "default_system")
    return Columns(**told, **{key: getattr(settings, key) for key in keys})


def read_roles(columns: Mapping[str, str]) -> dict[str, str]:
    """Return names of columns and tags by our names of their roles.

    Raises:
        KeyProblem: for a role that there is not.
    """
    told: dict[str, str] = {}
    for key, name in columns.items():
        role = ALIASES.get(key, key)
        if key in UNKNOWN_TAGS:
            continue
        if role not in (*ROLES, *TAGS):
            raise KeyProblem(_describe_role(key, name))
        if not name or told.setdefault(role, name) != name:
            raise KeyProblem(f"columns: {key} must name one column, got {name!r}")
    return told


def _describe_role(key: str, name: str) -> str:
    """Return what is wrong with a role that there is not."""
    known = [*ROLES, *ALIASES, *TAGS]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if name in known:
        hint = f"; did you mean {name}={key}? The role comes first"
    return f"columns has no role {key!r}: there are {', '.join(known)}{hint}"


def check_learning(settings: Any) -> None:
    """Refuse values of the keys that say how rows are read.

    Raises:
        KeyProblem: naming the key, the value, and what is possible.
    """
    told, names = settings.learn_turns, [d.name for d in DIALECTS if d.meaning]
    require(
        told in LEARN_TURNS, "learn_turns", told, "last or all, or left out for each form's habit"
    )
    near = difflib.get_close_matches(settings.dialect, BY_NAME, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    is_known = not settings.dialect or settings.dialect in BY_NAME
    require(is_known, "dialect", settings.dialect, f"one of {', '.join(names)}{hint}")
    build_columns(settings)


def rename_columns(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a row with the names that the dialects know, whatever plays a named part once.

    Raises:
        ColumnProblem: if a column that is named is not there and nothing goes without it.
    """
    told = columns.named
    if not told:
        return _rename_tags(row, columns)
    for role, name in told.items():
        if name not in row and role in NEEDED:
            found = ", ".join(map(str, row)) or "(none)"
            raise ColumnProblem(f"the row has no column {name!r} ({role}); it has {found}")
    rivals = {rival for role in told for rival in RIVALS.get(role, ())}
    kept = {k: v for k, v in row.items() if k not in rivals and k not in told.values()}
    named = {role: row[name] for role, name in told.items() if name in row}
    return _rename_tags({**kept, **named}, columns)


def check_named(columns: Columns, keys: Iterable[str]) -> None:
    """Refuse names of columns that no row of the files has.

    Args:
        columns: what is told of rows.
        keys: of all rows together.

    Raises:
        ColumnProblem: naming the first such column, and those that there are.
    """
    there = list(keys)
    for role, name in columns.named.items():
        if name not in there:
            near = difflib.get_close_matches(name, map(str, there), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            found = ", ".join(map(str, there))
            raise ColumnProblem(f"no row has the column {name!r} ({role}); there are {found}{hint}")


def _rename_tags(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a row whose messages have the keys and roles that are known."""
    if not columns.has_tags:
        return row
    talks = (*TALKING, *RIVALS["messages"])
    return {k: _rename_messages(v, columns) if k in talks else v for k, v in row.items()}


def _rename_messages(value: Any, columns: Columns) -> Any:
    """Return messages with the keys and roles that are known."""
    if isinstance(value, list):
        return [_rename_messages(item, columns) for item in value]
    if not isinstance(value, dict):
        return value
    message = dict(value)
    for name, key, known in (
        (columns.role_tag, "role", ROLE_KEYS),
        (columns.content_tag, "content", CONTENT_KEYS),
    ):
        if name and name not in message:
            raise RowProblem(f"a message has no {name!r} ({key}_tag): {value!r:.60}")
        if name:
            told = message.pop(name)
            message = {k: v for k, v in message.items() if k not in known} | {key: told}
    roles = {
        columns.user_tag: USER,
        columns.assistant_tag: ASSISTANT,
        columns.system_tag: SYSTEM,
    }
    for key in ROLE_KEYS:
        told = message.get(key)
        if isinstance(told, str) and told:
            message[key] = roles.get(told, told)
    return message


__all__ = ["build_columns", "check_learning", "check_named", "rename_columns"]
