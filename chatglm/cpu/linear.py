"""Products with packed and plain weights on a CPU: which kernel computes which, and how.

Owns the choice. What the kernels do is told in `gemv`, `gemm` and `float_products`; what plain
torch does instead is the model's. Weights are read as they are stored: nothing is repacked or kept
twice.

`int8` products round the input to 8 bits in groups, and sum integers; `exact` ones multiply in
float32. Both are deterministic: a result does not depend on the number of threads.

Shapes: `T` tokens (all rows of the input), `O` output features, `I` input features, `C` stored
columns of a packed matrix, `G` groups of a row.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chatglm.cpu.compiler import find_compiler, find_kernel
from chatglm.cpu.float_products import EXACT, ExactTile
from chatglm.cpu.gemm import PANELS, PanelTile
from chatglm.cpu.gemv import DOTS, DotTile
from chatglm.cpu.rounding import ROUNDING, Layout
from chatglm.cpu.runtime import Call, count_threads
from chatglm.cpu.writer import Processor

PANEL_TOKENS = 8  # from so many tokens on, weights are unpacked first
PANEL_SPAN = 512  # columns that share a scale there
PLAIN_TOKENS = 2  # beyond, a product of matrices is the faster one
WIDENED_ROWS = 256  # of a half matrix that are float32 at a time, which the cache holds
# With which a CPU multiplies halves itself; without, torch widens them, slowly.
HALF_FEATURES = {
    torch.bfloat16: ("+avx512bf16", "+amx-bf16", "+bf16"),
    torch.float16: ("+avx512fp16", "+amx-fp16", "+fullfp16"),
}
BLOCK_BYTES = 2**16  # of weights that a thread takes at a time
PART_TOKENS = 512  # of a long prompt at once, whose float32 sums would be the most that is held
LONG_ROW = 8192  # columns from which rounded rows leave the first cache
TYPE_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Weights(NamedTuple):
    """How a matrix of weights is stored.

    Attributes:
        processor: the CPU that reads it.
        kind: "i4", "i8", "f32", "f16" or "bf16".
        scale_type: "f32" or "f16".
        groups: G, or None for a scale per row.
    """

    processor: Processor
    kind: str
    scale_type: str = "f32"
    groups: int | None = None


class Sizes(NamedTuple):
    """What a product's kernel and its way of working are chosen by.

    Attributes:
        weights: how they are stored.
        tokens, rows, columns, row_bytes: T, O, I and the bytes of a weight row.
        threads: torch's.
    """

    weights: Weights
    tokens: int
    rows: int
    columns: int
    row_bytes: int
    threads: int

    @property
    def group_size(self) -> int | None:
        """Columns that share a weight scale."""
        groups = self.weights.groups
        return None if groups is None else self.columns // groups

    def lay_out(self, chunks: int, whole: bool) -> Layout:
        """Return a layout for the rounded input."""
        return Layout(self.weights.processor, int(self.weights.kind[1:]), chunks, whole)

    def count_threads(self, blocks: int) -> int:
        """Return the threads for so many blocks of the weights."""
        return count_threads(blocks, self.rows * self.row_bytes)


class Product(Protocol):
    """A product that is ready to be computed again and again."""

    def run(self, input: Tensor, weight: int, scale: int, output: Tensor | None = None) -> Tensor:
        """Multiply float32 `(T, I)` with the weights that stand somewhere.

        Args:
            input: `(T, I)`, contiguous.
            weight, scale: addresses.
            output: what an earlier run returned, to be written again; None makes it anew.

        Returns:
            float32, whose first T rows and O columns are the product; the rest is padding.
        """
        ...


class RoundedProduct:
    """A product that rounds its input first.

    Args:
        sizes: of the product.
        layout: of the rounded input.
        padding: of the tokens, to a multiple.
        call: the kernel, with all but the pointers.
        output_stride: columns of the output, the padding's too.
    """

    def __init__(
        self, sizes: Sizes, layout: Layout, padding: int, call: Call, output_stride: int
    ) -> None:
        spans = layout.count_spans(sizes.columns)
        self.shape = (-(-sizes.tokens // padding) * padding, spans * layout.span_bytes)
        self.output_shape = (self.shape[0], output_stride)
        self.call = call
        kernel = find_kernel(ROUNDING, layout)
        assert kernel is not None, "a compiler that made one kernel makes this one too"
        self.rounding = kernel.prepare(
            count_threads(sizes.tokens, 4 * sizes.tokens * sizes.columns),
            rows=sizes.tokens,
            columns=sizes.columns,
            spans=spans,
            input_stride=4 * sizes.columns,
            rounded_stride=self.shape[1],
        )

    def run(self, input: Tensor, weight: int, scale: int, output: Tensor | None = None) -> Tensor:
        """Round, and multiply."""
        rounded = torch.empty(self.shape, dtype=torch.uint8, device="cpu")
        if output is None:
            output = torch.empty(self.output_shape, dtype=torch.float32, device="cpu")
        place = rounded.data_ptr()
        self.rounding.run(input=input.data_ptr(), rounded=place)
        self.call.run(weight=weight, scale=scale, rounded=place, output=output.data_ptr())
        return output


class ExactProduct(NamedTuple):
    """A product of float32 numbers with the weights' exact values."""

    shape: tuple[int, int]
    call: Call

    def run(self, input: Tensor, weight: int, scale: int, output: Tensor | None = None) -> Tensor:
        """Multiply."""
        if output is None:
            output = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        self.call.run(weight=weight, scale=scale, input=input.data_ptr(), output=output.data_ptr())
        return output


@functools.lru_cache(maxsize=4096)
def plan_product(sizes: Sizes, activations: str) -> Product | None:
    """Choose how to compute a product; None to leave it to torch."""
    if sizes.columns == 0 or sizes.rows == 0 or sizes.tokens == 0:
        return None
    if activations == "exact":
        return _plan_exact(sizes)
    if sizes.tokens >= PANEL_TOKENS and sizes.weights.groups is None:
        return _plan_panels(sizes)
    return _plan_dots(sizes)


def _plan_dots(sizes: Sizes) -> Product | None:
    """Few tokens: every weight is read once, and no more is done than that needs."""
    layout = sizes.lay_out(chunks=1, whole=False)
    tokens = next(count for count in (4, 2, 1) if count <= sizes.tokens)
    # What was measured fastest: several rows at once where the input is not in the first cache.
    is_alone = tokens == 1 and sizes.columns <= LONG_ROW
    tile_rows = 1 if is_alone or sizes.rows < 4 else 4
    tile = DotTile(layout, tile_rows, tokens, sizes.weights.scale_type, sizes.group_size)
    kernel = find_kernel(DOTS, tile)
    if kernel is None:
        return None
    block_rows = -(-max(1, BLOCK_BYTES // sizes.row_bytes) // tile_rows) * tile_rows
    blocks = -(-sizes.rows // block_rows)
    call = kernel.prepare(
        sizes.count_threads(blocks),
        blocks=blocks,
        block_rows=block_rows,
        rows=sizes.rows,
        columns=sizes.columns,
        row_bytes=sizes.row_bytes,
        tokens=sizes.tokens,
        scales=sizes.rows * (sizes.weights.groups or 1),
        rounded_stride=layout.count_spans(sizes.columns) * layout.span_bytes,
    )
    return RoundedProduct(sizes, layout, 1, call, sizes.rows)


def _plan_panels(sizes: Sizes) -> Product | None:
    """Many tokens: weights are unpacked once for all of them."""
    layout = sizes.lay_out(chunks=1, whole=True)
    layout = layout._replace(chunks=PANEL_SPAN // layout.span_columns)
    tile = PanelTile(layout, PANEL_TOKENS, sizes.weights.scale_type)
    kernel = find_kernel(PANELS, tile)
    if kernel is None:
        return None
    blocks = -(-sizes.rows // tile.rows)
    spans = layout.count_spans(sizes.columns)
    call = kernel.prepare(
        sizes.count_threads(blocks),
        blocks=blocks,
        rows=sizes.rows,
        row_bytes=sizes.row_bytes,
        spans=spans,
        tokens=-(-sizes.tokens // tile.tokens) * tile.tokens,
        rounded_stride=spans * layout.span_bytes,
        output_stride=blocks * tile.rows,
    )
    return RoundedProduct(sizes, layout, tile.tokens, call, blocks * tile.rows)


def _plan_exact(sizes: Sizes) -> Product | None:
    """Few tokens in float32; many are torch's."""
    if sizes.tokens >= PANEL_TOKENS:
        return None
    tokens = next(count for count in (4, 2, 1) if count <= sizes.tokens)
    tile = ExactTile(sizes.weights.kind, tokens, sizes.weights.scale_type, sizes.group_size)
    kernel = find_kernel(EXACT, tile)
    if kernel is None:
        return None
    block_rows = max(1, BLOCK_BYTES // sizes.row_bytes)
    blocks = -(-sizes.rows // block_rows)
    call = kernel.prepare(
        sizes.count_threads(blocks),
        blocks=blocks,
        block_rows=block_rows,
        rows=sizes.rows,
        columns=sizes.columns,
        row_bytes=sizes.row_bytes,
        tokens=sizes.tokens,
    )
    return ExactProduct((sizes.tokens, sizes.rows), call)


class CpuKernels(NamedTuple):
    """The kernels of this CPU, as `quantization` asks for them."""

    processor: Processor

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bits: int,
        activations: str = "int8",
    ) -> Tensor | None:
        """Return `input @ W.T`, `(..., I)` to `(..., O)`; None for operands left to torch.

        Args:
            input: any float dtype but float64.
            weight: int8 `(O, C)`, contiguous.
            weight_scale: `(O,)` or `(O, G)`, float32 or float16.
            bits: 4 or 8.
            activations: "int8" to round the input, or "exact".
        """
        scale_type = TYPE_NAMES.get(weight_scale.dtype)
        if scale_type in (None, "bf16") or not are_matrices(weight, weight_scale):
            return None
        if input.shape[-1] * bits != weight.shape[1] * 8 or len(weight) != len(weight_scale):
            return None
        groups = None if weight_scale.dim() == 1 else weight_scale.shape[1]
        weights = Weights(self.processor, f"i{bits}", scale_type, groups)
        return _multiply(input, weights, weight, weight_scale.data_ptr(), activations)

    def dequantize(
        self, weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Leave whole matrices to torch."""
        return None


def find_kernels() -> CpuKernels | None:
    """Return the kernels of this CPU; None if they cannot be made, and the log says why."""
    compiler = find_compiler()
    return None if compiler is None else CpuKernels(compiler.processor)


def multiply_plain(input: Tensor, weight: Tensor) -> Tensor | None:
    """Return `input @ weight.T` for a plain weight; None if left to torch.

    One or two tokens have a kernel. More, of halves that the CPU has no product for, are multiplied
    in float32, a part of the matrix at a time.

    Args:
        input: `(..., I)`, of the weight's dtype.
        weight: `(O, I)`, float32, float16 or bfloat16.
    """
    compiler, weight_type = find_compiler(), TYPE_NAMES.get(weight.dtype)
    if compiler is None or weight_type is None or input.dtype != weight.dtype:
        return None
    if not are_matrices(weight) or input.shape[-1:] != weight.shape[1:]:
        return None
    if input.numel() > PLAIN_TOKENS * weight.shape[1]:
        is_slow = is_plain(input) and not _multiplies(compiler.processor, weight.dtype)
        return _multiply_widened(input, weight) if is_slow else None
    return _multiply(input, Weights(compiler.processor, weight_type), weight, 0, "exact")


@functools.cache
def _multiplies(processor: Processor, dtype: torch.dtype) -> bool:
    """Tell whether a CPU has a product of such numbers, which torch then uses."""
    wanted = HALF_FEATURES.get(dtype)
    return wanted is None or not set(wanted).isdisjoint(processor.features.split(","))


def _multiply_widened(input: Tensor, weight: Tensor) -> Tensor:
    """Multiply halves in float32, and round the sums once."""
    rows = input.detach().reshape(-1, input.shape[-1]).float()
    output = input.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], WIDENED_ROWS):
        part = weight.detach()[start : start + WIDENED_ROWS].float()
        output[:, start : start + WIDENED_ROWS] = rows @ part.T
    return output.view(*input.shape[:-1], -1)


def _multiply(
    input: Tensor, weights: Weights, weight: Tensor, scale: int, activations: str
) -> Tensor | None:
    """Look up how a product is computed, and compute it."""
    if type(input) is not Tensor or input.dtype not in TYPE_NAMES or input.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu"):  # which has its own idea of the output's dtype
        return None
    rows = input.detach().reshape(-1, input.shape[-1])
    features, row_bytes = weight.shape[0], weight.stride(0) * weight.element_size()
    sizes = Sizes(
        weights, rows.shape[0], features, rows.shape[1], row_bytes, torch.get_num_threads()
    )
    if sizes.tokens > PART_TOKENS:
        output = _multiply_parts(rows, sizes, weight.data_ptr(), scale, activations)
    else:
        product = plan_product(sizes, activations)
        if product is None:
            return None
        output = product.run(rows.float().contiguous(), weight.data_ptr(), scale)
        if output.shape != (sizes.tokens, features):
            output = output[: sizes.tokens, :features].contiguous()
        output = output.to(input.dtype)
    return None if output is None else output.view(*input.shape[:-1], features)


def _multiply_parts(
    rows: Tensor, sizes: Sizes, weight: int, scale: int, activations: str
) -> Tensor | None:
    """Multiply a long prompt part by part, in memory that all but the last one share."""
    output = rows.new_empty(sizes.tokens, sizes.rows)
    sums: Tensor | None = None
    for part, place in zip(rows.split(PART_TOKENS), output.split(PART_TOKENS)):
        product = plan_product(sizes._replace(tokens=len(part)), activations)
        if product is None:
            return None
        if len(part) < PART_TOKENS:
            sums = None
        sums = product.run(part.float().contiguous(), weight, scale, sums)
        place.copy_(sums[: len(part), : sizes.rows])
    return output


def are_matrices(*tensors: Tensor) -> bool:
    """Tell whether tensors are memory that a kernel can read, row after row."""
    return all(is_plain(tensor) and tensor.is_contiguous() for tensor in tensors)


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is memory that a kernel can read."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def wants_graph(*tensors: Tensor) -> bool:
    """Tell whether torch has to see the operations, to differentiate, compile or cast them."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class FastProducts(TorchFunctionMode):
    """Computes `torch.nn.functional.linear` by other means where torch is slow at it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Multiply with a plain weight; every other function of torch is run as it is."""
        kwargs = kwargs or {}
        product = multiply_by(*args, **kwargs) if func is nn.functional.linear else None
        return func(*args, **kwargs) if product is None else product


def multiply_by(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return `input @ weight.T + bias` as `multiply_plain` does, or None."""
    product = None if wants_graph(input, weight) else multiply_plain(input, weight)
    return product if product is None or bias is None else product.add_(bias)


_here = threading.local()


@contextmanager
def fast_products() -> Iterator[None]:
    """Use `FastProducts` in this thread meanwhile, once however often this is entered."""
    if getattr(_here, "is_active", False):
        yield
        return
    _here.is_active = True
    try:
        with FastProducts():
            yield
    finally:
        _here.is_active = False


__all__ = ["fast_products", "find_kernels", "multiply_plain"]
