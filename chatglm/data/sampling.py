"""Owns which rows are drawn: those held out, and those of an entry with a weight.

What is drawn follows from the seed and the rows alone, so a run that goes on draws the same. Rows
are drawn whole: the answers of a dialogue are never on both sides. Does not know files or records.
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

FIELDS, ITEM = 5, 4


class Rows(NamedTuple):
    """Which records are of one row.

    Attributes:
        starts: the number of each row's first record, `(rows,)`.
        counts: how many records each row has, `(rows,)`.
        sources: the number of each row's entry, `(rows,)`.
    """

    starts: Any
    counts: Any
    sources: Any


def find_rows(places: "array[int]", source_of: Sequence[int]) -> Rows:
    """Return the rows of all records.

    Args:
        places: what is kept of records, as of `RecordFiles`.
        source_of: the entry of each file.
    """
    import numpy as np

    table = np.frombuffer(places, dtype=np.uint64).reshape(-1, FIELDS)
    starts = np.flatnonzero(table[:, ITEM] == 0)
    counts = np.diff(np.append(starts, len(table)))
    return Rows(starts, counts, np.asarray(source_of)[table[starts, 0].astype(np.int64)])


def count_rows(places: "array[int]", chosen: "array[int]") -> int:
    """Return how many rows some records are of, each counted once."""
    import numpy as np

    table = np.frombuffer(places, dtype=np.uint64).reshape(-1, FIELDS)
    numbers = np.unique(np.frombuffer(chosen, dtype=np.uint64))
    return int((table[numbers.astype(np.int64), ITEM] == 0).sum())


def choose_records(
    rows: Rows, weights: Sequence[float], held_out_share: float, is_held_out: bool, seed: int
) -> Any:
    """Return the numbers of the records that are trained on, or held out.

    Args:
        rows: of all entries.
        weights: how often the rows of each entry are seen in an epoch.
        held_out_share: of the rows of each entry.
        is_held_out: whether those are wanted, or the others.
        seed: of the draws.

    Raises:
        ValueError: if no row is left on a side.
    """
    import numpy as np

    chosen = []
    for number, weight in enumerate(weights):
        own = np.flatnonzero(rows.sources == number)
        order = own[np.random.default_rng((seed, number, 0)).permutation(len(own))]
        cut = round(held_out_share * len(own))
        side = order[:cut] if is_held_out else order[cut:]
        part = round(weight % 1 * len(side))
        drawn = side[np.random.default_rng((seed, number, 1)).permutation(len(side))[:part]]
        chosen += [np.repeat(side, int(weight)), drawn]
    numbers = np.sort(np.concatenate(chosen))
    if not len(numbers):
        share = f"val_ratio {held_out_share:g}" if held_out_share else f"weight {min(weights):g}"
        raise ValueError(f"{share} of {len(rows.starts)} rows leaves no row: choose another share")
    starts, counts = rows.starts[numbers], rows.counts[numbers]
    # Each row's records, one behind the other: its first one's number and those that follow.
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + steps


__all__ = ["Rows", "choose_records", "count_rows", "find_rows"]
