"""Owns whether the weights of a folder are whole and its own, and their index where it is missing.

Reads tables of contents and no values, and changes no file.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from chatglm.checkpoints.complete import find_auto_map
from chatglm.checkpoints.reading import (
    WEIGHT_FILES,
    StoredTensor,
    build_skeleton,
    check_weight_file,
    list_weight_files,
    match_whole,
    open_shards,
)

# How transformers names the shards of a model, and the number of them in each name.
SHARD = re.compile(r"(pytorch_model|model)-(\d{5})-of-(\d{5})\.(bin|safetensors)")


def find_weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's weight files, also of shards that have lost their index.

    Raises:
        ValueError: if there are none, if some are missing, or if one is no whole file.
    """
    names = _list_files(folder)
    for name in names:
        check_weight_file(folder / name)
    return names


def _list_files(folder: Path) -> list[str]:
    known = [name for pair in WEIGHT_FILES for name in pair]
    shards = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))
    if not shards or any((folder / name).is_file() for name in known):
        return list_weight_files(folder)
    sets = {SHARD.sub(r"\1-{:05d}-of-\3.\4", name) for name in shards}
    if len(sets) > 1:
        raise ValueError(
            f"{folder} has shards of several models and no index: move those that do not belong "
            f"there elsewhere ({', '.join(shards)})"
        )
    pattern = sets.pop()
    count = int(pattern.rpartition(".")[0][-5:])
    wanted = [pattern.format(number) for number in range(1, count + 1)]
    missing = [name for name in wanted if name not in shards]
    if missing:
        raise ValueError(
            f"{folder} misses {len(missing)} of {count} shards ({', '.join(missing)}): download "
            "them again"
        )
    return wanted


def make_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, bytes]:
    """Return the index of a folder's shards by its name, and nothing where none is needed."""
    if any((folder / name).is_file() for pair in WEIGHT_FILES for name in pair):
        return {}
    first = next(iter(tensors.values()))
    assert first.file is not None
    index = next(index for single, index in WEIGHT_FILES if single.endswith(first.file.suffix))
    places = {name: stored.file.name for name, stored in tensors.items() if stored.file}
    return {index: dump_index(places, sum(stored.tensor.nbytes for stored in tensors.values()))}


def dump_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Return the text of an index, as transformers reads it.

    Args:
        weight_map: the file of each tensor.
        total_size: of all tensors, in bytes.
    """
    fields = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder, none of them read yet.

    Raises:
        ValueError: as `find_weight_files`, or for a file that holds something else.
    """
    return open_shards(folder / name for name in find_weight_files(folder))


def choose_auto_class(fields: Mapping[str, Any]) -> str:
    """Return the name of the Auto class that is for the architecture of a configuration."""
    classes: list[str] = fields.get("architectures") or []
    found = (
        auto_class
        for auto_class, reference in find_auto_map().items()
        if auto_class != "AutoConfig" and reference.partition(".")[2] in classes
    )
    return next(found, "AutoModel")


def check_whole(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that are not all of those of a configuration, and no others.

    Raises:
        ValueError: with the first field or tensor that says other.
    """
    auto_class: Any = getattr(transformers, choose_auto_class(fields))
    match_whole(build_skeleton(fields, auto_class), tensors)


__all__ = [
    "check_whole",
    "choose_auto_class",
    "dump_index",
    "find_weight_files",
    "make_index",
    "open_weights",
]
