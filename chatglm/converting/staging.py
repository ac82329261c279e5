"""Owns how a result folder comes about: whole or not at all, and resumable after a kill.

Files grow in a folder of their own beside the target, which is renamed when all of them are there
and read back as they were written. What is finished is recorded together with the job that it was
made for. Does not know what the files hold.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm.cards import CARD_FILE
from chatglm.checkpoints.checksums import hash_file, write_sums
from chatglm.checkpoints.recognize import read_object

RECORD = "job.json"
# The card is there to be completed by hand, and its hash would be wrong then.
UNSUMMED = (CARD_FILE,)
UNFINISHED = ".part"  # of a folder's name, and of a file's


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

    def begin(self) -> None:
        """Make the folder, free of all that is not to be kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name != RECORD and path.name not in self._sums:
                path.unlink()
        self._record()

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Add a file: it has its name only once it is whole and on the disk.

        Args:
            name: of the file.
            save: writes it to the path it is given.
        """
        unfinished = self.folder / f"{name}{UNFINISHED}"
        save(unfinished)
        shutil.copymode(self.folder / RECORD, unfinished)  # some writers leave it to one user
        _flush(unfinished)
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
        _flush(write_sums(self.folder, fixed))
        _flush(self.folder)
        if self.target.exists():
            self.target.rmdir()  # it is empty
        self.folder.rename(self.target)
        (self.target / RECORD).unlink()
        _flush(self.target.parent)

    def _record(self) -> None:
        """Write down what is finished, at once or not at all."""
        record = {"job": self._job, "finished": self._sums}
        unfinished = self.folder / f"{RECORD}{UNFINISHED}"
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _flush(unfinished)
        unfinished.replace(self.folder / RECORD)
        _flush(self.folder)


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


def _flush(path: Path) -> None:
    """Wait until a file, or on Unix the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
