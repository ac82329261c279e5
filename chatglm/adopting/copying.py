"""Owns an adopted folder beside the old one, which stays as it is.

The weights are there under a second name (a hard link) and take no room, or are copied where the
file system has no links; all else is copied, so that settings of one folder are not those of the
other. Does not know what is completed (`plan`), nor how a folder survives a kill
(`converting.staging`).
"""

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from chatglm.adopting.describing import describe_adopted
from chatglm.adopting.kinds import read_for_model, read_kind
from chatglm.adopting.plan import dump_fields, find_changes
from chatglm.adopting.weights import dump_index, find_weight_files, open_weights
from chatglm.cards import BASE_CARD_FILE, CARD_FILE
from chatglm.checkpoints.checksums import SUMS, hash_bytes
from chatglm.checkpoints.prefixes import describe_fields
from chatglm.checkpoints.reading import WEIGHT_FILES
from chatglm.checkpoints.recognize import CONFIG_FILE, PREFIX_TENSORS
from chatglm.converting.staging import Staging, claim_target, describe_files
from chatglm.publishing.contents import list_contents

WEIGHT_INDEXES = tuple(index for _, index in WEIGHT_FILES)


class Copy(NamedTuple):
    """What an adopted folder beside the old one consists of.

    Attributes:
        weights: files by their names in the new folder.
        others: small files that are copied as they are, by name.
        written: the contents of new files, by name.
        left: what of the old folder belongs to no model, and is not in the new one.
        remarks: what a person should know, a line each.
    """

    weights: dict[str, Path]
    others: dict[str, Path]
    written: dict[str, bytes]
    left: list[str]
    remarks: list[str]


def plan_copy(folder: Path, ptuning: Path | None = None) -> Copy:
    """Say what an adopted copy of a folder consists of.

    Args:
        folder: as of `find_changes`.
        ptuning: the folder of a P-Tuning prefix to put into it, in either layout.

    Raises:
        ValueError: as `find_changes`, or for a prefix that cannot be put into it.
    """
    changes = find_changes(folder)
    weights = {name: folder / name for name in find_weight_files(folder)}
    contents = list_contents(folder)
    gone = {*changes.moved, *changes.written, *weights, SUMS}
    others = {name: folder / name for name in contents.kept if name not in gone}
    written = {name: text for name, text in changes.written.items() if name != SUMS}
    left = sorted(set(contents.left_out) - weights.keys() - set(changes.moved))
    copy = Copy(weights, others, written, left, changes.remarks)
    return copy if ptuning is None else _add_prefix(copy, folder, ptuning)


def _add_prefix(copy: Copy, folder: Path, ptuning: Path) -> Copy:
    """Return a copy whose weights have a shard more, which holds a prefix."""
    kind = read_kind(folder)
    if not kind.is_model:
        raise ValueError(f"{folder} is a prefix itself: name the model that {ptuning} is for")
    if kind.fields.get("pre_seq_len"):
        raise ValueError(
            f"{folder} has a prefix of its own (pre_seq_len={kind.fields['pre_seq_len']}): name "
            "the model without one"
        )
    tensors = read_for_model(ptuning, kind.fields)
    kind = kind._replace(fields={**kind.fields, **describe_fields(tensors)})
    weights, shard, index = _number_shards(copy.weights)
    stored = {f"{PREFIX_TENSORS}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    written = {name: text for name, text in copy.written.items() if name not in WEIGHT_INDEXES}
    written[shard] = _dump_tensors(stored, shard)
    written[index] = _index_with(folder, weights, stored, shard)
    written[CONFIG_FILE] = dump_fields(kind.fields)
    written[CARD_FILE] = describe_adopted(folder, kind, ptuning.name).encode()
    others = {n: f for n, f in copy.others.items() if n not in {*written, *WEIGHT_INDEXES}}
    if CARD_FILE in copy.others:  # it speaks of the model without the prefix
        others[BASE_CARD_FILE] = copy.others[CARD_FILE]
    return copy._replace(weights=weights, others=others, written=written)


def _number_shards(weights: Mapping[str, Path]) -> tuple[dict[str, Path], str, str]:
    """Return weight files by names that leave room for one more, its name, and the index's."""
    ending = next(iter(weights.values())).suffix
    single, index = next(pair for pair in WEIGHT_FILES if pair[0].endswith(ending))
    stem, total = single.removesuffix(ending), len(weights) + 1
    names = [f"{stem}-{number:05d}-of-{total:05d}{ending}" for number in range(1, total + 1)]
    return dict(zip(names, weights.values())), names[-1], index


def _dump_tensors(tensors: dict[str, Tensor], name: str) -> bytes:
    if name.endswith(".safetensors"):
        return save_tensors(tensors, metadata={"format": "pt"})
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _index_with(
    folder: Path, weights: Mapping[str, Path], prefix: Mapping[str, Tensor], shard: str
) -> bytes:
    """Return the index of a folder's shards under their new names, and of one more."""
    renamed = {file.name: name for name, file in weights.items()}
    stored = open_weights(folder)
    places = {name: renamed[s.file.name] for name, s in stored.items() if s.file}
    sizes = sum(s.tensor.nbytes for s in stored.values()) + sum(t.nbytes for t in prefix.values())
    return dump_index(places | dict.fromkeys(prefix, shard), sizes)


def write_copy(folder: Path, target: Path, copy: Copy) -> list[str]:
    """Make the new folder, or go on with one that was stopped.

    Args:
        folder: the old one.
        target: the new one; it must not be there, or be empty.
        copy: what it consists of.

    Returns:
        The names of weight files that had to be copied.

    Raises:
        ValueError: for a place that is taken, or a disk without room.
    """
    with claim_target(folder, target, "chatglm adopt") as place:
        staging = Staging(place, _describe_job(copy))
        sizes = {name: file.stat().st_size for name, file in copy.others.items()}
        sizes |= {name: len(text) for name, text in copy.written.items()}
        if not _has_links(folder, place):
            sizes |= {name: file.stat().st_size for name, file in copy.weights.items()}
        staging.check_room(sizes)
        staging.begin()
        missing = (name for name in copy.weights if not staging.has(name))
        copied = [name for name in missing if not staging.link(name, copy.weights[name])]
        for name, file in copy.others.items():
            staging.write(name, partial(copyfile, file))
        for name, text in copy.written.items():
            staging.write(name, partial(_write_bytes, text))
        staging.finish()
    return copied


def _describe_job(copy: Copy) -> dict[str, Any]:
    """Say what the new folder depends on; a card that says another day is no other job."""
    files = {**copy.weights, **copy.others}
    texts = {n: hash_bytes(text) for n, text in copy.written.items() if n != CARD_FILE}
    names = {name: str(file) for name, file in files.items()}
    return {"files": names, "inputs": describe_files(sorted(files.values())), "written": texts}


def _has_links(folder: Path, place: Path) -> bool:
    """Whether both folders are on one disk, as far as that can be known before."""
    existing = next(parent for parent in place.parents if parent.exists())
    return existing.stat().st_dev == folder.stat().st_dev


def _write_bytes(content: bytes, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


__all__ = ["Copy", "plan_copy", "write_copy"]
