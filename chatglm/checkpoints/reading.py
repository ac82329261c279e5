"""Owns the package's way to the one reader of checkpoints, which belongs to the model.

The files of the model must be able to load a folder without this package, so the reader and the
matcher are theirs (`checkpoint_chatglm.py`, `quantizer_chatglm.py`). Here they are asked about a
folder as a whole: every tensor of the model must be there and nothing else, before any is read.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel

from chatglm import door
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
    from quantizer_chatglm import check_checkpoint
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
    from chatglm.model.quantizer_chatglm import check_checkpoint


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
    if not _is_archive(file):
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is no complete weight file, but a Git-LFS "
            "pointer or a broken download: fetch it again (git lfs pull)"
        )


def _is_archive(file: Path) -> bool:
    """Whether the file is whole, as far as its own table of contents tells."""
    if file.suffix == ".bin":
        return zipfile.is_zipfile(file)
    try:
        with cast(Any, safe_open)(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def build_skeleton(fields: Mapping[str, Any]) -> Any:
    """Return the model of a configuration without values, built by the installed code.

    Raises:
        ValueError: if the configuration is wrong, or its matrices cannot be packed so.
    """
    with torch.device("meta"), door.package_code():
        config: Any = door.find_class(CODE_FOLDER, "AutoConfig").from_dict(dict(fields))
        return door.build_from(config, AutoModel)


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
    config = door.load_from(folder, AutoConfig)
    with torch.device("meta"):
        model = door.build_from(config, AutoModel)
    match_whole(model, open_folder(folder))


__all__ = [
    "WEIGHT_FILES",
    "Checkpoint",
    "Packing",
    "StoredTensor",
    "build_skeleton",
    "check_fit",
    "check_weight_file",
    "list_weight_files",
    "match_whole",
    "open_folder",
    "open_shards",
    "read_weight_map",
]
