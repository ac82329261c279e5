"""Owns the dataset of a set that is streamed: examples without end, in an order that can be had
again.

A pass over the files follows another one; where a run is in it follows from its steps alone, so one
that goes on skips what it was trained on. Does not know files, nor what an example is made of.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from chatglm.data.records import Record, RowProblem
from chatglm.data.streaming import RecordStream
from chatglm.training.settings import KeyProblem

# Examples are drawn from so many, which are those that come next in the files.
BUFFER = 1000


class StreamedExamples(IterableDataset):
    """Examples of a stream of records, shuffled as far as a buffer goes.

    Args:
        stream: the records.
        expand: makes the examples of a record, of it and a generator of its own.
        seed: of the orders.
        examples: those of the first records, which were looked at; what is told of the data.
    """

    def __init__(
        self,
        stream: RecordStream,
        expand: Callable[[Record, random.Random], Iterable[Any]],
        seed: int,
        examples: Any = None,
    ) -> None:
        self.stream, self.expand, self.seed = stream, expand, seed
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        """Yield examples, pass after pass; worker processes share the records of each.

        Raises:
            ValueError: for a row that cannot be used, or a pass without an example.
        """
        for number in itertools.count():
            rng = random.Random(f"{self.seed}/{number}")
            count = 0
            for example in shuffle(self._read_pass(number, rng), rng):
                count += 1
                yield example
            if not count:
                raise ValueError("no row of the stream is short enough: raise max_length")

    def _read_pass(self, number: int, rng: random.Random) -> Iterator[Any]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for place, record in enumerate(self.stream.read(rng)):
            if place % workers == own:
                yield from self._make(record, random.Random(f"{self.seed}/{number}/{place}"))

    def _make(self, record: Record, rng: random.Random) -> list[Any]:
        """Return the examples of a record; none of one that is left out."""
        report = self.stream.head.report
        try:
            made = list(self.expand(record, rng))
        except RowProblem as problem:
            if not self.stream.options.skips:
                raise
            source, _, reason = str(problem).partition(": ")
            report.skip(source, reason)
            return []
        report.too_long += not made
        return made


def shuffle(examples: Iterable[Any], rng: random.Random) -> Iterator[Any]:
    """Yield examples in an order that is random within a buffer."""
    held: list[Any] = []
    for example in examples:
        if len(held) < BUFFER:
            held.append(example)
            continue
        place = rng.randrange(BUFFER)
        yield held[place]
        held[place] = example
    rng.shuffle(held)
    yield from held


def check_streaming(max_steps: int) -> None:
    """Refuse a stream without an end: nobody knows how long an epoch is.

    Raises:
        KeyProblem: naming the key.
    """
    if max_steps <= 0:
        raise KeyProblem(
            "streaming needs max_steps: how many rows there are is not known before they are read"
        )


__all__ = ["StreamedExamples", "check_streaming", "shuffle"]
