"""Owns what tells the weights of one model from those of another without reading all of them.

Of each tensor some thousand values are taken, at places that its size alone decides, and rounded to
float16 and to bfloat16. So the same weights give the same digest in any layout of shards, in either
kind of file, and in float32 as in float16. bfloat16 has fewer digits: where one of two models is
stored in it, both are compared as bfloat16. Packed integers are not compared with floats.

Tensors are taken together by their name without the number of the layer, so that a difference is
named in a few words. Does not know whose weights they are, nor where a digest is kept.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chatglm.checkpoints.reading import StoredTensor, list_weight_files, open_folder

RUNS = 16  # stretches of neighbouring values, each of which is one look at the disk
RUN_LENGTH = 256
ROUNDINGS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HASH_LETTERS = 16
MODEL_PREFIX = "transformer."
LAYER = re.compile(r"\blayers\.(\d+)\.")
COMPUTED = re.compile(r"\.inv_freq$")  # buffers of the official files, which no code reads
TABLE, HEAD = "word_embeddings.weight", "lm_head.weight"
FOLDERS_REMEMBERED = 16
# What two models can differ in is named by these many parts at most.
MOST_NAMED = 3

Fingerprint = tuple[tuple[str, int, int], ...]


class Part(NamedTuple):
    """The digest of all tensors of one name.

    Attributes:
        dtype: of the first of them, as it is stored.
        hashes: by the number format that the values were rounded to; of integers, by "stored".
    """

    dtype: str
    hashes: dict[str, str]


Digest = dict[str, Part]


class Difference(NamedTuple):
    """How two digests differ.

    Attributes:
        parts: the names of tensors that differ, or that only one of both has.
        unknown: the names of those that cannot be compared, packed here and floats there.
    """

    parts: list[str]
    unknown: list[str]

    def __str__(self) -> str:
        more = len(self.parts) - MOST_NAMED
        return ", ".join(self.parts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def digest_folder(folder: Path) -> Digest:
    """Return the digest of a model folder's weights, computed once for each state of its files.

    Raises:
        ValueError: if they cannot be read.
    """
    files = [folder / name for name in list_weight_files(folder)]
    states = ((file.name, file.stat()) for file in files if file.is_file())
    return _digest_again(folder, tuple((n, s.st_mtime_ns, s.st_size) for n, s in states))


@lru_cache(maxsize=FOLDERS_REMEMBERED)
def _digest_again(folder: Path, fingerprint: Fingerprint) -> Digest:
    return digest_tensors(open_folder(folder))


def digest_tensors(tensors: Mapping[str, StoredTensor]) -> Digest:
    """Return the digest of stored tensors.

    Args:
        tensors: by name, with the model's prefix or without it.
    """
    named = {name.removeprefix(MODEL_PREFIX): stored.tensor for name, stored in tensors.items()}
    if HEAD in named and TABLE not in named:  # tied, and stored under its other name
        named[TABLE] = named.pop(HEAD)
    groups: dict[str, list[str]] = {}
    for name in sorted(named, key=_order):
        if not COMPUTED.search(name):
            groups.setdefault(LAYER.sub("", name), []).append(name)
    if _is_copy(named):
        del groups[HEAD]
    return {group: _digest_group(names, named) for group, names in sorted(groups.items())}


def _order(name: str) -> tuple[int, str]:
    found = LAYER.search(name)
    return int(found[1]) if found else -1, name


def _is_copy(named: Mapping[str, Tensor]) -> bool:
    """Whether a head repeats the embedding, which only some kinds of files write twice."""
    table, head = named.get(TABLE), named.get(HEAD)
    if table is None or head is None or (table.shape, table.dtype) != (head.shape, head.dtype):
        return False
    return torch.equal(take_samples(table), take_samples(head))


def _digest_group(names: list[str], named: Mapping[str, Tensor]) -> Part:
    first = named[names[0]]
    roundings: Mapping[str, torch.dtype | None] = ROUNDINGS
    if not first.is_floating_point():
        roundings = {"stored": None}
    hashers = {rounding: hashlib.sha256() for rounding in roundings}
    for name in names:
        samples = take_samples(named[name])
        for rounding, hasher in hashers.items():
            hasher.update(f"{name} {list(named[name].shape)}\n".encode())
            hasher.update(_as_bytes(samples, roundings[rounding]))
    hashes = {rounding: h.hexdigest()[:HASH_LETTERS] for rounding, h in hashers.items()}
    return Part(str(first.dtype).removeprefix("torch."), hashes)


def take_samples(tensor: Tensor) -> Tensor:
    """Return the values of a tensor at places that follow from their number, `(N,)`."""
    values = tensor.detach().reshape(-1)
    if len(values) <= RUNS * RUN_LENGTH:
        return values
    starts = [(len(values) - RUN_LENGTH) * run // (RUNS - 1) for run in range(RUNS)]
    return torch.cat([values[start : start + RUN_LENGTH] for start in starts])


def _as_bytes(samples: Tensor, rounding: torch.dtype | None) -> bytes:
    # Zero has two signs, which some roads through other formats lose.
    rounded = samples if rounding is None else samples.to(rounding) + 0.0
    return rounded.contiguous().view(torch.uint8).numpy().tobytes()


def compare_digests(mine: Digest, other: Digest) -> Difference:
    """Return how the digests of two models differ."""
    parts: list[str] = []
    unknown: list[str] = []
    for name in sorted(mine.keys() | other.keys()):
        pair = [digest.get(name) for digest in (mine, other)]
        if name.endswith("_scale") and None in pair:
            continue  # told by the matrix that it belongs to
        if None in pair:
            parts.append(name)
            continue
        hashes = [part.hashes for part in pair if part is not None]
        shared = [
            rounding for rounding in _choose_rounding(*pair) if all(rounding in h for h in hashes)
        ]
        if not shared:
            unknown.append(name)
        elif hashes[0][shared[0]] != hashes[1][shared[0]]:
            parts.append(name)
    return Difference(parts, unknown)


def _choose_rounding(*parts: Part | None) -> tuple[str, ...]:
    """Return in which formats two parts may be compared, the finest first."""
    is_coarse = any(part is not None and part.dtype == "bfloat16" for part in parts)
    return ("bfloat16",) if is_coarse else ("float16", "stored")


def name_digest(digest: Digest) -> str:
    """Return a digest in one word, for messages."""
    # Of the finest rounding alone: copies in float32 and float16 may differ in the other one.
    finest = {name: next(iter(part.hashes.values())) for name, part in digest.items()}
    told = "".join(f"{name} {found}\n" for name, found in sorted(finest.items()))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def pack_digest(digest: Digest) -> dict[str, Any]:
    """Return a digest as JSON has it."""
    return {name: {"dtype": part.dtype, **part.hashes} for name, part in digest.items()}


def read_digest(fields: Any, place: str) -> Digest:
    """Return the digest that JSON holds.

    Args:
        fields: as `pack_digest` made them.
        place: what an error calls the file.

    Raises:
        ValueError: if they are none.
    """
    digest: Digest = {}
    for name, part in _items(fields, place):
        texts = dict(_items(part, place))
        if not all(isinstance(value, str) for value in texts.values()) or "dtype" not in texts:
            _refuse(place)
        digest[name] = Part(texts.pop("dtype"), texts)
    return digest


def _items(fields: Any, place: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(fields, dict) or not fields:
        _refuse(place)
    yield from fields.items()


def _refuse(place: str) -> None:
    raise ValueError(f"{place} holds no digest of a base: remove the file, and nothing is known")


__all__ = [
    "Difference",
    "Digest",
    "compare_digests",
    "digest_folder",
    "digest_tensors",
    "name_digest",
    "pack_digest",
    "read_digest",
]
