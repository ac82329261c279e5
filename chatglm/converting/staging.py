"""Owns how a result folder comes about: whole or not at all, and resumable after a kill.

Files grow in a folder of their own beside the target, which is renamed when all of them are there
and read back as they were written. What is finished is recorded together with the job that it was
made for. Does not know what the files hold.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from chatglm.adapters.bases import RECORD_FILE
from chatglm.cards import CARD_FILE
from chatglm.checkpoints.checksums import hash_file, write_sums
from chatglm.checkpoints.durable import UNFINISHED, flush, write_whole
from chatglm.checkpoints.recognize import read_object
from chatglm.folder_lock import hold_target

RECORD = "job.json"
# The card is there to be completed by hand, and its hash would be wrong then; the record of the
# base names places of this machine, and is not published.
UNSUMMED = (CARD_FILE, RECORD_FILE)
SPARE_BYTES = 2**20  # more than the headers, the record and the index take
# What systems say of a second name for a file that they cannot give.
WITHOUT_LINKS = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def claim_target(source: Path, target: str | Path, command: str) -> Generator[Path, None, None]:
    """Resolve the folder to be made, and let nobody else make it for the statements inside.

    Args:
        source: what it is made from.
        target: the folder.
        command: that makes it.

    Raises:
        ValueError: if it is the source folder or inside it, if something is there already, or if
            another process is making it.
    """
    with hold_target(check_target(source, target), command):
        yield check_target(source, target)  # again: it may have come about just now


def check_target(source: Path, target: str | Path) -> Path:
    """Resolve the folder to be made.

    Raises:
        ValueError: if it is the source folder or inside it, or if something is there already.
    """
    folder = Path(target).expanduser().resolve()
    if folder == source or source in folder.parents:
        raise ValueError(f"{target} is {source} or inside it: name a folder elsewhere")
    if folder.exists() and not _is_empty(folder):
        raise ValueError(f"{target} exists and is not empty: remove it, or name another folder")
    return folder


def unfinished_folder(target: Path) -> Path:
    """The folder in which a target grows."""
    return target.with_name(target.name + UNFINISHED)


class Staging:
    """A folder in the making. Nothing is written before `begin`.

    Args:
        target: the folder to be made.
        job: all that the files depend on, as JSON has it. What another job has left is not used.

    Raises:
        ValueError: if the place beside the target is taken by something else.
    """

    def __init__(self, target: Path, job: Mapping[str, Any]) -> None:
        self.target = target
        self.folder = unfinished_folder(target)
        self._job = dict(job)
        self._sums: dict[str, str] = {}
        record = self.folder / RECORD
        if not record.is_file():
            if self.folder.exists() and not _is_empty(self.folder):
                raise ValueError(
                    f"{self.folder} exists and is no unfinished result of this command: remove it, "
                    "or name another target"
                )
            return
        left = read_object(record)
        if left["job"] == self._job:
            self._sums = dict(_intact(self.folder, left["finished"]))

    def has(self, name: str) -> bool:
        """Whether a file was finished by this job, now or before, and is still as it was."""
        return name in self._sums

    def missing_bytes(self, sizes: Mapping[str, int]) -> int:
        """How many bytes the volume must still find for files of these sizes."""
        left = self.folder.iterdir() if self.folder.is_dir() else ()
        return sum(sizes.values()) - sum(path.stat().st_size for path in left)

    def check_room(self, sizes: Mapping[str, int]) -> None:
        """Refuse a volume that is too full for files of these sizes.

        Raises:
            ValueError: saying how full it is.
        """
        needed = self.missing_bytes(sizes) + SPARE_BYTES
        free = free_bytes(self.folder)
        if needed > free:
            raise ValueError(
                f"the disk of {self.target} has {free / 1e6:,.0f} MB free, and the result "
                f"needs {needed / 1e6:,.0f} MB: make room, or name a folder on another disk"
            )

    def begin(self) -> None:
        """Make the folder, free of all that is not to be kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # What lies in folders inside is small.
        self._sums = {name: digest for name, digest in self._sums.items() if "/" not in name}
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != RECORD and path.name not in self._sums:
                path.unlink()
        self._record()

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Add a file: it has its name only once it is whole and on the disk.

        Args:
            name: of the file.
            save: writes it to the path it is given.
        """
        unfinished = self.folder / f"{name}{UNFINISHED}"
        unfinished.parent.mkdir(exist_ok=True)
        try:
            save(unfinished)
            shutil.copymode(self.folder / RECORD, unfinished)  # some writers leave it to one user
            flush(unfinished)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._take(name, unfinished)

    def link(self, name: str, file: Path) -> bool:
        """Add a file that is there already under another name, without room for it if possible.

        Args:
            name: of the file here.
            file: it must not be written into afterwards, and no writer of models does so.

        Returns:
            Whether it is the same file; a copy, if it is on another disk, or one without links.
        """
        unfinished = self.folder / f"{name}{UNFINISHED}"
        try:
            os.link(file.resolve(), unfinished)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            self.write(name, partial(shutil.copyfile, file))
            return False
        self._take(name, unfinished)
        return True

    def _take(self, name: str, unfinished: Path) -> None:
        """Give a whole file its name, and write down its hash."""
        digest = hash_file(unfinished)
        unfinished.replace(self.folder / name)
        self._sums[name] = digest
        self._record()

    def finish(self) -> None:
        """Read all files back, write their hashes beside them, and rename the folder.

        Raises:
            ValueError: if a file is not what was written; the next run makes it anew.
        """
        changed = self._sums.keys() - dict(_intact(self.folder, self._sums)).keys()
        if changed:
            raise ValueError(
                f"{self.folder / min(changed)} does not read back as it was written: check the "
                "disk, and run the same command again"
            )
        fixed = {name: self._sums[name] for name in self._sums if name not in UNSUMMED}
        flush(write_sums(self.folder, fixed))
        flush(self.folder)
        if self.target.exists():
            self.target.rmdir()  # it is empty
        self.folder.rename(self.target)
        (self.target / RECORD).unlink()
        flush(self.target.parent)

    def _record(self) -> None:
        """Write down what is finished, at once or not at all."""
        record = {"job": self._job, "finished": self._sums}
        text = json.dumps(record, indent=2) + "\n"
        write_whole(self.folder / RECORD, text.encode())


def describe_files(files: list[Path]) -> dict[str, list[int]]:
    """Return what tells whether a job's input is still the same: size and time of change."""
    stats = {str(file): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def free_bytes(folder: Path) -> int:
    """How much room the volume has on which a folder is, or will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _intact(folder: Path, sums: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Those of the recorded files that are there and have their hash."""
    for name, digest in sums.items():
        if (folder / name).is_file() and hash_file(folder / name) == digest:
            yield name, digest
