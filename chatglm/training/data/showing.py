"""Owns how rows are shown: lines for people, with what is learned marked, and fields for programs.

Does not know how they are read.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from chatglm.training.data.measuring import Measured, Shown

# What is learned stands between these: green on a terminal, in brackets elsewhere.
COLOURS, BRACKETS = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")
WORSE_COLOURS = ("\x1b[31m", "\x1b[0m")
# Characters that a terminal would act on; rows may hold any.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
GAP = " ... "


def has_colours(stream: TextIO) -> bool:
    """Whether colours are to be written to a stream."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def describe_rows(measured: Measured) -> list[str]:
    """Return what was read of files, and how long the rows are, as lines."""
    lines = measured.report.describe()
    if measured.examples != measured.rows:
        lines.append(f"{measured.rows:,} rows give {measured.examples:,} examples")
    lengths = measured.list_lengths()
    if lengths:
        lines.append(
            "tokens of an example: {min:,} to {max:,}, half have at most {median:,}, 95 % at most "
            "{p95:,}; max_length is {max_length:,}".format(**lengths)
        )
        where = "in these first rows of the stream" if measured.is_head else "in an epoch"
        lines.append(f"{measured.num_tokens:,} tokens {where}{_describe_learned(measured)}")
    return lines


def _describe_learned(measured: Measured) -> str:
    learned, tokens = measured.num_learned, measured.num_tokens
    if not learned or not tokens:
        return ""
    return f", {learned:,} of them learned" if learned <= tokens else f", {learned:,} are learned"


def show_examples(shown: Iterable[Shown], is_coloured: bool, limit: int = 0) -> Iterator[str]:
    """Yield lines of examples, what is learned marked.

    Args:
        shown: the examples.
        is_coloured: whether by colours, or by brackets.
        limit: characters of a part; 0 for all. The middle of longer ones is left out.
    """
    good = COLOURS if is_coloured else BRACKETS
    for item in shown:
        yield f"{item.source}: {_count(item)}"
        text = _clean(item.prompt, limit)
        yield text + (_mark(item.learned, good, limit) if item.learned else "")
        if item.rejected is not None:
            bad = WORSE_COLOURS if is_coloured else ("", "")
            yield f"rejected: {_mark(item.rejected, bad, limit)}"
        if item.reference:
            yield f"the data answers: {_clean(item.reference, limit)}"


def _count(item: Shown) -> str:
    if not item.learned_tokens:
        return f"a question of {item.prompt_tokens:,} tokens"
    return f"{item.prompt_tokens:,} tokens, then {item.learned_tokens:,} that are learned"


def _mark(text: str, marks: tuple[str, str], limit: int) -> str:
    return f"{marks[0]}{_clean(text, limit)}{marks[1]}"


def _clean(text: str, limit: int) -> str:
    """Return a text that does nothing to a terminal, its middle left out if it is long."""
    plain = CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    if not limit or len(plain) <= limit:
        return plain
    half = (limit - len(GAP)) // 2
    return f"{plain[:half]}{GAP}{plain[-half:]}"


def list_fields(measured: Measured, duplicates: int, shown: Iterable[Shown]) -> dict[str, Any]:
    """Return what is told of rows as one object for programs.

    Args:
        measured: the counts.
        duplicates: examples that are there a second time.
        shown: the first examples.
    """
    report = measured.report
    dialects = sorted(report.dialects, key=lambda name: -report.dialects[name])
    return {
        "rows": measured.rows,
        "examples_in_all": measured.examples,
        "skipped": [item._asdict() for item in measured.left_out],
        "dialect": dialects[0] if len(dialects) == 1 else dialects,
        "dialects": dict(report.dialects),
        "files": [vars(file) for file in report.files],
        "lengths": measured.list_lengths(),
        "tokens": measured.num_tokens,
        "learned_tokens": measured.num_learned,
        "duplicates": duplicates,
        "warnings": list(report.warnings),
        "examples": [_list_fields(item) for item in shown],
    }


def _list_fields(item: Shown) -> dict[str, Any]:
    return {key: value for key, value in item._asdict().items() if value is not None}


__all__ = ["describe_rows", "has_colours", "list_fields", "show_examples"]
