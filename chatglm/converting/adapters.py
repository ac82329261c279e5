"""Owns LoRA adapters: reads one from a folder of peft and adds it to the matrices it is for.

Merges as peft does, in the same order and the same number formats, so that the result is that of
`merge_and_unload` bit for bit. What another kind of adapter would need is refused by name. Does not
know where the matrices come from, nor what becomes of them.

Shapes: `O` output features, `I` input features, `R` rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from chatglm.checkpoints.reading import open_shards
from chatglm.checkpoints.recognize import read_object

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # how peft calls the model inside its own
WRAPPED = ".base_layer."  # stands in the name of a bias whose layer has factors
FACTORS = (".lora_A.weight", ".lora_B.weight")
# What may stand in adapter_config.json without a say in the sum. `fan_in_fan_out` is for layers
# that store their matrix transposed; peft ignores it on linear ones.
SILENT_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Fields with values that change nothing either; all others of a name unknown here must be empty.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),  # the biases are there, or are not
    # Other ways to begin also change the base model.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        files: its files.
        scaling: the factor on the product.
        factors: by the name of a matrix, A `(R, I)` and B `(O, R)`.
        replacements: by name, tensors that were trained whole (`modules_to_save`, biases).
    """

    files: tuple[Path, ...]
    scaling: float
    factors: dict[str, tuple[Tensor, Tensor]]
    replacements: dict[str, Tensor]

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return what becomes of the model's tensor of that name, in its dtype."""
        if name in self.replacements:
            # Copied: a view would keep all of its file mapped until the shard is written.
            return self.replacements[name].to(tensor.dtype, copy=True)
        if name not in self.factors:
            return tensor
        lora_a, lora_b = self.factors[name]
        # peft holds and multiplies half factors in float32, and rounds the sum once.
        delta = (lora_b.float() @ lora_a.float()) * self.scaling  # (O, I)
        return tensor.clone().add_(delta)


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter that fits a model.

    Args:
        folder: adapter_config.json, and adapter_model.safetensors or adapter_model.bin.
        shapes: of the model's tensors that may be changed, by name.

    Raises:
        ValueError: if it is no LoRA adapter, one that cannot be merged here, or one for another
            model; the message names the field or the tensor.
    """
    fields = _read_fields(folder)
    file = _find_weights(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    replacements: dict[str, Tensor] = {}
    for key, tensor in ((key, stored.tensor) for key, stored in open_shards([file]).items()):
        name = key.removeprefix(PREFIX).replace(WRAPPED, ".")
        factor = next((ending for ending in FACTORS if name.endswith(ending)), None)
        if factor is None:
            _check_replacement(file, name, tensor, shapes)
            replacements[name] = tensor
        else:
            weight = f"{name.removesuffix(factor)}.weight"
            factors.setdefault(weight, {})[factor] = tensor
    pairs = {name: _pair(file, name, found, shapes) for name, found in factors.items()}
    _check_ranks(file, fields["r"], pairs)
    files = (folder / CONFIG_FILE, file)
    return Adapter(files, _scaling(fields), pairs, replacements)


def _read_fields(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; refuse a kind of adapter that is not merged as plain LoRA is."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is no adapter folder: it has no {CONFIG_FILE}")
    fields = read_object(folder / CONFIG_FILE)
    for name, value in fields.items():
        is_harmless = value in HARMLESS_VALUES.get(name, ("", None, False, [], {}))
        if name not in SILENT_FIELDS and not is_harmless:
            raise ValueError(
                f"{folder} has {name}={value!r}, and only plain LoRA adapters can be merged here: "
                "merge it with peft (merge_and_unload), save the model and take that"
            )
    for name in ("peft_type", "r", "lora_alpha"):
        if not fields.get(name):
            raise ValueError(f"{folder / CONFIG_FILE} has no {name}: save the adapter with peft")
    return fields


def _scaling(fields: Mapping[str, Any]) -> float:
    rank = fields["r"]
    return fields["lora_alpha"] / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _find_weights(folder: Path) -> Path:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no weights: put {' or '.join(ADAPTER_FILES)} there")


def _check_replacement(
    file: Path, name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if name not in shapes:
        raise ValueError(
            f"{file} has {name}, which is neither a LoRA factor of a linear layer nor a tensor of "
            "the model that can be replaced: merge the adapter with peft, and take the result"
        )
    if tuple(tensor.shape) != shapes[name]:
        raise ValueError(
            f"{file} has {name} as {tuple(tensor.shape)}, and the model has {shapes[name]}: it is "
            "an adapter of another model"
        )


def _pair(
    file: Path, name: str, found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Return both factors of a matrix of the model, if their product has its shape."""
    for factor in FACTORS:
        if factor not in found:
            layer = name.removesuffix(".weight")
            raise ValueError(f"{file} lacks {layer}{factor}: save the adapter again")
    lora_a, lora_b = (found[factor] for factor in FACTORS)
    shape = shapes.get(name, ())
    if len(shape) != 2:
        raise ValueError(
            f"{file} is for {name}, which is no linear layer of the model that can be changed "
            "alone: merge the adapter with peft, and take the result"
        )
    if (lora_b.shape[0], lora_a.shape[1]) != shape or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"{file} has factors {tuple(lora_b.shape)} and {tuple(lora_a.shape)} for {name}, which "
            f"is {shape}: it is an adapter of another model"
        )
    return lora_a, lora_b


def _check_ranks(file: Path, rank: int, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (lora_a, _) in pairs.items():
        if lora_a.shape[0] != rank:
            raise ValueError(
                f"{file} has rank {lora_a.shape[0]} for {name}, and {CONFIG_FILE} says r={rank}: "
                "one of the two files is not this adapter's"
            )
