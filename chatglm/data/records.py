"""Owns what a row means: a question, what was said before it, and its answers.

Here is the one rule for system texts: they stand in front of the first question that is given, with
an empty line between, as the chat template has it. Does not know files, forms of rows, the rest of
the prompt format, nor tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

Rounds = list[tuple[str, str]]
# What stands between a system text and the first question.
SYSTEM_END = "\n\n"


class Record(NamedTuple):
    """One example as people write it.

    Attributes:
        source: "file:line", for messages to people.
        history: the rounds before, oldest first.
        query: the question; the whole text of a plain text.
        answer: the answer, the better one of a pair; "" where only prompts are wanted.
        rejected: the worse one of a pair.
        kind: what is wrong with the worse one, where the row says so.
        system: what stands in front of the first question, whichever round that is.
        dialect: the form that the row was read as.
    """

    source: str
    history: Rounds
    query: str
    answer: str = ""
    rejected: str = ""
    kind: str = ""
    system: str = ""
    dialect: str = ""

    def frame(self, start: int = 0) -> tuple[str, Rounds]:
        """Return the question and the rounds as the model is given them, the system text in place.

        Args:
            start: rounds to leave out, the oldest first; the system text stays.
        """
        rounds = [*self.history[start:], (self.query, "")]
        if self.system:
            rounds[0] = (f"{self.system}{SYSTEM_END}{rounds[0][0]}", rounds[0][1])
        return rounds[-1][0], rounds[:-1]


# The fields of `Columns` that name columns, and those that name what is in messages.
ROLES = ("prompt", "response", "history", "input", "system", "messages")
ROLES += ("chosen", "rejected", "text")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")


class RowProblem(ValueError):
    """A row that cannot be used, and why."""


class ColumnProblem(RowProblem):
    """A row without a column that was named: to name it rightly helps, to skip rows does not."""


@dataclass(frozen=True)
class Columns:
    """What is told of rows: names of their columns, their form, which answers are learned.

    A name is "" where the row's own form decides.

    Attributes:
        prompt: the question's column; text, or messages that end with a question.
        response: the answer's.
        history: the earlier rounds'.
        input: a second part of the question (`query` in LLaMA-Factory's `columns`).
        system: the system text's.
        messages: a list of messages.
        chosen, rejected: the better and the worse answer.
        text: a plain text.
        role_tag, content_tag: what the keys of a message are called.
        user_tag, assistant_tag, system_tag: what its roles are called.
        dialect: name of the form that rows have; "" to recognize it by their keys.
        learn_turns: "last" or "all" answers of a dialogue; "" is the habit of its form.
        default_system: the system text of dialogues that have none.
    """

    prompt: str = ""
    response: str = ""
    history: str = ""
    input: str = ""
    system: str = ""
    messages: str = ""
    chosen: str = ""
    rejected: str = ""
    text: str = ""
    role_tag: str = ""
    content_tag: str = ""
    user_tag: str = ""
    assistant_tag: str = ""
    system_tag: str = ""
    dialect: str = ""
    learn_turns: str = ""
    default_system: str = ""

    @cached_property
    def named(self) -> dict[str, str]:
        """The columns that are named, by their roles."""
        return {role: getattr(self, role) for role in ROLES if getattr(self, role)}

    @cached_property
    def has_tags(self) -> bool:
        """Whether messages have keys or roles of other names."""
        return any(getattr(self, tag) for tag in TAGS)


Reader = Callable[[dict[str, Any], Columns], Iterator[Record]]

__all__ = ["ColumnProblem", "Columns", "Reader", "Record", "Rounds", "RowProblem"]
