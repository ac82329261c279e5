"""Owns the writing of a converted model folder, from the plan to the last file.

The model's own code reads and packs, as it does while a model is loaded. Only one matrix and one
shard of the result are in memory at a time. Does not know what may be converted (`planning`), how
an adapter is merged (`adapters`), how tensors are read and packed (`checkpoints.reading`), what the
card says (`describing`) nor how the result survives a kill (`staging`).
"""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from tqdm import tqdm

from chatglm.cards import CARD_FILE
from chatglm.checkpoints.reading import Packing, StoredTensor
from chatglm.converting.adapters import Adapter
from chatglm.converting.describing import describe_conversion
from chatglm.converting.planning import (
    FILE_KINDS,
    FLOAT_WEIGHTS,
    Form,
    PackedFormat,
    Piece,
    Plan,
    make_plan,
    read_source,
)
from chatglm.converting.staging import Staging, check_target, free_bytes
from chatglm.loading import check_model_folder

SPARE_BYTES = 2**20  # more than the headers, the record and the index take


def quantize_checkpoint(
    source: str | Path, target: str | Path, packed_format: PackedFormat, lora: str | None = None
) -> int:
    """Write a quantized copy of a model folder, or go on with one that was stopped.

    Args:
        source: model folder with float weights: official, a fork's or a fine-tune's.
        target: folder to be made; it must not exist, or be empty.
        packed_format: what the weights become.
        lora: folder of a peft LoRA adapter to merge into the weights first.

    Returns:
        The size of the new weights in bytes.

    Raises:
        ValueError: before anything is written, for folders, weights or an adapter that cannot be
            quantized so, or a volume without room for the result; later for a value that is not
            finite, and for a file that does not read back as it was written.
    """
    return _convert_checkpoint(source, target, Form(packed_format), lora)


def merge_checkpoint(
    source: str | Path,
    target: str | Path,
    lora: str,
    dtype: torch.dtype | None = None,
    kind: str = "safetensors",
) -> int:
    """Write a copy of a model folder with an adapter in its weights, or go on with a stopped one.

    Args:
        source, target: as in `quantize_checkpoint`.
        lora: folder of a peft LoRA adapter.
        dtype: of the new weights, but float32 vectors stay so; None leaves each tensor its own.
            The sum is made in the wider of the old and the new one.
        kind: of the weight files, "safetensors" or the official "bin".

    Returns:
        The size of the new weights in bytes.

    Raises:
        ValueError: as `quantize_checkpoint`.
    """
    return _convert_checkpoint(source, target, Form(FLOAT_WEIGHTS, dtype, kind), lora)


def _convert_checkpoint(
    source: str | Path, target: str | Path, form: Form, lora: str | None
) -> int:
    origin = read_source(check_model_folder(source))
    place = check_target(origin.folder, target)
    plan = make_plan(origin, form, lora)
    staging = Staging(place, plan.job())
    _check_room(staging, plan)
    staging.begin()
    write_shards(staging, plan)
    _write_rest(staging, plan)
    card = describe_conversion(origin.folder, plan, form, lora)
    staging.write(CARD_FILE, partial(_write_text, card))
    staging.finish()
    return sum(plan.shard_sizes().values())


def _check_room(staging: Staging, plan: Plan) -> None:
    """Raise ValueError if the volume of the result is too full for it."""
    sizes = {name: path.stat().st_size for name, path in plan.files.items()}
    needed = staging.missing_bytes(sizes | plan.shard_sizes()) + SPARE_BYTES
    free = free_bytes(staging.folder)
    if needed > free:
        raise ValueError(
            f"the disk of {staging.target} has {free / 1e6:,.0f} MB free, and the result "
            f"needs {needed / 1e6:,.0f} MB: make room, or name a folder on another disk"
        )


def write_shards(staging: Staging, plan: Plan) -> None:
    """Write the shards that are not there yet, one after the other.

    Raises:
        ValueError: for a value that is not finite, or tied tensors that differ.
    """
    total = sum(
        piece.stored[0].tensor.nbytes for pieces in plan.shards.values() for piece in pieces
    )
    units = {"unit": "B", "unit_scale": True}
    with cast(Any, tqdm)(total=total, desc="converting", disable=None, **units) as progress:
        for name, pieces in plan.shards.items():
            is_missing = not staging.has(name)
            tensors: dict[str, Tensor] = {}
            for piece in pieces:
                if is_missing:
                    tensors.update(convert(piece, plan.adapter))
                progress.update(piece.stored[0].tensor.nbytes)
            if is_missing:
                staging.write(name, partial(_save, tensors, plan.kind))


def _save(tensors: dict[str, Tensor], kind: str, path: Path) -> None:
    """Write tensors into a file; the same ones give the same bytes."""
    if kind == "safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
        return
    with path.open("wb") as file:  # torch would put the name of a path into the file
        torch.save(tensors, file)


def convert(piece: Piece, adapter: Adapter | None) -> dict[str, Tensor]:
    """Read a parameter, merge and pack it; return what is stored for it, by name."""
    name, stored = piece.name, _choose_stored(piece)
    if piece.layer is None:
        tensor = stored.read(torch.promote_types(stored.dtype, piece.dtype))
        tensor = tensor if adapter is None else adapter.merge(name, tensor)
        return dict.fromkeys(piece.sizes, _keep(name, tensor, piece.dtype))
    if adapter is not None:
        stored = StoredTensor(adapter.merge(name, stored.read()), name)
    if stored.dtype != torch.float16:  # the official integers are those of half weights
        stored = StoredTensor(stored.read(torch.float16), name)
    packing = Packing(stored, piece.layer, name)
    return {name: packing.take("weight"), f"{name}_scale": packing.take("weight_scale")}


def _choose_stored(piece: Piece) -> StoredTensor:
    """Return a parameter's values; one that is stored twice must be the same in both places."""
    first, *others = piece.stored
    for other in others:
        if not first.equals(other):
            raise ValueError(
                f"{first.name} and {other.name} differ, and config.json ties them: set "
                "tie_word_embeddings to false there to keep both, or remove the wrong one"
            )
    return first


def _keep(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that is not packed as it is stored, if all of it is finite."""
    kept = tensor.to(dtype)
    if not all(bound.isfinite() for bound in kept.aminmax()):
        raise ValueError(
            f"{name} has values that are not finite in {dtype}: repair the weights, take an "
            "earlier checkpoint, or merge into a wider format (--dtype)"
        )
    return kept


def _write_rest(staging: Staging, plan: Plan) -> None:
    """Write the files beside the shards: code, settings, configuration and index."""
    for name, path in plan.files.items():
        staging.write(name, partial(shutil.copyfile, path))
    staging.write("config.json", partial(_write_json, plan.fields))
    if len(plan.shards) > 1:
        _, index = FILE_KINDS[plan.kind]
        staging.write(index, partial(_write_json, _build_index(plan)))


def _build_index(plan: Plan) -> dict[str, Any]:
    """Return the index of the shards as transformers reads it."""
    weight_map = {name: shard for shard in plan.shards for name in _stored_names(plan, shard)}
    total_size = sum(plan.shard_sizes().values())
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def _stored_names(plan: Plan, shard: str) -> list[str]:
    return [name for piece in plan.shards[shard] for name in piece.sizes]


def _write_json(fields: Mapping[str, Any], path: Path) -> None:
    _write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", path)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
