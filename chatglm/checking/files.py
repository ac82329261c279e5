"""Owns the faults of a folder that its files show one by one: absent, cut, replaced, elsewhere.

Opens each file and reads its beginning, and the pickle of an archive of torch. Does not know
tensors.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from chatglm.checking.pickles import find_foreign_code
from chatglm.checking.problems import ODD, PROBLEM, Problem, gather
from chatglm.checkpoints.complete import GENERATION_FILE, TOKENIZER_FILE
from chatglm.checkpoints.reading import WEIGHT_FILES, check_weight_file, list_weight_files
from chatglm.checkpoints.recognize import CONFIG_FILE, VOCABULARY_FILE, read_object
from chatglm.checkpoints.signatures import POINTER, choose_remedy, identify_file

SHARD_PATTERNS = ("pytorch_model-*.bin", "model-*.safetensors")
WEIGHT_ENDINGS = (".bin", ".safetensors")
SETTINGS = (GENERATION_FILE, TOKENIZER_FILE)


def find_weight_problems(folder: Path) -> list[Problem]:
    """Return what is wrong with the weight files of a model folder, all of them."""
    try:
        names = list_weight_files(folder)
    except (ValueError, OSError) as error:
        return [_explain_no_weights(folder, error)]
    return [problem for name in names for problem in find_shard_problems(folder, name)]


def find_shard_problems(folder: Path, name: str) -> list[Problem]:
    """Return what is wrong with one weight file.

    Args:
        folder: of the model.
        name: of the file.
    """
    file = folder / name
    if not file.is_file():
        code = "dangling-link" if file.is_symlink() else "missing-shard"
        return gather(code, name, lambda: check_weight_file(file))
    broken = gather("broken-weights", name, lambda: check_weight_file(file))
    if broken or file.suffix != ".bin":
        return broken
    return _find_code(file)


def _find_code(file: Path) -> list[Problem]:
    try:
        foreign = find_foreign_code(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        what = f"{file} has a table of contents that cannot be read ({error})"
        return [Problem("broken-weights", PROBLEM, file.name, what, "download it again")]
    if not foreign:
        return []
    what = f"{file} would run code when it is unpickled, {', '.join(foreign)}, and is not read"
    remedy = "take the weights from a source that you trust, as safetensors"
    return [Problem("pickled-code", PROBLEM, file.name, what, remedy)]


def _explain_no_weights(folder: Path, error: Exception) -> Problem:
    """Return why it cannot be told which the weight files are."""
    indexes = [index for _, index in WEIGHT_FILES if (folder / index).is_file()]
    shards = sorted(path.name for pattern in SHARD_PATTERNS for path in folder.glob(pattern))
    if indexes or not shards:
        return Problem.of_error("no-weights", indexes[0] if indexes else "", error)
    what = f"{folder} has {len(shards)} shards, {shards[0]} for one, and no index of them"
    remedy = (
        "fetch the index that belongs to them (of the official eight: chatglm/presets/chatglm-6b/"
        "pytorch_model.bin.index.json)"
    )
    return Problem("no-index", PROBLEM, "", what, remedy)


def find_settings_problems(folder: Path) -> list[Problem]:
    """Return what is wrong with the files beside the weights that every model needs."""
    problems: list[Problem] = []
    for name in SETTINGS:
        file = folder / name
        if file.is_file():
            problems += gather("broken-settings", name, lambda file=file: read_object(file))
    vocabulary = folder / VOCABULARY_FILE
    if not vocabulary.is_file():
        what = f"{folder} has no {VOCABULARY_FILE}"
        remedy = "copy that of the model it was made from there"
        problems.append(Problem("no-vocabulary", PROBLEM, VOCABULARY_FILE, what, remedy))
    else:
        problems += gather("broken-vocabulary", VOCABULARY_FILE, lambda: _check_content(vocabulary))
    return problems


def _check_content(vocabulary: Path) -> None:
    kind = identify_file(vocabulary)
    if kind == POINTER:
        raise ValueError(f"{vocabulary} is {kind}: {choose_remedy(kind)}")


def find_odd_files(folder: Path, weights: Iterable[str]) -> Iterator[Problem]:
    """Yield what is odd about a folder's files, whatever they are for.

    Args:
        folder: of a model or an adapter.
        weights: the names of the weight files that are read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_symlink() or path.is_file())
    read = {*weights, CONFIG_FILE, VOCABULARY_FILE, *SETTINGS}
    yield from _find_links(folder, files)
    yield from _find_clashes(files)
    for file in (file for file in files if file.is_file()):
        if not os.access(file, os.R_OK):
            severity = PROBLEM if file.name in read else ODD
            what = f"{file} may not be read by this user"
            yield Problem("unreadable", severity, file.name, what, "change its mode or its owner")
        elif file.name not in read and identify_file(file) == POINTER:
            what = f"{file} is {POINTER}"
            yield Problem("pointer", ODD, file.name, what, choose_remedy(POINTER))


def _find_links(folder: Path, files: Iterable[Path]) -> Iterator[Problem]:
    """Files that lie elsewhere. Those of the Hub's cache are links to its blobs."""
    inside = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for file in (file for file in files if file.is_symlink()):
        place = file.resolve()
        if inside.resolve() not in place.parents:
            what = f"{file} is a link to {place}, outside of the folder"
            remedy = "fine here; a copy of the folder needs the file itself (cp --dereference)"
            yield Problem("link-outside", ODD, file.name, what, remedy)


def _find_clashes(files: Iterable[Path]) -> Iterator[Problem]:
    names = Counter(file.name.casefold() for file in files)
    for file in files:
        if names[file.name.casefold()] > 1:
            what = f"{file} differs from another file in upper and lower case alone"
            remedy = "remove one: on Windows and macOS they are the same file"
            yield Problem("case-clash", ODD, file.name, what, remedy)


__all__ = [
    "find_odd_files",
    "find_settings_problems",
    "find_shard_problems",
    "find_weight_problems",
]
