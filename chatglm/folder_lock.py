"""Owns that one process at a time writes into a place: the second one is told who was first.

The lock is the operating system's, on a file that is there only while it is held: a process that
dies leaves the file and no lock, and the next one takes it. Does not know what is written.
"""

import datetime
import errno
import importlib
import json
import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK_FILE = ".chatglm.lock"  # of a folder that is written into where it is
LOCK_ENDING = ".lock"  # of the name of a folder that comes into being
# Windows locks bytes, and nobody else can read those: one that is far behind the note.
LOCKED_BYTE = 2**30
# Some file systems of networks have no locks; nobody is told then, as before there were any.
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


@contextmanager
def hold_folder(folder: Path, command: str) -> Generator[None, None, None]:
    """Be the only one who writes into a folder that is there, for the statements inside.

    Args:
        folder: it may be written to.
        command: what writes, for those who come later.

    Raises:
        ValueError: if another one does, naming its process, since when, and the remedy.
    """
    with _hold(folder / LOCK_FILE, folder, command):
        yield


@contextmanager
def hold_target(folder: Path, command: str) -> Generator[None, None, None]:
    """Be the only one who makes a folder, for the statements inside.

    Its parents are made, and removed if nothing has come to be in them.

    Raises:
        ValueError: as `hold_folder`.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _hold(folder.with_name(folder.name + LOCK_ENDING), folder, command):
            yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _hold(file: Path, place: Path, command: str) -> Generator[None, None, None]:
    descriptor = _acquire(file, place)
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same, without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _describe_holder(command))
        yield
    finally:
        _release(file, descriptor)


def _acquire(file: Path, place: Path) -> int:
    """Open and lock the file; one that was removed meanwhile is no lock for anybody else."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(
                f"{place} cannot be written to ({error.strerror}): make room, change its rights, "
                "or name another folder"
            ) from error
        try:
            is_free = _lock(descriptor)
            is_current = is_free and _is_same(descriptor, file)
        except BaseException:
            os.close(descriptor)
            raise
        if is_current:
            return descriptor
        note = b"" if is_free else _read_note(descriptor)
        os.close(descriptor)
        if not is_free:
            raise ValueError(_tell_holder(place, note))


def _release(file: Path, descriptor: int) -> None:
    """Remove the file while it is locked, so that nobody waits at one that is gone for others."""
    with suppress(OSError):  # on Windows an open file cannot be removed
        file.unlink()
    os.close(descriptor)
    if os.name == "nt":
        with suppress(OSError):
            file.unlink()


def _lock(descriptor: int) -> bool:
    """Whether the file is locked now by this process; True where there are no locks at all."""
    try:
        if sys.platform == "win32":
            msvcrt: Any = importlib.import_module("msvcrt")
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl: Any = importlib.import_module("fcntl")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            return False
    return True


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _describe_holder(command: str) -> bytes:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    note = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    return json.dumps(note).encode()


def _read_note(descriptor: int) -> bytes:
    with suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.read(descriptor, 4096)
    return b""


def _tell_holder(place: Path, note: bytes) -> str:
    try:
        told: dict[str, Any] = json.loads(note)
        host = "" if told["host"] == socket.gethostname() else f" on {told['host']}"
        holder = f"{told['command']} (process {told['pid']}{host}, since {told['since']})"
    except (ValueError, KeyError, TypeError):  # it has not come to its note yet
        holder = "another process of chatglm"
    return (
        f"{place} is being written by {holder}: wait until it is done, or stop it, and run the "
        "same command again"
    )


__all__ = ["LOCK_FILE", "hold_folder", "hold_target"]
