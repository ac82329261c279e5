"""Texts between marks: where a text is cut, how its white space becomes pieces, and back together.

Owns: the signs that keep what a person typed apart from what is meant, and the shape of a part.

Does not know: which marks a tokenizer has, ids, what SentencePiece makes of a part.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from .vocabulary_chatglm import LONGEST_BLANK, WHITESPACE

ESCAPE = "\ufdd0"  # a Unicode noncharacter, which no text meant for interchange contains
ESCAPED = re.compile(f"{ESCAPE}(.)", re.DOTALL)
# What an answer has in it that would be taken for the template's own, with escapes or without.
FALSE_MARK = re.compile(rf"(?<=\[gMASK\]){ESCAPE}*(?=<sop>)|(?<=<){ESCAPE}*(?=eop>\s*\Z)")
SPACES = re.compile("( {2,})")
# What would come out as white space: tags like `<n>`, also in letters that SentencePiece reads as
# these, and its own sign of a space. Parted, or in bytes, they stay.
TAG = re.compile("[<\ufe64\uff1c][^<>\ufe64\ufe65\uff1c\uff1e]+[>\ufe65\uff1e]")
SPACE = "\u2581"
PARTING = "\ud800"  # a lone surrogate, which has no encoding
TYPED = {PARTING: (), SPACE: tuple(f"<0x{byte:02X}>" for byte in SPACE.encode())}


@lru_cache(maxsize=64)
def marks_pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the marks in a text, the longest first; with no marks it finds nothing."""
    choices = [re.escape(mark) for mark in sorted(marks, key=len, reverse=True)]
    return re.compile(f"({'|'.join(choices) or '(?!)'})")


@lru_cache(maxsize=256)
def name_spaces(spaces: str) -> str:
    """Pieces for a run of two or more spaces; a single space that is left over stays."""
    full, rest = divmod(len(spaces), LONGEST_BLANK)
    return f"<|blank_{LONGEST_BLANK}|>" * full + (f"<|blank_{rest}|>" if rest > 1 else " " * rest)


def replace_surrogates(text: str) -> str:
    """A text with a question mark for every lone surrogate, which has no encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def part_typed(match: re.Match[str]) -> str:
    """A tag, parted behind its first sign if SentencePiece would take it for white space."""
    plain = unicodedata.normalize("NFKC", match[0]).lower()
    is_piece = "".join(filter(str.isprintable, plain)) in WHITESPACE
    return match[0][0] + PARTING * is_piece + match[0][1:]


class Sides(NamedTuple):
    """What a mark does to the text beside it."""

    strips_left: bool = False
    strips_right: bool = False
    is_added: bool = False


class Part(NamedTuple):
    """A text between two marks as SentencePiece gets it, and the tokens of what follows it.

    `raw` is the text before its white space became pieces, and `start` its place in the whole one,
    where `spans` are those of the tokens. Both leave out the escapes that stood at `gone`.
    """

    text: str
    is_behind_added: bool = False
    is_before_added: bool = False
    tokens: tuple[str, ...] = ()
    raw: str = ""
    start: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    gone: tuple[int, ...] = ()


def join_parts(parts: list[Part], encoded: Iterator[Any], newline: Any, convert: Any) -> list[Any]:
    """The pieces of a text, or their ids, from those of its parts, which are next in `encoded`."""
    if len(parts) == 1 and not parts[0].tokens:
        return next(encoded)
    joined: list[Any] = []
    for part, pieces in zip(parts, encoded):
        start = pieces.index(newline) + 1 if part.is_behind_added else 0
        joined += pieces[start : len(pieces) - part.is_before_added]
        joined += convert(part.tokens) if part.tokens else []
    return joined


def add_tokens(part: Part, tokens: tuple[str, ...], start: int) -> Part:
    """A part with tokens behind it that stand in the text one after another from `start` on."""
    spans = []
    for token in tokens:
        spans.append((start, start + len(token)))
        start += len(token)
    return part._replace(tokens=(*part.tokens, *tokens), spans=(*part.spans, *spans))


def move_part(part: Part, distance: int) -> Part:
    """A part of a text that is itself that far behind the beginning of another one."""
    spans = tuple((start + distance, end + distance) for start, end in part.spans)
    return part._replace(start=part.start + distance, spans=spans)


def name_white_space(text: str) -> str:
    """Put the white space of a text into pieces."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    cut = SPACES.split(text)  # text, spaces, text, ..., spaces, text
    cut[1::2] = map(name_spaces, cut[1::2])
    return "".join(cut)
