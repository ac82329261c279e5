"""Owns what is counted of rows that were read: rows, tokens, what was left out and why.

The rows are those of a training (`training.data`); nothing is read a second time but the first
ones. Does not know how any of it is shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from chatglm.data.records import Record
from chatglm.data.report import DataReport, name_reason
from chatglm.training.data.rendering import Example, Renderer

TOO_LONG = "too long"
BLANK = "[MASK]"


class Shown(NamedTuple):
    """An example as the model is given it.

    Attributes:
        source: "file:line".
        prompt: what stands before the answer.
        learned: the answer, or what is missing in a text; "" of a question that is practised.
        rejected: the worse answer of a pair; None of anything else.
        reference: what the data answers to a question that is practised; None of anything else.
        prompt_tokens, learned_tokens: how many they are, the markers among them.
    """

    source: str
    prompt: str
    learned: str
    rejected: str | None = None
    reference: str | None = None
    prompt_tokens: int = 0
    learned_tokens: int = 0


class LeftOut(NamedTuple):
    """Rows that were left out for one reason.

    Attributes:
        reason: in words.
        count: of them.
        places: "file:line: reason" of the first ones.
    """

    reason: str
    count: int
    places: list[str]


@dataclass
class Measured:
    """What is told of rows.

    Attributes:
        report: of their files.
        rows: that are used, whole rows of the files.
        examples: that they are: a row of messages is one for each answer.
        lengths: `(examples,)` in tokens; of packed rows, of each of those.
        num_learned: tokens that are learned; None where they are drawn anew in every epoch.
        window: the most tokens of a row.
        is_head: whether these are but the first rows, of a set that is streamed.
    """

    report: DataReport
    rows: int
    examples: int
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_learned: int | None = None
    window: int = 0
    is_head: bool = False

    @property
    def num_tokens(self) -> int:
        """All tokens of an epoch, pads left out."""
        return int(self.lengths.sum())

    @property
    def left_out(self) -> list[LeftOut]:
        """What was left out, by the reason."""
        report = self.report
        found = []
        for reason, count in report.skipped.items():
            places = [s for s in report.shown if name_reason(s.partition(": ")[2]) == reason]
            found.append(LeftOut(reason, count, places))
        return found + ([LeftOut(TOO_LONG, report.too_long, [])] if report.too_long else [])

    def list_lengths(self) -> dict[str, int]:
        """Return the spread of the lengths in tokens."""
        if not len(self.lengths):
            return {}
        middle, most = np.percentile(self.lengths, (50, 95), method="inverted_cdf")
        bounds = {"min": int(self.lengths.min()), "median": int(middle), "p95": int(most)}
        return {**bounds, "max": int(self.lengths.max()), "max_length": self.window}


def measure(dataset: Any, renderer: Renderer) -> Measured:
    """Return what there is to tell of a dataset of a stage.

    Args:
        dataset: `Examples`, `Packed`, `Blanks`, `Prompts` or `StreamedExamples`.
        renderer: of its rows.
    """
    examples = find_examples(dataset)
    records = examples.records
    lengths = getattr(dataset, "lengths", None)
    lengths = examples.lengths if lengths is None else lengths
    return Measured(
        report=records.report,
        rows=getattr(examples, "num_rows", records.report.kept),
        examples=len(examples),
        lengths=np.asarray(lengths, dtype=np.int64),
        num_learned=getattr(examples, "num_learned", None),
        window=renderer.max_length,
        is_head=hasattr(dataset, "stream"),
    )


def find_duplicates(dataset: Any) -> int:
    """Return how many examples are there a second time, by what they say."""
    examples = find_examples(dataset)
    numbers = getattr(examples, "kept", range(len(examples.records)))
    seen: set[int] = set()
    for number in numbers:
        record = examples.records[number]
        seen.add(hash((record.system, str(record.history), *record[2:5])))
    return len(numbers) - len(seen)


def find_examples(dataset: Any) -> Any:
    """Return what a dataset is made of that has records: itself, or what it packs or asks."""
    for name in ("examples", "rows"):
        inner = getattr(dataset, name, None)
        if hasattr(inner, "records"):
            return inner
    return dataset


def show_first(dataset: Any, renderer: Renderer, count: int) -> Iterator[Shown]:
    """Yield the first examples of a dataset of a stage.

    Args:
        dataset: as of `measure`.
        renderer: of its rows.
        count: how many at most.
    """
    examples = find_examples(dataset)
    for index in range(min(count, len(examples))):
        if hasattr(examples, "kept"):
            record = examples.records[examples.kept[index]]
        else:  # a piece of a text
            record = examples.records[examples.places[index][0]]
        yield _show(examples[index], record, renderer)


def _show(made: Any, record: Record, renderer: Renderer) -> Shown:
    if isinstance(made, Example):
        return _show_answer(made, record, renderer)
    if made and isinstance(made[0], Example):
        better, worse = made
        shown = _show_answer(better, record, renderer)
        return shown._replace(rejected=_tell(worse.answer_ids, record.rejected, renderer))
    prompt = _tell_prompt(made, record, renderer)
    return Shown(record.source, prompt, "", None, record.answer, len(made), 0)


def _show_answer(made: Example, record: Record, renderer: Renderer) -> Shown:
    return Shown(
        record.source,
        _tell_prompt(made.prompt_ids, record, renderer),
        _tell(made.answer_ids, record.answer, renderer),
        prompt_tokens=len(made.prompt_ids),
        learned_tokens=len(made.answer_ids),
    )


def _tell_prompt(ids: list[int], record: Record, renderer: Renderer) -> str:
    """Return a prompt's text, the markers at its end left out; what was cut is not in it."""
    query, history = record.frame()
    if query and renderer.encode_prompt(query, history) == ids:
        return renderer.build_prompt(query, history)
    blank = renderer.tokenizer.convert_tokens_to_ids(BLANK)
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == blank:
            parts.append([])
        else:
            parts[-1].append(token)
    # Decoding leaves out special tokens, a blank in the middle of a text too.
    return BLANK.join(renderer.tokenizer.decode(part) for part in parts)


def _tell(ids: list[int], text: str, renderer: Renderer) -> str:
    """Return an answer's text: as it was written, unless it was cut."""
    if text and [*renderer.encode_text(text), renderer.end_id] == ids:
        return text
    return renderer.tokenizer.decode(ids, skip_special_tokens=True)


__all__ = [
    "LeftOut",
    "Measured",
    "Shown",
    "find_duplicates",
    "find_examples",
    "measure",
    "show_first",
]
