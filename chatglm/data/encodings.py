"""Owns the encodings of text files: UTF-8 is read, others are named, and read where that is asked.

Nothing is guessed silently: a guess stands in the message of a refusal only. Does not know rows.
"""

import codecs
from collections import Counter
from pathlib import Path

from chatglm.data.rows import FileProblem

HEAD = 1 << 16
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Bytes that may be damaged in a file that is UTF-8 otherwise, as a share of its characters.
DAMAGED_SHARE = 0.01
SURE = 8


def find_mark(head: bytes) -> tuple[bytes, str]:
    """Return the mark that a file begins with and the encoding that it means; "" if it has none."""
    return next(((mark, name) for mark, name in MARKS if head.startswith(mark)), (b"", ""))


def check_name(encoding: str) -> str:
    """Return Python's name of an encoding; "" stays so.

    Raises:
        ValueError: if there is no such encoding of text.
    """
    try:
        name = codecs.lookup(encoding).name if encoding else ""
        "x".encode(name or "utf-8")
    except LookupError as error:
        raise ValueError(
            f"there is no encoding {encoding!r}: name one as gb18030, big5, shift_jis, utf-16"
        ) from error
    return "utf-8" if name == "utf-8-sig" else name


def count_utf8(data: bytes) -> tuple[int, int]:
    """Return how many characters beyond ASCII bytes have as UTF-8, and how many are damaged."""
    if data.isascii():
        return 0, 0
    decoded = data.decode("utf-8", "replace")
    damaged = decoded.count("\ufffd") - data.count("\ufffd".encode())
    beyond = sum(not char.isascii() for char in decoded) - damaged
    return beyond, damaged


def is_damaged_utf8(path: Path) -> bool:
    """Whether a file that cannot be decoded is UTF-8 all the same, but for a few bytes."""
    beyond = damaged = 0
    with path.open("rb") as file:
        # Pieces end with a line, since a character that a piece cuts would count as damaged.
        while piece := file.read(HEAD) + file.readline(HEAD):
            found = count_utf8(piece)
            beyond, damaged = beyond + found[0], damaged + found[1]
    return 0 < damaged <= DAMAGED_SHARE * beyond


def check_other(head: bytes, encoding: str, path: Path) -> None:
    """Refuse to read as another encoding what is UTF-8: the text would be another one.

    Raises:
        FileProblem: naming the remedy.
    """
    beyond, damaged = count_utf8(head)
    if beyond >= SURE and damaged <= 1:
        raise FileProblem(
            f"{path} is UTF-8, and encoding says {encoding}: leave the key out, or give it to the "
            "other files alone, as an entry {path: FILE, encoding: " + encoding + "}"
        )


def is_utf8(head: bytes) -> bool:
    """Whether the first bytes of a file may be UTF-8; one with many zero bytes is none."""
    return _can_decode(head, "utf-8") and head.count(b"\0") * 20 <= len(head)


def refuse_bytes(path: Path | str, plain: Path, line: int = 1) -> FileProblem:
    """Return what is to be said of a file that is no UTF-8, or is damaged.

    Args:
        path: that was named.
        plain: of which the bytes are.
        line: that cannot be decoded.
    """
    if is_damaged_utf8(plain):
        return FileProblem(f"{path}:{line}: behind this line stand bytes that are no UTF-8")
    guess = guess_encoding(read_odd(plain))
    words = f"it looks like {guess}, which is read with encoding: {guess}"
    if not guess:
        words = "name its encoding with the key encoding, as gb18030"
    return FileProblem(f"{path}:{line}: the file is no UTF-8; {words}")


def read_odd(path: Path) -> bytes:
    """Return so many bytes of a file that a guess is possible, from where it is not ASCII."""
    with path.open("rb") as file:
        while (piece := file.read(HEAD)) and piece.isascii() and b"\0" not in piece:
            continue
        return piece


def guess_encoding(data: bytes) -> str:
    """Return the likeliest encoding of bytes that are no UTF-8; "" if none is likely.

    Chinese encodings are told apart by what is common in them: the frequent characters of GB 2312
    have both bytes above 0xA0, and of Big5 two fifths of the second bytes are ASCII letters.
    """
    if b"\0" in data:
        counts = Counter(place % 2 for place, byte in enumerate(data[:4096]) if not byte)
        return "utf-16-le" if counts[1] > counts[0] else "utf-16-be"
    for name in ("utf-16-le", "utf-16-be"):
        if _is_utf16(data[: len(data) // 2 * 2].decode(name, "replace")):
            return name
    pairs = _find_pairs(data)
    likely = {
        "gb18030": sum(0xB0 <= a <= 0xD7 and b >= 0xA1 for a, b in pairs),
        "big5": sum(0xA4 <= a <= 0xC6 and (b < 0x7F or b >= 0xA1) for a, b in pairs),
        "shift_jis": sum(a in (0x82, 0x83) or 0x88 <= a <= 0x9F for a, _ in pairs),
        "cp1252": 0,
    }
    if sum(b < 0x7F for _, b in pairs) < 0.1 * len(pairs):
        likely["big5"] = 0
    for name in sorted(likely, key=lambda name: -likely[name]):
        is_likely = likely[name] > 0.4 * len(pairs) if name != "cp1252" else pairs
        if is_likely and _can_decode(data, name):
            return name
    return ""


def _is_utf16(text: str) -> bool:
    """Whether a text is Chinese or Japanese, and no Shift JIS whose kana look like Chinese."""
    codes = [ord(char) for char in text]
    near = sum(0x3000 <= code <= 0x30FF or 0x4E00 <= code <= 0x9FFF for code in codes)
    kana = sum(code >> 8 in (0x82, 0x83) for code in codes)
    return near > 0.8 * len(codes) and kana < 0.3 * len(codes)


def _find_pairs(data: bytes) -> list[tuple[int, int]]:
    """Return the pairs of bytes that begin beyond ASCII."""
    pairs, place = [], 0
    while place < len(data) - 1:
        if data[place] >= 0x80:
            pairs.append((data[place], data[place + 1]))
        place += 1 + (data[place] >= 0x80)
    return pairs


def _can_decode(data: bytes, name: str) -> bool:
    try:
        codecs.getincrementaldecoder(name)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def copy_as_utf8(path: Path, source: Path, target: Path, encoding: str) -> None:
    """Write a copy of a text file in UTF-8, without a mark.

    Args:
        path: that was named.
        source: of which the bytes are.
        target: that is written.
        encoding: of the source.

    Raises:
        FileProblem: if it is not of the encoding, with the line.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with source.open("rb") as file, target.open("wb") as copy:
        while True:
            piece = file.read(1 << 20)
            try:
                text = decoder.decode(piece, final=not piece)
                copy.write(text.removeprefix("\ufeff").encode("utf-8"))
            except UnicodeError as error:
                reason = getattr(error, "reason", error)
                raise FileProblem(
                    f"{path}: near line {line}: the file is no {encoding} ({reason}); it is read "
                    "as UTF-8 without the key encoding"
                ) from error
            line += text.count("\n")
            if not piece:
                return


__all__ = [
    "check_name",
    "check_other",
    "copy_as_utf8",
    "find_mark",
    "guess_encoding",
    "is_damaged_utf8",
    "refuse_bytes",
]
