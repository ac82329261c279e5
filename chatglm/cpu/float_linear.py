"""Products in float32, with plain weights and with packed ones' exact values: what computes which.

Owns the choice. What the kernel does is told in `float_products`; what plain torch does instead is
the model's. Weights are read as they are stored: nothing is repacked or kept twice. No result
depends on the number of threads.

Shapes: `T` tokens (all rows of the input), `O` output features, `I` input features.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from chatglm.cpu.amx import ask_for_tiles
from chatglm.cpu.compiler import find_compiler, find_kernel
from chatglm.cpu.float_products import FLOATS, SPAN, SPAN_ROWS, FloatTile
from chatglm.cpu.products import (
    BLOCK_BYTES,
    TYPE_NAMES,
    Product,
    Sizes,
    Weights,
    are_matrices,
    is_plain,
    multiply,
)
from chatglm.cpu.runtime import Call, count_threads
from chatglm.cpu.tile_products import CHUNK, SIDE, SPLIT, TILES, TileShape
from chatglm.cpu.writer import Processor

EXACT_TOKENS = 64  # of more, torch's products are as fast
# Weight rows of a tile by its tokens: what the registers of 16 and of 8 lanes hold, of which the
# processors with the former have 32 and some with the latter 16.
WIDE_TILES = {1: 8, 2: 8, 3: 8, 4: 4, 5: 4, 6: 4}
NARROW_TILES = {1: 4, 2: 4, 3: 2, 4: 2}
TILE_ROWS = 32  # weight rows of a block of tiles
WIDENED_ROWS = 256  # of a half matrix that are float32 at a time, which the cache holds
# With which a CPU multiplies halves itself; without, torch widens them, slowly.
HALF_FEATURES = {
    torch.bfloat16: ("+avx512bf16", "+amx-bf16", "+bf16"),
    torch.float16: ("+avx512fp16", "+amx-fp16", "+fullfp16"),
}


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


class TileProduct(NamedTuple):
    """A product of halves by tile registers, for which the input is split first."""

    shape: tuple[int, int]
    split_bytes: int
    split: Call
    call: Call

    def run(self, input: Tensor, weight: int, scale: int, output: Tensor | None = None) -> Tensor:
        """Split, and multiply."""
        split = torch.empty(self.split_bytes, dtype=torch.uint8, device="cpu")
        if output is None:
            output = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        place = split.data_ptr()
        self.split.run(input=input.data_ptr(), split=place)
        self.call.run(weight=weight, split=place, output=output.data_ptr())
        return output


def plan_tiles(sizes: Sizes, parts: int) -> Product | None:
    """Choose the tiles for a product of any number of tokens, their numbers split into parts."""
    side_by_side = next((n for n in (1, 2) if n * SIDE >= sizes.tokens), 4)
    panels = -(-sizes.tokens // (SIDE * side_by_side)) * side_by_side
    tokens = -(-sizes.tokens // panels)
    shape = TileShape(sizes.weights.kind, tokens, side_by_side, parts, TILE_ROWS)
    kernel, split = find_kernel(TILES, shape), find_kernel(SPLIT, shape)
    if kernel is None or split is None:
        return None
    row_blocks, chunks = -(-sizes.rows // shape.block_rows), -(-sizes.columns // CHUNK)
    blocks = row_blocks * (panels // side_by_side)
    values = {"chunks": chunks, "tokens": sizes.tokens, "columns": sizes.columns}
    threads = count_threads(panels * chunks, 4 * sizes.tokens * sizes.columns)
    return TileProduct(
        (sizes.tokens, sizes.rows),
        panels * chunks * parts * shape.input_bytes,
        split.prepare(threads, blocks=panels * chunks, **values),
        kernel.prepare(
            sizes.count_threads(blocks),
            blocks=blocks,
            row_blocks=row_blocks,
            rows=sizes.rows,
            row_bytes=sizes.row_bytes,
            **values,
        ),
    )


@functools.lru_cache(maxsize=4096)
def plan_exact(sizes: Sizes, parts: int = 2) -> Product | None:
    """Choose the tile for a product of up to `EXACT_TOKENS` in float32; more are torch's."""
    if 0 in (sizes.tokens, sizes.rows, sizes.columns):
        return None
    if multiplies_tiles(sizes.weights, sizes.rows):
        return plan_tiles(sizes, parts)
    if sizes.tokens > EXACT_TOKENS:
        return None
    tile = choose_tile(sizes)
    kernel = find_kernel(FLOATS, tile)
    if kernel is None:
        return None
    is_one_tile = tile.tokens == sizes.tokens
    span = sizes.columns if is_one_tile else SPAN
    block_rows = max(1, BLOCK_BYTES // sizes.row_bytes) if is_one_tile else SPAN_ROWS
    block_rows = -(-block_rows // tile.rows) * tile.rows
    blocks = -(-sizes.rows // block_rows)
    call = kernel.prepare(
        sizes.count_threads(blocks),
        blocks=blocks,
        block_rows=block_rows,
        last_first=max(0, sizes.rows - block_rows),
        rows=sizes.rows,
        columns=sizes.columns,
        span=span,
        row_bytes=sizes.row_bytes,
        tokens=sizes.tokens,
    )
    return ExactProduct((sizes.tokens, sizes.rows), call)


def multiplies_tiles(weights: Weights, rows: int) -> bool:
    """Tell whether so many rows of weights are halves that this CPU multiplies by tiles."""
    is_able = "+amx-bf16" in weights.processor.features.split(",")
    return is_able and weights.kind in ("f16", "bf16") and rows >= TILE_ROWS and ask_for_tiles()


def choose_tile(sizes: Sizes) -> FloatTile:
    """Return the tile whose sums fill the processor's registers, tokens parted evenly."""
    weights = sizes.weights
    limits = WIDE_TILES if weights.processor.lanes == 16 else NARROW_TILES
    parts = -(-sizes.tokens // max(limits))
    tokens = -(-sizes.tokens // parts)
    rows = limits[tokens] if sizes.rows >= limits[tokens] else 1
    return FloatTile(weights.kind, rows, tokens, weights.scale_type, sizes.group_size, parts > 1)


def multiply_plain(input: Tensor, weight: Tensor) -> Tensor | None:
    """Return `input @ weight.T` for a plain weight; None if left to torch.

    Up to `EXACT_TOKENS` have one kernel, so that a token's product does not depend on how many
    there are. More, of halves that the CPU has no product for, are multiplied in float32, a part of
    the matrix at a time.

    Args:
        input: `(..., I)`, of the weight's dtype.
        weight: `(O, I)`, float32, float16 or bfloat16.
    """
    compiler, weight_type = find_compiler(), TYPE_NAMES.get(weight.dtype)
    if compiler is None or weight_type is None or input.dtype != weight.dtype:
        return None
    if not are_matrices(weight) or input.shape[-1:] != weight.shape[1:]:
        return None
    weights = Weights(compiler.processor, weight_type)
    has_tiles = weight_type == "f16" and multiplies_tiles(weights, len(weight))
    if input.numel() > EXACT_TOKENS * weight.shape[1] and not has_tiles:
        is_slow = is_plain(input) and not _multiplies(compiler.processor, weight.dtype)
        return _multiply_widened(input, weight) if is_slow else None
    plan = functools.partial(plan_exact, parts=1 if weight_type == "bf16" else 2)
    return multiply(input, weights, weight, 0, plan)


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


__all__ = ["ExactProduct", "TileProduct", "multiply_plain", "plan_exact"]
