"""Owns what a row of a file is before anybody asks what it means, and what can be wrong with files.

Does not know kinds of files.
"""

from typing import Any, NamedTuple

from chatglm.data.records import RowProblem


class FileProblem(ValueError):
    """A file that cannot be read as a whole: to leave rows out would not help."""


class BytesProblem(RowProblem):
    """A row of bytes that are no UTF-8: of a damaged row, or of a file in another encoding."""


class Row(NamedTuple):
    """A row, and where it stands.

    Attributes:
        offset, size: bytes of the file, or of its plain copy.
        line: that it begins on, from 1.
        content: its columns, or what is wrong with it.
    """

    offset: int
    size: int
    line: int
    content: dict[str, Any] | RowProblem


def decode(data: bytes) -> str:
    """Return the text of a row's bytes.

    Raises:
        BytesProblem: if they are no UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BytesProblem(f"bytes that are no UTF-8 ({error.reason})") from error


__all__ = ["BytesProblem", "FileProblem", "Row", "decode"]
