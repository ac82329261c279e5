"""Owns the package's way to the one reader of checkpoints, which belongs to the model.

The files of the model must be able to load a folder without this package, so the reader and the
matcher are theirs (`checkpoint_chatglm.py`, `quantizer_chatglm.py`). Here they are asked about a
folder as a whole: every tensor of the model must be there and nothing else, before any is read.
"""

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from chatglm import door
from chatglm.checkpoints import signatures
from chatglm.checkpoints.recognize import CONFIG_FILE, SCORER
from chatglm.model import FOLDER as CODE_FOLDER

if TYPE_CHECKING:  # a type checker does not know chatglm.model: see there
    from checkpoint_chatglm import (
        WEIGHT_FILES,
        Checkpoint,
        StoredTensor,
        list_weight_files,
        open_shards,
        read_weight_map,
    )
    from quantization import Packing
    from quantizer_chatglm import METHOD, check_checkpoint
else:
    from chatglm.model.checkpoint_chatglm import (
        WEIGHT_FILES,
        Checkpoint,
        StoredTensor,
        list_weight_files,
        open_shards,
        read_weight_map,
    )
    from chatglm.model.quantization import Packing
    from chatglm.model.quantizer_chatglm import METHOD, check_checkpoint

NO_NAME = "(?!)"  # a pattern that is found in none
SCALE_ENDING = "_scale"
SAFETENSORS_ENDING = ".safetensors"
WEIGHT_KINDS = {".bin": signatures.ARCHIVE, SAFETENSORS_ENDING: signatures.SAFETENSORS}


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a model folder's weight files, by name, none of them read yet.

    Raises:
        ValueError: if a file cannot be read, holds something else, or repeats another's tensor.
    """
    return open_shards(folder / name for name in list_weight_files(folder))


def check_weight_file(file: Path) -> None:
    """Refuse a file that is missing, or that cannot be the archive its name says.

    Raises:
        ValueError: saying so, with the remedy.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} misses the shard {file.name}: download it again")
    kind = signatures.identify_file(file)
    if kind == WEIGHT_KINDS.get(file.suffix, signatures.ARCHIVE):
        if _is_whole(file):
            return
        what, remedy = "a broken download", "download it again"
    else:
        what, remedy = kind, signatures.choose_remedy(kind)
    size = file.stat().st_size
    raise ValueError(f"{file} ({size} bytes) is no complete weight file, but {what}: {remedy}")


def _is_whole(file: Path) -> bool:
    """Whether the file is whole, as far as its own table of contents tells."""
    if file.suffix != SAFETENSORS_ENDING:
        return zipfile.is_zipfile(file)
    try:
        with cast(Any, safe_open)(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def build_skeleton(fields: Mapping[str, Any], auto_class: Any = AutoModel) -> Any:
    """Return the model of a configuration without values, built by the installed code.

    Args:
        fields: what a config.json holds.
        auto_class: one of transformers' Auto classes of models.

    Raises:
        ValueError: if the configuration is wrong, or its matrices cannot be packed so.
    """
    with torch.device("meta"), door.package_code():
        config: Any = door.find_class(CODE_FOLDER, "AutoConfig").from_dict(dict(fields))
        return door.build_from(config, auto_class)


def match_whole(model: Any, tensors: Mapping[str, StoredTensor]) -> Checkpoint:
    """Find each tensor of a model in a folder that must have all of them, and no other.

    Args:
        model: without values.
        tensors: of the folder.

    Raises:
        ValueError: with the first field of the configuration, or the first tensor, that says other.
    """
    checkpoint = Checkpoint.match(model, tensors)
    check_checkpoint(model, checkpoint)
    return checkpoint


def check_fit(folder: Path) -> None:
    """Refuse a folder whose weights are not those of its config.json, before any is read.

    Raises:
        ValueError: as `match_whole`.
    """
    config, tensors = door.load_from(folder, AutoConfig), open_folder(folder)
    check_fields(config, tensors)
    match_whole(build_empty(config), tensors)


def build_empty(config: Any) -> Any:
    """Return the model of a configuration without values, by the code that `door` has chosen.

    Args:
        config: as `door.load_from` gave it.

    Raises:
        ValueError: if no model can be made of it.
    """
    names = getattr(config, "architectures", None) or ["AutoModel"]
    is_scorer = names[0].endswith(SCORER)
    auto_class = AutoModelForSequenceClassification if is_scorer else AutoModel
    try:
        with torch.device("meta"):
            return door.build_from(config, auto_class)
    except ValueError as error:
        raise ValueError(f"{config.name_or_path}/{CONFIG_FILE}: {error}") from error
    except (AttributeError, TypeError, KeyError, RuntimeError) as error:
        place = f"{config.name_or_path}/{CONFIG_FILE}"
        raise ValueError(
            f"{place} makes no model ({type(error).__name__}: {error}); use the {CONFIG_FILE} that "
            "came with the weights"
        ) from error


def _is_made(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor is the scales of a matrix that is packed while it is loaded."""
    matrix = name.removesuffix(SCALE_ENDING)
    stored = checkpoint.find_all(checkpoint.ties.get(matrix, matrix))
    return matrix != name and any(tensor.dtype.is_floating_point for tensor in stored)


def check_fields(config: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a configuration of other sizes, before a model of these is built.

    Raises:
        ValueError: naming every such field.
    """
    Checkpoint(tensors, {}, {}, {}, []).check_fields(config)


def find_misfits(model: Any, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return a line for each kind of fault of weights beside the model that they are for.

    Args:
        model: without values; its sizes are those of the weights (`check_fields`).
        tensors: of the folder.
    """
    checkpoint = Checkpoint.match(model, tensors)
    made = [name for name in checkpoint.expected if _is_made(name, checkpoint)]
    missing, left_over = sorted(checkpoint.find_missing(made)), sorted(checkpoint.left_over)
    found: list[str] = []
    for check in (
        partial(checkpoint.refuse, "the weights lack", missing),
        partial(checkpoint.refuse, "the model has no place for", left_over),
        partial(check_checkpoint, model, checkpoint, NO_NAME),
    ):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


__all__ = [
    "METHOD",
    "WEIGHT_FILES",
    "Checkpoint",
    "Packing",
    "StoredTensor",
    "build_empty",
    "build_skeleton",
    "check_fields",
    "check_fit",
    "check_weight_file",
    "find_misfits",
    "list_weight_files",
    "match_whole",
    "open_folder",
    "open_shards",
    "read_weight_map",
]
