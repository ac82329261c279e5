"""Owns the reading of a checkpoint: which tensors a folder holds, and one of them at a time.

Files are memory-mapped, so that listing them reads a few pages and a tensor is read when it is
used. Does not know what a tensor is for, nor which ones a model needs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatglm.loading import list_weight_files

MAPPED_BYTES = 2**28  # are read before a file is mapped anew


class StoredTensor(NamedTuple):
    """A tensor in a weight file.

    Attributes:
        name: its name there.
        file: the weight file.
        shape, dtype: of the tensor.
        nbytes: its size.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class TensorReader:
    """Reads tensors one by one, mapped and not copied.

    Keeps the file at hand mapped, but not for long: what has been read of a map counts as the
    process's memory until it is closed, in the end the whole model.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self._read_bytes = 0

    def read(self, tensor: StoredTensor) -> Tensor:
        """Return a tensor's values."""
        if tensor.file != self._file or self._read_bytes > MAPPED_BYTES:
            self._tensors = map_file(tensor.file)
            self._file, self._read_bytes = tensor.file, 0
        self._read_bytes += tensor.nbytes
        return self._tensors[tensor.name]


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a model folder's weight files, by name.

    Raises:
        ValueError: if a file cannot be read, holds something else, or repeats another's tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in (folder / name for name in list_weight_files(folder)):
        for name, tensor in map_file(file).items():
            if name in found:
                raise ValueError(
                    f"{name} is in {found[name].file.name} and in {file.name} of {folder}: remove "
                    "the shard that does not belong there"
                )
            form = tuple(tensor.shape), tensor.dtype, tensor.nbytes
            found[name] = StoredTensor(name, file, *form)
    return found


def map_file(file: Path) -> Mapping[str, Tensor]:
    """Map the tensors of a safetensors file or of a torch archive, by name.

    Raises:
        ValueError: if the file cannot be read, or holds something else than named tensors.
    """
    try:
        tensors = _map_safetensors(file) if file.suffix == ".safetensors" else _map_archive(file)
    except (RuntimeError, SafetensorError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read: {reason}") from error
    items: list[tuple[str, Any]] = list(tensors.items()) if hasattr(tensors, "items") else []
    for name, tensor in items:
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{file} holds a {kind} named {name}: only tensors may be there")
    if not items:
        raise ValueError(f"{file} holds no tensors by name: save the model's state_dict")
    return dict(items)


def _map_safetensors(file: Path) -> Any:
    with cast(Any, safe_open)(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _map_archive(file: Path) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}") from error
    if not hasattr(fields, "items"):
        raise ValueError(f"{file} holds a {type(fields).__name__}, and not fields by name")
    return fields
