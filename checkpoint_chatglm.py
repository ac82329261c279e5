"""Checkpoints: which files they are, their tensors one by one, and whether these are a model's.

Owns the reading of weight files, by everybody who reads them: loading, quantizing, merging,
checking. What tensors are read into may be packed; how is not known here.
"""

import contextlib
import contextvars
import ctypes
import importlib
import json
import mmap
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import load_state_dict

# One file or an index of shards, in the order in which transformers looks for them.
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PLAIN_NAME = re.compile(r"\w[\w.-]*")  # no folder, nothing hidden, and no pattern for many names
GENERATION_FILE = "generation_config.json"
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST_ID = 2**31
BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Where the stored tensors tell a size of the configuration: how a name ends, and the axis. None of
# them is packed along it.
SIZES = {
    "vocab_size": ("word_embeddings.weight", 0),
    "hidden_size": ("final_layernorm.weight", 0),
    "inner_hidden_size": (".mlp.dense_h_to_4h.bias", 0),
}
REMEDY = "use the config.json that came with the weights, and all of their shards"

# Whether a model of ours is being loaded in this thread.
IS_OWN_LOAD = contextvars.ContextVar("IS_OWN_LOAD", default=False)

# Tensors are read, and reordered, by so many values at once. Larger blocks are no faster, and what
# is freed between the results leaves holes in the heap: with 2**24 they were 2 GB after the 6B
# model.
WEIGHTS_AT_ONCE = 2**20


def list_weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold a folder's weights, shards in their order.

    Raises:
        ValueError: if there are none, or their index is none.
    """
    for single, index in WEIGHT_FILES:
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return sorted(set(read_weight_map(folder / index).values()))
    raise ValueError(
        f"{folder} has no weights: put pytorch_model.bin.index.json or model.safetensors and "
        "what belongs to it there"
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor, as the index of a checkpoint tells it.

    Raises:
        ValueError: if it is no JSON, maps no tensors to files, names one outside of its folder, or
            has no metadata.
    """
    fields = read_object(index)
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index} has the weight_map {weight_map!r:.60}, which leads to no shards: take the "
            "index that came with the weights"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard):
            raise ValueError(
                f"{index} puts {name} into {shard!r}, and shards lie beside it under plain "
                "names: take the index that came with the weights"
            )
    if not isinstance(fields.get("metadata"), dict):
        raise ValueError(
            f'{index} has no "metadata", without which transformers reads no index: write '
            '"metadata": {} into it, beside "weight_map"'
        )
    return weight_map


def check_settings(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse files of settings that transformers trips over, or passes by without a word.

    Args:
        folder: a model folder; nothing is checked of one that is not on this machine.
        options: keyword arguments of `from_pretrained`.
    """
    folder = folder / (options.get("subfolder") or "")
    if (folder / GENERATION_FILE).is_file():
        check_token_ids(read_object(folder / GENERATION_FILE), folder / GENERATION_FILE)
    if any((folder / name).is_file() for kind in WEIGHT_FILES for name in kind):
        list_weight_files(folder)


def check_token_ids(fields: Mapping[str, Any], place: str | Path) -> None:
    """Raise ValueError for an id that is no number; transformers' own errors name no option.

    Args:
        fields: of which those of `ID_FIELDS` are looked at.
        place: what the error says they are of.
    """
    for name in ID_FIELDS:
        given = fields.get(name)
        ids: Any = given if isinstance(given, (list, tuple)) else [given]
        if given is None or isinstance(given, Tensor):
            continue
        are_numbers = all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids)
        if not are_numbers or not all(-1 <= i < LARGEST_ID for i in ids):
            raise ValueError(
                f"{place} has {name}={given!r}, which must be a whole number or a list of such: "
                "take the one that came with the weights, or leave it out"
            )


def read_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}; fetch it again") from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise ValueError(f"{file} holds a {kind}, and not fields by name; fetch it again")
    return fields


def open_shards(
    files: Iterable[str | Path], weights_only: bool = True
) -> "dict[str, StoredTensor]":
    """Map shards into memory; nothing but their tables of contents is read yet.

    Args:
        files: safetensors files or torch archives.
        weights_only: whether archives may hold nothing but tensors; else their code runs.

    Returns:
        All their tensors, by name.

    Raises:
        UnreadableWeightsError: if a file cannot be read.
        ValueError: if it holds something else, or repeats another's tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        for name, tensor in _map_file(file, weights_only).items():
            if name in found:
                raise ValueError(
                    f"{found[name]} is also in {file}: remove the shard that does not belong there"
                )
            found[name] = StoredTensor(tensor, name, file)
    return found


def _map_file(file: Path, weights_only: bool) -> dict[str, Tensor]:
    safetensors: Any = importlib.import_module("safetensors")  # transformers needs it itself
    unreadable = (OSError, RuntimeError, EOFError, UnpicklingError, safetensors.SafetensorError)
    try:
        tensors: Any = load_state_dict(str(file), map_location="cpu", weights_only=weights_only)
    except unreadable as error:
        # What torch has to say first, that other options would help, would be no help.
        told = re.search(r"Unpickler error: (.*)", str(error)) or re.match(r"(.*)", str(error))
        reason = re.split(r"\. |, | at '", told[1])[0] if told else ""
        raise UnreadableWeightsError(
            f"{file} cannot be read: {reason}; fetch it again (git lfs pull, if it is a pointer)"
        ) from error
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{file} holds no tensors by name: save the model's state_dict")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{file} holds a {kind} named {name}: only tensors may be there")
    return dict(tensors)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor of which DeepSpeed's ZeRO-3 may leave this process a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


class StoredTensor:
    """A tensor of a checkpoint, read block by block.

    Args:
        tensor: as stored.
        name: its name there.
        file: of ours that it is mapped from; None for a tensor of somebody else's. The pages of a
            file are given back once read: they count as memory of the process until then.
    """

    def __init__(self, tensor: Tensor, name: str = "", file: Path | None = None) -> None:
        self.tensor, self.name, self.file = tensor, name, file

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the tensor."""
        return self.tensor.dtype

    def __str__(self) -> str:
        return self.name if self.file is None else f"{self.name} in {self.file.name}"

    def iter_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows and where they stand; each is given back after its turn."""
        rows = self.tensor.shape[0]
        step = max(1, WEIGHTS_AT_ONCE * rows // max(1, self.tensor.numel()))
        is_file = self.file is not None and self.tensor.is_contiguous()
        may_forget = is_file and is_mapped(self.tensor)
        for start in range(0, rows, step):
            block = self.tensor[start : start + step]
            yield slice(start, start + block.shape[0]), block
            if may_forget:
                forget_pages(block)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy that no file stands behind, in another number format if one is given."""
        result = torch.empty(self.shape, dtype=dtype or self.dtype)
        for rows, block in self.iter_blocks():
            result[rows] = block
        return result

    def equals(self, other: "StoredTensor") -> bool:
        """Tell whether two tensors of the same sizes have the same values."""
        if self.tensor.data_ptr() == other.tensor.data_ptr():
            return True
        pairs = zip(self.iter_blocks(), other.iter_blocks())
        return all(torch.equal(block, twin.to(block.dtype)) for (_, block), (_, twin) in pairs)


class UnreadableWeightsError(OSError, ValueError):
    """A file that is none: transformers says so by an OSError, this code by the other."""


class Checkpoint(NamedTuple):
    """Stored tensors beside the model that they are for.

    Attributes:
        tensors: what is stored, by the stored name.
        names: the stored name of each of the model's tensors that is stored.
        expected: the model's tensors, by its own names; their values do not matter.
        ties: the model's tensors that are others of its own: name to name.
        left_over: the stored names that the model has no place for.
    """

    tensors: Mapping[str, StoredTensor]
    names: dict[str, str]
    expected: dict[str, Tensor]
    ties: dict[str, str]
    left_over: list[str]

    @classmethod
    def match(cls, model: Any, tensors: Mapping[str, StoredTensor]) -> "Checkpoint":
        """Find each stored tensor's place, which may have the base model's prefix or lack it.

        Args:
            model: of transformers, on any device; on "meta" it takes no memory.
            tensors: by the stored name.
        """
        expected = model.state_dict(keep_vars=True)
        prefix = f"{model.base_model_prefix}."
        names = {}
        for stored in tensors:
            for name in (stored, prefix + stored, stored.removeprefix(prefix)):
                if name in expected:
                    names[name] = stored
                    break
        is_tied = getattr(model.config, "tie_word_embeddings", False)
        ties = model._tied_weights_keys if is_tied else None
        computed = model._keys_to_ignore_on_load_unexpected or ()
        placed = set(names.values())
        left_over = [
            name
            for name in tensors
            if name not in placed and not any(re.search(pattern, name) for pattern in computed)
        ]
        return cls(tensors, names, expected, dict(ties or {}), left_over)

    def find(self, name: str) -> StoredTensor | None:
        """Return the stored tensor for one of the model's, or None."""
        return self.tensors[self.names[name]] if name in self.names else None

    def find_all(self, name: str) -> list[StoredTensor]:
        """Return what is stored for one of the model's tensors, under all names it is tied by."""
        twins = [tied for tied, origin in self.ties.items() if origin == name]
        found = (self.find(n) for n in (name, *twins))
        return [stored for stored in found if stored is not None]

    def is_copy(self, name: str) -> bool:
        """Tell whether what is stored for a tied tensor repeats the other: a head its embedding."""
        stored, origin = self.find(name), self.find(self.ties.get(name, ""))
        if stored is None or origin is None or stored.shape != origin.shape:
            return False
        return stored.equals(origin)

    def check_fields(self, config: Any, remedy: str = REMEDY) -> None:
        """Refuse a configuration that names other sizes than the stored tensors have.

        Args:
            config: of the model.
            remedy: what the error advises.

        Raises:
            ValueError: naming every such field, and both sizes.
        """
        found = {field: self._read_size(*place) for field, place in SIZES.items()}
        found["num_layers"] = len({m[1] for m in map(BLOCK.search, self.tensors) if m})
        others = {
            field: getattr(config, field)
            for field, size in found.items()
            if size and getattr(config, field, size) != size
        }
        if others:
            named = ", ".join(f"{field} {value}" for field, value in others.items())
            stored = ", ".join(str(found[field]) for field in others)
            self.refuse("the configuration has", [f"{named}, and the weights {stored}"], remedy)

    def _read_size(self, ending: str, axis: int) -> int | None:
        """Return a size of the first stored tensor with such a name."""
        for name, stored in self.tensors.items():
            if name.endswith(ending) and stored.tensor.dim() > axis:
                return stored.shape[axis]
        return None

    def check_names(self, pattern: str = "", computed: Iterable[str] = ()) -> None:
        """Refuse weights that lack a tensor of the model's, or have one more.

        Args:
            pattern: what is searched for in the names that matter.
            computed: the model's tensors that need not be stored.

        Raises:
            ValueError: naming the first of them.
        """
        for problem, names in (
            ("the weights lack", self.find_missing(computed)),
            ("the model has no place for", self.left_over),
        ):
            self.refuse(problem, sorted(name for name in names if re.search(pattern, name)))

    def find_missing(self, computed: Iterable[str] = ()) -> list[str]:
        """Return the model's tensors that are stored under none of their names.

        Args:
            computed: those that need not be.
        """
        wanted = self.expected.keys() - set(computed)
        return [name for name in wanted if not self.find_all(self.ties.get(name, name))]

    def check_sizes(
        self,
        names: Iterable[str],
        others: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        remedy: str = REMEDY,
    ) -> None:
        """Refuse stored tensors of other sizes than the model's.

        Args:
            names: the model's tensors to look at.
            others: the sizes of those that are stored in another form than the model's.
            remedy: what the error advises.

        Raises:
            ValueError: naming the first of them.
        """
        misfits = []
        for name in names:
            stored, wanted = self.find(name), others.get(name) or whole_shape(self.expected[name])
            if stored is not None and stored.shape != wanted:
                misfits.append(f"{stored} with the sizes {stored.shape}, and not {wanted}")
        self.refuse("the weights have", misfits, remedy)

    def refuse(self, problem: str, found: Iterable[str], remedy: str = REMEDY) -> None:
        """Raise ValueError about what was found, if anything was; it names the first."""
        first, *others = [*found] or [None]
        if first is None:
            return
        files = (tensor.file for tensor in self.tensors.values())
        folder = next((file.parent for file in files if file is not None), None)
        whose = "weights and configuration" + ("" if folder is None else f" of {folder}")
        more = f" and {len(others)} more" if others else ""
        raise ValueError(f"{whose} do not belong together: {problem} {first}{more}; {remedy}")


class PendingTensor:
    """A tensor that is made when transformers asks for it, which it does as for a shard's slice.

    Args:
        shape, dtype: those of what will be made.
        make: makes it, on the CPU.
        lock: held meanwhile; transformers 5 reads in threads, whose matrices would add up.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        make: Callable[[], Tensor],
        lock: threading.Lock,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._make, self._lock = make, lock

    def __getitem__(self, index: Any) -> Tensor:
        with self._lock:
            return self._make()[index]

    def to(self, device: Any) -> Tensor:
        """Make it on a device."""
        return self[...].to(device)


def is_mapped(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in memory that a file stands behind; False where unknown."""
    if sys.platform != "linux":
        return False
    address = tensor.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            area, _, _, _, inode = line.split(maxsplit=5)[:5]
            start, end = (int(number, 16) for number in area.split("-"))
            if start <= address < end:
                return inode != "0"
    return False


def forget_pages(tensor: Tensor) -> None:
    """Give the pages that only this mapped tensor touches back; they can be read again."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED))


class LatePatterns(dict[str, Any]):
    """transformers' patterns of all models' weights, compiled once another model is asked for.

    It keeps over a thousand regular expressions, and compiles all of them before any model is
    loaded: a third of a second of the time to a first answer. This family has none of them.

    Args:
        build: compiles them.
        keep: takes what was compiled, in the place of this.
    """

    def __init__(self, build: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        super().__init__()
        self.build, self.keep = build, keep

    def compile_all(self) -> Any:
        patterns = self.build()
        self.keep(patterns)
        return patterns

    def get(self, name: str, default: Any = None) -> Any:
        if IS_OWN_LOAD.get():
            # What old names of every model's norms become: none is one of ours.
            return [] if name == "legacy" else default
        return self.compile_all().get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self.compile_all()

    def __getitem__(self, name: str) -> Any:
        return self.compile_all()[name]

    def __setitem__(self, name: str, patterns: Any) -> None:
        self.compile_all()[name] = patterns


@contextlib.contextmanager
def without_patterns() -> Iterator[None]:
    """Load a model of ours: what transformers 5 knows of others' weights is not compiled for it."""
    module = sys.modules.get("transformers.conversion_mapping")
    build = getattr(module, "_build_checkpoint_conversion_mapping", None)
    name = "_checkpoint_conversion_mapping_cache"
    if build is not None and getattr(module, name, ()) is None:
        setattr(module, name, LatePatterns(build, partial(setattr, module, name)))
    token = IS_OWN_LOAD.set(True)
    try:
        yield
    finally:
        IS_OWN_LOAD.reset(token)


__all__ = [
    "REMEDY",
    "WEIGHT_FILES",
    "Checkpoint",
    "LatePatterns",
    "PendingTensor",
    "StoredTensor",
    "UnreadableWeightsError",
    "check_settings",
    "check_token_ids",
    "forget_pages",
    "is_mapped",
    "list_weight_files",
    "open_shards",
    "read_object",
    "read_weight_map",
    "whole_shape",
    "without_patterns",
]
