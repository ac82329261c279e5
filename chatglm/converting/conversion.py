"""Owns the writing of a converted model folder, from the plan to the last file.

The model's own code reads and packs, as it does while a model is loaded. Only one matrix and one
shard of the result are in memory at a time. Does not know what may be converted (`planning`), how
an adapter is merged (`adapters`), how tensors are read and packed (`checkpoints.reading`), what the
card says (`describing`) nor how the result survives a kill (`staging`).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from tqdm import tqdm

from chatglm.adapters.bases import RECORD_FILE, describe_foundations, format_record
from chatglm.adapters.digest import digest_tensors
from chatglm.adapters.kinds import require_mergeable, stack_adapters
from chatglm.cards import CARD_FILE
from chatglm.checkpoints.checksums import SUMS
from chatglm.checkpoints.reading import Packing, StoredTensor, open_shards
from chatglm.checkpoints.recognize import CONFIG_FILE
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
from chatglm.converting.staging import Staging, claim_target
from chatglm.loading import check_model_folder

Adapters = str | Path | Sequence[str | Path] | None


class Merging(NamedTuple):
    """Which adapters are merged into weights before anything else.

    Attributes:
        lora: folder of an adapter, or several in order; None or empty for none.
        any_base: whether those are taken that were trained on another base.
    """

    lora: Adapters
    any_base: bool

    def check(self, base: Path) -> list[Path]:
        """Return the folders of the adapters, if they are for a base.

        Raises:
            ValueError: if they are not, or are none that can be merged.
        """
        if not self.lora:
            return []
        paths = [self.lora] if isinstance(self.lora, str | Path) else self.lora
        stack = stack_adapters(paths, base, self.any_base)
        require_mergeable(stack)
        return stack.folders


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    packed_format: PackedFormat,
    lora: Adapters = None,
    command: str = "chatglm quantize",
    any_base: bool = False,
) -> int:
    """Write a quantized copy of a model folder, or go on with one that was stopped.

    Args:
        source: model folder with float weights: official, a fork's or a fine-tune's.
        target: folder to be made; it must not exist, or be empty.
        packed_format: what the weights become.
        lora: folder of a peft LoRA adapter to merge into the weights first, or several in order.
        command: what the card says that it was made by.
        any_base: whether adapters are taken that were trained on another base.

    Returns:
        The size of the new weights in bytes.

    Raises:
        ValueError: before anything is written, for folders, weights or an adapter that cannot be
            quantized so, or a volume without room for the result; later for a value that is not
            finite, and for a file that does not read back as it was written.
    """
    merging = Merging(lora, any_base)
    return _convert_checkpoint(source, target, Form(packed_format), merging, command)


def merge_checkpoint(
    source: str | Path,
    target: str | Path,
    lora: Adapters,
    dtype: torch.dtype | None = None,
    kind: str = "safetensors",
    command: str = "chatglm merge",
    any_base: bool = False,
) -> int:
    """Write a copy of a model folder with adapters in its weights, or go on with a stopped one.

    Args:
        source, target, command, any_base: as in `quantize_checkpoint`.
        lora: folder of a peft LoRA adapter, or several in order: each is merged into what those
            before it have made; None for weight files of another kind, or dtype, alone.
        dtype: of the new weights, but float32 vectors stay so; None leaves each tensor its own.
            The sum is made in the wider of the old and the new one.
        kind: of the weight files, "safetensors" or the official "bin".

    Returns:
        The size of the new weights in bytes.

    Raises:
        ValueError: as `quantize_checkpoint`.
    """
    form = Form(FLOAT_WEIGHTS, dtype, kind)
    return _convert_checkpoint(source, target, form, Merging(lora, any_base), command)


def list_results(
    source: str | Path,
    packed_format: PackedFormat,
    lora: Adapters = None,
    any_base: bool = False,
) -> list[str]:
    """Return the names of all files that a conversion to safetensors would write.

    Args:
        source, packed_format, lora, any_base: as in `quantize_checkpoint`.

    Raises:
        ValueError: as `quantize_checkpoint`, before anything is written.
    """
    form = Form(packed_format) if packed_format.bits else Form(FLOAT_WEIGHTS, None)
    origin = read_source(check_model_folder(source))
    plan = make_plan(origin, form, Merging(lora, any_base).check(origin.folder))
    names = {*plan.files, *plan.shards, *_describe_shards(plan), CONFIG_FILE, CARD_FILE, SUMS}
    return sorted({*names, RECORD_FILE})


def _convert_checkpoint(
    source: str | Path, target: str | Path, form: Form, merging: Merging, command: str
) -> int:
    origin = read_source(check_model_folder(source))
    with claim_target(origin.folder, target, command) as place:
        lora = merging.check(origin.folder)
        plan = make_plan(origin, form, lora)
        staging = Staging(place, plan.job())
        sizes = {name: path.stat().st_size for name, path in plan.files.items()}
        staging.check_room(sizes | plan.shard_sizes())
        staging.begin()
        write_shards(staging, plan)
        bases = describe_foundations(origin.folder, lora)
        result = digest_tensors(open_shards(staging.folder / name for name in plan.shards))
        staging.write(RECORD_FILE, partial(_write_text, format_record(bases, result)))
        _write_rest(staging, plan)
        card = describe_conversion(origin.folder, plan, form, lora, command)
        staging.write(CARD_FILE, partial(_write_text, card))
        staging.finish()
    return sum(plan.shard_sizes().values())


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
                    tensors.update(convert(piece, plan.adapters))
                progress.update(piece.stored[0].tensor.nbytes)
            if is_missing:
                staging.write(name, partial(_save, tensors, plan.kind))


def _save(tensors: dict[str, Tensor], kind: str, path: Path) -> None:
    """Write tensors into a file; the same ones give the same bytes.

    Raises:
        OSError: if it cannot be written: neither library says so of a full disk by itself.
    """
    try:
        if kind == "safetensors":
            save_file(tensors, path, metadata={"format": "pt"})
            return
        with path.open("wb") as file:  # torch would put the name of a path into the file
            torch.save(tensors, file)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def convert(piece: Piece, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Read a parameter, merge and pack it; return what is stored for it, by name."""
    name, stored = piece.name, _choose_stored(piece)
    if piece.layer is None:
        tensor = stored.read(torch.promote_types(stored.dtype, piece.dtype))
        tensor = _merge_all(name, tensor, adapters)
        return dict.fromkeys(piece.sizes, _keep(name, tensor, piece.dtype))
    if adapters:
        stored = StoredTensor(_merge_all(name, stored.read(), adapters), name)
    if stored.dtype != torch.float16:  # the official integers are those of half weights
        stored = StoredTensor(stored.read(torch.float16), name)
    packing = Packing(stored, piece.layer, name)
    return {name: packing.take("weight"), f"{name}_scale": packing.take("weight_scale")}


def _merge_all(name: str, tensor: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Merge adapters in their order, rounded after each, as peft does one after the other."""
    for adapter in adapters:
        tensor = adapter.merge(name, tensor)
    return tensor


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
    staging.write(CONFIG_FILE, partial(_write_json, plan.fields))
    for index, fields in _describe_shards(plan).items():
        staging.write(index, partial(_write_json, fields))


def _describe_shards(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the index of several shards, as transformers reads it, by its name."""
    if len(plan.shards) == 1:
        return {}
    _, index = FILE_KINDS[plan.kind]
    weight_map = {name: shard for shard in plan.shards for name in _stored_names(plan, shard)}
    total_size = sum(plan.shard_sizes().values())
    return {index: {"metadata": {"total_size": total_size}, "weight_map": weight_map}}


def _stored_names(plan: Plan, shard: str) -> list[str]:
    return [name for piece in plan.shards[shard] for name in piece.sizes]


def _write_json(fields: Mapping[str, Any], path: Path) -> None:
    _write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", path)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
