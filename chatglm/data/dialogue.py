"""Owns what every form of row is read as: rounds, a system text, marks, pairs of answers.

Which of the answers are learned is settled here, for all forms alike: the marks of single messages
and the key `learn_turns`. Does not know the forms.
"""

from typing import NamedTuple

from chatglm.data.records import Columns, Rounds, RowProblem

LEARN_TURNS = ("", "last", "all")


class Dialogue(NamedTuple):
    """A row, whatever its form.

    Attributes:
        rounds: questions and answers, oldest first; the last answer is "" where it is due.
        system: the system text; "" for none.
        marks: for each round, whether its answer may be learned; none where the row marks nothing.
        pairs: better and worse answers to the last question.
        teaches_all: whether the form's habit is to learn every answer, not only the last.
    """

    rounds: Rounds
    system: str = ""
    marks: tuple[bool, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    teaches_all: bool = False

    @property
    def question(self) -> str:
        """The last question."""
        return self.rounds[-1][0]


def list_learned(dialogue: Dialogue, columns: Columns) -> list[int]:
    """Return which rounds have answers that are learned.

    A mark takes an answer out; it stays in the history of later ones.

    Raises:
        RowProblem: if there is none.
    """
    answered = [i for i, (_, answer) in enumerate(dialogue.rounds) if answer]
    if not answered:
        raise RowProblem("no answer: the dialogue ends with its only question")
    takes_all = columns.learn_turns == "all" or (dialogue.teaches_all and not columns.learn_turns)
    asked = answered if takes_all else answered[-1:]
    marks = dialogue.marks or (True,) * len(dialogue.rounds)
    learned = [i for i in asked if marks[i]]
    if not learned:
        which = "all answers are" if takes_all else "the last answer is"
        raise RowProblem(f"nothing is to be learned: {which} marked so; take the row out")
    return learned


def agree(whole: Dialogue, part: Dialogue) -> bool:
    """Say whether two readings of a row go together.

    A question alone, as a column beside the messages, is the first or the last of the dialogue.
    """
    if part.system not in ("", whole.system):
        return False
    if part.rounds == whole.rounds:
        return part.pairs in ((), whole.pairs)
    (query, answer), *more = part.rounds
    return not answer and not more and query in (whole.rounds[0][0], whole.question)


__all__ = ["LEARN_TURNS", "Dialogue", "agree", "list_learned"]
