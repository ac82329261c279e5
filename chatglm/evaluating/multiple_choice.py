"""Owns multiple-choice tests: the files of C-Eval and MMLU, the wording of a question, the marks.

A test is a folder with the folders dev, val and test, and one CSV file a subject in each:
`dev/law_dev.csv`. With a header line its columns go by their names (`id`, `question`, `A`, `B`,
`C`, `D`, `answer`), as in C-Eval; without one they are the question, the options and the answer, as
in MMLU. Does not know tokens or models.
"""

import csv
import itertools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.data.records import Record
from chatglm.evaluating.settings import SPLITS
from chatglm.evaluating.subjects import CATEGORIES, CHINESE_NAMES

SHOTS_SPLIT = "dev"
LETTERS = string.ascii_uppercase
HANZI = re.compile("[\u4e00-\u9fff]")


class Question(NamedTuple):
    """A question and what may be its answer.

    Attributes:
        source: "file:line", for messages to people.
        key: its id in the file, or its number there, from 0.
        text: the question.
        options: their texts.
        answer: the letter of the right one; "" if the file does not tell.
    """

    source: str
    key: str
    text: str
    options: tuple[str, ...]
    answer: str


class Subject(NamedTuple):
    """A subject of a test.

    Attributes:
        name: as its file is called.
        questions: to be answered.
        shots: questions that come with their answers.
    """

    name: str
    questions: list[Question]
    shots: list[Question]


class Wording(NamedTuple):
    """The words around questions, those of the test's own programs.

    Attributes:
        header: before the first one, with `{subject}`.
        end: behind each.
    """

    header: str
    end: str


WORDINGS = {
    "zh": Wording(
        "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案："
    ),
    "en": Wording(
        "The following are multiple choice questions (with answers) about {subject}.\n\n",
        "\nAnswer:",
    ),
}


# Files


def read_subjects(
    folder: Path, split: str, shots: int, names: Sequence[str], skips: bool = False
) -> tuple[list[Subject], list[str]]:
    """Read the subjects of a test.

    Args:
        folder: of the test.
        split: which of its folders is asked: "dev", "val" or "test".
        shots: how many questions of dev come with their answers.
        names: of the subjects that are wanted; all if there are none.
        skips: whether bad rows are left out.

    Returns:
        The subjects by their names' order, and what was wrong with the rows that were left out.

    Raises:
        ValueError: for files that are not there, too few shots, or a bad row (with file, line and
            reason) unless they are skipped.
    """
    files = _find_files(folder, split)
    unknown = sorted(set(names) - files.keys())
    if unknown:
        raise ValueError(f"{folder / split} has no subject {unknown[0]}, but {', '.join(files)}")
    problems: list[str] = []
    subjects = []
    shot_files = _find_files(folder, SHOTS_SPLIT) if shots else {}
    for name in names or files:
        given = _read_shots(shot_files.get(name), shots, skips, name) if shots else []
        subjects.append(Subject(name, read_questions(files[name], skips, problems), given))
    return subjects, problems


def _find_files(folder: Path, split: str) -> dict[str, Path]:
    """Return the files of a split by subject."""
    found = sorted((folder / split).glob("*.csv"))
    if not found:
        raise ValueError(
            f"{folder} has no {split}/*.csv: name the folder that has {', '.join(SPLITS)} in it"
        )
    return {file.stem.removesuffix(f"_{split}"): file for file in found}


def _read_shots(file: Path | None, count: int, skips: bool, name: str) -> list[Question]:
    found = read_questions(file, skips, []) if file else []
    found = [question for question in found if question.answer]
    if len(found) < count:
        raise ValueError(
            f"{SHOTS_SPLIT} has {len(found)} questions with answers of {name}, and shots is "
            f"{count}: lower shots"
        )
    return found[:count]


def read_questions(file: Path, skips: bool, problems: list[str]) -> list[Question]:
    """Read the questions of a file.

    Args:
        file: in the form of C-Eval or of MMLU.
        skips: whether bad rows are left out and noted in `problems`.
        problems: what was wrong, one line each.

    Raises:
        ValueError: for a file that is none of these, or a bad row unless they are skipped.
    """
    questions: list[Question] = []
    for source, number, columns, row in _read_rows(file):
        try:
            questions.append(_read_question(source, str(number), columns, row))
        except ValueError as error:
            if not skips:
                remedy = "mend the row, or leave such rows out with bad_rows: skip"
                raise ValueError(f"{source}: {error}; {remedy}") from error
            problems.append(f"{source}: {error}")
    if not questions:
        raise ValueError(f"{file} has no questions that can be used")
    return questions


def _read_rows(file: Path) -> Iterator[tuple[str, int, list[str], list[str]]]:
    """Yield the source and the number of each row below the header, all columns' names, its cells.

    Raises:
        ValueError: for a file that is no CSV file, or has other columns.
    """
    columns: list[str] = []
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened)
            for row in filter(None, reader):
                if not columns:
                    columns, is_header = _name_columns(file, row)
                    if is_header:
                        continue
                yield f"{file}:{reader.line_num}", number, columns, row
                number += 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}") from error


def _name_columns(file: Path, row: Sequence[str]) -> tuple[list[str], bool]:
    """Return the columns' names by a file's first row, and whether it is a header."""
    names = [name.strip().lower() for name in row]
    letters = [letter.lower() for letter in LETTERS[: max(0, len(row) - 2)]]
    is_header = {"question", "a", "b"} <= set(names)
    if not is_header and len(letters) < 2:
        raise ValueError(
            f"{file} has {len(row)} columns: it needs question, A, B, C, D and answer, in this "
            "order or by a header"
        )
    return (names, True) if is_header else (["question", *letters, "answer"], False)


def _read_question(source: str, key: str, columns: list[str], row: list[str]) -> Question:
    if len(row) != len(columns):
        raise ValueError(f"it has {len(row)} columns, and the first row has {len(columns)}")
    cells = {name: cell.strip() for name, cell in zip(columns, row)}
    letters = list(itertools.takewhile(lambda letter: letter.lower() in cells, LETTERS))
    options = tuple(cells[letter.lower()] for letter in letters)
    answer = cells.get("answer", "").upper()
    if not cells["question"] or not all(options):
        raise ValueError("the question or an option is empty")
    if answer and answer not in letters:
        raise ValueError(f"the answer is {answer!r}, and the options are {', '.join(letters)}")
    return Question(source, cells.get("id") or key, cells["question"], options, answer)


# Wording


class PromptTemplate:
    """Words the questions of a subject.

    Args:
        subject: with its shots.
        language: "zh", "en", or "" for that of the questions.
        lists_options: whether the options stand below the question and letters are answers;
            otherwise the options' texts are.
    """

    def __init__(self, subject: Subject, language: str = "", lists_options: bool = True) -> None:
        texts = "".join(question.text for question in subject.questions)
        language = language or ("zh" if HANZI.search(texts) else "en")
        self.subject, self.wording = subject, WORDINGS[language]
        self.lists_options = lists_options
        name = subject.name.replace("_", " ")
        name = CHINESE_NAMES.get(subject.name, name) if language == "zh" else name
        self.header = self.wording.header.format(subject=name)

    def format_question(self, question: Question) -> str:
        """Return the text of a question."""
        if not self.lists_options:
            return question.text + self.wording.end
        options = zip(LETTERS, question.options)
        listed = "".join(f"\n{letter}. {text}" for letter, text in options)
        return question.text + listed + self.wording.end

    def format_answer(self, question: Question) -> str:
        """Return the text of a question's right answer."""
        if self.lists_options:
            return question.answer
        return question.options[LETTERS.index(question.answer)]

    def build_record(self, question: Question, shots: int) -> Record:
        """Return a conversation of so many answered questions, and this one."""
        given = self.subject.shots[:shots]
        texts = [self.format_question(item) for item in (*given, question)]
        texts[0] = self.header + texts[0]
        history = list(zip(texts, map(self.format_answer, given)))
        return Record(question.source, history, texts[-1])


# Marks


def mark_subject(questions: Sequence[Question], picked: Sequence[str]) -> dict[str, Any]:
    """Return how many of the questions whose answer is known were answered, and what share right.

    Args:
        questions: of a subject.
        picked: a letter for each, or "" where it was left out.
    """
    pairs = [(q.answer, letter) for q, letter in zip(questions, picked) if q.answer and letter]
    right = sum(answer == letter for answer, letter in pairs)
    return {"questions": len(pairs), "accuracy": right / len(pairs) if pairs else None}


def mark_test(marks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the marks of subjects: all of them, and those of each category.

    Args:
        marks: of `mark_subject`, by the subjects' names.

    Returns:
        `accuracy` over all questions, `mean_accuracy` over the subjects, `questions`, and the
        same for each of the `categories`; nothing where no answer is known.
    """
    known = {name: mark for name, mark in marks.items() if mark["questions"]}
    categories: dict[str, list[Mapping[str, Any]]] = {}
    for name, mark in known.items():
        if name in CATEGORIES:
            categories.setdefault(CATEGORIES[name], []).append(mark)
    if not known:
        return {}
    summed = {category: _sum_marks(found) for category, found in sorted(categories.items())}
    return {**_sum_marks(list(known.values())), "categories": summed}


def _sum_marks(marks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    questions = sum(mark["questions"] for mark in marks)
    right = sum(mark["accuracy"] * mark["questions"] for mark in marks)
    mean = sum(mark["accuracy"] for mark in marks) / len(marks)
    return {"questions": questions, "accuracy": right / questions, "mean_accuracy": mean}


__all__ = ["PromptTemplate", "Question", "Subject", "mark_subject", "mark_test", "read_subjects"]
