"""Owns SHA256SUMS, the file by which a model folder's files are compared with what was written.

Its lines are those of `sha256sum`, and `sha256sum -c` reads them too. Does not know what the files
hold, nor which of them a model needs: the caller says that.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from tqdm import tqdm

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
BLOCK_BYTES = 2**20


def hash_file(file: Path, count: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file's content, in lower-case hexadecimal digits.

    Args:
        file: to read.
        count: is called with the number of bytes of every block that was read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
            if count is not None:
                count(len(block))
    return digest.hexdigest()


def hash_bytes(content: bytes) -> str:
    """Return the SHA-256 of a content, as `hash_file` does of a file's."""
    return hashlib.sha256(content).hexdigest()


def format_sums(sums: Mapping[str, str]) -> str:
    """Return the lines with the hashes of files, by their names."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def write_sums(folder: Path, sums: Mapping[str, str]) -> Path:
    """Write the hashes of a folder's files, by their names, and return the file with them."""
    (folder / SUMS).write_text(format_sums(sums), encoding="utf-8", newline="\n")
    return folder / SUMS


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files, by their names with slashes.

    Empty lines and those that begin with # say nothing, as to `sha256sum -c`.

    Raises:
        ValueError: if the file is absent or no text, or for a line of another form, a path that
            leaves the folder, or two hashes of one file.
    """
    sums: dict[str, str] = {}
    for number, line in enumerate(_read_lines(folder), 1):
        if not line.strip() or line.startswith("#"):
            continue
        place = f"line {number} of {folder / SUMS}"
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(
                f"{place} is {line[:100]!r}, and not 64 hexadecimal digits, two spaces and the "
                f"name of a file: take the {SUMS} that was published with the weights"
            )
        digest, name = found[1].lower(), _inner_path(found[2], place)
        if sums.setdefault(name, digest) != digest:
            raise ValueError(f"{place} has another hash of {name} than a line above it")
    return sums


def verify_folder(folder: Path, needed: Iterable[str]) -> None:
    """Compare all files that a folder's SHA256SUMS names with it; reads every byte of them.

    Args:
        folder: of a model.
        needed: names of files that must be among them.

    Raises:
        ValueError: as `read_sums`, or for files that are absent or others, by their names, or if
            a needed one is not named.
    """
    sums = read_sums(folder)
    unnamed = sorted(set(needed) - sums.keys())
    if unnamed:
        raise ValueError(
            f"{folder / SUMS} does not name {', '.join(unnamed)}, which cannot be verified so: "
            f"take the {SUMS} that was published with these weights"
        )
    missing = [name for name in sums if not (folder / name).is_file()]
    present = [name for name in sums if name not in missing]
    changed = [name for name, digest in _hash_files(folder, present) if digest != sums[name]]
    problems = [f"{', '.join(missing)} missing"] if missing else []
    problems += [f"{', '.join(changed)} damaged or changed"] if changed else []
    if problems:
        raise ValueError(
            f"{folder} is not what its {SUMS} says ({'; '.join(problems)}): download these files "
            "again"
        )


def _hash_files(folder: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield names and hashes of files, with a bar of the bytes on a terminal."""
    total = sum((folder / name).stat().st_size for name in names)
    units = {"unit": "B", "unit_scale": True}
    with cast(Any, tqdm)(total=total, desc="verifying", disable=None, **units) as progress:
        for name in names:
            yield name, hash_file(folder / name, progress.update)


def _read_lines(folder: Path) -> list[str]:
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
        return [line.rstrip("\r") for line in text.split("\n")]
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {SUMS} to be verified by: put the one that was published with the "
            "weights there, or do without verifying"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / SUMS} is no UTF-8 text ({error}): fetch it again") from error


def _inner_path(name: str, place: str) -> str:
    """Return the path of a file without needless dots; refuse one that leads out of the folder."""
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    if path.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{place} names {name!r}, which is outside of the folder: mend the line")
    return path.as_posix()
