"""Owns what an archive of torch would run if it were unpickled: told by its opcodes, never run.

Does not know which tensors it holds.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# What tensors and dictionaries of them are made of.
HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch(\.\w+)* (_rebuild_\w+|\w+Storage|Size|device)"
    r"|torch (float|bfloat|int|uint|bool|complex)\w*"
    r"|torch\.nn\.parameter Parameter"
)
LEGACY_PICKLES = 4  # the mark, the protocol, the system, and then the tensors
LOCAL_HEADER_BYTES = 30  # of a member of an archive, before its name
EXTENSIONS = {"EXT1", "EXT2", "EXT4"}


def find_foreign_code(file: Path) -> list[str]:
    """Return what a file would call beside the functions that rebuild tensors, as `module name`.

    Args:
        file: an archive of torch, or a weight file of before 1.6.

    Raises:
        ValueError: if a pickle cannot be read.
        zipfile.BadZipFile: if an archive cannot be.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            named = [name for _ in range(LEGACY_PICKLES) for name in _read_globals(opened)]
        return _keep_foreign(named)
    with zipfile.ZipFile(file) as archive:
        pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
        contents = [_read_member(archive, file, info) for info in pickles]
    return _keep_foreign([name for part in contents for name in _read_globals(io.BytesIO(part))])


def _read_member(archive: zipfile.ZipFile, file: Path, info: zipfile.ZipInfo) -> bytes:
    """Return a member's content; of one that is stored as it is, whatever its check sum says.

    torch can be told to write none (`set_crc32_options`), and zipfile would refuse to read it.
    """
    if info.compress_type != zipfile.ZIP_STORED:
        return archive.read(info)
    with file.open("rb") as opened:
        opened.seek(info.header_offset)
        header = opened.read(LOCAL_HEADER_BYTES)
        named, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        opened.seek(named + extra, io.SEEK_CUR)
        return opened.read(info.compress_size)


def _keep_foreign(named: list[str]) -> list[str]:
    return sorted({name for name in named if not HARMLESS.fullmatch(name)})


def _read_globals(opened: IO[bytes]) -> Iterator[str]:
    """Yield all that one pickle looks up by name.

    A name that is taken from the stack cannot be told for certain, and torch writes none.
    """
    for opcode, value, _ in pickletools.genops(opened):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(value)
        elif opcode.name == "STACK_GLOBAL":
            yield "a name that is put together on the stack"
        elif opcode.name in EXTENSIONS:
            yield f"an extension of pickle, number {value}"


__all__ = ["find_foreign_code"]
