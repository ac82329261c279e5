"""Owns the finding of a row's form, and what each kind of training reads from it.

The form is the one that the row's keys show, or that is named with `dialect`; where two forms fit
and say different things, the row is refused. Does not know files, the prompt format, nor tokens.
"""

import difflib
import functools
from collections.abc import Iterator
from typing import Any

from chatglm.data.columns import rename_columns
from chatglm.data.dialogue import Dialogue, agree, list_learned
from chatglm.data.fields import ANSWERS, QUESTIONS, Row, is_filled
from chatglm.data.messages import read_talk
from chatglm.data.pairs import is_whole
from chatglm.data.records import Columns, Record, Rounds, RowProblem
from chatglm.data.registry import BY_NAME, DIALECTS, Dialect
from chatglm.data.strangers import refuse_strangers

# How to tell the columns, by what rows are read for.
TELLING = {
    "answers": "prompt=COLUMN response=COLUMN, or messages=COLUMN",
    "pairs": "prompt=COLUMN chosen=COLUMN rejected=COLUMN",
    "prompts": "prompt=COLUMN, or messages=COLUMN",
    "texts": "text=COLUMN",
}
MISSED = {"answers": "answer", "pairs": "pair", "prompts": "prompt", "texts": "text"}
LACKING = {
    "answers": (("no prompt", QUESTIONS), ("no answer", ANSWERS)),
    "pairs": (("no chosen", ("chosen",)), ("no rejected", ("rejected",)), ("no prompt", QUESTIONS)),
    "prompts": (("no prompt", QUESTIONS),),
    "texts": (("no text", ("text", "content")),),
}
STAGES = {
    "answers": "sft and ptuning learn it",
    "pairs": "reward and dpo learn it",
    "texts": "pretrain learns it",
}
PAIRED = "the row is a pair of answers, as reward and dpo learn it"
SHOWN_KEYS = 12


def read_answers(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield a record for every answer that a row teaches.

    Messages teach each of their answers, behind what was said before it; columns teach the last.

    Raises:
        RowProblem: if there is no answer in it that may be learned, or its form is not clear.
    """
    name, dialogue = read_row(row, columns, "answers")
    for i in list_learned(dialogue, columns):
        query, answer = dialogue.rounds[i]
        system = dialogue.system or columns.default_system
        yield Record("", dialogue.rounds[:i], query, answer, system=system, dialect=name)


def read_pairs(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield a record for every pair of a better and a worse answer.

    Of answers with scores, each is better than the next one that has a lower score. A column `kind`
    says what is wrong with the worse one.

    Raises:
        RowProblem: if there is no such pair, or the row's form is not clear.
    """
    kind = str(row["kind"]) if is_filled(row.get("kind")) else ""
    name, dialogue = read_row(row, columns, "pairs")
    if not dialogue.pairs:
        raise RowProblem("no two answers with different scores")
    record = _open_record(name, dialogue, columns)._replace(kind=kind)
    for chosen, rejected in dialogue.pairs:
        yield record._replace(answer=chosen, rejected=rejected)


def read_prompts(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield the question of a row; its answer, if it has one, is kept for whoever compares.

    Raises:
        RowProblem: if there is none, or the row's form is not clear.
    """
    # A result that is no text, as a number to compare with, is nobody's answer here.
    row = {k: v for k, v in row.items() if k not in ANSWERS or _is_said(v)}
    yield _open_record(*read_row(row, columns, "prompts"), columns)


def read_texts(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield the text of a row.

    Raises:
        RowProblem: if there is none.
    """
    name, dialogue = read_row(row, columns, "texts")
    yield Record("", [], dialogue.question, dialect=name)


def read_messages(messages: Any) -> Rounds:
    """Return the rounds of messages; the last answer is "" if it is still due.

    A system message goes before the first question, as in the chat template.

    Raises:
        RowProblem: if roles do not take turns or a text is missing.
    """
    dialogue = read_talk(messages)
    query, answer = dialogue.rounds[-1]
    record = Record("", dialogue.rounds[:-1], query, answer, system=dialogue.system)
    query, rounds = record.frame()
    return [*rounds, (query, answer)]


def read_row(row: Row, columns: Columns, aim: str) -> tuple[str, Dialogue]:
    """Return the name of a row's form, and the dialogue that it holds.

    Args:
        row: as it stands in the file.
        columns: what is told of it.
        aim: "answers", "pairs", "prompts" or "texts".

    Raises:
        RowProblem: if no form fits, or two that say different things.
    """
    row = rename_columns({key: value for key, value in row.items() if value is not None}, columns)
    if columns.dialect:
        row = keep_told(row, BY_NAME[columns.dialect], aim)
        dialects: tuple[Dialect, ...] = (BY_NAME[columns.dialect],)
    else:
        refuse_strangers(row, aim)
        filled = {key: value for key, value in row.items() if is_filled(value)}
        dialects = find_dialects(frozenset(filled), aim)
        # A form that only empty columns show is found for the sake of what is said of them.
        row, dialects = (
            (filled, dialects) if dialects else (row, find_dialects(frozenset(row), aim))
        )
    if not dialects:
        raise RowProblem(describe_stranger(row, aim))
    readings = [(dialect, dialect.read(row, *dialect.keys)) for dialect in dialects]
    if aim == "answers" and "rejected" in row and not readings[0][1].rounds[-1][1]:
        raise RowProblem(f"no answer: {PAIRED}")
    return settle(readings) if len(readings) > 1 else (dialects[0].name, readings[0][1])


def settle(readings: list[tuple[Dialect, Dialogue]]) -> tuple[str, Dialogue]:
    """Return the fullest of several readings of a row.

    Raises:
        RowProblem: if one of them says anything else.
    """
    dialect, whole = max(readings, key=lambda item: sum(len(r) for r in item[1].rounds))
    for other, part in readings:
        if not agree(whole, part):
            first, second = (f"{d.name} ({', '.join(d.keys)})" for d in (dialect, other))
            raise RowProblem(
                f"the row can be read as {first} and as {second}, which say different things; say "
                f"which is meant with dialect: {dialect.name} or dialect: {other.name}"
            )
    return dialect.name, whole


@functools.lru_cache(maxsize=1024)
def find_dialects(keys: frozenset[str], aim: str) -> tuple[Dialect, ...]:
    """Return the forms that keys show, without those that are but a part of another one."""
    shown = [d for d in DIALECTS if aim in d.aims and keys.issuperset(d.keys)]
    return tuple(d for d in shown if not any(other.covers(d) for other in shown))


def keep_told(row: Row, dialect: Dialect, aim: str) -> Row:
    """Return what the form that is named reads of a row.

    Raises:
        RowProblem: if the row is not of that form, or the form is of no use here.
    """
    if aim not in dialect.aims:
        fitting = ", ".join(d.name for d in DIALECTS if aim in d.aims and d.meaning)
        raise RowProblem(f"rows of the dialect {dialect.name} hold no {aim}; such are {fitting}")
    lacking = [key for key in dialect.keys if key not in row]
    if lacking:
        raise RowProblem(
            f"the row is not of the dialect {dialect.name}: {' and '.join(lacking)} is not among "
            f"its columns {list_keys(row)}"
        )
    return {key: value for key, value in row.items() if key in dialect.known}


def describe_stranger(row: Row, aim: str) -> str:
    """Return what a row of no known form lacks, what form it is like, and how to tell."""
    if aim == "answers" and find_dialects(frozenset(row), "pairs"):
        chosen = next((key for key in ("chosen", "response_chosen") if key in row), "chosen")
        role = "messages" if is_whole(row.get(chosen)) else "response"
        return f"no answer: {PAIRED}; to learn the better one, write columns: {role}={chosen}"
    forms = {other: find_dialects(frozenset(row), other) for other in ("answers", "pairs", "texts")}
    known = [(other, found[0]) for other, found in forms.items() if found and found[0].meaning]
    if known:
        other, form = known[0]
        return (
            f"no {MISSED[aim]}: the row has the columns {list_keys(row)} and is of the dialect "
            f"{form.name}, as {STAGES[other]}; else say what they are with columns: {TELLING[aim]}"
        )
    problem = next(
        (lack for lack, keys in LACKING[aim] if not any(is_filled(row.get(key)) for key in keys)),
        "no form that is known",
    )
    near = find_nearest(frozenset(map(str, row)), aim)
    return (
        f"{problem}: the row has the columns {list_keys(row)}; nearest is {near.name} "
        f"({', '.join(near.keys)}): say what the columns are with columns: {TELLING[aim]}"
    )


@functools.lru_cache(maxsize=1024)
def find_nearest(keys: frozenset[str], aim: str) -> Dialect:
    """Return the form of whose keys the most are among some, or nearly."""

    def compare(wanted: str) -> float:
        ratios = (difflib.SequenceMatcher(None, wanted, key).ratio() for key in keys)
        return max(ratios, default=0.0)

    fitting = [dialect for dialect in DIALECTS if aim in dialect.aims and dialect.meaning]
    return max(fitting, key=lambda d: sum(map(compare, d.keys)) / len(d.keys))


def list_keys(row: Row) -> str:
    """Return the names of a row's columns, in words."""
    keys = [str(key) for key in row]
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return (", ".join(keys[:SHOWN_KEYS]) or "(none)") + more


def _is_said(value: Any) -> bool:
    """Say whether an answer's column holds a text or messages."""
    is_talk = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return isinstance(value, (str, dict)) or is_talk


def _open_record(name: str, dialogue: Dialogue, columns: Columns) -> Record:
    """Return a record of the last question of a dialogue, with its answer."""
    query, answer = dialogue.rounds[-1]
    system = dialogue.system or columns.default_system
    return Record("", dialogue.rounds[:-1], query, answer, system=system, dialect=name)


__all__ = ["read_answers", "read_messages", "read_pairs", "read_prompts", "read_texts"]
