"""How a model gets packed weights and gets rid of them.

Owns which layers of the network are packed and the walks that swap them, in memory or around a
checkpoint that is still to be loaded. Knows nothing of the integers themselves: storage and
arithmetic are `quantization`'s.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .quantization import (
    ACTIVATIONS,
    PackedMatrix,
    QuantizedEmbedding,
    QuantizedLinear,
    check_activations,
    check_bits,
    check_columns,
    has_finite_scales,
    quantize_weight,
)
from .releases_chatglm import renew_ties

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


class WeightFormat(NamedTuple):
    """What `quantize` takes: the format of the packed weights.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; None for whole rows, the official format.
        embeddings: whether the embedding and the head are packed too.
        activations: "int8" if a CPU's kernels may round the input of products, or "exact".
    """

    bits: int
    group_size: int | None = None
    embeddings: bool = False
    activations: str = ACTIVATIONS[0]

    def __str__(self) -> str:
        group = "" if self.group_size is None else f" in groups of {self.group_size}"
        return f"{self.bits} bits{group}"

    @classmethod
    def of_config(cls, config: Any) -> "WeightFormat":
        """Return the format that a model's configuration names; 0 bits for plain weights."""
        return cls(
            config.quantization_bit,
            config.quantization_group_size,
            config.quantization_embeddings,
            check_activations(config.quantization_activations),
        )


class QuantizationMixin:
    """The methods that pack and unpack a whole model."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the model; scales, which bfloat16 never narrows, do not count."""
        model = cast(nn.Module, self)
        return next(
            tensor.dtype
            for name, tensor in model.named_parameters()
            if tensor.is_floating_point() and not name.endswith("weight_scale")
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


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer's weights are packed."""
    return isinstance(module, PackedMatrix)


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


def _check_layer(
    name: str, module: nn.Module, weight_format: WeightFormat, empty_init: bool
) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise ValueError(
            f"{name} is a {type(module).__name__}, and only linear layers can be quantized: "
            "quantize before adding adapters, or merge them first."
        )
    if module.weight.is_meta and not empty_init:
        raise ValueError(f"{name} has no values (meta device): load the weights first.")
    bits, group_size = weight_format.bits, weight_format.group_size
    check_columns(module.weight.shape[1], bits, group_size, name)
    if not empty_init and not has_finite_scales(module.weight, bits):
        quantize_weight(module.weight, bits, name, group_size)  # raises, naming the row


__all__ = ["QuantizationMixin", "WeightFormat", "note_ties", "swap_layers"]
