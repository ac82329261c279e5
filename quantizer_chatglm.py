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
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_chatglm import (
    GROUP_SIZES,
    WeightFormat,
    check_activations,
    check_bits,
    check_columns,
)
from .environment_chatglm import (
    PendingTensor,
    StoredTensor,
    change_load_settings,
    keep_float_norms,
    loading_own_dtype,
    open_shards,
    read_load_settings,
    renew_ties,
    whole_shape,
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

    def quantize(
        self,
        bits: int,
        empty_init: bool = False,
        group_size: int | None = None,
        embeddings: bool = False,
        activations: str | None = None,
        **ignored: Any,
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
            ignored: options of the original's own kernels.

        Returns:
            The model itself.

        Raises:
            ValueError: for an unknown format, another one than before, or a layer that cannot be
                packed. The model is as before then.
        """
        if bits == 0:
            return self
        check_bits(bits)
        activations = check_activations(
            activations or cast(Any, self).config.quantization_activations
        )
        if ignored:
            logger.warning("quantize() ignores %s.", ", ".join(sorted(ignored)))
        weight_format = WeightFormat(bits, group_size, embeddings, activations)
        model = cast(PreTrainedModel, self)
        if not swap_layers(model, weight_format, empty_init):
            logger.info("The model is already quantized to %s.", weight_format)
        has_packed_embedding = isinstance(model.get_input_embeddings(), QuantizedEmbedding)
        note_format(model, weight_format._replace(embeddings=has_packed_embedding))
        return self

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
        raise ValueError(
            f"{name} is a {type(module).__name__}, and only torch's own layers can be quantized: "
            "load unquantized weights, and quantize before adding adapters, or merge them first."
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
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, quantizing on the way if a format is asked for.

        Args:
            args, kwargs: as in transformers. A `quantization_config` of the method "chatglm", or
                `quantization_bit` in the configuration, packs a float checkpoint while it is read.
                Without a dtype it is that of config.json, but norms stored in float32 stay so.

        Raises:
            ValueError: if the checkpoint's tensors are not those of the configuration, or cannot
                be packed; it names the tensor.
        """
        register()
        asked = _read_format(kwargs)
        with loading_own_dtype(kwargs):
            loaded = cast(Any, super()).from_pretrained(*args, **kwargs)
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
        are_files = state_dict is None
        tensors = state_dict or open_shards(checkpoint_files or [], settings["weights_only"])
        checkpoint = Checkpoint.match(model, tensors)
        check_checkpoint(checkpoint, settings)
        stored = {name: tensors[place] for name, place in checkpoint.names.items()}
        keep_float_norms(checkpoint.expected, stored)
        changes: dict[str, Any] = {"hf_quantizer": None}  # nothing is left for it to do
        if checkpoint.has_float_matrices:
            changes["sharded_metadata"] = None  # it does not know the scales
            state_dict = pack_checkpoint(checkpoint, are_files)
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


class Checkpoint(NamedTuple):
    """Stored tensors beside the model that they are for.

    Attributes:
        tensors: what is stored, by the stored name.
        names: the stored name of each of the model's tensors that is stored.
        expected: the model's tensors, by its own names; without values.
        packed: the model's packed layers, by name.
        ties: the model's tensors that are others of its own: name to name.
    """

    tensors: Mapping[str, Tensor]
    names: dict[str, str]
    expected: dict[str, Tensor]
    packed: dict[str, PackedMatrix]
    ties: dict[str, str]

    @classmethod
    def match(cls, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> "Checkpoint":
        """Find each stored tensor's place, which may have the base model's prefix or lack it."""
        expected = model.state_dict(keep_vars=True)
        prefix = f"{model.base_model_prefix}."
        names = {}
        for stored in tensors:
            for name in (stored, prefix + stored, stored.removeprefix(prefix)):
                if name in expected:
                    names[name] = stored
                    break
        packed = {name: layer for name, layer in model.named_modules() if is_packed(layer)}
        is_tied = cast(Any, model.config).tie_word_embeddings
        ties = cast(dict[str, str], model._tied_weights_keys) if is_tied else None
        return cls(tensors, names, expected, cast(Any, packed), ties or {})

    def find(self, name: str) -> Tensor | None:
        """Return the stored tensor for one of the model's, or None."""
        return self.tensors[self.names[name]] if name in self.names else None

    def iter_matrices(self) -> Iterator[tuple[str, PackedMatrix, Tensor]]:
        """Yield the name of each packed layer's weight, the layer and the stored matrix.

        Raises:
            ValueError: for a layer that is not stored.
        """
        for layer_name, layer in self.packed.items():
            name = f"{layer_name}.weight"
            stored = self.find(name)
            if stored is not None:
                yield name, layer, stored
            elif name not in self.ties:
                raise ValueError(f"The checkpoint has no {name}: use all of its shards.")

    @property
    def has_float_matrices(self) -> bool:
        """Whether packed layers are stored as plain matrices, to be packed while loading."""
        return any(stored.is_floating_point() for _, _, stored in self.iter_matrices())


# What is refused


def check_checkpoint(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Refuse stored tensors that are not the model's, before any is read.

    Args:
        checkpoint: what is to be loaded.
        settings: transformers' `sharded_metadata`, `device_map` and `ignore_mismatched_sizes`.

    Raises:
        ValueError: with the tensor's name.
    """
    _check_one_dtype(checkpoint)
    for name, layer, stored in checkpoint.iter_matrices():
        if stored.is_floating_point():
            _check_size(name, stored, (layer.weight.shape[0], _count_columns(layer)))
        else:
            _check_packed(name, layer, stored, checkpoint.find(f"{name}_scale"))
    _check_plain_tensors(checkpoint, settings["ignore_mismatched_sizes"])
    if settings["sharded_metadata"] is not None:
        _check_index(checkpoint, settings["sharded_metadata"]["weight_map"])
    on_disk = "disk" in (settings["device_map"] or {}).values()
    if on_disk and checkpoint.has_float_matrices:
        raise ValueError(
            'device_map puts layers on "disk", where they cannot be quantized while loading: save '
            "a quantized checkpoint first and load that."
        )


def _count_columns(layer: PackedMatrix) -> int:
    return layer.weight.shape[1] * 8 // layer.bits


def _check_one_dtype(checkpoint: Checkpoint) -> None:
    """Refuse a mixture of checkpoints among the packed layers."""
    first: tuple[str, torch.dtype] | None = None
    for name, _, stored in checkpoint.iter_matrices():
        first = first or (name, stored.dtype)
        if stored.dtype != first[1]:
            raise ValueError(
                f"{first[0]} is stored as {first[1]} and {name} as {stored.dtype}: take all shards "
                "from one checkpoint, quantized or not."
            )


def _check_size(name: str, stored: Tensor, expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        raise ValueError(
            f"{name} is stored with the sizes {tuple(stored.shape)}, and the configuration makes "
            f"it {tuple(expected)}: use the config.json that came with the weights, or pass "
            "ignore_mismatched_sizes=True to begin with new weights there."
        )


def _check_packed(name: str, layer: PackedMatrix, stored: Tensor, scale: Tensor | None) -> None:
    """Check the integers and scales of one layer of a quantized checkpoint."""
    other_bits = 12 - layer.bits
    if stored.shape[1] * 8 == _count_columns(layer) * other_bits:
        raise ValueError(
            f"{name} is stored with the sizes {tuple(stored.shape)}, which is {other_bits} bits, "
            f"and quantization_bit is {layer.bits}: set quantization_bit to {other_bits}."
        )
    _check_size(name, stored, layer.weight.shape)
    if scale is None:
        raise ValueError(
            f"{name} is stored as {stored.dtype}, but the checkpoint has no {name}_scale: use a "
            "complete quantized checkpoint, or the unquantized weights."
        )
    if scale.shape != layer.weight_scale.shape:
        groups = scale.shape[1] if scale.dim() == 2 else None
        group_size = _count_columns(layer) // groups if groups else None
        raise ValueError(
            f"{name}_scale is stored with the sizes {tuple(scale.shape)}, and "
            f"quantization_group_size {layer.group_size} makes it "
            f"{tuple(layer.weight_scale.shape)}: set it to {group_size}."
        )
    if not scale.isfinite().all():
        value = scale[~scale.isfinite()][0].item()
        raise ValueError(
            f"{name}_scale holds {value}, and every scale must be finite: the checkpoint is "
            "broken, fetch or make it again."
        )


def _check_plain_tensors(checkpoint: Checkpoint, may_differ: bool) -> None:
    """Check the sizes of all other tensors, and that none of them is packed."""
    packed = {f"{name}.{kind}" for name in checkpoint.packed for kind in ("weight", "weight_scale")}
    for name in (name for name in checkpoint.names if name not in packed):
        stored, expected = checkpoint.tensors[checkpoint.names[name]], checkpoint.expected[name]
        if expected.is_floating_point() and not stored.is_floating_point():
            bits = 4 if stored.shape[-1] * 2 == expected.shape[-1] else 8
            raise ValueError(
                f"{name} is stored as {stored.dtype}, and the configuration names no such format "
                f"for it: set quantization_bit to {bits}, and quantization_embeddings if "
                "the embedding is packed, or use the unquantized weights."
            )
        if not may_differ:
            _check_size(name, stored, whole_shape(expected))


def _check_index(checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> None:
    """Refuse an index of other shards: a float index beside quantized ones, or the reverse."""
    for name, layer, _ in checkpoint.iter_matrices():
        stored = f"{checkpoint.names[name]}_scale"
        if (stored in weight_map) != (stored in checkpoint.tensors):
            known = "lists" if stored in weight_map else "does not list"
            held = "holds" if stored in checkpoint.tensors else "does not hold"
            raise ValueError(
                f"The checkpoint's index {known} {stored}, and its shards' data {held} it: use "
                f"the index that came with the shards, for {layer.bits} bits or for none."
            )


# Packing while reading


def pack_checkpoint(checkpoint: Checkpoint, are_files: bool) -> dict[str, Any]:
    """Return a float checkpoint as the quantized one that it would make.

    Args:
        checkpoint: float tensors, checked.
        are_files: whether they are mapped from files that nobody else reads.
    """
    lock = threading.Lock()
    pending: dict[str, Any] = dict(checkpoint.tensors)
    for name, stored_name in checkpoint.names.items():
        if _is_copy(checkpoint, name, are_files):
            del pending[stored_name]
            continue
        stored = StoredTensor(checkpoint.tensors[stored_name], are_files)
        layer = checkpoint.packed.get(name.removesuffix(".weight"))
        if layer is None:
            shape, dtype = stored.tensor.shape, checkpoint.expected[name].dtype
            pending[stored_name] = PendingTensor(shape, dtype, partial(stored.read, dtype), lock)
            continue
        packing = Packing(stored, layer, name)
        for suffix, kind in (("", "weight"), ("_scale", "weight_scale")):
            part = getattr(layer, kind)
            take = partial(packing.take, kind)
            pending[stored_name + suffix] = PendingTensor(part.shape, part.dtype, take, lock)
    return pending


def _is_copy(checkpoint: Checkpoint, name: str, are_files: bool) -> bool:
    """Tell whether a stored tensor repeats the one it is tied to: a head beside its embedding."""
    stored, origin = checkpoint.find(name), checkpoint.find(checkpoint.ties.get(name, ""))
    if stored is None or origin is None or stored.shape != origin.shape:
        return False
    return StoredTensor(stored, are_files).equals(StoredTensor(origin, are_files))


__all__ = [
    "ChatGLMQuantizationConfig",
    "ChatGLMQuantizer",
    "QuantizationMixin",
    "QuantizedLoadingMixin",
    "note_ties",
    "swap_layers",
]
