"""Owns the reading of training data: from the lines of JSONL files to records, one by one.

A row may hold messages, a prompt and a response with a history, an instruction, a pair of answers
(`chosen`, `rejected`), several answers with scores (the fork's format) or a plain text. Files are
not held in memory: what is kept of a record is where its line stands. Does not know the prompt
format, nor tokens.
"""

import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.training.settings import Settings

Rounds = list[tuple[str, str]]
SUFFIXES = (".jsonl", ".json")
SHOWN_PROBLEMS = 3


class Record(NamedTuple):
    """One example as people write it.

    Attributes:
        source: "file:line", for messages to people.
        history: the rounds before, oldest first.
        query: the question; the whole text of a plain text.
        answer: the answer, the better one of a pair; "" where only prompts are wanted.
        rejected: the worse one of a pair.
        kind: what is wrong with the worse one, where the row says so.
    """

    source: str
    history: Rounds
    query: str
    answer: str = ""
    rejected: str = ""
    kind: str = ""


class RowProblem(ValueError):
    """A row that cannot be used, and why."""


@dataclass(frozen=True)
class Columns:
    """What the columns of prompt/response rows are called."""

    prompt: str = "prompt"
    response: str = "response"
    history: str = "history"


def read_answers(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield a record for every answer that a row teaches.

    Messages teach each of their answers, behind what was said before it.

    Raises:
        RowProblem: if there is no answer in it.
    """
    if "messages" in row:
        rounds = read_messages(row["messages"])
        for i, (query, answer) in enumerate(rounds):
            if answer:
                yield _check_answer(Record("", rounds[:i], query, answer))
        return
    history, query = _read_prompt(row, columns)
    if "answers" in row:
        answer = _rank_answers(row["answers"])[0][1]
    else:
        answer = _read_first(row, (columns.response, "output", "answer"), "no answer")
    yield _check_answer(Record("", history, query, answer))


def read_pairs(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield a record for every pair of a better and a worse answer.

    Of answers with scores, each is better than the next one that has a lower score. A column `kind`
    says what is wrong with the worse one.

    Raises:
        RowProblem: if there is no such pair.
    """
    kind = row.get("kind")
    for record in _read_pairs(row, columns):
        yield record._replace(kind="" if kind is None else str(kind))


def _read_pairs(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Do what `read_pairs` does, but for the kind."""
    if "answers" in row:
        history, query = _read_prompt(row, columns)
        ranked = _rank_answers(row["answers"])
        pairs = [(a[1], b[1]) for a, b in itertools.pairwise(ranked) if a[0] > b[0]]
        if not pairs:
            raise RowProblem("no two answers with different scores")
        for chosen, rejected in pairs:
            yield Record("", history, query, chosen, rejected)
        return
    if isinstance(row.get("chosen"), list):
        yield _read_message_pair(row)
        return
    history, query = _read_prompt(row, columns)
    chosen, rejected = (_read_first(row, (key,), f"no {key}") for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowProblem("chosen and rejected are the same")
    yield Record("", history, query, chosen, rejected)


def read_prompts(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield the question of a row; its answer, if it has one, is kept for whoever compares.

    Raises:
        RowProblem: if there is none.
    """
    if "messages" in row:
        rounds = read_messages(row["messages"])
        query, answer = rounds[-1]
        yield Record("", rounds[:-1], query, answer)
        return
    if isinstance(row.get("chosen"), list):
        yield _read_message_pair(row)._replace(rejected="")
        return
    history, query = _read_prompt(row, columns)
    keys = (columns.response, "output", "answer", "chosen")
    answer = next((row[key] for key in keys if isinstance(row.get(key), str)), "")
    yield Record("", history, query, answer)


def read_texts(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield the text of a row.

    Raises:
        RowProblem: if there is none.
    """
    yield Record("", [], _read_first(row, ("text", "content"), "no text"))


def read_messages(messages: Any) -> Rounds:
    """Return the rounds of messages; the last answer is "" if it is still due.

    A system message goes before the first question, as in the chat template.

    Raises:
        RowProblem: if roles do not take turns or a text is missing.
    """
    if not isinstance(messages, list) or not messages:
        raise RowProblem("messages is no list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowProblem(f"a message has no text as its content: {message!r:.60}")
    has_system = messages[0].get("role") == "system"
    turns = messages[1:] if has_system else messages
    for i, turn in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        if turn.get("role") != role:
            raise RowProblem(f"role {turn.get('role')!r} where {role!r} was due")
    texts = [turn["content"] for turn in turns]
    if not texts or not all(text.strip() for text in texts):
        raise RowProblem("a message is empty")
    if has_system:
        texts[0] = f"{messages[0]['content']}\n\n{texts[0]}"
    texts += [""] * (len(texts) % 2)
    return list(zip(texts[::2], texts[1::2]))


def _read_message_pair(row: dict[str, Any]) -> Record:
    """Read a pair of conversations, or a conversation and the two ways it goes on."""
    lead = row.get("prompt", [])
    lead = lead if isinstance(lead, list) else [{"role": "user", "content": lead}]
    chosen, rejected = (read_messages([*lead, *row.get(key, [])]) for key in ("chosen", "rejected"))
    if [q for q, _ in chosen] != [q for q, _ in rejected] or chosen[:-1] != rejected[:-1]:
        raise RowProblem("chosen and rejected answer different conversations")
    if not chosen[-1][1] or chosen[-1][1] == rejected[-1][1]:
        raise RowProblem("chosen and rejected need two different last answers")
    return Record("", chosen[:-1], *chosen[-1], rejected[-1][1])


def _read_prompt(row: dict[str, Any], columns: Columns) -> tuple[Rounds, str]:
    """Return the history and the question of a row that has them as columns."""
    if isinstance(row.get(columns.prompt), list):
        rounds = read_messages(row[columns.prompt])
        return rounds[:-1], rounds[-1][0]
    query = _read_first(row, (columns.prompt, "instruction", "question"), "no prompt")
    for key, form in (("input", "{query}\n{part}"), ("prefix", "{query}{part}")):
        if isinstance(row.get(key), str) and row[key]:
            query = form.format(query=query, part=row[key])
    if isinstance(row.get("system"), str) and row["system"]:
        query = f"{row['system']}\n\n{query}"
    return _read_history(row.get(columns.history) or []), query


def _read_history(history: Any) -> Rounds:
    is_list = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not is_list:
        raise RowProblem(f"the history is no list of [question, answer]: {history!r:.60}")
    return [(question, answer) for question, answer in history]


def _read_first(row: dict[str, Any], keys: Iterable[str], problem: str) -> str:
    """Return the first of some columns that holds a text."""
    keys = tuple(keys)
    found = next((row[key] for key in keys if row.get(key) is not None), None)
    if not isinstance(found, str) or not found.strip():
        raise RowProblem(f"{problem} (a text in the column {' or '.join(dict.fromkeys(keys))})")
    return found


def _rank_answers(answers: Any) -> list[tuple[float, str]]:
    """Return the fork's answers, the best first."""
    try:
        ranked = [(float(item["score"]), item["answer"]) for item in answers]
    except (TypeError, KeyError, ValueError) as error:
        raise RowProblem("answers is no list of {answer, score}") from error
    if not ranked or not all(isinstance(text, str) and text.strip() for _, text in ranked):
        raise RowProblem("answers holds no texts")
    return sorted(ranked, key=lambda item: -item[0])


def _check_answer(record: Record) -> Record:
    if not record.query.strip() or not record.answer.strip():
        raise RowProblem("the question or the answer is empty")
    return record


Reader = Callable[[dict[str, Any], Columns], Iterator[Record]]


class RecordFiles(Sequence[Record]):
    """The records of some files, read from the disk whenever they are asked for.

    Every line is read once at first, so that a bad one is reported before anything is trained.

    Args:
        paths: JSONL files, or folders of them.
        reader: makes records of a row.
        columns: of prompt/response rows.
        skips: whether bad rows are counted and left out.

    Attributes:
        problems: the first lines that were left out, with the reason.
        num_skipped: how many there were.

    Raises:
        ValueError: for files that are not there, a bad row (with file, line and reason) unless
            they are skipped, or no usable row at all.
    """

    def __init__(
        self,
        paths: Sequence[str],
        reader: Reader,
        columns: Columns | None = None,
        skips: bool = False,
    ) -> None:
        self.files = list_files(paths)
        self.reader, self.columns, self.skips = reader, columns or Columns(), skips
        self.problems: list[str] = []
        self.num_skipped = 0
        # One entry a record: file, place and size of the line, its number, which of its records.
        self._places = array("Q")
        for number in range(len(self.files)):
            self._scan(number)
        if not len(self):
            raise ValueError(f"there is no usable row in {', '.join(map(str, self.files))}")

    def __len__(self) -> int:
        return len(self._places) // 5

    def __getitem__(self, index: Any) -> Any:
        """Return a record, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        start = 5 * (index % len(self))
        file, offset, size, line, item = self._places[start : start + 5]
        # Opened each time: worker processes would share a place in an open file.
        with self.files[file].open("rb") as handle:
            handle.seek(offset)
            text = handle.read(size).decode("utf-8")
        return self._parse(text, f"{self.files[file]}:{line}")[item]

    def _scan(self, file: int) -> None:
        offset = 0
        with self.files[file].open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    for item in range(self._count(file, number, line)):
                        self._places.extend((file, offset, len(line), number, item))
                offset += len(line)

    def _count(self, file: int, number: int, line: bytes) -> int:
        """Return how many records a line holds; 0 for a bad one that is skipped."""
        source = f"{self.files[file]}:{number}"
        try:
            return len(self._parse(line.decode("utf-8"), source))
        except (RowProblem, UnicodeDecodeError) as error:
            if not self.skips:
                remedy = "mend the row, or leave such rows out with bad_rows: skip"
                raise ValueError(f"{source}: {error}; {remedy}") from error
            self.num_skipped += 1
            if len(self.problems) < SHOWN_PROBLEMS:
                self.problems.append(f"{source}: {error}")
            return 0

    def _parse(self, text: str, source: str) -> list[Record]:
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise RowProblem(f"no JSON object on a line of its own ({error.msg})") from error
        if not isinstance(row, dict):
            raise RowProblem("no JSON object on a line of its own")
        records = [r._replace(source=source) for r in self.reader(row, self.columns)]
        if not records:
            raise RowProblem("no answer")
        return records


def list_files(paths: Sequence[str]) -> list[Path]:
    """Return the data files that are named, and those in the folders that are.

    Raises:
        ValueError: if one is missing or none is named.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"there is no data file {path}")
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else []
        if path.is_dir() and not found:
            raise ValueError(f"the folder {path} has no {' or '.join(SUFFIXES)} file")
        files += found or [path]
    if not files:
        raise ValueError("no data is named: give files with train_data")
    return files


def open_records(paths: Sequence[str], reader: Reader, settings: Settings) -> RecordFiles:
    """Return the records of some files as a stage's settings say.

    Args:
        paths: JSONL files, or folders of them.
        reader: makes records of a row.
        settings: say what the columns are called and what happens to bad rows.

    Raises:
        ValueError: as `RecordFiles`.
    """
    columns = Columns(settings.prompt_column, settings.response_column, settings.history_column)
    return RecordFiles(paths, reader, columns, settings.bad_rows == "skip")


__all__ = [
    "Columns",
    "Record",
    "RecordFiles",
    "RowProblem",
    "open_records",
    "read_answers",
    "read_messages",
    "read_pairs",
    "read_prompts",
    "read_texts",
]
