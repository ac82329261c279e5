"""The vocabulary file of every generation, brought to one layout.

Owns: the names and types of the pieces that are no text (special tokens, white space, bytes), and
what is appended to a file of the first generation. No id is written down here.

Does not know: the tokenizer that reads the file.
"""

LONGEST_BLANK = 80  # spaces
BLANKS = {f"<|blank_{width}|>": " " * width for width in range(2, LONGEST_BLANK + 1)}
WHITESPACE = {"<n>": "\n", "<|tab|>": "\t", **BLANKS}
MASK_PIECES = ("[MASK]", "[gMASK]", "[sMASK]")
BORDER_PIECES = ("<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")

# What stands before the text pieces, and behind them since the second generation, each with
# SentencePiece's number for the type of the piece.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
FIRST_PIECES = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<pad>": CONTROL}
FIRST_PIECES["<n>"] = USER_DEFINED
LATE_PIECES = {
    **dict.fromkeys((*MASK_PIECES, *BORDER_PIECES), CONTROL),
    **dict.fromkeys(("<|tab|>", *BLANKS), USER_DEFINED),
    **{f"<0x{byte:02X}>": BYTE for byte in range(256)},
}
SPECIAL_TEXTS = tuple(
    piece
    for piece, piece_type in {**FIRST_PIECES, **LATE_PIECES}.items()
    if piece_type in (UNKNOWN, CONTROL)
)
# Tags of an encoded SentencePiece model, and its sub-message {trainer_spec: {byte_fallback: true}}.
PIECE_TAG, TRAINER_TAG, NORMALIZER_TAG = 0x0A, 0x12, 0x1A
BYTE_FALLBACK = b"\x12\x03\x98\x02\x01"


def _encode_piece(piece: str, piece_type: int) -> bytes:
    """One `pieces` entry of a SentencePiece model: name, score 0.0 and type."""
    body = b"\x0a%c%b\x15\0\0\0\0\x18%c" % (len(piece), piece.encode("ascii"), piece_type)
    return b"%c%c%b" % (PIECE_TAG, len(body), body)


FIRST_ENTRIES = b"".join(_encode_piece(*item) for item in FIRST_PIECES.items())
LATE_ENTRIES = b"".join(_encode_piece(*item) for item in LATE_PIECES.items())


def _read_entries(model_proto: bytes) -> list[tuple[int, bytes]]:
    """The top-level entries of an encoded message as (tag, content)."""
    entries, position, end = [], 0, len(model_proto)
    padded = model_proto + b"\xff\x7f"  # a length that is cut off reads as one beyond the end
    while position < end:
        tag, length, shift, byte = padded[position], 0, 0, 0x80
        while byte & 0x80 and shift < 63:
            position += 1
            byte = padded[position]
            length, shift = length | (byte & 0x7F) << shift, shift + 7
        start, position = position + 1, position + 1 + length
        entries.append((tag, padded[start:position]))
    if position > end:
        raise ValueError(f"is truncated: it stops short at byte {end}; download it again")
    return entries


def _check_is_model(model_proto: bytes) -> None:
    """Refuse what is not a SentencePiece model at all, and say what it is."""
    if model_proto.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"is a Git LFS pointer of {len(model_proto)} bytes, not the vocabulary itself; "
            "run `git lfs pull` or download the file it stands for"
        )
    if not model_proto.startswith(bytes([PIECE_TAG])):
        what = f"starts with {model_proto[:8]!r}" if model_proto else "is empty (0 bytes)"
        raise ValueError(
            f"{what} and is no SentencePiece model; download the checkpoint's ice_text.model"
        )


def complete_vocabulary(model_proto: bytes) -> bytes:
    """Bring a vocabulary to the layout of the 130528-row checkpoints.

    A file of the first generation ends after the text pieces. The special tokens, the pieces for
    tabs and runs of spaces and the 256 bytes are appended in encoded form. That is enough, as any
    reader concatenates repeated entries and merges the others. A complete file stays as it is.

    Raises:
        ValueError: for a Git LFS pointer, an empty, truncated or foreign file. The message says
            which it is and what to do, in words that follow the name of the file.
    """
    _check_is_model(model_proto)
    entries = _read_entries(model_proto)
    if not {TRAINER_TAG, NORMALIZER_TAG} <= {tag for tag, _ in entries}:
        raise ValueError(
            f"is truncated: no settings behind its {len(entries)} pieces; download it again"
        )
    pieces = [body for tag, body in entries if tag == PIECE_TAG]
    names = [body[2 : 2 + ord(body[1:2] or b"\0")].decode("utf-8", "replace") for body in pieces]
    if not model_proto.startswith(FIRST_ENTRIES):
        raise ValueError(
            f"is the vocabulary of another model: it begins with {names[: len(FIRST_PIECES)]}, not "
            f"with {[*FIRST_PIECES]} of the right types; download the checkpoint's ice_text.model"
        )
    if LATE_ENTRIES in model_proto:
        return model_proto
    if known := LATE_PIECES.keys() & set(names):
        raise ValueError(
            f"has {len(known)} of the {len(LATE_PIECES)} pieces that follow the text pieces, or in "
            "another order or of another type; it must have all or none of them"
        )
    return model_proto + LATE_ENTRIES + BYTE_FALLBACK
