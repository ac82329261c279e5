"""Owns what is decided before a model folder is converted, and what is refused.

A model of the same configuration without values says which tensors there must be, and in which
form they will be stored. Settings and code come from the folder itself or from this repository, by
the size of its vocabulary. Reads files and writes none; knows nothing of values.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from chatglm.cards import BASE_CARD_FILE, CARD_FILE
from chatglm.checkpoints.complete import CURRENT, complete_fields, find_auto_map, list_settings
from chatglm.checkpoints.reading import (
    WEIGHT_FILES,
    StoredTensor,
    build_skeleton,
    match_whole,
    open_folder,
)
from chatglm.checkpoints.recognize import CONFIG_FILE, read_object, refuse_foreign_format
from chatglm.converting.adapters import Adapter, read_adapter
from chatglm.converting.staging import describe_files
from chatglm.model import FOLDER as CODE_FOLDER
from chatglm.model_files import find_model_files

MAX_SHARD_BYTES = 10**9
# One file or an index of shards, by the kind of file.
FILE_KINDS: dict[str, tuple[str, str]] = dict(zip(("safetensors", "bin"), WEIGHT_FILES))
VOCABULARY = "ice_text.model"
TEMPLATE = "chat_template.jinja"
SETTINGS = ("generation_config.json", "tokenizer_config.json")
# What a tokenizer of ours saves beside these on some releases of transformers.
MORE_SETTINGS = ("special_tokens_map.json", "added_tokens.json")
LICENSES = ("LICENSE*", "MODEL_LICENSE*", "NOTICE*")


class PackedFormat(NamedTuple):
    """What the weights become.

    Attributes:
        bits: 4 or 8; 0 for weights that stay as they are.
        group_size: columns that share a scale; None for whole rows, the official format.
        embeddings: whether the embedding and the head are packed too.
    """

    bits: int
    group_size: int | None = None
    embeddings: bool = False

    def fields(self) -> dict[str, Any]:
        """The format as config.json has it."""
        return {
            "quantization_bit": self.bits,
            "quantization_group_size": self.group_size,
            "quantization_embeddings": self.embeddings,
        }


FLOAT_WEIGHTS = PackedFormat(0)


class Form(NamedTuple):
    """How the result is stored.

    Attributes:
        packed_format: what the matrices become.
        dtype: of what is not packed, see `kept_dtype`; None leaves each tensor its own.
        kind: of the files, "safetensors" or the official "bin".
    """

    packed_format: PackedFormat
    dtype: torch.dtype | None = torch.float16
    kind: str = "safetensors"


class Source(NamedTuple):
    """A folder with float weights.

    Attributes:
        folder: where they are.
        fields: its configuration, completed, for float weights.
        files: what the result takes over as it is, by its name there.
    """

    folder: Path
    fields: dict[str, Any]
    files: dict[str, Path]


class Piece(NamedTuple):
    """A parameter of the model.

    Attributes:
        name: its name.
        stored: its values, not read yet; a tied one may be stored twice.
        layer: the layer without values that packs it, or None if it stays a float tensor.
        dtype: of that float tensor.
        sizes: the bytes that are written for it, by name; 0 for another name of the same values.
    """

    name: str
    stored: list[StoredTensor]
    layer: Any
    dtype: torch.dtype
    sizes: dict[str, int]


class Plan(NamedTuple):
    """What will be written.

    Attributes:
        files: what the result takes over as it is, by its name there.
        fields: its config.json.
        shards: the pieces of each weight file, by its name.
        kind: of the weight files.
        adapters: what is merged into the weights first, in order.
        inputs: all files that the result depends on.
    """

    files: dict[str, Path]
    fields: dict[str, Any]
    shards: dict[str, list[Piece]]
    kind: str
    adapters: tuple[Adapter, ...]
    inputs: list[Path]

    def job(self) -> dict[str, Any]:
        """Describe the plan so that one that gives the same files is equal, and others are not."""
        shards = {
            name: [[piece.name, str(piece.dtype)] for piece in pieces]
            for name, pieces in self.shards.items()
        }
        order = [str(adapter.files[0]) for adapter in self.adapters]
        inputs = describe_files(self.inputs)
        return {"config": self.fields, "shards": shards, "inputs": inputs, "adapters": order}

    def shard_sizes(self) -> dict[str, int]:
        """The bytes of the tensors of each weight file."""
        return {name: sum(map(sum_sizes, pieces)) for name, pieces in self.shards.items()}


def make_plan(source: Source, form: Form, lora: Sequence[Path] = ()) -> Plan:
    """Check the weights of a folder and its adapters, and say what becomes of them.

    Args:
        source: the folder.
        form: what becomes of it.
        lora: folders of LoRA adapters to merge first, in order.

    Raises:
        ValueError: for tensors that are not those of the configuration, a format that does not fit
            them, or an adapter that cannot be merged.
    """
    plain = build_skeleton(source.fields)
    tensors = match_tensors(source.folder, plain)
    adapters = tuple(_read_adapter(folder, plain) for folder in lora)
    fields = source.fields | form.packed_format.fields()
    pieces = plan_pieces(tensors, build_skeleton(fields), form)
    fields["torch_dtype"] = str(form.dtype or _main_dtype(pieces)).removeprefix("torch.")
    shards = cut_shards(pieces, MAX_SHARD_BYTES, form.kind)
    inputs = {*source.files.values(), source.folder / "config.json"}
    inputs |= {tensor.file for found in tensors.values() for tensor in found if tensor.file}
    inputs |= {file for adapter in adapters for file in adapter.files}
    return Plan(source.files, fields, shards, form.kind, adapters, sorted(inputs))


def read_source(folder: Path) -> Source:
    """Read the configuration of a folder and find what belongs beside its converted weights.

    A folder that has our code keeps its own settings; any other takes those of its generation,
    which its vocabulary's size tells.

    Raises:
        ValueError: if the weights are quantized already, a file is missing, or the generation is
            not known.
    """
    code = CODE_FOLDER
    own = read_object(folder / CONFIG_FILE)
    refuse_foreign_format(folder, own, known=())
    is_ours = own.get("auto_map") == find_auto_map()
    settings = folder
    if not is_ours or not all((folder / name).is_file() for name in SETTINGS):
        settings = _find_generation(folder, own.get("vocab_size"))
    for name in SETTINGS:  # a folder that carries on broken ones would fail with its next reader
        if (settings / name).is_file():
            read_object(settings / name)
    fields = own if is_ours else complete_fields(own)
    for name in ("_name_or_path", "dtype", "torch_dtype"):
        fields.pop(name, None)
    return Source(folder, fields | FLOAT_WEIGHTS.fields(), _find_companions(folder, code, settings))


def _find_generation(folder: Path, vocab_size: int | None) -> Path:
    """Return the folder with the settings of a model whose embedding has so many rows."""
    known = list_settings()
    if vocab_size in known:
        return known[vocab_size]
    raise ValueError(
        f"{folder} has a vocab_size of {vocab_size}, and the known ones are {sorted(known)}: copy "
        f"the files of this repository there ({', '.join(SETTINGS)} and a config.json with its "
        "auto_map), adapted to that vocabulary"
    )


def _find_companions(folder: Path, code: Path, settings: Path) -> dict[str, Path]:
    """Return the files that the result takes over, by name: code, settings, vocabulary, licences.

    What the folder has of its own goes before the repository's. Its card is that of the base now.
    """
    if not (folder / VOCABULARY).is_file():
        raise ValueError(
            f"{folder} has no {VOCABULARY}: copy that of the model it was made from there"
        )
    template = settings / TEMPLATE
    files = [code / "LICENSE", folder / VOCABULARY, *(settings / name for name in SETTINGS)]
    files += [path for pattern in LICENSES for path in folder.glob(pattern)]
    files += [code / name for name in find_model_files(code, CURRENT)]
    files.append(template if template.is_file() else code / TEMPLATE)
    if settings == folder:
        files += [folder / name for name in MORE_SETTINGS]
    found = {path.name: path for path in files if path.is_file()}
    if (folder / CARD_FILE).is_file():
        found[BASE_CARD_FILE] = folder / CARD_FILE
    return found


def match_tensors(folder: Path, plain: Any) -> dict[str, list[StoredTensor]]:
    """Find where each parameter of the model is stored, tied ones under any of their names.

    Raises:
        ValueError: for a tensor that is missing, left over, of another shape or no float tensor.
    """
    tensors = open_folder(folder)
    for stored in tensors.values():
        if not stored.dtype.is_floating_point:
            raise ValueError(
                f"{stored} of {folder} is {stored.dtype}: such weights are quantized already; "
                "name the folder with the float weights"
            )
    checkpoint = match_whole(plain, tensors)
    names = (name for name in checkpoint.expected if name not in checkpoint.ties)
    return {name: checkpoint.find_all(name) for name in names}


def _read_adapter(lora: Path, plain: nn.Module) -> Adapter:
    """Read an adapter for the model's parameters; tied ones cannot be changed one by one."""
    groups = _tied_names(plain)
    shapes = {n[0]: tuple(plain.get_parameter(n[0]).shape) for n in groups if len(n) == 1}
    return read_adapter(lora, shapes)


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of all parameters, those of one and the same together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def plan_pieces(
    tensors: Mapping[str, list[StoredTensor]], model: nn.Module, form: Form
) -> list[Piece]:
    """Say for each stored parameter what becomes of it in a model of the new configuration."""
    parameters = dict(model.named_parameters())
    # Archives name tied parameters each, as the official ones do; safetensors files cannot.
    ties = {names[0]: names[1:] for names in _tied_names(model) if form.kind == "bin"}
    pieces: list[Piece] = []
    for name, stored in tensors.items():
        scale = parameters.get(f"{name}_scale")
        dtype = kept_dtype(stored[0], form.dtype)
        if scale is None:
            sizes = {name: parameters[name].numel() * dtype.itemsize}
            sizes |= dict.fromkeys(ties.get(name, []), 0)
            pieces.append(Piece(name, stored, None, dtype, sizes))
        else:
            layer = model.get_submodule(name.rpartition(".")[0])
            half = torch.float16.itemsize
            sizes = {name: parameters[name].nbytes, f"{name}_scale": scale.numel() * half}
            pieces.append(Piece(name, stored, layer, dtype, sizes))
    return pieces


def kept_dtype(tensor: StoredTensor, wanted: torch.dtype | None) -> torch.dtype:
    """Return the number format of a tensor that is not packed.

    It is the wanted one, or its own if none is; vectors in float32 stay so, as the norms of the
    official checkpoints do.
    """
    is_wide_vector = len(tensor.shape) == 1 and tensor.dtype == torch.float32
    return tensor.dtype if wanted is None or is_wide_vector else wanted


def _main_dtype(pieces: Iterable[Piece]) -> torch.dtype:
    """Return the number format of most bytes."""
    shares: Counter[torch.dtype] = Counter()
    for piece in pieces:
        shares[piece.dtype] += sum_sizes(piece)
    return shares.most_common(1)[0][0]


def sum_sizes(piece: Piece) -> int:
    """The bytes that are written for a piece."""
    return sum(piece.sizes.values())


def cut_shards(pieces: Iterable[Piece], limit: int, kind: str) -> dict[str, list[Piece]]:
    """Distribute pieces, in their order, to files of at most `limit` bytes or one piece."""
    whole, _ = FILE_KINDS[kind]
    cuts: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = sum_sizes(piece)
        if not cuts or size > room:
            cuts.append([])
            room = limit
        cuts[-1].append(piece)
        room -= size
    if len(cuts) == 1:
        return {whole: cuts[0]}
    stem, ending = whole.split(".")
    numbers = range(1, len(cuts) + 1)
    return {f"{stem}-{n:05d}-of-{len(cuts):05d}.{ending}": cut for n, cut in zip(numbers, cuts)}
