"""Owns preferences: a better and a worse answer behind the same dialogue.

The two may be texts, messages, or whole dialogues that differ in their last answer. Does not know
which columns a form of row has.
"""

from typing import Any

from chatglm.data.dialogue import Dialogue, agree
from chatglm.data.fields import (
    ANSWERS,
    PARTS,
    QUESTIONS,
    Row,
    answer_with,
    find_question,
    is_filled,
    merge_system,
    read_answer,
    read_question,
    read_system,
)
from chatglm.data.messages import ASSISTANT, ROLE_KEYS, ROLES, is_transcript, read_talk
from chatglm.data.records import RowProblem
from chatglm.data.strangers import refuse_strangers

TALKS = ("messages", "conversations")


def read_preference(row: Row, chosen: str, rejected: str, *_: str) -> Dialogue:
    """Return the dialogue of a row with a better and a worse answer in columns of their own.

    Args:
        row: with what comes before them in columns, in messages, or in the two themselves.
        chosen, rejected: the columns.

    Raises:
        RowProblem: if they are not answers of one dialogue, or the same.
    """
    if is_whole(row[chosen]) and is_whole(row[rejected]):
        return read_whole_pair(row, chosen, rejected)
    lead = read_lead(row)
    ways = [row[key] for key in (chosen, rejected)]
    if all(isinstance(way, list) for way in ways) and max(map(len, ways)) > 1:
        before = list_messages(lead)
        both = {key: [*before, *row[key]] for key in (chosen, rejected)}
        return read_whole_pair({**both, "system": lead.system}, chosen, rejected)
    return pair_up(lead, *(read_answer(row[key], key) for key in (chosen, rejected)))


def read_whole_pair(row: Row, chosen: str, rejected: str, *_: str) -> Dialogue:
    """Return the dialogue of two whole ones, which differ in their last answer.

    What stands beside them, a question or messages, has to be part of them.
    """
    system = read_system(row)
    better, worse = (merge_system(read_talk(row[key], key), system) for key in (chosen, rejected))
    same = better.rounds[:-1] == worse.rounds[:-1] and better.question == worse.question
    if not same or better.system != worse.system:
        raise RowProblem(f"{chosen} and {rejected} answer different conversations")
    asked = Dialogue(better.rounds, better.system)
    for key in (*QUESTIONS, *TALKS):
        if is_filled(row.get(key)) and not _is_part(row, key, asked):
            raise RowProblem(f"{key} is no part of the conversation that {chosen} answers")
    return pair_up(asked, better.rounds[-1][1], worse.rounds[-1][1])


def _is_part(row: Row, key: str, whole: Dialogue) -> bool:
    """Say whether a column holds what a whole dialogue begins with, or a question of it."""
    value = row[key]
    is_talk = isinstance(value, list) or (isinstance(value, str) and is_transcript(value))
    if key not in TALKS and not is_talk:
        return agree(whole, read_question({key: value}, key))
    part = read_talk(value, key)
    begun = whole.rounds[: len(part.rounds)]
    if not part.rounds[-1][1]:
        begun = [*begun[:-1], (begun[-1][0], "")]
    return part.rounds == begun and part.system in ("", whole.system)


def read_second(row: Row, rejected: str, *_: str) -> Dialogue:
    """Return the dialogue of a row with its answer, and a worse one beside it (ms-swift).

    Raises:
        RowProblem: if there is no answer, or two.
    """
    talks = [key for key in TALKS if is_filled(row.get(key))]
    answers = [key for key in ANSWERS if is_filled(row.get(key))]
    if len(talks) + len(answers) != 1:
        found = " and ".join((*talks, *answers)) or "none"
        raise RowProblem(f"{rejected} needs one better answer beside it, there is {found}")
    if answers:
        lead = read_question(row, find_question(row))
        return pair_up(lead, read_answer(row[answers[0]], answers[0]), row[rejected])
    if rejected == "rejected_messages":
        return read_whole_pair({**row, talks[0]: None, "better": row[talks[0]]}, "better", rejected)
    talk = merge_system(read_talk(row[talks[0]], talks[0]), read_system(row))
    return pair_up(talk._replace(marks=(), teaches_all=False), talk.rounds[-1][1], row[rejected])


def read_openai_pair(row: Row, chosen: str, rejected: str, *_: str) -> Dialogue:
    """Return the dialogue of OpenAI's preferences, whose input holds the messages before."""
    asked = row.get("input")
    if not isinstance(asked, dict) or not is_filled(asked.get("messages")):
        raise RowProblem("no prompt: input holds no messages")
    refuse_strangers(asked, "pairs")
    return read_preference({**row, "input": None, "messages": asked["messages"]}, chosen, rejected)


def read_two_answers(row: Row, question: str, answers: str, *_: str) -> Dialogue:
    """Return the dialogue of a row with a list of the better and the worse answer."""
    value = row[answers]
    if not isinstance(value, list) or len(value) != 2:
        raise RowProblem(f"no rejected: {answers} is no list of the better and the worse answer")
    chosen, rejected = (read_answer(item, answers) for item in value)
    return pair_up(read_question(row, question), chosen, rejected)


def read_lead(row: Row) -> Dialogue:
    """Return the dialogue that comes before the two answers, its answer still due.

    Raises:
        RowProblem: if there is none, or one in messages and another in columns.
    """
    leads: list[Dialogue] = []
    for key in TALKS:
        if is_filled(row.get(key)):
            talk = merge_system(read_talk(row[key], key), read_system(row))
            if talk.rounds[-1][1]:
                raise RowProblem(f"{key} ends with an answer, where the two answers were due")
            leads.append(talk._replace(marks=(), teaches_all=False))
    if not leads or any(is_filled(row.get(key)) for key in (*QUESTIONS, *PARTS)):
        leads.append(read_question(row, find_question(row)))
    if not all(agree(leads[0], lead) for lead in leads[1:]):
        raise RowProblem("messages and the question beside them are different")
    return leads[0]


def list_messages(lead: Dialogue) -> list[dict[str, str]]:
    """Return the messages of a dialogue whose last answer is due, its system text left out."""
    texts = [text for pair in lead.rounds for text in pair][:-1]
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def pair_up(lead: Dialogue, chosen: Any, rejected: Any) -> Dialogue:
    """Return a dialogue with a pair of answers to its last question.

    Raises:
        RowProblem: if one is missing, or both are the same.
    """
    pair = read_answer(chosen, "chosen"), read_answer(rejected, "rejected")
    if pair[0] == pair[1]:
        raise RowProblem("chosen and rejected are the same")
    return answer_with(lead, pair[0])._replace(pairs=(pair,))


def is_whole(value: Any) -> bool:
    """Say whether one of two answers is a whole dialogue: it begins with a question."""
    if isinstance(value, str):
        return is_transcript(value)
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    first = next((value[0][key] for key in ROLE_KEYS if value[0].get(key) is not None), "")
    return ROLES.get(str(first).lower()) != ASSISTANT


__all__ = ["is_whole", "read_openai_pair", "read_preference", "read_second", "read_two_answers"]
