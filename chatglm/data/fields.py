"""Owns questions and answers that stand in columns of their own, and texts.

The parts of a question, the history before it, one answer or several with scores. Does not know
which columns a form of row has, nor pairs.
"""

import itertools
from typing import Any

from chatglm.data.dialogue import Dialogue
from chatglm.data.messages import is_transcript, parse_json, read_talk
from chatglm.data.records import Rounds, RowProblem

Row = dict[str, Any]
# What a question's column may be called, an answer's, a second part's, in the world's trainers.
QUESTIONS = ("prompt", "instruction", "query", "question")
ANSWERS = ("response", "output", "completion", "answer")
PARTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")


def read_fields(row: Row, question: str, answer: str, *_: str) -> Dialogue:
    """Return the dialogue of a row with a question and an answer in columns.

    Args:
        row: with or without a history, a system text and more parts of the question.
        question: the column; a text, or messages that end with a question.
        answer: the column; a text, or one message.

    Raises:
        RowProblem: if one of them is neither.
    """
    asked, value = read_question(row, question), row.get(answer)
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) for item in items):
        return answer_with(asked, read_answer(value, answer))
    return answer_with(asked, read_text(row, answer, "no answer"))


def read_renamed(row: Row, question: str, answer: str, *_: str) -> Dialogue:
    """Return the dialogue of COIG's columns: the parts of a question are lines of it, in order."""
    order = (
        *("trans_instruction", "trans_input"),
        *("textbox_q_instruction", "textbox_q_context", "textbox_question"),
    )
    texts = [read_text(row, key, "no prompt") for key in order if is_filled(row.get(key))]
    if not texts:
        read_text(row, question, "no prompt")
    return Dialogue([("\n".join(texts), read_text(row, answer, "no answer"))])


def read_question(row: Row, key: str, *_: str) -> Dialogue:
    """Return a dialogue that ends with the question of a row, its answer still due.

    The question is a text, to which an input and a prefix may be joined, or messages.

    Raises:
        RowProblem: if there is no question.
    """
    value = row.get(key)
    history = read_history(row.get("history"))
    system = read_system(row)
    if isinstance(value, str) and not is_transcript(value):
        query = join_question(row, key)
        return Dialogue([*history, (query, "")], system)
    if not isinstance(value, (str, list)):
        read_text(row, key, "no prompt")
    talk = merge_system(read_talk(value, key), system)
    if talk.rounds[-1][1]:
        raise RowProblem(f"no prompt: {key} ends with an answer, not with a question")
    parts = [part for part in (*PARTS, "prefix") if is_filled(row.get(part))]
    if parts:
        raise RowProblem(f"{key} is a whole dialogue, to which {' and '.join(parts)} cannot belong")
    return talk._replace(rounds=[*history, *talk.rounds], marks=(), teaches_all=False)


def join_question(row: Row, key: str) -> str:
    """Return a question of its parts: the instruction, a line break, the input, then the prefix.

    Raises:
        RowProblem: if there is none.
    """
    keys = [part for part in dict.fromkeys((key, *PARTS)) if is_filled(row.get(part))]
    if not keys:
        read_text(row, key, "no prompt")
    query = "\n".join(read_text(row, part, "no prompt") for part in keys)
    if is_filled(row.get("prefix")):
        query += read_text(row, "prefix", "no prefix")
    return query


def read_history(history: Any) -> Rounds:
    """Return the rounds of a column: pairs, or messages.

    Raises:
        RowProblem: if it holds anything else.
    """
    history = parse_json(history) if isinstance(history, str) else history
    if history is None or history == "" or history == []:
        return []
    if isinstance(history, list) and all(isinstance(item, dict) for item in history):
        talk = read_talk(history, "the history")
        if talk.system or not talk.rounds[-1][1]:
            raise RowProblem("the history has a question without its answer, or a system message")
        return talk.rounds
    is_list = isinstance(history, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history
    )
    if not is_list or not all(isinstance(text, str) for pair in history for text in pair):
        raise RowProblem(f"the history is no list of [question, answer]: {history!r:.60}")
    return [(question, answer) for question, answer in history]


def read_system(row: Row) -> str:
    """Return the system text of a row; "" for none.

    Raises:
        RowProblem: if it is no text, or if there are two.
    """
    keys = [key for key in SYSTEMS if is_filled(row.get(key))]
    texts = {read_text(row, key, "no system text") for key in keys}
    if len(texts) > 1:
        raise RowProblem(f"there are two system texts, in {' and '.join(keys)}; leave one")
    return texts.pop() if texts else ""


def merge_system(talk: Dialogue, system: str) -> Dialogue:
    """Return a dialogue with a system text that stood beside it.

    Raises:
        RowProblem: if it has another one.
    """
    if system and talk.system not in ("", system):
        raise RowProblem(
            f"there are two system texts, {talk.system!r:.40} in a message and {system!r:.40} "
            "beside it; leave one"
        )
    return talk._replace(system=talk.system or system)


def answer_with(asked: Dialogue, answer: str) -> Dialogue:
    """Return a dialogue with the answer that was due."""
    return asked._replace(rounds=[*asked.rounds[:-1], (asked.question, answer)])


def read_answer(value: Any, name: str) -> str:
    """Return the one answer that a text, a message or a list of one message is.

    Raises:
        RowProblem: if it is anything else.
    """
    if isinstance(value, str):
        return read_text({name: value}, name, f"no {name}")
    items = value if isinstance(value, list) else [value]
    if len(items) != 1 or not isinstance(items[0], dict):
        raise RowProblem(f"no {name}: it must be a text or one message, got {value!r:.60}")
    # A question that is no matter makes a dialogue of it, whose rules then hold.
    rounds = read_talk([{"role": "user", "content": "?"}, items[0]], name).rounds
    return rounds[0][1]


def read_scored(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of the fork's answers with scores: the best one, and pairs of neighbors.

    Raises:
        RowProblem: if they are not of that form.
    """
    asked = read_question(row, find_question(row))
    ranked = rank_answers(row[key])
    pairs = [(a[1], b[1]) for a, b in itertools.pairwise(ranked) if a[0] > b[0]]
    return answer_with(asked, ranked[0][1])._replace(pairs=tuple(pairs))


def rank_answers(answers: Any) -> list[tuple[float, str]]:
    """Return the fork's answers, the best first."""
    answers = parse_json(answers) if isinstance(answers, str) else answers
    try:
        ranked = [(float(item["score"]), item["answer"]) for item in answers]
    except (TypeError, KeyError, ValueError) as error:
        raise RowProblem("answers is no list of {answer, score}") from error
    if not ranked or not all(isinstance(text, str) and text.strip() for _, text in ranked):
        raise RowProblem("answers holds no texts")
    return sorted(ranked, key=lambda item: -item[0])


def find_question(row: Row) -> str:
    """Return the one column of a row that asks.

    Raises:
        RowProblem: if there is none, or more than one.
    """
    keys = [key for key in QUESTIONS if is_filled(row.get(key))]
    keys = keys or [key for key in PARTS if is_filled(row.get(key))]
    if len(keys) > 1:
        raise RowProblem(
            f"there are {len(keys)} questions, {' and '.join(keys)}; say which is meant with "
            f"columns: prompt={keys[0]}"
        )
    if not keys:
        raise RowProblem(f"no prompt (a text in the column {' or '.join(QUESTIONS)})")
    return keys[0]


def read_text(row: Row, key: str, problem: str) -> str:
    """Return the text of a column.

    Raises:
        RowProblem: if it holds none.
    """
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value
    if value is None or value == "" or isinstance(value, str):
        raise RowProblem(f"{problem}: the column {key} is empty")
    kind = type(value).__name__
    raise RowProblem(f"{problem}: the column {key} holds no text but {value!r:.40} ({kind})")


def is_filled(value: Any) -> bool:
    """Say whether a column holds anything."""
    if isinstance(value, str):
        return not (value.isspace() or not value)
    return value is not None and not (isinstance(value, (list, dict, tuple)) and not value)


__all__ = [
    "ANSWERS",
    "PARTS",
    "QUESTIONS",
    "SYSTEMS",
    "Row",
    "find_question",
    "is_filled",
    "merge_system",
    "read_answer",
    "read_fields",
    "read_question",
    "read_renamed",
    "read_scored",
    "read_system",
    "read_text",
]
