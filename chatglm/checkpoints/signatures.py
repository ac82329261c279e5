"""Owns what a file really is, told by its first bytes: weights, or what stands in their place.

Does not know what a file is needed for, nor whether all of it is there.
"""

from pathlib import Path

POINTER, EMPTY, PAGE, TEXT, COMPRESSED, UNKNOWN = (
    "a Git-LFS pointer",
    "an empty file",
    "a web page",
    "a text",
    "a compressed file",
    "bytes of no known form",
)
ARCHIVE, LEGACY, SAFETENSORS, GGUF, GGML = (
    "an archive of torch",
    "a weight file of torch before 1.6",
    "a safetensors file",
    "a GGUF file of llama.cpp",
    "a GGML file of chatglm.cpp",
)
# A number in a pickle, by which torch marked its files until 1.6.
LEGACY_MARK = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_MARK_END = 32  # it is there within so many bytes, whichever protocol the pickle has
BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", POINTER),
    (b"PK\x03\x04", ARCHIVE),
    (b"GGUF", GGUF),
    (b"ggml", GGML),
    (b"lmgg", GGML),
    (b"\x1f\x8b", COMPRESSED),
    (b"\xfd7zXZ", COMPRESSED),
    (b"\x28\xb5\x2f\xfd", COMPRESSED),
)
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<error")
REMEDIES = {
    POINTER: "fetch it again (git lfs pull)",
    LEGACY: "write it anew, torch.save(torch.load(FILE, weights_only=True), FILE)",
    COMPRESSED: "unpack it",
    SAFETENSORS: "give it its ending .safetensors, or take the file of the right kind",
    ARCHIVE: "give it its ending .bin, or take the file of the right kind",
    GGUF: "take the weights that it was made from",
    GGML: "take the weights that it was made from",
}
BYTES_LOOKED_AT = 512


def identify_file(file: Path) -> str:
    """Return what a file is, one of the phrases above.

    Raises:
        OSError: if it cannot be read.
    """
    with file.open("rb") as opened:
        content = opened.read(BYTES_LOOKED_AT)
    if not content:
        return EMPTY
    for beginning, kind in BEGINNINGS:
        if content.startswith(beginning):
            return kind
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 2**32:
        return SAFETENSORS
    if content.startswith(b"\x80") and LEGACY_MARK in content[:LEGACY_MARK_END]:
        return LEGACY
    if content.lstrip().lower().startswith(PAGES):
        return PAGE
    return TEXT if is_text(content) else UNKNOWN


def is_text(content: bytes) -> bool:
    """Whether the beginning of a file is text that a person could read."""
    try:
        text = content[:-4].decode() if len(content) == BYTES_LOOKED_AT else content.decode()
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def choose_remedy(kind: str) -> str:
    """Return what to do about a file of a kind that does not belong where it is."""
    return REMEDIES.get(kind, "download it again")


__all__ = ["choose_remedy", "identify_file", "is_text"]
