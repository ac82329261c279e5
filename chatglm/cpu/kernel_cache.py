"""Keeps compiled kernels on the disk.

Owns the folder and the files in it. Knows nothing of kernels but their names and bytes.
"""

import hashlib
import os
import tempfile
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_VARIABLE = "CHATGLM_KERNEL_CACHE"  # names a folder; "off" for none


def find_cache_folder() -> Path | None:
    """Return the folder of compiled kernels, or None if there shall be none."""
    named = os.environ.get(CACHE_VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "chatglm" / "kernels"


def read_cached(name: str) -> bytes | None:
    """Return a kernel's object file from the disk; None if it is absent or damaged."""
    folder = find_cache_folder()
    try:
        stored = b"" if folder is None else (folder / f"{name}.o").read_bytes()
    except OSError:
        return None
    checksum, code = stored[:32], stored[32:]
    return code if code and hashlib.sha256(code).digest() == checksum else None


def write_cached(name: str, code: bytes) -> None:
    """Keep a kernel's object file behind its checksum; a disk that refuses only costs time."""
    folder = find_cache_folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            file = Path(workplace) / name
            file.write_bytes(hashlib.sha256(code).digest() + code)
            os.replace(file, folder / f"{name}.o")
    except OSError as error:
        logger.info("Compiled kernels are not kept in %s: %s.", folder, error)
