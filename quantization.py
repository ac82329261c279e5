"""Packed 4-bit and 8-bit weights: the official storage format and its arithmetic in plain torch.

Owns how a float matrix becomes integers with a scale per row, how two 4-bit integers share a byte,
the layer that computes with them, and the walk that swaps a model's layers. Knows nothing of
attention, of text, or of devices: whatever torch runs on, this runs on.

The scheme is the original's (absmax rounding as in GLM-130B, https://arxiv.org/abs/2210.02414,
symmetric, one scale a row), with `limit = 2 ** (bits - 1) - 1`:

    weight_scale[o] = half(max_i |W[o, i]| / limit)
    weight[o, i]    = round_half_to_even(W[o, i] / weight_scale[o])
    W[o, i]        ~= weight[o, i] * weight_scale[o]

Shapes: `O` output features, `I` input features, `C` stored columns: `I`, or `I / 2` with 4 bits.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The layers of a block whose weights are packed; embedding, norms and head stay as they are.
PACKED_LAYERS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}; 0 leaves a model as it is.")


def count_columns(in_features: int, bits: int, name: str = "weight") -> int:
    """Return the stored columns of a matrix, or say why it cannot be stored."""
    _check_bits(bits)
    if bits == 4 and in_features % 2:
        raise ValueError(
            f"{name} has {in_features} columns, and 4 bits need an even number of them, two to a "
            "byte: use 8 bits."
        )
    return in_features * bits // 8


def pack_int4(integers: Tensor) -> Tensor:
    """Store two 4-bit integers a byte, the even column in the high half.

    Args:
        integers: int8 `(O, I)`, each in [-8, 7].

    Returns:
        int8 `(O, I / 2)`.
    """
    return (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: int8 `(O, C)` to int8 `(O, 2 * C)`."""
    even = packed >> 4
    odd = ((packed & 15) ^ 8) - 8  # extends the sign without an overflowing shift
    return torch.stack((even, odd), dim=-1).flatten(1)  # (O, C, 2) -> (O, I)


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Round a float matrix to integers, bit for bit as the original does.

    Half keeps few bits of a very small scale, so a quotient can leave the integers' range: it is
    clamped, where the original wraps around to the other sign. A row of scale 0 becomes zeros.

    Args:
        weight: `(O, I)`, any floating dtype, any device.
        bits: 4 or 8.
        name: what an error calls the matrix.

    Returns:
        The stored integers, int8 `(O, C)`, and the scales, half `(O,)`.

    Raises:
        ValueError: for other bits, an odd `I` with 4 bits, or a row whose scale is not finite.
    """
    count_columns(weight.shape[1], bits, name)
    limit = 2 ** (bits - 1) - 1
    largest = torch.linalg.vector_norm(weight, ord=torch.inf, dim=1)
    scale = (largest.float() / limit).half()  # (O,)
    if not scale.isfinite().all():
        row = int(scale.isfinite().int().argmin())
        raise ValueError(
            f"{name} cannot be quantized: row {row} reaches {largest[row].item()}, and half scales "
            f"with {bits} bits reach {65504 * limit}. Repair the weights."
        )
    divisor = scale.masked_fill(scale == 0, torch.inf).unsqueeze(1)
    # Half weights are divided in half, as by the original: a rounded quotient can make a tie.
    integers = (weight / divisor).round_().clamp_(-limit - 1, limit).to(torch.int8)
    return (pack_int4(integers) if bits == 4 else integers), scale


def dequantize_weight(
    weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Return the matrix `(O, I)` that stored integers stand for.

    Half times half is taken in half, as the original's kernels do; any other product in a dtype
    that holds the scales exactly.

    Args:
        weight: int8 `(O, C)`.
        weight_scale: `(O,)`, any floating dtype.
        bits: 4 or 8.
        dtype: of the result.
    """
    integers = unpack_int4(weight) if bits == 4 else weight
    # Widening by hand: a product of mixed dtypes has the same value, at twice the time and memory.
    product_dtype = torch.promote_types(dtype, weight_scale.dtype)
    return integers.to(product_dtype).mul_(weight_scale.unsqueeze(1)).to(dtype)


class PackedProduct(torch.autograd.Function):
    """`input @ W.T` that keeps only the packed `W` for the backward pass, and unpacks it again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        ctx.bits = bits
        unpacked = dequantize_weight(weight, weight_scale, bits, input.dtype)
        return nn.functional.linear(input, unpacked)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        weight, weight_scale = ctx.saved_tensors
        unpacked = dequantize_weight(weight, weight_scale, ctx.bits, grad_output.dtype)
        return grad_output @ unpacked, None, None, None


def quantized_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """Apply a packed linear layer; the one place that decides how its product is computed.

    Args:
        input: `(..., I)`, floating.
        weight, weight_scale, bits: as in `dequantize_weight`; no gradient reaches them.
        bias: `(O,)` or None.

    Returns:
        `(..., O)`.
    """
    output = PackedProduct.apply(input, weight, weight_scale, bits)
    return output if bias is None else output + bias


class QuantizedLinear(nn.Module):
    """A linear layer with frozen, packed weights under the official names.

    A new layer holds zeros, to be loaded into; `from_linear` makes one with values.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`.
        bits: 4 or 8.
        dtype: of the bias and, bfloat16 excepted, of the scales; by default torch's default.

    Raises:
        ValueError: for other bits, or an odd `in_features` with 4 bits.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        columns = count_columns(in_features, bits)
        zeros = torch.zeros(out_features, dtype=dtype, device=device)
        scale = zeros.float() if zeros.dtype == torch.bfloat16 else zeros.clone()
        self.weight = _freeze(torch.zeros(out_features, columns, dtype=torch.int8, device=device))
        self.weight_scale = _freeze(scale)
        self.register_parameter("bias", _freeze(zeros) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: int, empty_init: bool = False, name: str = "weight"
    ) -> "QuantizedLinear":
        """Pack a linear layer on its device; with `empty_init`, only take its sizes.

        Arguments and errors otherwise as in `quantize_weight`.
        """
        device, dtype = linear.weight.device, linear.weight.dtype
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bits, has_bias, device, dtype)
        if not empty_init:
            weight, scale = quantize_weight(linear.weight, bits, name)
            layer.weight, layer.weight_scale = _freeze(weight), _freeze(scale)
            layer.bias = _freeze(linear.bias.detach()) if has_bias else None
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return quantized_linear(input, self.weight, self.weight_scale, self.bits, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, bits={self.bits}"

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep assigned parameters frozen; transformers 5 loads every float one as trainable."""
        if isinstance(value, nn.Parameter):
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move or cast the layer; casts pass integers by, and never narrow scales to bfloat16.

        Of half's 11 significant bits bfloat16 keeps 8, which a later `.half()` would not restore.
        """
        scale = self.weight_scale.detach()
        super()._apply(fn, recurse)
        if self.weight_scale.dtype == torch.bfloat16:
            self.weight_scale = _freeze(scale.to(self.weight_scale.device, torch.float32))
        return self


def _freeze(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def quantize_model(model: ModelT, bits: int, empty_init: bool = False, **ignored: Any) -> ModelT:
    """Swap the linear layers of all blocks for packed ones, in place and one at a time.

    Args:
        model: a ChatGLM model, on any device and in any floating dtype.
        bits: 4 or 8, also written to the model's config; 0 leaves the model as it is.
        empty_init: only change the storage, for values that will be loaded afterwards.
        ignored: options of the original's own kernels.

    Returns:
        The model itself.

    Raises:
        ValueError: for other bits, another number than before, or a layer that cannot be packed.
    """
    if bits == 0:
        return model
    _check_bits(bits)
    if ignored:
        logger.warning("quantize() ignores %s.", ", ".join(sorted(ignored)))
    names = _find_layers_to_pack(model, bits, empty_init)
    if not names:
        logger.info("The model is already quantized to %d bits.", bits)
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(name))
        packed = QuantizedLinear.from_linear(linear, bits, empty_init, name)
        setattr(model.get_submodule(parent), child, packed)
    model.config.quantization_bit = bits
    return model


def _find_layers_to_pack(model: nn.Module, bits: int, empty_init: bool) -> list[str]:
    """Name the layers to be packed, or refuse before any of them is.

    Names, since a list of the modules would keep the replaced matrices alive.
    """
    names = []
    for name, module in model.named_modules():
        if not name.endswith(PACKED_LAYERS):
            continue
        if isinstance(module, QuantizedLinear):
            if module.bits == bits:
                continue
            raise ValueError(
                f"The model is quantized to {module.bits} bits and cannot be quantized to {bits}: "
                "load the unquantized weights and quantize those."
            )
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name} is a {type(module).__name__}, and only linear layers can be quantized: "
                "quantize before adding adapters, or merge them first."
            )
        if module.weight.is_meta and not empty_init:
            raise ValueError(f"{name} has no values (meta device): load the weights first.")
        count_columns(module.in_features, bits, name)
        names.append(name)
    return names


__all__ = ["QuantizedLinear", "dequantize_weight", "quantize_model", "quantize_weight"]
