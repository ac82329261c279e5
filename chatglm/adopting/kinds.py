"""Owns which kinds of folders can be adopted, and what each gets beside code and settings.

A model, whatever its generation and packing; a P-Tuning prefix as the official scripts save it,
alone in its folder; a prefix as peft saves it. Reads and changes nothing (`plan`, `journal`).
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chatglm.adopting.weights import check_whole, make_index, open_weights
from chatglm.checkpoints.complete import complete_fields, list_settings
from chatglm.checkpoints.prefixes import (
    PEFT_FOLDER,
    build_encoder,
    compute_states,
    describe_fields,
    format_for_peft,
    holds_prefix,
    is_peft_prefix,
    is_prefix,
    read_peft_prefix,
    select_prefix,
)
from chatglm.checkpoints.reading import WEIGHT_FILES, StoredTensor
from chatglm.checkpoints.recognize import (
    ADAPTER,
    ADAPTER_FILE,
    CONFIG_FILE,
    PREFIX_TENSORS,
    VOCABULARY_FILE,
    describe_stranger,
    read_object,
    recognize_folder,
    refuse_foreign_format,
)

OFFICIAL_WEIGHTS = WEIGHT_FILES[1][0]


class Kind(NamedTuple):
    """A folder that can be adopted.

    Attributes:
        own: what its config.json holds; nothing if it has none.
        fields: its configuration, completed.
        files: what it gets for being of its kind, by name.
        is_model: whether it is a model, and no prefix.
    """

    own: Mapping[str, Any]
    fields: dict[str, Any]
    files: dict[str, bytes]
    is_model: bool


def read_kind(folder: Path) -> Kind:
    """Say of what kind a folder is, having checked that it is whole.

    Raises:
        ValueError: if it is of none, is not whole, has weights that are not those of its
            configuration, or lacks what cannot be made; the message names it and the remedy.
    """
    check_family(folder)
    if not (folder / CONFIG_FILE).is_file():
        return _read_peft(folder)
    own = read_object(folder / CONFIG_FILE)
    refuse_foreign_format(folder, own)
    fields, tensors = complete_fields(own), open_weights(folder)
    if is_prefix(tensors):
        return _read_official(folder, own, fields, select_prefix(tensors))
    check_whole(fields, tensors)
    files = find_vocabulary(folder, fields) | make_index(folder, tensors)
    return Kind(own, fields, files, is_model=True)


def check_family(folder: Path) -> None:
    """Refuse a folder that is neither a model of the family nor a prefix of peft's for one.

    Raises:
        ValueError: saying what it is.
    """
    found = recognize_folder(folder)
    if not found.is_first_family and not (found.kind == ADAPTER and is_peft_prefix(folder)):
        raise ValueError(describe_stranger(folder, found))


def check_convertible(folder: Path) -> None:
    """Refuse a prefix, whose weights are no model's to be packed or merged into.

    Raises:
        ValueError: saying so.
    """
    check_family(folder)
    if not (folder / CONFIG_FILE).is_file() or holds_prefix(folder):
        raise ValueError(
            f"{folder} is a P-Tuning prefix and no model: put it into its model first, chatglm "
            f"adopt MODEL --ptuning {folder} --out NEW"
        )


def find_vocabulary(folder: Path, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the vocabulary that a folder lacks and this repository has; nothing if it has one.

    Raises:
        ValueError: if it lacks one that nobody can make.
    """
    if (folder / VOCABULARY_FILE).is_file():
        return {}
    settings = list_settings().get(fields["vocab_size"])
    if settings is None or not (settings / VOCABULARY_FILE).is_file():
        raise ValueError(
            f"{folder} has no {VOCABULARY_FILE}, and a vocabulary cannot be made anew: copy that "
            "of the model it was made from there"
        )
    return {VOCABULARY_FILE: (settings / VOCABULARY_FILE).read_bytes()}


def _read_official(
    folder: Path,
    own: Mapping[str, Any],
    fields: dict[str, Any],
    stored: Mapping[str, StoredTensor],
) -> Kind:
    """A prefix in the official layout: it gets peft's beside it, where that is not there."""
    fields |= describe_fields(stored)
    encoder = build_encoder(fields, stored)
    has_peft = any((folder / place / ADAPTER_FILE).is_file() for place in ("", PEFT_FOLDER))
    files: dict[str, bytes] = {}
    if not has_peft:
        base = str(own.get("_name_or_path") or "")
        found = format_for_peft(compute_states(encoder), fields, base)
        files = {f"{PEFT_FOLDER}/{name}": content for name, content in found.items()}
    return Kind(own, fields, files, is_model=False)


def _read_peft(folder: Path) -> Kind:
    """A prefix in peft's layout: it gets the official one, with the configuration of its model."""
    base = str(read_object(folder / ADAPTER_FILE).get("base_model_name_or_path") or "")
    config = Path(base).expanduser() / CONFIG_FILE
    if not base or not config.is_file():
        raise ValueError(
            f"{folder} is a prefix of peft's for {base or 'an unnamed model'}, which is no folder "
            f"on this machine: name the model's, chatglm adopt MODEL --ptuning {folder} --out NEW"
        )
    fields = complete_fields(read_object(config))
    tensors = read_for_model(folder, fields)
    fields |= describe_fields(tensors)
    buffer = io.BytesIO()
    torch.save({f"{PREFIX_TENSORS}{name}": tensor for name, tensor in tensors.items()}, buffer)
    return Kind({}, fields, {OFFICIAL_WEIGHTS: buffer.getvalue()}, is_model=False)


def read_for_model(folder: Path, fields: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors of a prefix in either layout, by their names in it.

    Args:
        folder: of the prefix.
        fields: the configuration of the model that it is for.

    Raises:
        ValueError: if there is no prefix, or it is one for another model.
    """
    if is_peft_prefix(folder):
        states = read_peft_prefix(folder)
        width = fields["num_layers"] * 2 * fields["hidden_size"]
        if states.shape[1] != width:
            raise ValueError(
                f"{folder} has a prefix {tuple(states.shape)}, and this model takes {width} columns"
                ": it is one of another model"
            )
        return {"embedding.weight": states}
    stored = select_prefix(open_weights(folder))
    if "embedding.weight" not in stored:
        raise ValueError(
            f"{folder} has no tensors {PREFIX_TENSORS}* and is no prefix of peft's: name the "
            "folder with a P-Tuning prefix (checkpoint-N)"
        )
    build_encoder({**fields, **describe_fields(stored)}, stored)
    return {name: tensor.read() for name, tensor in stored.items()}


__all__ = ["Kind", "check_convertible", "check_family", "read_for_model", "read_kind"]
