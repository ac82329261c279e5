"""What lies around the model: transformers, weight files, torch's own products, the engine.

Owns the list of tested releases, the check of the installed one, and each name or calling
convention that changed from one of them to the next. Apart from that check nothing asks for a
version number: what an object looks like decides, so that a release that is not out yet is met by
the same code.

Owns the reading of checkpoints: which files they are, their tensors one by one, and whether these
are those of a model. What they are read into may be packed; how is not known here.

Owns the products with integers that torch has for a CPU and does not promise, and the order in
which one of them reads 4-bit weights.

Owns the seam to the engine too, and what graphs hold in the place of kernels. The model's files are
complete without an engine: each function that it has a fast twin of is the slow one, and answers
wherever the twin does not, which for operands that it does not take returns None. The engine is the
package `chatglm.cpu`; another version of the seam is left alone, with a line in the log.

Knows nothing of layers, or of what the model or its engine computes. `docs/hooks.md` lists what
else the model's files lean on, and the test that names each of it.
"""

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import importlib
import inspect
import json
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from packaging import version
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

# The oldest and the newest bound what pyproject.toml installs; tools/noxfile.py tests all of them.
TESTED_TRANSFORMERS = ("4.56.2", "4.57.6", "5.8.1", "5.23.0", "5.24.0")

OLD_CACHE_NAME = "past_key_values"
NEW_CACHE_NAME = "cache"
CACHE_NAMES = (OLD_CACHE_NAME, NEW_CACHE_NAME)

# What `generate` and the outputs of models call a cache: since 5.24 by its new name.
CACHE_NAME = (
    NEW_CACHE_NAME
    if NEW_CACHE_NAME in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    else OLD_CACHE_NAME
)

# One file or an index of shards, in the order in which transformers looks for them.
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PLAIN_NAME = re.compile(r"\w[\w.-]*")  # no folder, nothing hidden, and no pattern for many names
GENERATION_FILE = "generation_config.json"
REMEDY = "use the config.json that came with the weights, and all of their shards"

# Shards are read, and weights reordered, by so many at once. Larger blocks are no faster, and what
# is freed between the results leaves holes in the heap: with 2**24 they were 2 GB after the 6B
# model.
WEIGHTS_AT_ONCE = 2**20

# What torch's product with 8-bit integers reads at once, and where it may begin.
VECTOR_LENGTH = 16
VECTOR_BYTES = 64
# Rows of a block in torch's order of 4-bit integers, with AVX512 and with AVX2; the columns that
# may share a factor there; and the rows of input up to which its product is the fastest.
INT4_BLOCK_ROWS = (64, 32)
INT4_GROUP_SIZES = (256, 128, 64, 32)
INT4_INPUT_ROWS = 48

ENGINE = "chatglm.cpu"
SEAM_VERSION = 1
OPERATORS = "chatglm"  # where torch keeps the operations that graphs see
# The first is for all devices; the second is what the CPU's alone was called before.
SWITCH_VARIABLES = ("CHATGLM_KERNELS", "CHATGLM_CPU_KERNELS")

# The methods of peft that compute with the weight of the layer that an adapter is around. Those of
# DoRA and PiSSA, and others that make an adapter from it, end as the last one does.
WEIGHT_READERS = ("merge", "_merge", "get_base_weight", "init")

# Whether the `from_pretrained` that runs in this thread was told no dtype of the caller's.
IS_PLAIN_LOAD = contextvars.ContextVar("IS_PLAIN_LOAD", default=False)

logger = logging.get_logger(__name__)

_switched_off: list[object] = []  # by whom, in any thread


def check_transformers(installed: str) -> None:
    """Stop on a release that lacks what the code needs, and tell of one that nobody has tried.

    Args:
        installed: the version string of the installed transformers.

    Raises:
        ImportError: if it is older than the oldest tested release.
    """
    oldest, newest = TESTED_TRANSFORMERS[0], TESTED_TRANSFORMERS[-1]
    found = version.parse(installed)
    if found < version.parse(oldest):
        raise ImportError(
            f"This ChatGLM code needs transformers >= {oldest}, found {installed}: "
            "run `pip install -U transformers`, or use the original remote code "
            "(revision v1.1.0 of THUDM/chatglm-6b), which works up to transformers 4.33.3."
        )
    if found.release[:2] > version.parse(newest).release[:2]:
        logger.warning_once(
            f"This ChatGLM code was tested with transformers {oldest} to {newest}, and not with "
            f"{installed}: run `chatglm bench` or `make test` if in doubt, report what differs "
            f'with the output of `transformers env`, or `pip install "transformers<={newest}"`.'
        )


def choose_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that a caller gave under either of its names, or None.

    Raises:
        ValueError: if there are two.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            f"{OLD_CACHE_NAME} and {NEW_CACHE_NAME} are two names of one argument and got two "
            f"caches, a {type(past_key_values).__name__} and a {type(cache).__name__}: pass one."
        )
    return cache if past_key_values is None else past_key_values


def rename_cache(arguments: dict[str, Any]) -> None:
    """Put a cache among keyword arguments under the name that transformers' `generate` takes."""
    cache = choose_cache(*(arguments.pop(name, None) for name in CACHE_NAMES))
    if cache is not None:
        arguments[CACHE_NAME] = cache


def refuse_weight_of_integers(layer: nn.Module) -> None:
    """Refuse an adapter of peft that is about to compute with a packed layer's weight.

    Its `get_base_layer` asks every layer for a `base_layer` within, and calls nothing else of ours
    before it reads the weight; which method wants it only the next frame tells. Left alone, some
    methods end in torch's errors of shapes or dtypes, and others change the integers in silence.

    Args:
        layer: that was asked.

    Raises:
        ValueError: if it is for one of `WEIGHT_READERS`.
    """
    names: list[str] = []
    frame = inspect.currentframe()
    while frame is not None and len(names) < 4:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    asked_by, reader = (*names, "", "")[2:4]  # behind this function and the layer's property
    if asked_by == "get_base_layer" and (reader in WEIGHT_READERS or reader.endswith("_init")):
        raise ValueError(
            f"This adapter needs the weight of {layer}, which is packed integers, to be merged or "
            "to be made from it (as DoRA and PiSSA are): unpack the model first, by "
            "model.get_base_model().dequantize(), or use the unquantized weights (chatglm merge "
            "FOLDER TARGET --lora ADAPTER, and chatglm quantize behind it)."
        )


@contextlib.contextmanager
def loading_own_dtype(options: dict[str, Any]) -> Iterator[None]:
    """Ask for the dtype of config.json where none is named: transformers 4 takes float32 else.

    Meanwhile `IS_PLAIN_LOAD` says whether it is the configuration's, and not one of the caller's.

    Args:
        options: keyword arguments of `from_pretrained`.
    """
    named = [options[key] for key in ("dtype", "torch_dtype") if options.get(key) is not None]
    if not named:
        options["dtype"] = "auto"
    token = IS_PLAIN_LOAD.set(all(isinstance(x, str) and x == "auto" for x in named))
    try:
        yield
    finally:
        IS_PLAIN_LOAD.reset(token)


def keep_float_norms(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Widen a model's norms where a checkpoint has float32, unless the caller named a dtype.

    Args:
        parameters: of the model, by name; those of norms have no values yet.
        stored: tensors of the checkpoint, by the same names.
    """
    for name, tensor in stored.items():
        parameter = parameters[name]
        is_wide = "layernorm" in name and tensor.dtype == torch.float32
        if is_wide and parameter.is_meta and IS_PLAIN_LOAD.get():
            parameter.data = parameter.data.float()


def check_dtype_name(name: Any) -> None:
    """Raise ValueError for the name of a number format that torch does not have."""
    is_known = isinstance(getattr(torch, str(name).removeprefix("torch."), None), torch.dtype)
    if name not in (None, "auto") and not is_known:
        raise ValueError(
            f"config.json has the dtype {name!r}, and it must be one of torch's: float32, float16 "
            "or bfloat16."
        )


def read_load_settings(args: tuple[Any, ...], options: dict[str, Any]) -> Mapping[str, Any]:
    """Return what `_load_pretrained_model` was told, by name.

    transformers 4 passes its settings one by one, 5 as one object in front of the rest.

    Args:
        args: its arguments after the files. options: its keyword arguments.
    """
    return vars(args[0]) if _has_settings_object(args) else options


def change_load_settings(
    args: tuple[Any, ...], options: dict[str, Any], changes: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `read_load_settings` with some settings changed."""
    if _has_settings_object(args):
        return (dataclasses.replace(args[0], **changes), *args[1:]), options
    return args, options | changes


def _has_settings_object(args: tuple[Any, ...]) -> bool:
    return bool(args) and dataclasses.is_dataclass(args[0])


def renew_ties(model: Any) -> None:
    """Have transformers read a model's `_tied_weights_keys` again, which 5 keeps a copy of."""
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


# Reading checkpoints


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
        ValueError: if it is no JSON, maps no tensors to files, or names one outside of its folder.
    """
    weight_map = read_object(index).get("weight_map")
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
    return weight_map


def check_settings(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse files of settings that transformers trips over, or passes by without a word.

    Args:
        folder: a model folder; nothing is checked of one that is not on this machine.
        options: keyword arguments of `from_pretrained`.
    """
    folder = folder / (options.get("subfolder") or "")
    if (folder / GENERATION_FILE).is_file():
        read_object(folder / GENERATION_FILE)
    if any((folder / name).is_file() for kind in WEIGHT_FILES for name in kind):
        list_weight_files(folder)


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

    def check_names(self, pattern: str = "", computed: Iterable[str] = ()) -> None:
        """Refuse weights that lack a tensor of the model's, or have one more.

        Args:
            pattern: what is searched for in the names that matter.
            computed: the model's tensors that need not be stored.

        Raises:
            ValueError: naming the first of them.
        """
        wanted = self.expected.keys() - set(computed)
        missing = [name for name in wanted if not self.find_all(self.ties.get(name, name))]
        for problem, names in (
            ("the weights lack", missing),
            ("the model has no place for", self.left_over),
        ):
            self.refuse(problem, sorted(name for name in names if re.search(pattern, name)))

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


def _forget_read_pages(tensor: Tensor) -> None:
    """Give the pages of a tensor back that lies in a file, unless somebody has written there."""
    if tensor.is_inference() or getattr(tensor, "_version", None) != 0:
        return
    if tensor.is_contiguous() and is_mapped(tensor):
        forget_pages(tensor)


# Torch's own products


def find_int8_product(in_features: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return torch's product of bfloat16 `(M, I)` with int8 `(O, I)`; None without one.

    torch's kernel reads whole vectors and checks none of it: rows of other lengths it reads past
    their end, and at odd addresses, as those of weights that a file stands behind, it faults.
    """
    # torch promises no such operation; without it products are torch's plain ones.
    multiply = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
    if multiply is None or in_features % VECTOR_LENGTH:
        return None

    def multiply_aligned(input: Tensor, weight: Tensor) -> Tensor:
        return multiply(_align(input), _align(weight), input.new_ones(weight.shape[0]))

    return multiply_aligned


def _align(tensor: Tensor) -> Tensor:
    """Return a tensor, or a copy if its memory begins at an address that vectors do not."""
    return tensor.clone() if tensor.data_ptr() % VECTOR_BYTES else tensor


class Int4Blocks(NamedTuple):
    """A 4-bit matrix in the order in which torch's own product reads it: the same bytes, moved.

    As it is stored, a byte has two columns of one row, the even one in the high half. Here it has
    one column of two rows that are half a block of `R` rows apart, the upper one in the low half,
    and every integer is larger by 8.

    Attributes:
        integers: uint8 `(O / R, I, R / 2)`.
        factors: bfloat16 `(I / g, O, 2)`: what each run of `g` columns is multiplied by and what is
            added to it. With a scale per row these are 1 and 0.
        row_scale: `(O,)`, which the product is multiplied by then; else None.
    """

    integers: Tensor
    factors: Tensor
    row_scale: Tensor | None

    @classmethod
    def of_packed(
        cls, weight: Tensor, weight_scale: Tensor, block_rows: int
    ) -> "Int4Blocks | None":
        """Bring stored integers into torch's order; None for sizes that it has no blocks for.

        Args:
            weight: int8 `(O, I / 2)`.
            weight_scale: `(O,)`, or `(O, G)`, which are rounded to bfloat16.
            block_rows: `R`.
        """
        rows, in_features = weight.shape[0], 2 * weight.shape[1]
        if rows % block_rows or in_features % INT4_GROUP_SIZES[-1]:
            return None
        integers = _order_int4(weight, block_rows)
        _forget_read_pages(weight)
        if weight_scale.dim() == 1:
            group_size = next(size for size in INT4_GROUP_SIZES if in_features % size == 0)
            factors = make_unit_factors(in_features // group_size, rows)
            return cls(integers, factors, weight_scale)
        scales = weight_scale.T.to(torch.bfloat16)  # (G, O)
        return cls(integers, torch.stack((scales, torch.zeros_like(scales)), dim=-1), None)

    def restore(self) -> Tensor:
        """Return the integers as they were stored, int8 `(O, I / 2)`."""
        num_blocks, in_features, half = self.integers.shape
        stored = self.integers.new_empty(num_blocks, 2, half, in_features // 2)
        step = max(1, WEIGHTS_AT_ONCE // (2 * half * in_features))
        for ordered, rows in zip(self.integers.split(step), stored.split(step)):
            even, odd = ordered.unflatten(1, (-1, 2)).unbind(2)  # (n, I / 2, R / 2) each
            lower, upper = _exchange_halves(odd, even)
            rows[:, 0], rows[:, 1] = upper.transpose(1, 2), lower.transpose(1, 2)
        return stored.bitwise_xor_(0x88).view(torch.int8).view(2 * half * num_blocks, -1)

    def multiply(self, input: Tensor) -> Tensor:
        """Return `input @ W.T`, bfloat16 `(..., I)` to `(..., O)`."""
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        is_short = rows.shape[0] <= INT4_INPUT_ROWS
        product = self.multiply_few(rows) if is_short else self._multiply_many(rows)
        if self.row_scale is not None:
            product = (product * self.row_scale).to(input.dtype)
        return product.view(*input.shape[:-1], -1)

    def multiply_few(self, rows: Tensor) -> Tensor:
        """Return torch's product, `(M, I)` to `(M, O)`, without the scales of rows."""
        weight = self.integers.view(self.factors.shape[1], -1)  # (O, I / 2)
        group_size = rows.shape[1] // self.factors.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group_size, self.factors)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        """Return the same by unpacking some blocks at a time; bfloat16 holds the integers."""
        _, in_features, half = self.integers.shape
        step = max(1, WEIGHTS_AT_ONCE // (2 * half * in_features))
        factors = self.factors.split(2 * half * step, dim=1)
        parts = []
        for integers, factor in zip(self.integers.split(step), factors):
            halves = torch.stack((integers & 15, integers >> 4), dim=2)  # (n, I, 2, R / 2)
            matrix = halves.transpose(0, 1).reshape(in_features, -1).to(rows.dtype).sub_(8)
            if self.row_scale is None:
                groups = matrix.view(factor.shape[0], -1, matrix.shape[1])  # (I / g, g, n * R)
                groups.mul_(factor[..., 0].unsqueeze(1))
            parts.append(rows @ matrix)
        return torch.cat(parts, dim=-1)


def _order_int4(weight: Tensor, block_rows: int) -> Tensor:
    """Return the integers of `Int4Blocks`, uint8 `(O / R, I, R / 2)`, of int8 `(O, I / 2)`."""
    rows, columns = weight.shape
    half = block_rows // 2
    ordered = weight.new_empty(rows // block_rows, columns, 2, half, dtype=torch.uint8)
    step = max(1, WEIGHTS_AT_ONCE // (2 * columns * block_rows))
    for stored, blocks in zip(weight.split(step * block_rows), ordered.split(step)):
        larger = stored.view(torch.uint8) ^ 0x88  # by 8, both halves
        upper, lower = larger.view(-1, 2, half, columns).unbind(1)
        for parity, exchanged in enumerate(_exchange_halves(upper, lower)):
            blocks[:, :, parity] = exchanged.transpose(1, 2)
    return ordered.flatten(1, 2)  # (O / R, I / 2, 2, R / 2) -> (O / R, I, R / 2)


def _exchange_halves(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes of the two high halves, and of the two low ones; the first one's go low."""
    return (first >> 4) | (second & 0xF0), (first & 15) | (second << 4)


@functools.cache
def make_unit_factors(groups: int, rows: int) -> Tensor:
    """Return factors that change nothing, `(groups, rows, 2)`; all layers of a shape share them."""
    with torch.inference_mode(False):
        return torch.tensor([1, 0], dtype=torch.bfloat16).repeat(groups, rows, 1)


@functools.cache
def find_int4_block_rows() -> int:
    """Return the rows of a block of torch's 4-bit product on this processor, or 0 without one.

    torch promises neither the product nor its order: a product of known integers has to be right.
    """
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return 0
    rows, in_features = 2 * max(INT4_BLOCK_ROWS), INT4_GROUP_SIZES[-1]
    integers = torch.arange(rows * in_features).mul_(37).remainder_(251).remainder_(16).sub_(8)
    even, odd = integers.to(torch.int8).view(rows, -1, 2).unbind(-1)
    weight, unit = (even << 4) | (odd & 15), torch.eye(in_features, dtype=torch.bfloat16)
    expected = integers.view(rows, -1).T.to(unit.dtype)
    for block_rows in INT4_BLOCK_ROWS:
        blocks = Int4Blocks.of_packed(weight, torch.ones(rows), block_rows)
        if blocks is not None and torch.equal(blocks.multiply_few(unit), expected):
            return block_rows
    return 0


# The seam


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Leave everything to plain torch meanwhile, in all threads.

    The environment variable `CHATGLM_KERNELS=off` does so for a whole process.
    """
    _switched_off.append(marker := object())
    try:
        yield
    finally:
        _switched_off.remove(marker)


def are_kernels_on() -> bool:
    """Say whether the user leaves kernels switched on."""
    return not _switched_off and not any(os.environ.get(v) == "off" for v in SWITCH_VARIABLES)


def may_use_kernels() -> bool:
    """Say whether code of our own may compute; a compiler or a tracer has to see torch's."""
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not torch.compiler.is_compiling() and not is_tracing and are_kernels_on()


@functools.cache
def find_engine() -> Any:
    """Return the engine's package; None, with one line in the log, where there is none that fits.

    Raises nothing: whatever keeps a package from being imported, the model's files need none.
    """
    try:
        engine = importlib.import_module(ENGINE)
    except ImportError as error:
        problem = f"{ENGINE} cannot be imported ({error})"
    else:
        version_found = getattr(engine, "SEAM_VERSION", None)
        if version_found == SEAM_VERSION:
            return engine
        problem = f"{ENGINE} has version {version_found} of the seam, not {SEAM_VERSION}"
    logger.warning_once(
        f"ChatGLM's kernels for CPUs are not used, torch's slower operations are: {problem}. "
        "`pip install -U chatglm` brings the package that fits."
    )
    return None


def find_twin(name: str) -> Callable[..., Any] | None:
    """Return the engine's function of a name, or None where plain torch has to do."""
    engine = find_engine() if may_use_kernels() else None
    return None if engine is None else getattr(engine, name)


def try_first(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let the engine's function of that name answer first; what it does not take, it leaves.

    The decorated function is the model; its twin takes the same arguments, those on a CPU.
    """

    def plug(slow: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(slow)
        def choose(*args: Any, **kwargs: Any) -> Any:
            is_for_engine = any(isinstance(x, Tensor) and x.is_cpu for x in args)
            twin = find_twin(name) if is_for_engine else None
            found = None if twin is None else twin(*args, **kwargs)
            return slow(*args, **kwargs) if found is None else found

        return choose

    return plug


def with_fast_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have the engine compute what torch's linear layers are slow at on a CPU, without gradients.

    It sees every call of `torch.nn.functional.linear` meanwhile, so that the layers are torch's own
    and other tools know them.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_for_engine = not torch.is_grad_enabled() and self.device.type == "cpu"
        twin = find_twin("fast_products") if is_for_engine else None
        if twin is None:
            return forward(self, *args, **kwargs)
        with twin():
            return forward(self, *args, **kwargs)

    return run


# What graphs hold


def keep_whole(
    name: str, allocate: Callable[..., Tensor], has_kernels: Callable[[torch.device], bool]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let graphs call the decorated function, where it has kernels, and not look into it.

    What `torch.compile` and `torch.export` make then holds `torch.ops.chatglm.<name>`, which
    computes what the function does, and by its kernels, whenever the graph is run.

    Args:
        name: of the operation.
        allocate: takes the same arguments, and returns memory as the result's.
        has_kernels: tells it of a device, with a compiler's leave to ask.
    """

    def plug(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        operator = _define_operator(name, compute, allocate)

        @functools.wraps(compute)
        def choose(input: Tensor, *args: Any) -> Tensor:
            # Outside of graphs the operation costs 10 to 25 us more than the call (1,000 small
            # products on a CPU, torch 2.13): 1 to 3 ms a token of 6B, so the call is direct there.
            is_kept = torch.compiler.is_compiling() and are_kernels_on()
            if is_kept and has_kernels(input.device) and not _is_autocast(input):
                return operator(input, *args)
            return compute(input, *args)

        return choose

    return plug


def _define_operator(
    name: str, compute: Callable[..., Tensor], allocate: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Have torch know a function by a name, and return the operation.

    A process may hold several copies of these files, and torch takes a name once: the first copy
    computes for all. So a name's meaning never changes; another meaning gets another name.
    """
    known = getattr(torch.ops, OPERATORS)
    if not hasattr(known, name):
        operator = torch.library.custom_op(f"{OPERATORS}::{name}", compute, mutates_args=())
        operator.register_fake(allocate)
    return getattr(known, name)


def _is_autocast(tensor: Tensor) -> bool:
    """Tell whether torch casts products of a tensor, by rules that are not an operation's."""
    return torch.is_autocast_enabled(tensor.device.type)


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "REMEDY",
    "TESTED_TRANSFORMERS",
    "WEIGHT_FILES",
    "Checkpoint",
    "PendingTensor",
    "StoredTensor",
    "UnreadableWeightsError",
    "change_load_settings",
    "check_dtype_name",
    "check_settings",
    "check_transformers",
    "choose_cache",
    "find_engine",
    "find_twin",
    "is_mapped",
    "keep_float_norms",
    "keep_whole",
    "kernels_off",
    "list_weight_files",
    "loading_own_dtype",
    "may_use_kernels",
    "open_shards",
    "read_load_settings",
    "read_object",
    "read_weight_map",
    "refuse_weight_of_integers",
    "rename_cache",
    "renew_ties",
    "try_first",
    "whole_shape",
    "with_fast_products",
]
