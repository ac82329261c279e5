"""How a model gets packed weights: in memory, or from a checkpoint while it is read.

Owns which layers are packed and the walks that swap them, transformers' quantization method
"chatglm", the way from a shard to the model's tensors, and what is refused on it. Storage and
arithmetic are `quantization`'s.

A float checkpoint is handed to transformers as if it had been saved quantized: under each packed
name stands a `PendingTensor` that is read, rounded and released when it is asked for. So one way
serves `quantization_config`, `config.quantization_bit`, every `device_map` and every release. What
is rounded is the tensor as stored, whatever dtype is asked for the rest: half shards give the
official integers.

Shapes: `O` output features, `I` input features of a packed layer.
"""

import re
import threading
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_chatglm import (
    REMEDY,
    Checkpoint,
    PendingTensor,
    StoredTensor,
    check_settings,
    open_shards,
    without_patterns,
)
from .configuration_chatglm import (
    GROUP_SIZES,
    WeightFormat,
    check_activations,
    check_bits,
    check_columns,
    check_tensor_parallel,
)
from .environment_chatglm import (
    change_load_settings,
    keep_float_norms,
    loading_own_dtype,
    read_load_settings,
    read_quantize_options,
    renew_ties,
    returns_with_adapters,
    translate_load_options,
)
from .quantization import (
    PackedMatrix,
    Packing,
    QuantizedEmbedding,
    QuantizedLinear,
    has_finite_scales,
    is_packed,
    quantize_weight,
)

logger = logging.get_logger(__name__)

# The layers of a block whose weights are packed; biases, norms and prefix stay as they are.
PACKED_LAYERS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
# Packed on demand: the embedding, and the head that is tied to it.
EMBEDDING_LAYERS = ("word_embeddings", "lm_head")

METHOD = "chatglm"

# What every model of the family has: the rest, heads and prefixes, may be new or not wanted.
CORE = r"(^|\.)(word_embeddings|layers\.\d+|final_layernorm)\."
REMEDY_IN_PYTHON = (
    f"{REMEDY}, or pass ignore_mismatched_sizes=True in Python to begin with new weights there"
)


class QuantizationMixin:
    """The methods that pack and unpack a whole model."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the model; scales and norms, which may be wider, do not count."""
        return next(
            tensor.dtype
            for name, tensor in cast(nn.Module, self).named_parameters()
            if tensor.is_floating_point() and not re.search("weight_scale|layernorm", name)
        )

    @returns_with_adapters
    def quantize(
        self,
        bits: int,
        empty_init: bool = False,
        group_size: int | None = None,
        embeddings: bool = False,
        activations: str | None = None,
        **options: Any,
    ) -> Any:
        """Swap the model's large layers for packed ones, in place and one at a time.

        Works on any device and in any floating dtype. The format is also written to the model's
        config. A second call may pack the embedding too or change `activations`, nothing else.

        Args:
            bits: 4 or 8; 0 leaves the model as it is.
            empty_init: only change the storage, for values that will be loaded afterwards.
            group_size: 32, 64 or 128 columns that share a scale; None for a scale per row, the
                official format.
            embeddings: whether to pack the embedding and the head too.
            activations: "int8" lets the kernels of a CPU round the input of every product to 8
                bits, with a scale for every few columns (the default; not while training);
                "exact" keeps it, at up to twice the time.
            options: `quantize_embeddings`, the original's name of `embeddings`, and options of
                its own kernels, which are ignored.

        Returns:
            The model itself.

        Raises:
            ValueError: for an unknown format or option, another format than before, or a layer
                that cannot be packed. The model is as before then.
        """
        embeddings = read_quantize_options(embeddings, options)
        if bits == 0:
            return self
        check_bits(bits)
        activations = check_activations(
            activations or cast(Any, self).config.quantization_activations
        )
        weight_format = WeightFormat(bits, group_size, embeddings, activations)
        model = cast(PreTrainedModel, self)
        if not swap_layers(model, weight_format, empty_init):
            logger.info("The model is already quantized to %s.", weight_format)
        has_packed_embedding = isinstance(model.get_input_embeddings(), QuantizedEmbedding)
        note_format(model, weight_format._replace(embeddings=has_packed_embedding))
        return self

    @returns_with_adapters
    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Swap packed layers for plain ones with the values that they compute with, in place.

        Adapters around packed layers stay, and can be merged afterwards.

        Args:
            dtype: of the matrices; that of the rest of the model by default.

        Returns:
            The model itself.
        """
        model = cast(PreTrainedModel, self)
        dtype = dtype or model.dtype
        for name in [name for name, layer in model.named_modules() if is_packed(layer)]:
            layer = model.get_submodule(name)
            plain: nn.Module = (
                layer.to_linear(dtype)
                if isinstance(layer, QuantizedLinear)
                else cast(QuantizedEmbedding, layer).to_embedding(dtype)
            )
            del layer
            _replace_module(model, name, plain)
        activations = cast(Any, model.config).quantization_activations
        note_format(model, WeightFormat(0, activations=activations))
        return self

    def _tie_weights(self) -> None:
        """Share a packed head's scales too; transformers 4 knows only of its weight."""
        model = cast(Any, self)
        if isinstance(model.get_output_embeddings(), QuantizedLinear) and _is_tied(model):
            model.lm_head.weight_scale = model.get_input_embeddings().weight_scale


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(cast(Any, model.config).tie_word_embeddings)


def note_format(model: PreTrainedModel, weight_format: WeightFormat) -> None:
    """Write a model's format to its configuration, and tie what belongs together."""
    config = cast(Any, model.config)
    config.quantization_bit = weight_format.bits
    config.quantization_group_size = weight_format.group_size
    config.quantization_embeddings = weight_format.embeddings
    config.quantization_activations = weight_format.activations
    if model.get_output_embeddings() is not None:
        note_ties(model)
        renew_ties(model)
        model.tie_weights()


def note_ties(model: PreTrainedModel) -> None:
    """Tell transformers what a head shares with the embedding: packed, also the scales."""
    ties = {"lm_head.weight": "transformer.word_embeddings.weight"}
    if isinstance(model.get_output_embeddings(), QuantizedLinear):
        ties["lm_head.weight_scale"] = "transformer.word_embeddings.weight_scale"
    model._tied_weights_keys = cast(Any, ties)


def swap_layers(
    model: nn.Module, weight_format: WeightFormat, empty_init: bool = False
) -> list[str]:
    """Put packed layers into the place of those that the format names; return their names.

    Args:
        model: a ChatGLM model or its stack of blocks.
        weight_format: what to pack and how.
        empty_init: only change the storage, for values that will be loaded afterwards.

    Raises:
        ValueError: before any layer is changed, if one cannot be packed.
    """
    names = _find_layers_to_pack(model, weight_format, empty_init)
    for name in names:
        layer = model.get_submodule(name)
        pack: Any = QuantizedLinear.from_linear
        if isinstance(layer, nn.Embedding):
            pack = QuantizedEmbedding.from_embedding
        packed = pack(layer, weight_format.bits, empty_init, name, weight_format.group_size)
        del layer  # or the float matrix would outlive its replacement by one round
        _replace_module(model, name, packed)
    for layer in filter(is_packed, model.modules()):
        cast(PackedMatrix, layer).activations = weight_format.activations
    return names


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _find_layers_to_pack(
    model: nn.Module, weight_format: WeightFormat, empty_init: bool
) -> list[str]:
    """Name the layers to be packed, or refuse before any of them is.

    Names, since a list of the modules would keep the replaced matrices alive.
    """
    endings = PACKED_LAYERS + (EMBEDDING_LAYERS if weight_format.embeddings else ())
    names = []
    for name, module in model.named_modules():
        if not name.endswith(endings):
            continue
        if isinstance(module, PackedMatrix):
            _check_same_format(module, weight_format)
            continue
        _check_layer(name, module, weight_format, empty_init)
        names.append(name)
    return names


def _check_same_format(layer: PackedMatrix, asked: WeightFormat) -> None:
    found = WeightFormat(layer.bits, layer.group_size)
    if found != WeightFormat(asked.bits, asked.group_size):
        raise ValueError(
            f"The model is quantized to {found} and cannot be quantized to {asked}: load the "
            "unquantized weights and quantize those."
        )


def _check_layer(name: str, module: Any, weight_format: WeightFormat, empty_init: bool) -> None:
    if type(module) not in (nn.Linear, nn.Embedding):  # other quantizers derive theirs from these
        kind = type(module).__name__
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} has an adapter around it ({type(module).__module__}.{kind}): quantize the "
                "model before adding adapters, or merge them first, by merge_and_unload()."
            )
        raise ValueError(
            f"{name} is a {kind}, and only torch's own layers can be quantized: load unquantized "
            "weights, and quantize those."
        )
    if hasattr(module.weight, "placements"):
        raise ValueError(
            f"{name} is shared out among processes (a DTensor): quantize in one process, and load "
            "the quantized weights without tp_plan."
        )
    if module.weight.is_meta and not empty_init:
        raise ValueError(f"{name} has no values (meta device): load the weights first.")
    bits, group_size = weight_format.bits, weight_format.group_size
    check_columns(module.weight.shape[1], bits, group_size, name)
    if not empty_init and not has_finite_scales(module.weight, bits):
        quantize_weight(module.weight, bits, name, group_size)  # raises, naming the row


# While a checkpoint is loaded


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """The format of packed weights, as `from_pretrained(quantization_config=...)` takes it.

    Args:
        bits: 4 or 8.
        group_size: 32, 64 or 128 columns that share a scale; None for a scale per row.
        embeddings: whether to pack the embedding and the head too.
        quant_method: "chatglm", by which a dictionary names this class.

    Raises:
        ValueError: for a format that there is not, or an unknown option.
    """

    def __init__(
        self,
        bits: int | None = None,
        group_size: int | None = None,
        embeddings: bool = False,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config has no {', '.join(sorted(unknown))}: it takes bits, "
                "group_size and embeddings."
            )
        check_columns(max(GROUP_SIZES), cast(int, bits), group_size)
        self.quant_method = cast(Any, quant_method)
        self.bits = cast(int, bits)
        self.group_size = group_size
        self.embeddings = embeddings


class ChatGLMQuantizer(HfQuantizer):
    """Makes room for packed weights in a model before it is loaded; the reading does the rest.

    It asks the model itself, whose classes another folder's copy of this file would not know.
    """

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        asked = cast(ChatGLMQuantizationConfig, self.quantization_config)
        if model.config.model_type != METHOD:
            raise ValueError(
                f"quant_method {METHOD} is for ChatGLM models, and {type(model).__name__} is a "
                f"{model.config.model_type}: load it without."
            )
        model.quantize(
            asked.bits, empty_init=True, group_size=asked.group_size, embeddings=asked.embeddings
        )
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # The format stands in the configuration's own fields now, which the original reads as
        # well; a model that is quantized in transformers' sense would refuse `half` and `float`.
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained around the packed layers."""
        return True


def register() -> None:
    """Make this copy of the file the one that transformers knows the method by.

    transformers makes a copy for every folder, and the registries' own functions refuse a second.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ChatGLMQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = ChatGLMQuantizer


class QuantizedLoadingMixin:
    """The steps of `from_pretrained` that quantize and check."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, quantizing on the way if a format is asked for.

        Args:
            path, args, kwargs: as in transformers. A `quantization_config` of the method
                "chatglm", `quantization_bit` in the configuration, or `load_in_4bit` and
                `load_in_8bit`, pack a float checkpoint while it is read. Without a dtype it is that
                of config.json, but norms stored in float32 stay so.

        Raises:
            ValueError: if the checkpoint's tensors are not those of the configuration, or cannot
                be packed; it names the tensor.
        """
        register()
        check_settings(Path(path or ""), kwargs)
        weight_format = translate_load_options(kwargs)
        if weight_format is not None:
            kwargs["quantization_config"] = {"quant_method": METHOD, **weight_format}
        asked = _read_format(kwargs)
        with loading_own_dtype(kwargs), without_patterns():
            loaded = cast(Any, super()).from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if asked is not None:
            _check_asked_format(WeightFormat.of_config(model.config), asked)
        # transformers 5 makes all that it loads trainable, a P-Tuning model's frozen weights too.
        model.base_model.freeze_around_prefix()
        return loaded

    @classmethod
    def _load_pretrained_model(
        cls,
        model: PreTrainedModel,
        state_dict: Mapping[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Check what transformers is about to load, and quantize it on the way if need be."""
        load = cast(Any, super())._load_pretrained_model
        settings = read_load_settings(args, options)
        if "expected_keys" in options or _is_foreign(settings["hf_quantizer"]):
            # An adapter, or the layers of another method: none of our tensors.
            return load(model, state_dict, checkpoint_files, *args, **options)
        mesh = settings.get("device_mesh")
        if mesh is not None:
            check_tensor_parallel(cast(Any, model.config), mesh.size())
        if state_dict is None:
            tensors = open_shards(checkpoint_files or [], settings["weights_only"])
        else:
            tensors = {name: StoredTensor(tensor, name) for name, tensor in state_dict.items()}
        checkpoint = Checkpoint.match(model, tensors)
        may_differ = settings["ignore_mismatched_sizes"]
        check_checkpoint(model, checkpoint, CORE, REMEDY_IN_PYTHON, may_differ)
        if settings["sharded_metadata"] is not None:
            _check_index(model, checkpoint, settings["sharded_metadata"]["weight_map"])
        stored = {name: tensors[place].tensor for name, place in checkpoint.names.items()}
        keep_float_norms(checkpoint.expected, stored)
        changes: dict[str, Any] = {"hf_quantizer": None}  # nothing is left for it to do
        if has_float_matrices(model, checkpoint):
            changes["sharded_metadata"] = None  # it does not know the scales
            _check_no_disk(settings["device_map"] or {})
            state_dict = pack_checkpoint(model, checkpoint)
        del tensors, checkpoint  # shards of an old kind are not mapped, but read as a whole
        args, options = change_load_settings(args, options, changes)
        return load(model, state_dict, checkpoint_files, *args, **options)


def _read_format(options: dict[str, Any]) -> WeightFormat | None:
    """Return the format asked for, and leave it in the options as an object of this file's class.

    transformers refuses a dictionary if the configuration holds an object.
    """
    asked = dict(options.get("quantization_config") or {})
    if asked.get("quant_method") != METHOD:
        return None
    config = ChatGLMQuantizationConfig(**asked)
    options["quantization_config"] = config
    return WeightFormat(config.bits, config.group_size, config.embeddings)


def _check_asked_format(found: WeightFormat, asked: WeightFormat) -> None:
    """Notice where transformers preferred a config.json's format to the one asked for."""
    if found[:2] != asked[:2]:
        raise ValueError(
            f"The checkpoint is quantized to {found}, and quantization_config asks for {asked}: "
            "leave it out, or load the unquantized weights."
        )


def _is_foreign(quantizer: HfQuantizer | None) -> bool:
    return quantizer is not None and quantizer.quantization_config.quant_method != METHOD


# What is refused


def check_checkpoint(
    model: Any,
    checkpoint: Checkpoint,
    pattern: str = "",
    remedy: str = REMEDY,
    may_differ: bool = False,
) -> None:
    """Refuse stored tensors that are not the model's, before any is read.

    Args:
        model: what is to be filled; on the meta device it takes no memory.
        checkpoint: what is to be loaded into it.
        pattern: what is searched for in the names that may neither be missing nor left over.
        remedy: what an error advises.
        may_differ: whether sizes and names may be others, except those of packed layers.

    Raises:
        ValueError: with the field of the configuration, or with the tensor's name.
    """
    if not may_differ:
        checkpoint.check_fields(model.config, remedy)
    packed = {name: (layer, stored) for name, layer, stored in iter_matrices(model, checkpoint)}
    _check_one_dtype([stored for _, stored in packed.values()])
    sizes = {}
    for name, (layer, stored) in packed.items():
        if stored.dtype.is_floating_point:
            sizes[name] = (layer.weight.shape[0], _count_columns(layer))
        else:
            _check_packed(name, layer, stored, checkpoint.find(f"{name}_scale"))
    _check_plain_tensors(packed, checkpoint)
    checkpoint.check_sizes(packed if may_differ else checkpoint.names, sizes, remedy)
    if not may_differ:
        checkpoint.check_names(pattern, [f"{name}_scale" for name in sizes])


def iter_matrices(
    model: nn.Module, checkpoint: Checkpoint
) -> Iterator[tuple[str, PackedMatrix, StoredTensor]]:
    """Yield the name of each packed layer's weight, the layer and the stored matrix.

    Raises:
        ValueError: for a layer that is not stored.
    """
    for layer_name, layer in model.named_modules():
        # The layers may be of another folder's copy of the code, and so of another class.
        if not hasattr(layer, "weight_scale"):
            continue
        name = f"{layer_name}.weight"
        stored = checkpoint.find(name)
        if stored is not None:
            yield name, cast(PackedMatrix, layer), stored
        elif name not in checkpoint.ties:
            checkpoint.refuse("the weights lack", [name])


def has_float_matrices(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether packed layers are stored as plain matrices, to be packed while loading."""
    return any(stored.dtype.is_floating_point for _, _, stored in iter_matrices(model, checkpoint))


def _count_columns(layer: PackedMatrix) -> int:
    return layer.weight.shape[1] * 8 // layer.bits


def _check_one_dtype(matrices: list[StoredTensor]) -> None:
    """Refuse a mixture of checkpoints among the packed layers."""
    for stored in matrices:
        if stored.dtype != matrices[0].dtype:
            raise ValueError(
                f"{matrices[0]} is stored as {matrices[0].dtype} and {stored} as {stored.dtype}: "
                "take all shards from one checkpoint, quantized or not."
            )


def _check_packed(
    name: str, layer: PackedMatrix, stored: StoredTensor, scale: StoredTensor | None
) -> None:
    """Check the integers and scales of one layer of a quantized checkpoint."""
    other_bits = 12 - layer.bits
    if stored.shape[1] * 8 == _count_columns(layer) * other_bits:
        raise ValueError(
            f"{stored} is stored with the sizes {stored.shape}, which is {other_bits} bits, "
            f"and quantization_bit is {layer.bits}: set quantization_bit to {other_bits}."
        )
    if scale is None:
        raise ValueError(
            f"{stored} is stored as {stored.dtype}, but the checkpoint has no {name}_scale: use a "
            "complete quantized checkpoint, or the unquantized weights."
        )
    if scale.shape != layer.weight_scale.shape:
        groups = scale.shape[1] if len(scale.shape) == 2 else None
        group_size = _count_columns(layer) // groups if groups else None
        raise ValueError(
            f"{scale} is stored with the sizes {scale.shape}, and "
            f"quantization_group_size {layer.group_size} makes it "
            f"{tuple(layer.weight_scale.shape)}: set it to {group_size}."
        )
    if not scale.tensor.isfinite().all():
        value = scale.tensor[~scale.tensor.isfinite()][0].item()
        raise ValueError(
            f"{scale} holds {value}, and every scale must be finite: the checkpoint is "
            "broken, fetch or make it again."
        )


def _check_plain_tensors(packed: Collection[str], checkpoint: Checkpoint) -> None:
    """Check that none of the other tensors is packed."""
    for name in (name for name in checkpoint.names if name not in packed):
        stored, expected = checkpoint.tensors[checkpoint.names[name]], checkpoint.expected[name]
        if expected.is_floating_point() and not stored.dtype.is_floating_point:
            bits = 4 if stored.shape[-1] * 2 == expected.shape[-1] else 8
            raise ValueError(
                f"{stored} is stored as {stored.dtype}, and the configuration names no such format "
                f"for it: set quantization_bit to {bits}, and quantization_embeddings if "
                "the embedding is packed, or use the unquantized weights."
            )


def _check_index(model: nn.Module, checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> None:
    """Refuse an index of other shards: a float index beside quantized ones, or the reverse."""
    for name, _, _ in iter_matrices(model, checkpoint):
        stored = f"{checkpoint.names[name]}_scale"
        if (stored in weight_map) != (stored in checkpoint.tensors):
            known = "lists" if stored in weight_map else "does not list"
            held = "holds" if stored in checkpoint.tensors else "does not hold"
            raise ValueError(
                f"The checkpoint's index {known} {stored}, and its shards' data {held} it: use "
                "the index that came with the shards, quantized or not."
            )


def _check_no_disk(device_map: Mapping[str, Any]) -> None:
    if "disk" in device_map.values():
        raise ValueError(
            'device_map puts layers on "disk", where they cannot be quantized while loading: save '
            "a quantized checkpoint first and load that."
        )


# Packing while reading


def pack_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a float checkpoint as the quantized one that it would make.

    Args:
        model: with packed layers for them.
        checkpoint: float tensors, checked.
    """
    lock = threading.Lock()
    packed = {name: layer for name, layer, _ in iter_matrices(model, checkpoint)}
    pending: dict[str, Any] = {n: stored.tensor for n, stored in checkpoint.tensors.items()}
    for name, stored_name in checkpoint.names.items():
        stored = checkpoint.tensors[stored_name]
        if checkpoint.is_copy(name):
            del pending[stored_name]
        elif name not in packed:
            dtype = checkpoint.expected[name].dtype
            take = partial(stored.read, dtype)
            pending[stored_name] = PendingTensor(stored.tensor.shape, dtype, take, lock)
        else:
            packing = Packing(stored, packed[name], name)
            for suffix, kind in (("", "weight"), ("_scale", "weight_scale")):
                part = getattr(packed[name], kind)
                take = partial(packing.take, kind)
                pending[stored_name + suffix] = PendingTensor(part.shape, part.dtype, take, lock)
    return pending


__all__ = [
    "ChatGLMQuantizationConfig",
    "ChatGLMQuantizer",
    "QuantizationMixin",
    "QuantizedLoadingMixin",
    "check_checkpoint",
    "note_ties",
    "swap_layers",
]
