"""Keeps compiled kernels on the disk.

Owns the folder and the files in it, and whom they may come from: what is read here is run. So only
regular files count that this user has written, in a folder that nobody else can write to. Knows
nothing of kernels but their names and bytes.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_VARIABLE = "CHATGLM_KERNEL_CACHE"  # names a folder; "off" for none
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
LARGEST_FILE = 2**24  # bytes; a kernel takes some thousands
# Without these (Windows) files have an owner of another kind, and links need rights of their own.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def find_cache_folder() -> Path | None:
    """Return the folder of compiled kernels, or None if there shall be none."""
    named = os.environ.get(CACHE_VARIABLE)
    if named == "off":
        return None
    if named:
        return _require_absolute(Path(named), CACHE_VARIABLE)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return _require_absolute(Path(root) / "chatglm" / "kernels", "the user's cache")


def _require_absolute(folder: Path, source: str) -> Path | None:
    """Return a folder, but not one that another working directory would make another one."""
    if folder.is_absolute():
        return folder
    logger.warning_once(
        f"Compiled kernels are not kept: {source} is {folder}, and must be an absolute path. Set "
        f"{CACHE_VARIABLE} to one, or to off."
    )
    return None


def read_cached(name: str) -> bytes | None:
    """Return a kernel's object file from the disk; None if it is absent, damaged or not ours."""
    folder = find_cache_folder()
    if folder is None or not is_trusted(folder):
        return None
    stored = _read_own_file(folder / f"{name}.o")
    checksum, code = stored[:32], stored[32:]
    return code if code and hashlib.sha256(code).digest() == checksum else None


def is_trusted(folder: Path) -> bool:
    """Tell whether a folder exists and only this user can have written to it.

    One of this user's that others may read is closed to them; one that they may write to is left
    alone, since they may have done so already.
    """
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return _distrust(folder, "it is no folder of its own")
        if not _is_own(found):
            return _distrust(folder, f"it belongs to user {found.st_uid}")
        if found.st_mode & WRITABLE_BY_OTHERS and hasattr(os, "getuid"):
            return _distrust(folder, "others may write to it")
        if stat.S_IMODE(found.st_mode) != stat.S_IRWXU:
            folder.chmod(stat.S_IRWXU)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        return _distrust(folder, str(error))
    return True


def _distrust(folder: Path, reason: str) -> bool:
    logger.warning_once(
        f"Compiled kernels are neither read from {folder} nor kept there: {reason}. Remove it, or "
        f"set {CACHE_VARIABLE} to a folder of your own, or to off."
    )
    return False


def _is_own(found: os.stat_result) -> bool:
    """Tell whether this user owns a file; where users have no numbers, yes."""
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


def _read_own_file(path: Path) -> bytes:
    """Return what a regular file of this user holds; nothing for anything else."""
    try:
        descriptor = os.open(path, OPEN_FLAGS | getattr(os, "O_BINARY", 0))
    except OSError:  # absent, or a link
        return b""
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        is_shared = bool(found.st_mode & WRITABLE_BY_OTHERS) and hasattr(os, "getuid")
        if not stat.S_ISREG(found.st_mode) or not _is_own(found) or is_shared:
            return b""
        return file.read() if found.st_size <= LARGEST_FILE else b""


def write_cached(name: str, code: bytes) -> None:
    """Keep a kernel's object file behind its checksum; a disk that refuses only costs time."""
    folder = find_cache_folder()
    if folder is None:
        return
    try:
        folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        if not is_trusted(folder):
            return
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            file = Path(workplace) / name
            file.write_bytes(hashlib.sha256(code).digest() + code)
            file.chmod(stat.S_IRUSR | stat.S_IWUSR)
            os.replace(file, folder / f"{name}.o")
    except OSError as error:
        logger.info("Compiled kernels are not kept in %s: %s.", folder, error)
