"""Owns what a trainer is fed with: datasets of rows, and how rows become tensors.

Rows are padded, or several documents share a row and see only themselves (`pack`): their positions
and their mask come from the model, which owns them. Does not know formats of files or prompts.

Shapes: `B` batch, `S` columns.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from chatglm.data.dialects import read_answers
from chatglm.data.files import RecordFiles, open_records
from chatglm.data.records import Record, RowProblem
from chatglm.training.data.rendering import IGNORED_LABEL, Example, Renderer
from chatglm.training.settings import Settings

Row = dict[str, list[int]]
# So many batches are sorted at once: enough to waste little on padding, few enough to mix rows.
POOL_BATCHES = 50
# So many bad rows are named, and the others counted.
SHOWN_PROBLEMS = 3


class Examples(Dataset):
    """Rows of ids, made when they are asked for; all are measured at first.

    Args:
        records: what they are made of.
        render: makes one, or None where a row is to be left out.

    Attributes:
        lengths: tokens of each row.
        num_learned: tokens that are learned, of all rows.
        num_rows: rows of the files that these are of.
        num_skipped: records that were left out for their length.

    Raises:
        ValueError: for records that cannot be rendered, the first ones and how many there are, or
            if none is left.
    """

    def __init__(self, records: RecordFiles, render: Callable[[Record], Any]) -> None:
        self.records, self.render = records, render
        # Arrays, of which a million examples take 16 MB.
        self.kept, self.lengths = array("q"), array("q")
        self.num_learned = self.num_rows = 0
        self._last_source = ""
        self._problems: list[str] = []
        before = records.num_skipped
        for index in range(len(records)):
            length = self._measure(index)
            if length:
                self.kept.append(index)
                self.lengths.append(length)
        if self._problems:
            raise ValueError(_tell_first(self._problems))
        wrong = records.num_skipped - before
        self.num_skipped = records.report.too_long = len(records) - len(self.kept) - wrong
        self._check_share()

    def _check_share(self) -> None:
        """Refuse a set of which little is short enough, or nothing.

        Raises:
            ValueError: naming the counts and the remedies.
        """
        count, total = self.num_skipped, len(self.records)
        share = self.records.options.max_long_share
        if not self.kept or count > share * total:
            raise ValueError(
                f"{count} of {total} examples are too long, more than max_long_share ({share:g}): "
                "raise max_length, or set long_rows to cut"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Any:
        """Return what `render` makes of a record."""
        return self.render(self.records[self.kept[index]])

    def _measure(self, index: int) -> int:
        try:
            record = self.records[index]
            made = self.render(record)
        except RowProblem as problem:
            if not self.records.skips:
                self._problems.append(str(problem))
            else:
                source, _, reason = str(problem).partition(": ")
                self.records.report.skip(source, reason)
            return 0
        if made is None:
            return 0
        self.num_learned += count_learned(made)
        self.num_rows += record.source != self._last_source
        self._last_source = record.source
        return _count_tokens(made)


def _tell_first(problems: Sequence[str]) -> str:
    """Return the first problems of rows, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more:,} more" if more > 0 else "")


def count_learned(made: Any) -> int:
    """Return the tokens of a row that are learned: its answer, or both of a pair."""
    if isinstance(made, Example):
        return len(made.answer_ids)
    return sum(map(count_learned, made)) if isinstance(made[0], Example) else 0


def _count_tokens(made: Any) -> int:
    """Return the tokens of a row, or of the longest of several."""
    if isinstance(made, Example):
        return len(made.prompt_ids) + len(made.answer_ids)
    return max(map(_count_tokens, made)) if isinstance(made[0], Example) else len(made)


def read_examples(paths: Sequence[str], settings: Settings, renderer: Renderer) -> Examples:
    """Return the rendered answers of some files.

    Raises:
        ValueError: for files and rows that cannot be used.
    """
    return Examples(open_records(paths, read_answers, settings), renderer.render)


class Packed(Dataset):
    """Rows of several documents each, as full as they get.

    Documents are put, the longest first, each into the fullest row that still has room for it.

    Args:
        examples: the documents.
        max_length: columns of a row.
    """

    def __init__(self, examples: Examples, max_length: int) -> None:
        self.examples = examples
        self.rows = pack_lengths(examples.lengths, max_length)
        self.lengths = [sum(examples.lengths[i] for i in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        """Return the documents of a row."""
        return [self.examples[i] for i in self.rows[index]]


def pack_lengths(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which documents share a row, best fit first.

    Args:
        lengths: of the documents; none is longer than `room`.
        room: tokens of a row.
    """
    rows: list[list[int]] = []
    # The rows that have room left, by the tokens of it.
    by_room: dict[int, list[int]] = {}
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[document]
        left = next((r for r in range(size, room + 1) if by_room.get(r)), None)
        if left is None:
            rows.append([])
            number, left = len(rows) - 1, room
        else:
            number = by_room[left].pop()
        rows[number].append(document)
        by_room.setdefault(left - size, []).append(number)
    return rows


class LengthSampler(Sampler[int]):
    """Draws rows so that those of a batch are of like length, and little is wasted on padding.

    Every epoch has another order, which follows from the seed and its number alone. Rows are mixed,
    cut into pools, sorted in each, and the batches that come out are mixed again, so that neither
    short nor long ones come in a row.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows that should be alike: those of a pass, in all processes.
        seed: of the orders.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say whose order is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rows, size = rng.permutation(len(self)), self.batch_size
        for start in range(0, len(rows), POOL_BATCHES * size):
            pool = rows[start : start + POOL_BATCHES * size]
            pool[:] = pool[np.argsort(self.lengths[pool], kind="stable")]
        whole = len(rows) // size * size
        mixed = rng.permutation(rows[:whole].reshape(-1, size))  # (batches, size)
        yield from (*mixed.ravel().tolist(), *rows[whole:].tolist())


def pick_rows(num_rows: int, seed: int, start: int, count: int) -> list[int]:
    """Return some of the rows of an endless walk that passes over all, each time in a new order.

    What they are follows from the arguments alone, so a run that goes on needs no memory of it.

    Args:
        num_rows: of a pass.
        seed: of the orders.
        start: how many rows of the walk come before.
        count: rows to return.
    """
    rows: list[int] = []
    while len(rows) < count:
        number, place = divmod(start + len(rows), num_rows)
        order = np.random.default_rng((seed, number)).permutation(num_rows)
        rows += order[place : place + count - len(rows)].tolist()
    return rows


class PaddingCollator:
    """Pads examples on the right to the longest of a batch.

    Args:
        pad_id: the pad token.
        multiple: columns are a multiple of it, as kernels for float16 and bfloat16 like.
    """

    def __init__(self, pad_id: int, multiple: int = 1) -> None:
        self.pad_id, self.multiple = pad_id, multiple

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each `(B, S)`."""
        ids, mask = pad_rows([e.input_ids for e in examples], self.pad_id, self.multiple)
        labels, _ = pad_rows([e.labels for e in examples], IGNORED_LABEL, self.multiple)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PackingCollator:
    """Puts the documents of each row behind one another, none of which sees the others.

    Args:
        pad_id: the pad token.
        locate: the model's `locate_documents`.
    """

    def __init__(self, pad_id: int, locate: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> None:
        self.pad_id, self.locate = pad_id, locate

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        """Return `input_ids` and `labels` `(B, S)`, positions `(B, P, S)`, mask `(B, 1, S, S)`."""
        joined = [[i for e in row for i in e.input_ids] for row in rows]
        labels = [[i for e in row for i in e.labels] for row in rows]
        numbers = [[n for n, e in enumerate(row) for _ in e.input_ids] for row in rows]
        input_ids, _ = pad_rows(joined, self.pad_id)
        document_ids, _ = pad_rows(numbers, -1)
        position_ids, attention_mask = self.locate(input_ids, document_ids)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "labels": pad_rows(labels, IGNORED_LABEL)[0],
        }


def find_learned(labels: Tensor) -> Tensor:
    """Return where the next token is learned, `(B, S)` boolean: the only logits that count.

    Args:
        labels: `(B, S)`.
    """
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1), value=False)


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Return rows as one tensor `(B, S)`, and the mask of what is theirs, 1 = real.

    Args:
        rows: of ids.
        pad_id: fills the rest.
        multiple: S is a multiple of it.
        side: "right" or "left", where the rest is.
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    filled = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(filled)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        filled[number, place] = torch.tensor(row, dtype=filled.dtype)
        mask[number, place] = 1
    return filled, mask


__all__ = [
    "Examples",
    "LengthSampler",
    "Packed",
    "PackingCollator",
    "PaddingCollator",
    "find_learned",
    "pack_lengths",
    "pad_rows",
    "pick_rows",
    "read_examples",
]
