"""Packed 4-bit and 8-bit weights: the storage formats, their arithmetic, the layers that use them.

Owns how a float matrix becomes integers with a scale per row or per group of columns, how two 4-bit
integers share a byte, and the layers that compute with them. Knows nothing of attention, of text,
or of how a model gets such layers (`quantizer_chatglm`); which formats there are is the
configuration's. Kernels for a device come from a file of their own; what none of them takes is
computed by plain torch, on whatever torch runs on.

The official scheme is the original's (absmax rounding as in GLM-130B,
https://arxiv.org/abs/2210.02414, symmetric, one scale a row), with `limit = 2 ** (bits - 1) - 1`:

    weight_scale[o] = half(max_i |W[o, i]| / limit)
    weight[o, i]    = round_half_to_even(W[o, i] / weight_scale[o])
    W[o, i]        ~= weight[o, i] * weight_scale[o]

With groups, each run of `group_size` columns of a row is treated as such a row.

Shapes: `O` output features, `I` input features, `C` stored columns: `I`, or `I / 2` with 4 bits;
`G` groups of a row. Scales are `(O,)`, or `(O, G)` with groups.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint_chatglm import StoredTensor
from .configuration_chatglm import ACTIVATIONS, check_columns
from .environment_chatglm import find_engine, keep_whole, may_use_kernels, refuse_weight_of_integers
from .quantization_cuda import find_kernels as find_cuda_kernels
from .quantization_torch import ReorderedWeight, find_int8_product

# Larger matrices are worked on by blocks of rows of this many weights: few enough that the head is
# never unpacked as a whole, and on a CPU that each step of unpacking finds its data in the caches.
BLOCK_WEIGHTS = 2**26
CPU_BLOCK_WEIGHTS = 2**22


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
def quantize_weight(
    weight: Tensor,
    bits: int,
    name: str = "weight",
    group_size: int | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Round a float matrix to integers, without groups bit for bit as the original does.

    Half keeps few bits of a very small scale, so a quotient can leave the integers' range: it is
    clamped, where the original wraps around to the other sign. A row of scale 0 becomes zeros.

    Args:
        weight: `(O, I)`, any floating dtype, any device.
        bits: 4 or 8.
        name: what an error calls the matrix.
        group_size: columns that share a scale; None for whole rows, the official format.
        first_row: of the matrix that this is a part of, for an error.

    Returns:
        The stored integers, int8 `(O, C)`, and the scales, half `(O,)` or `(O, G)`.

    Raises:
        ValueError: for other bits, an `I` that cannot be stored so, or a scale that is not finite.
    """
    rows, in_features = weight.shape
    check_columns(in_features, bits, group_size, name)
    packed = weight.new_empty(rows, in_features * bits // 8, dtype=torch.int8)
    groups = () if group_size is None else (in_features // group_size,)
    scale = weight.new_empty(rows, *groups, dtype=torch.float16)
    for block in iter_row_blocks(rows, in_features, weight.device):
        packed[block], scale[block] = _quantize_rows(weight[block], bits, scale[block].shape)
    if not scale.isfinite().all():
        row = int(scale.view(rows, -1).isfinite().all(1).int().argmin())
        raise ValueError(
            f"{name} cannot be quantized: row {first_row + row} reaches "
            f"{weight[row].abs().max().item()}, and "
            f"half scales with {bits} bits reach {65504 * _limit(bits)}. Repair the weights."
        )
    return packed, scale


@torch.no_grad()
def has_finite_scales(weight: Tensor, bits: int) -> bool:
    """Tell whether `quantize_weight` would take a matrix's values, without a copy of them."""
    largest = torch.stack(weight.aminmax()).abs().max()
    return bool((largest.float() / _limit(bits)).half().isfinite())


def _limit(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _quantize_rows(weight: Tensor, bits: int, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    limit = _limit(bits)
    groups = weight.reshape(scale_shape.numel(), -1)  # (O * G, I / G)
    largest = torch.linalg.vector_norm(groups, ord=torch.inf, dim=1)
    scale = (largest.float() / limit).half()  # (O * G,)
    divisor = scale.masked_fill(scale == 0, torch.inf).unsqueeze(1)
    # Half weights are divided in half, as by the original: a rounded quotient can make a tie.
    integers = (groups / divisor).round_().clamp_(-limit - 1, limit).to(torch.int8)
    integers = integers.view(weight.shape)  # (O, I)
    return (pack_int4(integers) if bits == 4 else integers), scale.view(scale_shape)


def iter_row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Cut the rows of a matrix on a device into blocks."""
    # A compiled graph has its own ways with caches, and would grow with every block.
    is_cached = device.type == "cpu" and not torch.compiler.is_compiling()
    limit = CPU_BLOCK_WEIGHTS if is_cached else BLOCK_WEIGHTS
    step = max(1, limit // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dequantize_weight(
    weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Return the matrix `(O, I)` that stored integers stand for; the oracle of every kernel.

    Half times half is taken in half, as the original's kernels do; any other product in a dtype
    that holds the scales exactly.

    Args:
        weight: int8 `(O, C)`.
        weight_scale: `(O,)` or `(O, G)`, any floating dtype.
        bits: 4 or 8.
        dtype: of the result.
    """
    integers = unpack_int4(weight) if bits == 4 else weight
    # Widening by hand: a product of mixed dtypes has the same value, at twice the time and memory.
    product_dtype = torch.promote_types(dtype, weight_scale.dtype)
    groups = integers.to(product_dtype).view(*weight_scale.shape, -1)  # (O, [G,] I / G)
    return groups.mul_(weight_scale.unsqueeze(-1)).view(integers.shape).to(dtype)


class LinearKernels(Protocol):
    """What a device's kernels offer; None for operands that they leave to torch."""

    def multiply(
        self, input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, activations: str
    ) -> Tensor | None:
        """Return `input @ W.T`, `(..., I)` to `(..., O)`, without writing `W` to memory.

        With `activations` "int8" the input may be rounded to 8 bits, with "exact" it may not.
        """

    def dequantize(
        self, weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what `dequantize_weight` returns, bit for bit."""


class TorchKernels:
    """What torch itself has for packed weights on a CPU, where there is no engine.

    It is a product of bfloat16 numbers with 8-bit weights; 4-bit ones are unpacked to 8 bits, where
    `Int4Blocks` does not take them.
    """

    def multiply(
        self, input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, activations: str
    ) -> Tensor | None:
        """Return `input @ W.T` for bfloat16 inputs and a scale per row; None for others."""
        if input.dtype != torch.bfloat16 or weight_scale.dim() != 1 or activations == "exact":
            return None
        multiply_int8 = find_int8_product(input.shape[-1])
        if multiply_int8 is None or not input.numel():
            return None
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        product = multiply_int8(rows, unpack_int4(weight) if bits == 4 else weight)
        return (product * weight_scale).to(input.dtype).view(*input.shape[:-1], -1)

    def dequantize(
        self, weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Leave whole matrices to plain torch."""
        return None


def _find_cpu_kernels(device: torch.device) -> LinearKernels:
    engine = find_engine()
    found = None if engine is None else engine.find_kernels()
    return TorchKernels() if found is None else found


# How to find the kernels of a device, by its type; None where they cannot run.
KERNEL_FINDERS: dict[str, Callable[[torch.device], LinearKernels | None]] = {
    "cpu": _find_cpu_kernels,
    "cuda": find_cuda_kernels,
}


def _find_kernels(tensor: Tensor) -> LinearKernels | None:
    finder = KERNEL_FINDERS.get(tensor.device.type)
    return finder(tensor.device) if finder is not None and may_use_kernels() else None


def _dequantize(weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    kernels = _find_kernels(weight)
    matrix = None if kernels is None else kernels.dequantize(weight, weight_scale, bits, dtype)
    return dequantize_weight(weight, weight_scale, bits, dtype) if matrix is None else matrix


def allocate_product(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, activations: str
) -> Tensor:
    """Return memory as the result of `multiply_packed` has it."""
    torch._check(input.shape[-1] == weight.shape[1] * 8 // bits)
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    """Tell whether products on a device have kernels; a compiler asks, and does not look in."""
    kernels = KERNEL_FINDERS[device.type](device) if device.type in KERNEL_FINDERS else None
    return not isinstance(kernels, TorchKernels | None)


@keep_whole("packed_linear", allocate_product, _has_kernels)
def multiply_packed(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, activations: str
) -> Tensor:
    """Return `input @ W.T` by a kernel, or a block of unpacked rows at a time."""
    kernels = _find_kernels(weight)
    if kernels is not None:
        product = kernels.multiply(input, weight, weight_scale, bits, activations)
        if product is not None:
            return product
    parts = []
    for rows in iter_row_blocks(weight.shape[0], input.shape[-1], weight.device):
        matrix = _dequantize(weight[rows], weight_scale[rows], bits, input.dtype)
        parts.append(nn.functional.linear(input, matrix))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class PackedProduct(torch.autograd.Function):
    """`input @ W.T` that keeps only the packed `W` for the backward pass, and unpacks it again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, weight_scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        ctx.bits = bits
        return multiply_packed(input, weight, weight_scale, bits, "exact")

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        weight, weight_scale = ctx.saved_tensors
        in_features = weight.shape[1] * 8 // ctx.bits
        grad_input = grad_output.new_zeros(*grad_output.shape[:-1], in_features)
        for rows in iter_row_blocks(weight.shape[0], in_features, weight.device):
            matrix = _dequantize(weight[rows], weight_scale[rows], ctx.bits, grad_output.dtype)
            grad_input += grad_output[..., rows] @ matrix
        return grad_input, None, None, None


def quantized_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bits: int,
    bias: Tensor | None = None,
    activations: str = "exact",
) -> Tensor:
    """Apply a packed linear layer; the one place that decides how its product is computed.

    Args:
        input: `(..., I)`, floating.
        weight, weight_scale, bits: as in `dequantize_weight`; no gradient reaches them.
        bias: `(O,)` or None.
        activations: "int8" lets a kernel round the input to 8 bits where no gradient is wanted.

    Returns:
        `(..., O)`.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        # What is differentiated must be the function whose gradient the backward pass takes.
        output = PackedProduct.apply(input, weight, weight_scale, bits)
    else:
        output = multiply_packed(input, weight, weight_scale, bits, activations)
    return output if bias is None else output + bias


class PackedMatrix(ReorderedWeight):
    """What packed layers share: frozen integers and scales under the official names.

    A new one holds zeros, to be loaded into. While torch's own 4-bit product computes, `weight`
    lies in that product's order, and is moved back for whoever looks (`ReorderedWeight`).

    Attributes:
        weight: int8 `(O, C)`.
        weight_scale: `(O,)` or `(O, G)`.
        bits: 4 or 8.
        group_size: columns that share a scale, or None.
        activations: how products may treat their input: "int8" or "exact".
    """

    weight: Tensor
    weight_scale: Tensor
    bits: int
    group_size: int | None
    activations: str = ACTIVATIONS[0]

    def _hold_zeros(
        self,
        shape: tuple[int, int],
        bits: int,
        group_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        rows, columns = shape
        check_columns(columns, bits, group_size)
        self.bits, self.group_size = bits, group_size
        packed = torch.zeros(rows, columns * bits // 8, dtype=torch.int8, device=device)
        scale_shape = (rows,) if group_size is None else (rows, columns // group_size)
        scale = torch.zeros(scale_shape, dtype=dtype, device=device)
        self.weight = freeze(packed)
        self.weight_scale = freeze(scale.float() if scale.dtype == torch.bfloat16 else scale)

    def pack(self, weight: Tensor, name: str = "weight") -> None:
        """Hold a float matrix of this layer's shape from now on; errors as in `quantize_weight`.

        Under bfloat16 the scales are float32, as those of a model that is cast or loaded so.
        """
        packed, scale = quantize_weight(weight, self.bits, name, self.group_size)
        scale = scale.float() if weight.dtype == torch.bfloat16 else scale
        self.weight, self.weight_scale = freeze(packed), freeze(scale)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix `(O, I)` that the layer computes with."""
        return _dequantize(self.weight, self.weight_scale, self.bits, dtype)

    @property
    def base_layer(self) -> Any:
        """Have none, as peft sees it; ValueError if peft would compute with the integers."""
        refuse_weight_of_integers(self)
        raise AttributeError(f"{type(self).__name__} is no layer around another one")

    def _format(self) -> str:
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"bits={self.bits}{group}"

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep assigned parameters frozen; transformers 5 loads every float one as trainable."""
        if isinstance(value, nn.Parameter):
            value.requires_grad_(False)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Move or cast the layer; casts pass integers by, and never narrow scales to bfloat16.

        Of half's 11 significant bits bfloat16 keeps 8, which a later `.half()` would not restore.
        """
        scale = self.weight_scale

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor is scale and converted.dtype == torch.bfloat16:
                return tensor.to(converted.device, torch.float32)
            return converted

        return super()._apply(convert, recurse)


class QuantizedLinear(PackedMatrix, nn.Linear):
    """A linear layer with a packed weight.

    It is an `nn.Linear` to those who look for layers to adapt (peft), but one whose weight is
    integers: adapters are merged into a model that `dequantize` has unpacked, others are refused.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`.
        bits: 4 or 8.
        dtype: of the bias and, bfloat16 excepted, of the scales; by default torch's default.
        group_size: columns that share a scale; None for whole rows.

    Raises:
        ValueError: for other bits, or an `in_features` that cannot be stored so.
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
        group_size: int | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a float matrix first
        self.in_features = in_features
        self.out_features = out_features
        self._hold_zeros((out_features, in_features), bits, group_size, device, dtype)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else freeze(zeros))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int,
        empty_init: bool = False,
        name: str = "weight",
        group_size: int | None = None,
    ) -> "QuantizedLinear":
        """Pack a linear layer on its device; with `empty_init`, only take its sizes.

        Arguments and errors otherwise as in `quantize_weight`.
        """
        device, dtype = linear.weight.device, linear.weight.dtype
        has_bias = linear.bias is not None
        sizes = (linear.in_features, linear.out_features)
        layer = cls(*sizes, bits, has_bias, device, dtype, group_size)
        if not empty_init:
            layer.pack(linear.weight, name)
            layer.bias = freeze(linear.bias.detach()) if has_bias else None
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain layer with the values that this one computes with, not frozen."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, "meta", dtype)
        linear.weight = nn.Parameter(self.unpack(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        activations = "exact" if self.training else self.activations
        blocks = self.take_blocks() if self._may_use_blocks(input, activations) else None
        if blocks is not None:
            output = blocks.multiply(input)
            return output if self.bias is None else output + self.bias
        packed = (self.weight, self.weight_scale, self.bits)
        return quantized_linear(input, *packed, self.bias, activations)

    def _may_use_blocks(self, input: Tensor, activations: str) -> bool:
        """Tell whether torch's own 4-bit product is the one for an input."""
        if self.bits != 4 or input.dtype != torch.bfloat16 or activations == "exact":
            return False
        if input.shape[-1:] != (self.in_features,) or not input.numel():
            return False
        # What is differentiated must be the function whose gradient the backward pass takes.
        has_gradient = torch.is_grad_enabled() and input.requires_grad
        return not has_gradient and isinstance(_find_kernels(input), TorchKernels)

    def reset_parameters(self) -> None:
        """Keep the stored integers: there is no initialization for them."""

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._format()}"


class QuantizedEmbedding(PackedMatrix):
    """An embedding with a packed table; only the rows asked for are unpacked.

    Args:
        num_embeddings, embedding_dim, device: as in `nn.Embedding`.
        bits, group_size: as in `QuantizedLinear`.
        dtype: of the vectors it gives and, bfloat16 excepted, of the scales.

    Raises:
        ValueError: as in `QuantizedLinear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._hold_zeros((num_embeddings, embedding_dim), bits, group_size, device, dtype)
        # Of the vectors; the scales cannot tell it, which bfloat16 never narrows.
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        bits: int,
        empty_init: bool = False,
        name: str = "weight",
        group_size: int | None = None,
    ) -> "QuantizedEmbedding":
        """Pack an embedding on its device; with `empty_init`, only take its sizes."""
        sizes = (embedding.num_embeddings, embedding.embedding_dim)
        table = embedding.weight
        layer = cls(*sizes, bits, table.device, table.dtype, group_size)
        if not empty_init:
            layer.pack(table, name)
        return layer.train(embedding.training)

    def to_embedding(self, dtype: torch.dtype) -> nn.Embedding:
        """Return a plain embedding with the values that this one gives."""
        embedding = nn.Embedding.from_pretrained(self.unpack(dtype), freeze=False)
        return embedding.train(self.training)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids `(...)` to vectors `(..., embedding_dim)`."""
        ids = input_ids.flatten()
        rows = dequantize_weight(self.weight[ids], self.weight_scale[ids], self.bits, self.dtype)
        return rows.view(*input_ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Move or cast the layer, and note what a cast makes of the vectors."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._format()}"


class Packing:
    """The packed form of one stored matrix, made at the first question for a part of it.

    Args:
        stored: float `(O, I)`.
        layer: the packed layer that it is for.
        name: what an error calls the matrix.
    """

    def __init__(self, stored: StoredTensor, layer: PackedMatrix, name: str) -> None:
        self._stored, self._layer, self._name = stored, layer, name
        self._parts: dict[str, Tensor] = {}

    def take(self, kind: str) -> Tensor:
        """Return the "weight" or the "weight_scale" and keep only the other."""
        if kind not in self._parts:
            self._parts = dict(zip(("weight", "weight_scale"), self._pack()))
        return self._parts.pop(kind)

    def _pack(self) -> tuple[Tensor, Tensor]:
        layer = self._layer
        packed = torch.empty(layer.weight.shape, dtype=torch.int8)
        scale = torch.empty(layer.weight_scale.shape, dtype=torch.float16)
        for rows, block in self._stored.iter_blocks():
            packed[rows], scale[rows] = quantize_weight(
                block, layer.bits, self._name, layer.group_size, rows.start
            )
        return packed, scale


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer's weights are packed."""
    return isinstance(module, PackedMatrix)


def freeze(tensor: Tensor) -> nn.Parameter:
    """Return a parameter that no optimizer will touch."""
    return nn.Parameter(tensor, requires_grad=False)


__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "dequantize_weight",
    "quantize_weight",
    "quantized_linear",
]
