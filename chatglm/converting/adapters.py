"""Owns LoRA adapters: reads one from a folder of peft and adds it to the matrices it is for.

Merges as peft does, in the same order and the same number formats, so that the result is that of
`merge_and_unload` bit for bit; DoRA, rank-stabilized LoRA and factors with biases too. What another
kind of adapter would need is refused by name. Does not know where the matrices come from, nor what
becomes of them.

Shapes: `O` output features, `I` input features, `R` rank.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from chatglm.adapters.bases import find_adapter_weights
from chatglm.checkpoints.reading import open_shards
from chatglm.checkpoints.recognize import ADAPTER_FILE, read_object

PREFIX = "base_model.model."  # how peft calls the model inside its own
WRAPPED = ".base_layer."  # stands in the name of a bias whose layer has factors
FACTORS = (".lora_A.weight", ".lora_B.weight")
BIAS = ".lora_B.bias"
MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
# What may stand in adapter_config.json without a say in the sum. `fan_in_fan_out` is for layers
# that store their matrix transposed; peft ignores it on linear ones.
SILENT_FIELDS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
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
class Change:
    """What an adapter does to a matrix and its bias.

    Attributes:
        lora_a: `(R, I)`.
        lora_b: `(O, R)`.
        scaling: the factor on their product.
        magnitude: of DoRA, the length of each row `(O,)`; None without.
        bias: that the second factor adds, `(O,)`; None without.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def add_to(self, weight: Tensor) -> Tensor:
        """Return what becomes of the matrix `(O, I)`, in its dtype."""
        # peft holds and multiplies half factors in float32, and rounds the sum once.
        delta = (self.lora_b.float() @ self.lora_a.float()) * self.scaling  # (O, I)
        if self.magnitude is None:
            return weight.clone().add_(delta)
        moved = weight + delta
        norm: Any = cast(Any, torch.linalg).norm
        lengths: Tensor = norm(moved, dim=1)  # (O,)
        return ((self.magnitude.float() / lengths).view(-1, 1) * moved).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        files: its files.
        changes: by the name of a matrix.
        replacements: by name, tensors that were trained whole (`modules_to_save`, biases).
    """

    files: tuple[Path, ...]
    changes: dict[str, Change]
    replacements: dict[str, Tensor]

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return what becomes of the model's tensor of that name, in its dtype."""
        if name in self.replacements:
            # Copied: a view would keep all of its file mapped until the shard is written.
            tensor = self.replacements[name].to(tensor.dtype, copy=True)
        if name in self.changes:
            return self.changes[name].add_to(tensor)
        change = self.changes.get(f"{name.removesuffix('.bias')}.weight")
        if name.endswith(".bias") and change is not None and change.bias is not None:
            return tensor.clone().add_(change.bias.float() * change.scaling)
        return tensor


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
    file = find_adapter_weights(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    replacements: dict[str, Tensor] = {}
    for key, tensor in ((key, stored.tensor) for key, stored in open_shards([file]).items()):
        name = key.removeprefix(PREFIX).replace(WRAPPED, ".")
        part = _find_part(name)
        if part is None:
            _check_replacement(file, name, tensor, shapes)
            replacements[name] = tensor
        else:
            parts.setdefault(f"{name[: name.rindex('.lora_')]}.weight", {})[part] = tensor
    changes = {name: _pair(file, name, found, shapes, fields) for name, found in parts.items()}
    return Adapter((folder / ADAPTER_FILE, file), changes, replacements)


def _find_part(name: str) -> str | None:
    """Return which part of a change a stored tensor is; None if it is a tensor of the model's."""
    if MAGNITUDE.search(name):
        return MAGNITUDE.pattern
    return next((ending for ending in (*FACTORS, BIAS) if name.endswith(ending)), None)


def _read_fields(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; refuse a kind of adapter that is not merged as plain LoRA is."""
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} is no adapter folder: it has no {ADAPTER_FILE}")
    fields = read_object(folder / ADAPTER_FILE)
    for name, value in fields.items():
        is_harmless = value in HARMLESS_VALUES.get(name, ("", None, False, [], {}))
        if name not in SILENT_FIELDS and not is_harmless:
            raise ValueError(
                f"{folder} has {name}={value!r}, and only plain LoRA adapters can be merged here: "
                "merge it with peft (merge_and_unload), save the model and take that"
            )
    for name in ("peft_type", "r", "lora_alpha"):
        if not fields.get(name):
            raise ValueError(f"{folder / ADAPTER_FILE} has no {name}: save the adapter with peft")
    return fields


def _choose_scaling(name: str, rank: int, fields: Mapping[str, Any]) -> float:
    """Return the factor of a matrix, for which a pattern may have an alpha of its own."""
    alpha = _look_up(fields.get("alpha_pattern"), name, fields["lora_alpha"])
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _look_up(patterns: Any, name: str, otherwise: Any) -> Any:
    """Return what the first pattern says that the name of a layer ends with."""
    layer = name.removesuffix(".weight")
    named: dict[str, Any] = patterns or {}
    found = (v for key, v in named.items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, otherwise)


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
    file: Path,
    name: str,
    found: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    fields: Mapping[str, Any],
) -> Change:
    """Return what is done to a matrix of the model, if the parts of it have its shape."""
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
    _check_rank(file, name, lora_a.shape[0], fields)
    magnitude = _find_magnitude(file, name, found, fields)
    scaling = _choose_scaling(name, lora_a.shape[0], fields)
    return Change(lora_a, lora_b, scaling, magnitude, found.get(BIAS))


def _find_magnitude(
    file: Path, name: str, found: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> Tensor | None:
    """Return the lengths of rows that DoRA has learned; refuse half of a DoRA adapter."""
    magnitude = found.get(MAGNITUDE.pattern)
    if (magnitude is not None) != bool(fields.get("use_dora")):
        raise ValueError(
            f"{file} has {'no' if magnitude is None else 'a'} magnitude for {name}, and "
            f"{ADAPTER_FILE} says use_dora={bool(fields.get('use_dora'))}: one of the two files is "
            "not this adapter's"
        )
    return magnitude


def _check_rank(file: Path, name: str, found: int, fields: Mapping[str, Any]) -> None:
    rank = _look_up(fields.get("rank_pattern"), name, fields["r"])
    if found != rank:
        raise ValueError(
            f"{file} has rank {found} for {name}, and {ADAPTER_FILE} says r={rank}: one of the two "
            "files is not this adapter's"
        )
