"""Owns what keys mean, in words: read from the docstrings of the classes that have them.

Does not know any key.
"""

import inspect
import itertools
import re
import textwrap

# The head of a field in a docstring: our "a, b: meaning", or a library's "a (`int`, ...):".
OURS = re.compile(r"^(\w+(?:, \w+)*): (.*)$")
THEIRS = re.compile(r"^(\w+) ?\(.*\):?\s*(.*)$")
SECTIONS = re.compile(r"^(Attributes|Args|Parameters|Arguments):\s*$", re.MULTILINE)
SENTENCE = re.compile(r"^(.+?[.!?])(?:\s+[A-Z`\[*]|$)")
MARKUP = re.compile(r"\[`~?([^`\]]+)`\](?:\([^)]*\))?|\[([^\]]+)\]\([^)]*\)")
SHORTENED = " ..."


def read_meanings(docstring: str | None) -> dict[str, str]:
    """Return the meaning of each field that a docstring explains, as one paragraph.

    Args:
        docstring: with a section "Attributes:", "Args:" or "Parameters:".
    """
    text = inspect.cleandoc(docstring or "")
    found = SECTIONS.search(text)
    if found is None:
        return {}
    lines = text[found.end() :].strip("\n").splitlines()
    # The section ends where a line is as far to the left as its head.
    inside = itertools.takewhile(lambda line: not line or line.startswith(" "), lines)
    lines = textwrap.dedent("\n".join(inside)).splitlines()
    meanings: dict[str, list[str]] = {}
    current: list[list[str]] = []
    for line in lines:
        is_head = line.strip() and not line.startswith((" ", ">"))
        head = (OURS.match(line) or THEIRS.match(line)) if is_head else None
        if head is not None:
            current = [meanings.setdefault(name, []) for name in head[1].split(", ")]
        elif is_head:
            current = []  # A section behind this one, or a heading in it.
        for words in current:
            words.append(head[2] if head is not None else line.strip())
    return {name: " ".join(" ".join(words).split()) for name, words in meanings.items()}


def shorten(meaning: str, width: int) -> str:
    """Return a meaning as one line: its first sentence, or what there is room for of it.

    Args:
        meaning: of a key, "" if nobody says.
        width: columns.
    """
    plain = MARKUP.sub(lambda found: found[1] or found[2], " ".join(meaning.split()))
    sentence = SENTENCE.match(plain)
    line = (sentence[1] if sentence else plain).rstrip(".")
    return textwrap.shorten(line, width, placeholder=SHORTENED) if len(line) > width else line


__all__ = ["read_meanings", "shorten"]
