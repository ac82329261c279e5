"""Where in a text its tokens stand.

Owns: the way back from a part of a text, as SentencePiece gets it, to the characters it was made
of. What SentencePiece itself changes (it normalizes, and drops signs) it tells with its own spans.

Does not know: which marks a tokenizer has, how its inputs are closed, truncated or padded: an id
carries its span along.
"""

import re
from bisect import bisect_right
from typing import Any

from .fragments_chatglm import SPACE, Part, name_spaces
from .vocabulary_chatglm import LONGEST_BLANK

NAMED = re.compile(r"[\n\t]| {2,}")
WORD = re.compile(r"\S+")
Span = tuple[int, int]  # of characters, the end excluded


class PlacedId(int):
    """An id that knows its span. A token that was put to the text, and has none, has `NOWHERE`."""

    span: Span


NOWHERE: Span = (0, 0)


def place_id(index: int, span: Span) -> PlacedId:
    """An id with its span."""
    placed = PlacedId(index)
    placed.span = span
    return placed


def read_spans(ids: list[int]) -> list[Span]:
    """The spans of ids."""
    return [index.span if isinstance(index, PlacedId) else NOWHERE for index in ids]


def place_part(part: Part, found: Any, newline: str, removes_space: bool, lowers: bool) -> Any:
    """Pieces of a part and their spans in the whole text.

    Args:
        found: what SentencePiece says of `part.text`: its `pieces` and their `offsets`.
        newline: the piece that keeps spaces beside an added token.

    Returns:
        The places among `found` of what is left of them, and a span for each of these and then for
        each of the tokens behind the part. A character that became several signs belongs to the
        token of the last of them, and to those that have nothing else.
    """
    pieces, offsets = found["pieces"], found["offsets"]
    first = pieces.index(newline) + 1 if part.is_behind_added else 0
    kept = range(first, len(pieces) - part.is_before_added)
    origins = trace_text(part.raw, removes_space, lowers)
    shift = len(newline) * part.is_behind_added
    spans: list[Span] = []
    for place in reversed(kept):
        start, end = (min(max(x - shift, 0), len(origins)) for x in offsets[place])
        if start < end:
            spans.append((origins[start][0] + part.start, origins[end - 1][1] + part.start))
        elif spans and pieces[place].startswith("<0x"):
            spans.append(spans[-1])  # of the bytes of a character, the last has the span
        else:  # an end of the text, or the first pieces of a character that became several
            edge = origins[start] if start < len(origins) else (len(part.raw),) * 2
            first_end = edge[0] if pieces[place] == SPACE else edge[1]
            spans.append((edge[0] + part.start, first_end + part.start))
    return kept, [restore_span(span, part.gone) for span in (*reversed(spans), *part.spans)]


def restore_span(span: Span, gone: tuple[int, ...]) -> Span:
    """A span where the signs that were taken out at the places `gone` are counted again."""
    if not gone:
        return span
    left = [place - index for index, place in enumerate(gone)]  # the places without those before
    start, end = span
    return start + bisect_right(left, start), end + bisect_right(left, max(end - 1, start))


def trace_text(raw: str, removes_space: bool, lowers: bool) -> list[Span]:
    """For each character of a text that `_prepare_text` returns, those of `raw` it stands for."""
    spans: list[Span] = [(place, place + 1) for place in range(len(raw))]
    if removes_space:
        raw, spans = _trace_words(raw)
    if lowers:
        spans = [span for sign, span in zip(raw, spans) for _ in sign.lower()]
        raw = raw.lower()
    traced, last = [], 0
    for match in NAMED.finditer(raw):
        traced += spans[last : match.start()]
        traced += _trace_blank(match[0], spans[match.start() : match.end()])
        last = match.end()
    return traced + spans[last:]


def _trace_words(raw: str) -> tuple[str, list[Span]]:
    """A text with one space between any two words, and what each character stands for."""
    spans: list[Span] = []
    last = 0
    for word in WORD.finditer(raw):
        if spans:
            spans.append((last, word.start()))
        spans += [(place, place + 1) for place in range(word.start(), word.end())]
        last = word.end()
    return " ".join(raw.split()), spans


def _trace_blank(blank: str, spans: list[Span]) -> list[Span]:
    """What each character of the pieces for a line break, a tab or a run of spaces stands for."""
    if blank in ("\n", "\t"):
        return spans * len({"\n": "<n>", "\t": "<|tab|>"}[blank])
    traced: list[Span] = []
    for start in range(0, len(blank), LONGEST_BLANK):
        run = spans[start : start + LONGEST_BLANK]
        traced += [(run[0][0], run[-1][1])] * len(name_spaces(" " * len(run)))
    return traced
