"""Owns the checkpoints in a run's folder: which are whole, the newest of them, how many are kept.

    checkpoint-40/             what a trainer wrote, and
        manifest.json          sizes and hashes of all its files, written when these are on the disk
    broken-checkpoint-30/      was found damaged, and is out of the way of trainers
    removing-checkpoint-10/    is being deleted
    part-checkpoint-50/        is being written, by PPO

A checkpoint with a manifest is whole if its files are what that says. One without, of another tool
or of an older version, is whole if everything in it can be read and nothing is missing that a run
goes on from. Does not know what a trainer does with a checkpoint, or which settings go with one.
"""

import errno
import json
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from chatglm.checkpoints.checksums import hash_file
from chatglm.checkpoints.durable import UNFINISHED, flush, write_whole
from chatglm.checkpoints.reading import check_weight_file

NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST_FILE, STATE_FILE = "manifest.json", "trainer_state.json"
BROKEN, REMOVING, PART = "broken-", "removing-", "part-"
INDEX_ENDING = ".index.json"
# People change what these say, where a base model has moved for one: they are read instead of
# compared. Nothing goes on from a card.
CHANGEABLE = (STATE_FILE, "adapter_config.json")
CARD_ENDING = ".md"
TORCH_ENDINGS = (".pt", ".pth", ".bin")
# A run goes on from one file of each kind: names of files as `Path.match` knows them.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
NEEDED = {
    "trainer": (WEIGHTS, ("optimizer.pt",), ("scheduler.pt",), ("rng_state*.pth",)),
    "ppo": (("adapter_model.*", "model*.safetensors"), ("optimizer.pt",), ("value_head.*",)),
}
RANDOM_STATES = re.compile(r"rng_state(?:_\d+)?\.pth")
Tell = Callable[[str], None]
# What a disk that takes no more says, and how torch and safetensors pass it on.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
FULL_WORDS = ("PytorchStreamWriter", "inline_container", "os error", "I/O error")


def tell(line: str) -> None:
    """Say what was done with a checkpoint, on standard error."""
    sys.stderr.write(f"chatglm train: {line}\n")
    sys.stderr.flush()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first, whole or not."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def read_step(checkpoint: Path) -> int:
    """Return how many steps were done when a checkpoint was written, as its name says."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a whole checkpoint says of its run."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def count_processes(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint of a trainer; each keeps its random numbers."""
    return sum(1 for path in checkpoint.iterdir() if RANDOM_STATES.fullmatch(path.name))


# What makes a checkpoint whole


def seal(checkpoint: Path) -> None:
    """Write down what a checkpoint consists of, when all of it is on the disk.

    Raises:
        OSError: if it does not come to be there.
    """
    files: dict[str, dict[str, Any]] = {}
    for name, file in _list_files(checkpoint):
        flush(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    content = {"versions": get_versions(), "files": files}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_whole(checkpoint / MANIFEST_FILE, text.encode())
    flush(checkpoint.parent)


def get_versions() -> dict[str, str]:
    """Return the versions of the libraries that write checkpoints."""
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def read_versions(checkpoint: Path) -> dict[str, str]:
    """Return the versions that a checkpoint was written with; nothing if it does not say."""
    file = checkpoint / MANIFEST_FILE
    return json.loads(file.read_text(encoding="utf-8"))["versions"] if file.is_file() else {}


def find_fault(checkpoint: Path, reads_all: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, None if it is whole.

    Args:
        checkpoint: a folder.
        reads_all: whether to compare what its files hold and not their sizes alone.
    """
    if not (checkpoint / MANIFEST_FILE).is_file():
        return _probe(checkpoint)
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        entries = [(name, e["bytes"], e["sha256"]) for name, e in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    faults = (_compare(checkpoint, *entry, reads_all) for entry in entries)
    return next((fault for fault in faults if fault), None)


def _compare(checkpoint: Path, name: str, size: int, digest: str, reads_all: bool) -> str | None:
    """Return how a file differs from what the manifest says of it."""
    file = checkpoint / name
    if not file.is_file():
        return f"{name} is missing"
    if name in CHANGEABLE:
        fault = _probe_file(name, file)
        return fault or (_probe_state(checkpoint) if name == STATE_FILE else None)
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes of {size}"
    try:
        is_same = not reads_all or hash_file(file) == digest
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if is_same else f"{name} is not what was written"


def _list_files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """Yield all files but cards and the manifest, whole or half, by their names with slashes."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        is_manifest = name in (MANIFEST_FILE, MANIFEST_FILE + UNFINISHED)
        if path.is_file() and not is_manifest and path.suffix != CARD_ENDING:
            yield name, path


# Without a manifest


def _probe(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint that does not say itself what it consists of."""
    files = dict(_list_files(checkpoint))
    if not files:
        return "it is empty"
    if STATE_FILE not in files:
        return f"{STATE_FILE} is missing, which is written last"
    faults = (_probe_file(name, file) for name, file in files.items())
    return next((fault for fault in faults if fault), None) or _find_missing(checkpoint, files)


def _probe_file(name: str, file: Path) -> str | None:
    """Return why a file cannot be read to its end."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix in TORCH_ENDINGS:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return f"{name} is damaged"
        elif file.suffix == ".safetensors":
            check_weight_file(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        size = file.stat().st_size
        return f"{name} ({size} bytes) cannot be read to its end"
    return None


def _find_missing(checkpoint: Path, files: Collection[str]) -> str | None:
    """Return which file that a run goes on from is not there."""
    for index in (name for name in files if name.endswith(INDEX_ENDING)):
        content = json.loads((checkpoint / index).read_text(encoding="utf-8"))
        missing = sorted(set(content.get("weight_map", {}).values()) - set(files))
        if missing:
            return f"{missing[0]} is missing, which {index} names"
    if fault := _probe_state(checkpoint):
        return fault
    if any("/" in name for name in files):  # parts of FSDP and ZeRO have names of their own
        return None
    for patterns in NEEDED["ppo" if "kl_coefficient" in read_state(checkpoint) else "trainer"]:
        if not any(Path(name).match(pattern) for name in files for pattern in patterns):
            return f"{' or '.join(patterns)} is missing"
    if "rng_state_0.pth" in files and "rng_state_1.pth" not in files:
        return "rng_state_1.pth is missing"
    return None


def _probe_state(checkpoint: Path) -> str | None:
    state: Any = read_state(checkpoint)
    if isinstance(state, dict) and isinstance(state.get("global_step"), int):
        return None
    return f"{STATE_FILE} does not say how many steps were done"


# The newest, and how many


def list_whole(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that are whole as far as sizes tell, the oldest first."""
    return [path for path in list_checkpoints(folder) if find_fault(path, False) is None]


def find_checkpoint(folder: Path, tell: Tell = tell) -> Path | None:
    """Return the newest checkpoint that is whole; damaged ones are set aside, with a line each.

    Args:
        folder: of a run, held by this process.
        tell: says what was found.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        fault = find_fault(checkpoint)
        if fault is None:
            if not (checkpoint / MANIFEST_FILE).is_file():
                seal(checkpoint)  # of another tool; from now on sizes tell
            return checkpoint
        place = set_aside(checkpoint)
        tell(f"{checkpoint} is passed over: {fault}. It is kept as {place.name}")
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that is not whole, and return its new place.

    It has to go: a trainer would count it as one to keep, and write into it.
    """
    place = checkpoint.with_name(BROKEN + checkpoint.name)
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{BROKEN}{checkpoint.name}-{number}")
    checkpoint.rename(place)
    flush(place.parent)
    return place


def rotate(folder: Path, limit: int | None, kept: Collection[Path] = (), tell: Tell = tell) -> None:
    """Delete checkpoints until there are no more whole ones than a limit; the newest stays.

    Damaged ones are set aside and do not count. What a kill has left is cleared away.

    Args:
        folder: of a run, held by this process.
        limit: how many whole ones to keep; None or 0 for all.
        kept: those that stay whatever the limit.
        tell: says what was found.
    """
    sweep(folder)
    whole = []
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint, reads_all=False)
        if fault is None:
            whole.append(checkpoint)
        else:
            place = set_aside(checkpoint)
            tell(f"{checkpoint} is damaged: {fault}. It is kept as {place.name}")
    if whole:
        _remove_begun(folder)
    names = {path.name for path in kept}
    surplus = max(0, len(whole) - limit) if limit else 0
    for checkpoint in [path for path in whole[:-1] if path.name not in names][:surplus]:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed meanwhile, it is none any more."""
    place = checkpoint.with_name(REMOVING + checkpoint.name)
    shutil.rmtree(place, ignore_errors=True)
    checkpoint.rename(place)
    flush(place.parent)
    shutil.rmtree(place, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear away what a killed run was deleting, or had not written to its end."""
    for beginning in (REMOVING, PART):
        for path in folder.glob(f"{beginning}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def _remove_begun(folder: Path) -> None:
    """Delete what kills have left of checkpoints that were never complete.

    Nobody can go on from one, and each is as large as a checkpoint. Complete ones that were damaged
    later stay.
    """
    for path in folder.glob(f"{BROKEN}checkpoint-*"):
        if not (path / MANIFEST_FILE).exists() and not _has_state(path):
            shutil.rmtree(path, ignore_errors=True)


def _has_state(checkpoint: Path) -> bool:
    """Whether a trainer came to the end of what it writes last."""
    try:
        return _probe_state(checkpoint) is None
    except (OSError, ValueError):
        return False


@contextmanager
def telling_full_disk(folder: Path) -> Generator[None, None, None]:
    """Turn what a full disk does to the statements inside into one line, and clear up.

    Args:
        folder: of the run.

    Raises:
        ValueError: naming the last good checkpoint and the remedy.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        for checkpoint in list_checkpoints(folder):
            if not (checkpoint / MANIFEST_FILE).is_file() and find_fault(checkpoint):
                remove(checkpoint)
        sweep(folder)
        whole = list_whole(folder)
        kept = f"{whole[-1]} is the last good checkpoint" if whole else "there is no checkpoint yet"
        raise ValueError(
            f"the disk took no more of what was written to {folder} ({error}); {kept}. Make room, "
            "and give the same command with --resume"
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(words in str(error) for words in FULL_WORDS)


__all__ = [
    "count_processes",
    "find_checkpoint",
    "find_fault",
    "get_versions",
    "list_checkpoints",
    "list_whole",
    "read_state",
    "read_step",
    "read_versions",
    "rotate",
    "seal",
    "sweep",
    "tell",
    "telling_full_disk",
]
