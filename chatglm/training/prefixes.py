"""Owns the reading of a P-Tuning prefix in the official layout, as the stage `ptuning` writes it.

The tensors themselves say how long the prefix is and whether a network makes it. Does not know how
one is trained.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from chatglm.checkpoints.reading import StoredTensor, open_folder
from chatglm.training.models import ADAPTER_FILE, load_policy
from chatglm.training.settings import Settings
from chatglm.training.stages.ptuning import PREFIX_NAME


def load_with_prefix(settings: Settings, dtype: torch.dtype) -> Any:
    """Return the model with the prefix of the folder `adapter`.

    Args:
        settings: which model, how packed, and the folder.
        dtype: of the model's weights.

    Raises:
        ValueError: for a folder without a prefix, or with one of another model.
    """
    folder = Path(settings.adapter)
    stored = read_prefix(folder)
    model = load_policy(
        dataclasses.replace(settings, adapter=""),
        dtype,
        is_trained=False,
        pre_seq_len=stored["embedding.weight"].shape[0],
        prefix_projection=any(name.startswith("trans.") for name in stored),
    )
    _fill(model.transformer.prefix_encoder, stored, folder)
    return model


def read_prefix(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a prefix encoder, by their names in it.

    Raises:
        ValueError: if the folder has none.
    """
    stored = {}
    if folder.is_dir():
        stored = {
            name.removeprefix(PREFIX_NAME): tensor
            for name, tensor in open_folder(folder).items()
            if name.startswith(PREFIX_NAME)
        }
    if "embedding.weight" not in stored:
        raise ValueError(
            f"adapter {folder} has neither {ADAPTER_FILE} nor tensors {PREFIX_NAME}*: name a "
            "folder of LoRA adapters or of a P-Tuning prefix"
        )
    return stored


def _fill(encoder: Any, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Put stored tensors into a prefix encoder, in float32 as they were trained."""
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if found != shapes:
        raise ValueError(f"{folder} has a prefix of {found}, and this model takes {shapes}")
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    encoder.float().load_state_dict(tensors)


__all__ = ["load_with_prefix", "read_prefix"]
