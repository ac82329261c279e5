"""Products with packed and plain weights on a CPU: which kernel computes which, and how.

Owns the choice among the kernels that round their input (`packed_products`, `packed_tiles`); those
that do not are chosen by `float_linear`, and what plain torch does instead is the model's. Weights
are read as they are stored: nothing is repacked or kept twice.

`int8` products round the input to 8 bits in groups, and sum integers; `exact` ones multiply in
float32. A token's result depends neither on the number of threads nor on the other tokens.

Shapes: `T` tokens (all rows of the input), `O` output features, `I` input features, `C` stored
columns of a packed matrix, `G` groups of a row.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chatglm.cpu.compiler import find_compiler, find_kernel
from chatglm.cpu.float_linear import multiply_plain, plan_exact
from chatglm.cpu.packed_products import PANELS, TURNED, PackedTile
from chatglm.cpu.packed_tiles import TILE, TILED, WIDTH, has_tiles
from chatglm.cpu.products import (
    BLOCK_BYTES,
    PART_TOKENS,
    TYPE_NAMES,
    Product,
    Sizes,
    Weights,
    are_matrices,
    multiply,
    wants_graph,
)
from chatglm.cpu.rounding import ROUNDING, Layout
from chatglm.cpu.runtime import Call, count_threads
from chatglm.cpu.writer import KernelSource, Processor

MOST_TURNED = 8  # tokens, beyond which weights that were turned are kept for the others
LEAST_TILED = 9  # tokens, from which a kernel of tiles is the faster one


class RoundedProduct:
    """A product that rounds its input first.

    Args:
        sizes: of the product.
        layout: of the rounded input.
        call: the kernel, with all but the pointers.
    """

    def __init__(self, sizes: Sizes, layout: Layout, call: Call) -> None:
        # A kernel of tiles reads whole ones.
        self.shape = (-(-sizes.tokens // TILE) * TILE, layout.count_bytes(sizes.columns))
        self.output_shape = (sizes.tokens, sizes.rows)
        self.call = call
        kernel = find_kernel(ROUNDING, layout)
        assert kernel is not None, "a compiler that made one kernel makes this one too"
        self.rounding = kernel.prepare(
            count_threads(sizes.tokens, 4 * sizes.tokens * sizes.columns),
            rows=sizes.tokens,
            columns=sizes.columns,
            spans=layout.count_spans(sizes.columns),
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


@functools.lru_cache(maxsize=4096)
def plan_product(sizes: Sizes, activations: str) -> Product | None:
    """Choose how to compute a product; None to leave it to torch."""
    if sizes.columns == 0 or sizes.rows == 0 or sizes.tokens == 0:
        return None
    return plan_exact(sizes) if activations == "exact" else _plan_rounded(sizes)


def _plan_rounded(sizes: Sizes) -> Product | None:
    """Choose the kernel by the number of tokens; the result is the same."""
    layout = sizes.lay_out()
    source = _choose_kernel(sizes, layout)
    is_few, lanes = source is TURNED, layout.processor.lanes
    width = WIDTH if source is TILED else 2
    block_rows = lanes * (1 if is_few else width)
    tile = PackedTile(
        layout,
        sizes.tokens if is_few else PART_TOKENS,  # whose sums with a panel a thread has room for
        sizes.weights.scale_type,
        sizes.group_size,
        is_ragged=sizes.rows % block_rows != 0,
        width=width,
    )
    kernel = find_kernel(source, tile)
    if kernel is None:
        return None
    if is_few:
        block_rows *= max(1, BLOCK_BYTES // (sizes.row_bytes * lanes))
    blocks = -(-sizes.rows // block_rows)
    call = kernel.prepare(
        sizes.count_threads(blocks),
        blocks=blocks,
        block_rows=block_rows,
        rows=sizes.rows,
        columns=sizes.columns,
        row_bytes=sizes.row_bytes,
        spans=layout.count_spans(sizes.columns),
        tokens=sizes.tokens,
        groups=sizes.weights.groups or 1,
        rounded_stride=layout.count_bytes(sizes.columns),
    )
    return RoundedProduct(sizes, layout, call)


def _choose_kernel(sizes: Sizes, layout: Layout) -> KernelSource:
    """Return what is fastest for so many tokens."""
    has_pieces = layout.pieces > 2  # narrower than a tile
    if sizes.tokens >= LEAST_TILED and not has_pieces and has_tiles(sizes.weights.processor):
        return TILED
    return TURNED if sizes.tokens <= MOST_TURNED else PANELS


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
        plan = functools.partial(plan_product, activations=activations)
        return multiply(input, weights, weight, weight_scale.data_ptr(), plan)

    def dequantize(
        self, weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Leave whole matrices to torch."""
        return None


def find_kernels() -> CpuKernels | None:
    """Return the kernels of this CPU; None if they cannot be made, and the log says why."""
    compiler = find_compiler()
    return None if compiler is None else CpuKernels(compiler.processor)


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
