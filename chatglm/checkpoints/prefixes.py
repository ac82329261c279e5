"""Owns the two layouts in which a P-Tuning v2 prefix is stored, and the way from one to the other.

The official one is the encoder's weights, under their names in the model, beside a config.json that
says `pre_seq_len`. peft's is the keys and values that the encoder gives, `(pre_seq_len, L * 2 *
H)`, in the same order in memory. Does not know how a prefix is trained, nor what it is used with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from chatglm.checkpoints.reading import StoredTensor, build_skeleton, open_folder, open_shards
from chatglm.checkpoints.recognize import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    PREFIX_TENSORS,
    read_object,
)

ENCODER = "prefix_encoder."
ENCODER_TENSORS = {
    "embedding.weight",
    *(f"trans.{n}.{k}" for n in "02" for k in ("weight", "bias")),
}
PEFT_FOLDER = "peft"
PEFT_TYPE = "PREFIX_TUNING"
PEFT_TENSOR = "prompt_embeddings"


def is_prefix(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether tensors are those of a P-Tuning prefix, and of no model."""
    is_official = bool(tensors) and all(name.startswith(PREFIX_TENSORS) for name in tensors)
    return is_official or bool(_select_bare(tensors))


def holds_prefix(folder: Path) -> bool:
    """Whether the weights of a folder are a P-Tuning prefix, as its config.json says too."""
    says_so = bool(read_object(folder / CONFIG_FILE).get("pre_seq_len"))
    return says_so and is_prefix(open_folder(folder))


def is_peft_prefix(folder: Path) -> bool:
    """Whether a folder is an adapter of peft's prefix tuning."""
    file = folder / ADAPTER_FILE
    return file.is_file() and read_object(file).get("peft_type") == PEFT_TYPE


def read_prefix(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a prefix encoder, by their names in it.

    Raises:
        ValueError: if the folder has none.
    """
    tensors = open_folder(folder) if folder.is_dir() else {}
    stored = select_prefix(tensors) or _select_bare(tensors)
    if "embedding.weight" not in stored:
        raise ValueError(
            f"adapter {folder} has neither {ADAPTER_FILE} nor tensors {PREFIX_TENSORS}*: name a "
            "folder of LoRA adapters or of a P-Tuning prefix"
        )
    return stored


def select_prefix(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return those tensors of a folder that are a prefix encoder's, by their names in it."""
    return {
        name.removeprefix(PREFIX_TENSORS): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX_TENSORS)
    }


def _select_bare(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a file that holds an encoder and nothing else, under its own names."""
    bare = {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}
    return bare if bare.keys() <= ENCODER_TENSORS else {}


def open_prefix(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a prefix in either layout, by their names in an encoder, none read yet.

    peft's layout holds what a network gave and no network.

    Raises:
        ValueError: if the folder has none.
    """
    if is_peft_prefix(folder):
        return {"embedding.weight": _open_peft_prefix(folder)}
    return read_prefix(folder)


def read_peft_prefix(folder: Path) -> Tensor:
    """Return the keys and values of a prefix in peft's layout, `(pre_seq_len, L * 2 * H)`.

    Raises:
        ValueError: if the folder has no weights, or other ones.
    """
    return _open_peft_prefix(folder).read()


def _open_peft_prefix(folder: Path) -> StoredTensor:
    """Return what `read_peft_prefix` reads.

    Raises:
        ValueError: if the folder has no weights, or other ones.
    """
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no weights: put {' or '.join(ADAPTER_WEIGHTS)} there")
    stored = open_shards([file])
    if stored.keys() != {PEFT_TENSOR} or len(stored[PEFT_TENSOR].shape) != 2:
        raise ValueError(
            f"{file} holds {', '.join(sorted(stored)):.100}, and not a matrix {PEFT_TENSOR}: save "
            "the prefix again with peft"
        )
    return stored[PEFT_TENSOR]


def describe_fields(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of an encoder, given its tensors by their names in it."""
    length = int(tensors["embedding.weight"].shape[0])
    is_projected = any(name.startswith("trans.") for name in tensors)
    return {"pre_seq_len": length, "prefix_projection": is_projected}


def compute_states(encoder: Any) -> Tensor:
    """Return the keys and values of an encoder, `(pre_seq_len, L * 2 * H)`, without dropout."""
    with torch.no_grad():
        states = encoder.embedding.weight
        states = encoder.trans(states) if encoder.prefix_projection else states
        return states.detach().float().cpu()


def build_encoder(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Any:
    """Return the encoder of a configuration with stored values, in float32.

    Raises:
        ValueError: if they are those of another model.
    """
    encoder = build_skeleton(fields).transformer.prefix_encoder
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise ValueError(
            f"the prefix has {found}, and the model of its {CONFIG_FILE} takes {wanted}: use the "
            f"{CONFIG_FILE} that it was trained with"
        )
    encoder = encoder.to_empty(device="cpu").float()
    encoder.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    return encoder


def format_for_peft(states: Tensor, fields: Mapping[str, Any], base: str) -> dict[str, bytes]:
    """Return the files of an adapter of peft's prefix tuning.

    Args:
        states: the keys and values, `(pre_seq_len, L * 2 * H)`.
        fields: the model's configuration.
        base: what the adapter calls the model.
    """
    described = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": int(states.shape[0]),
        "token_dim": fields["hidden_size"],
        "num_transformer_submodules": 1,
        "num_attention_heads": fields["num_attention_heads"],
        "num_layers": fields["num_layers"],
        "encoder_hidden_size": fields["hidden_size"],
        "prefix_projection": bool(fields.get("prefix_projection")),
    }
    text = json.dumps(described, indent=2) + "\n"
    tensors = {PEFT_TENSOR: states.contiguous()}
    return {ADAPTER_FILE: text.encode(), ADAPTER_WEIGHTS[0]: save_tensors(tensors)}


__all__ = [
    "PEFT_FOLDER",
    "build_encoder",
    "compute_states",
    "describe_fields",
    "format_for_peft",
    "holds_prefix",
    "is_peft_prefix",
    "is_prefix",
    "open_prefix",
    "read_peft_prefix",
    "read_prefix",
    "select_prefix",
]
