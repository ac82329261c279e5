"""Owns what the tensors of a folder show: which there are, twice or not at all, and their values.

They are mapped, and none is read but by `find_broken_values`, one after the other. Does not know
which files they lie in is right, nor the words of most faults: those are the matcher's.
"""

import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from transformers import AutoConfig

from chatglm import door
from chatglm.checking.problems import PROBLEM, Problem, gather
from chatglm.checkpoints.reading import (
    StoredTensor,
    build_empty,
    check_fields,
    find_misfits,
    open_shards,
)
from chatglm.checkpoints.recognize import CONFIG_FILE

BLOCK_BYTES = 2**20


def open_all(folder: Path, names: list[str]) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """Return the tensors of all weight files that can be opened, and what is wrong with the rest.

    Args:
        folder: of the model.
        names: of its weight files.
    """
    tensors: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            found = open_shards([folder / name])
        except (ValueError, OSError) as error:
            problems.append(Problem.of_error("broken-weights", name, error))
            continue
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            first = tensors[twice[0]]
            more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            what = f"{first}{more} is also in {folder / name}"
            remedy = "remove the shard that does not belong there"
            problems.append(Problem("tensor-twice", PROBLEM, name, what, remedy))
        tensors |= found
    return tensors, problems


def find_fit_problems(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Return where a folder's configuration is none, and where its weights are not those of it.

    Args:
        folder: of the model.
        tensors: all of its own; none if they cannot be told.
    """
    configs: list[Any] = []
    problems = gather(
        "configuration", CONFIG_FILE, lambda: configs.append(door.load_from(folder, AutoConfig))
    )
    if problems or not tensors:
        return problems
    (config,) = configs
    if problems := gather("sizes", CONFIG_FILE, lambda: check_fields(config, tensors)):
        return problems
    models: list[Any] = []
    if problems := gather("configuration", CONFIG_FILE, lambda: models.append(build_empty(config))):
        return problems
    errors = [ValueError(line) for line in find_misfits(models[0], tensors)]
    return [Problem.of_error("tensors", "", error) for error in errors]


def count_dtypes(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return the bytes on disk by number format, most first."""
    counts: Counter[str] = Counter()
    for stored in tensors.values():
        counts[str(stored.dtype).removeprefix("torch.")] += stored.tensor.nbytes
    return dict(counts.most_common())


def find_broken_values(tensors: Mapping[str, StoredTensor]) -> Iterator[Problem]:
    """Yield the tensors with values that are no finite numbers; reads all of them."""
    for name, stored in tensors.items():
        if not stored.dtype.is_floating_point:
            continue
        if count := sum(_count_broken(stored)):
            file = stored.file.name if stored.file else ""
            what = f"{stored} has {count} values of {stored.tensor.numel()} that are not finite"
            yield Problem("not-finite", PROBLEM, file, what, f"download {file or name} again")


def _count_broken(stored: StoredTensor) -> Iterator[int]:
    blocks = stored.iter_blocks() if stored.shape else [(slice(0), stored.tensor)]
    for _, block in blocks:
        yield int((~block.isfinite()).sum())


def find_broken_records(file: Path) -> list[Problem]:
    """Return an archive of torch whose records are not what their check sums say; reads all of it.

    Args:
        file: whole, as far as its table of contents tells.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        broken = [member.filename for member in members if not _is_intact(archive, member)]
    # torch can be told to write no check sums: then none of them fits.
    if not broken or len(broken) == len(members):
        return []
    what = f"{file} is damaged in {', '.join(broken[:3])}"
    return [Problem("damaged", PROBLEM, file.name, what, "download it again")]


def _is_intact(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(member) as opened:
            _read_through(opened)
    except (zipfile.BadZipFile, zlib.error):
        return False
    return True


def _read_through(opened: IO[bytes]) -> None:
    while opened.read(BLOCK_BYTES):
        pass


__all__ = [
    "count_dtypes",
    "find_broken_records",
    "find_broken_values",
    "find_fit_problems",
    "open_all",
]
