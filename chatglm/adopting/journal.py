"""Owns how files of a folder change places: all of them or none, through a kill, and back again.

    FOLDER/original/            the files that were replaced or moved, and `adopted.json`
    FOLDER/original/staging/    new files that are still being written; worth nothing after a kill
    FOLDER/original/staged/     all new files and the record, on the disk; from here on it is done

New files are written aside first. One renaming, of `staging` to `staged`, decides that they will
take their places; what follows are renamings alone, for which a full disk has room, and each is
repeated or skipped rightly if the one before was the last. Does not know what the files are for.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.checkpoints.checksums import hash_file
from chatglm.checkpoints.durable import flush
from chatglm.checkpoints.recognize import read_object

ASIDE = "original"
RECORD = "adopted.json"
UNDONE = "undone.json"  # what the record is called while it is undone
STAGING, STAGED = "staging", "staged"
# A record may come with a folder from anywhere: nothing outside of it is moved or removed.
INNER_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


class Record(NamedTuple):
    """What was done to a folder, as hashes by the names of files.

    Attributes:
        version: of the package that did it.
        kept: the files that the folder had first, which are in `original` now.
        written: the files that were written.
        replaced: files of an earlier record that this one puts others in the place of, or removes.
    """

    version: str
    kept: dict[str, str]
    written: dict[str, str]
    replaced: dict[str, str]

    def vanish(self) -> list[str]:
        """Files of an earlier record that are needed no more."""
        return [name for name in self.replaced if name not in self.written]


def read_record(folder: Path) -> Record | None:
    """Return what was done to a folder, once nothing of it is unfinished; None if nothing was.

    Raises:
        ValueError: if the record is no JSON object, or none of this module's.
    """
    return _read(folder / ASIDE / RECORD)


def is_unfinished(folder: Path) -> bool:
    """Whether a run was stopped in the middle, and `finish` has something to do."""
    names = (STAGING, STAGED, UNDONE)
    return any((folder / ASIDE / name).exists() for name in names)


def finish(folder: Path) -> None:
    """Bring to its end what a run was stopped in: forwards if all was decided, or else back."""
    aside = folder / ASIDE
    if (undone := _read(aside / UNDONE)) is not None:
        _put_back(folder, undone)
    _discard(aside / STAGING)
    if (aside / STAGED).is_dir():
        _take_places(folder)
    _remove_if_empty(aside)


def check_aside(folder: Path) -> None:
    """Refuse a folder whose `original` is somebody else's.

    Raises:
        ValueError: saying so.
    """
    aside = folder / ASIDE
    ours = {RECORD, UNDONE, STAGING, STAGED}
    found = {path.name for path in aside.iterdir()} if aside.is_dir() else set[str]()
    is_folder = aside.is_dir() and not aside.is_symlink()
    if (aside.exists() and not is_folder) or (found and not found & ours):
        raise ValueError(
            f"{aside} is there and was not made by chatglm adopt, which keeps old files under that "
            "name: rename it"
        )


def change(folder: Path, version: str, written: Mapping[str, bytes], moved: Iterable[str]) -> None:
    """Write files and put others aside, all or none.

    Args:
        folder: nothing in it is unfinished.
        version: of the package.
        written: contents by name.
        moved: names of files there that go aside, those that are written anew among them; what an
            earlier record wrote is replaced or removed and not kept.

    Raises:
        OSError: if the disk is full, or the folder refuses; it is as before then, or the next
            `finish` brings it to an end.
        ValueError: if a file would take the place of another in `original`.
    """
    aside, before = folder / ASIDE, read_record(folder)
    try:
        (aside / STAGING).mkdir(parents=True)
        sums = {name: _write(aside / STAGING / name, text) for name, text in written.items()}
        record = _make_record(folder, version, sums, moved, before)
        _write(aside / STAGING / RECORD, json.dumps(record._asdict(), indent=2).encode() + b"\n")
        flush(aside / STAGING)
        (aside / STAGING).rename(aside / STAGED)
        flush(aside)
    except BaseException:
        if not (aside / STAGED).exists():
            _discard(aside / STAGING)
            _remove_if_empty(aside)
        raise
    try:
        _take_places(folder)
    except OSError:
        if before is None:
            with suppress(OSError):  # what refuses to go back is tried again by the next run
                (aside / STAGED / RECORD).replace(aside / UNDONE)
                _put_back(folder, record)
        raise


def undo(folder: Path) -> Record:
    """Bring a folder back to what it was before its first record, byte for byte.

    Returns:
        What was undone.

    Raises:
        ValueError: if nothing was done to it, or if a file has been changed since.
    """
    aside = folder / ASIDE
    found = check_undo(folder)
    if not (aside / UNDONE).is_file():
        _discard(aside / STAGING)
        staged = aside / STAGED / RECORD
        (staged if staged.is_file() else aside / RECORD).replace(aside / UNDONE)
        flush(aside)
    _put_back(folder, found)
    return found


def check_undo(folder: Path) -> Record:
    """Return what would be undone.

    Raises:
        ValueError: as `undo`.
    """
    aside = folder / ASIDE
    check_aside(folder)
    if (undone := _read(aside / UNDONE)) is not None:  # it was stopped in the middle
        return undone
    found = _read(aside / STAGED / RECORD) or read_record(folder)
    if found is None:
        raise ValueError(f"{folder} was not adopted, or that is undone already: nothing to undo")
    _check_unchanged(folder, found)
    return found


def _read(file: Path) -> Record | None:
    if not file.is_file():
        return None
    fields: Any = read_object(file)
    sums = [fields.get(name) for name in Record._fields[1:]]
    is_ours = set(fields) == set(Record._fields) and all(isinstance(part, dict) for part in sums)
    if not is_ours or not all(INNER_NAME.fullmatch(name) for part in sums for name in part):
        raise ValueError(f"{file} is no record of chatglm adopt: restore the file")
    return Record(**fields)


def _write(file: Path, content: bytes) -> str:
    """Write a new file to the disk and return its hash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    flush(file)
    return hash_file(file)


def _make_record(
    folder: Path,
    version: str,
    sums: Mapping[str, str],
    moved: Iterable[str],
    before: Record | None,
) -> Record:
    """Join what is done now to what was done before: only what was there first is kept."""
    kept, written = (dict(before.kept), dict(before.written)) if before else ({}, {})
    ours = dict(written)
    replaced: dict[str, str] = {}
    for name in moved:
        digest = hash_file(folder / name)
        if name in kept and name not in ours:
            raise ValueError(
                f"{folder / name} would take the place of {folder / ASIDE / name}: move one of the "
                "two elsewhere"
            )
        (replaced if name in ours else kept)[name] = digest
        written.pop(name, None)
    return Record(version, kept, {**written, **sums}, replaced)


def _take_places(folder: Path) -> None:
    """Do all the renamings that are left of what was decided."""
    aside, staged = folder / ASIDE, folder / ASIDE / STAGED
    record = _read(staged / RECORD)
    if record is not None:
        for name in record.kept:
            if not (aside / name).exists():
                _move(folder / name, aside / name)
        for name in record.written:
            if (staged / name).exists():
                _move(staged / name, folder / name)
        for name in record.vanish():
            (folder / name).unlink(missing_ok=True)
        _flush_parents(folder, record)
        _move(staged / RECORD, aside / RECORD)
        flush(aside)
    _discard(staged)


def _put_back(folder: Path, record: Record) -> None:
    """Do all that is left of an undoing: what was first comes back, what was written goes."""
    aside = folder / ASIDE
    for name in record.kept:
        if (aside / name).exists():
            _move(aside / name, folder / name)
    for name in record.written.keys() - record.kept.keys():
        (folder / name).unlink(missing_ok=True)
    for name in record.vanish():
        if name not in record.kept:
            (folder / name).unlink(missing_ok=True)
    for name in [*record.kept, *record.written]:
        if "/" in name:
            _remove_if_empty((folder / name).parent)
            _remove_if_empty((aside / name).parent)
    flush(folder)
    _discard(aside / STAGED)
    (aside / RECORD).unlink(missing_ok=True)
    flush(aside)
    (aside / UNDONE).unlink()
    _remove_if_empty(aside)


def _check_unchanged(folder: Path, record: Record) -> None:
    """Refuse to undo over files that are no longer what was written, or kept."""
    changed = sorted({*_list_changed(folder, record)})
    if changed:
        raise ValueError(
            f"{folder} has files that were changed since it was adopted, {', '.join(changed)}: "
            "move them out of the folder to keep them, or remove them, and undo again"
        )
    lost = [name for name in record.kept if not _holds_original(folder, name, record)]
    if lost:
        names = ", ".join(f"{ASIDE}/{name}" for name in lost)
        raise ValueError(
            f"{folder} has lost what it was, {names} missing or changed: put the files back that "
            "were there, and undo again"
        )


def _list_changed(folder: Path, record: Record) -> Iterator[str]:
    """Files whose content neither this module wrote nor a person had there at first."""
    for name in {**record.kept, **record.written, **record.replaced}:
        known = [sums.get(name) for sums in (record.written, record.replaced, record.kept)]
        if (folder / name).is_file() and hash_file(folder / name) not in known:
            yield name


def _holds_original(folder: Path, name: str, record: Record) -> bool:
    places = (folder / ASIDE / name, folder / name)
    first = next((place for place in places if place.is_file()), None)
    return first is not None and hash_file(first) == record.kept[name]


def _move(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    file.replace(place)


def _flush_parents(folder: Path, record: Record) -> None:
    names = [*record.kept, *record.written]
    for parent in {folder, folder / ASIDE, *((folder / name).parent for name in names)}:
        flush(parent)


def _discard(folder: Path) -> None:
    """Remove a folder with copies of this module's that nobody else has an interest in."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


__all__ = [
    "ASIDE",
    "Record",
    "change",
    "check_aside",
    "check_undo",
    "finish",
    "is_unfinished",
    "read_record",
    "undo",
]
