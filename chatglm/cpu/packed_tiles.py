"""The kernel that multiplies rounded inputs by the tile registers of some processors (AMX).

Owns the kernel's body, and which processors it is for. It sums the same integers as the
kernels of `packed_products`, faster, and does the same with them: a product has the same bits.

A tile has 16 rows of 64 bytes: 64 levels of 16 tokens, 16 turned vectors of weights (four columns
of 16 rows each), or the integer sums of 16 tokens and 16 rows.
"""

import functools
from typing import Any

from chatglm.cpu.amx import ask_for_tiles
from chatglm.cpu.packed_products import (
    SLOTS,
    PackedTile,
    Panel,
    add_piece,
    add_to_sums,
    find_line,
    for_each_part,
    load_piece_scale,
    load_start,
    panel_place,
)
from chatglm.cpu.writer import KernelSource, KernelWriter, Processor

TILE = 16  # rows of a tile, and numbers of 32 bits in each
TILE_BYTES = 64  # of a row
TILES = 8
PAIR = 2  # vectors of weight rows, and tiles of tokens, whose four products have a tile each
WIDTH = 8  # vectors of rows of a panel, which share the levels in the first cache
FEATURES = ("+amx-tile", "+amx-int8")


def has_tiles(processor: Processor) -> bool:
    """Tell whether kernels for a processor may use tiles in this process."""
    features = processor.features.split(",")
    is_able = all(feature in features for feature in FEATURES) and processor.dot == "vnni"
    return is_able and ask_for_tiles()


def write_tiles(writer: KernelWriter, tile: PackedTile) -> None:
    """Multiply many tokens; a block of the work is a panel of weight rows.

    The rounded input has whole tiles of rows; those behind the tokens may hold anything.
    """
    _configure(writer)
    sums = writer.reserve(2 * PAIR * PAIR * TILE * TILE_BYTES)
    for_each_part(writer, tile, functools.partial(_multiply_part, writer, tile, sums))
    _call(writer, "tilerelease")


def _call(writer: KernelWriter, name: str, *arguments: Any) -> None:
    """Call an instruction of tiles; small numbers are tiles'."""
    values = [writer.i8(x) if isinstance(x, int) else x for x in arguments]
    writer.call(f"llvm.x86.{name}", writer.ir.VoidType(), values)


def _configure(writer: KernelWriter) -> None:
    """Make all tiles as large as they can be: palette 1, then bytes of a row, then rows of each."""
    shape = [1] + [0] * 15 + [TILE_BYTES, 0] * TILES + [0] * 16 + [TILE] * TILES + [0] * 8
    place = writer.address(writer.reserve(len(shape)))
    kind = writer.vector(writer.i8, len(shape))
    writer.store(writer.ir.Constant(kind, shape), place)
    _call(writer, "ldtilecfg", place)


def _multiply_part(
    writer: KernelWriter, tile: PackedTile, sums: Any, panel: Panel, first: Any, stop: Any
) -> None:
    """Multiply a part of a panel by all tokens, two tiles at once while there are so many."""
    at, builder = writer.slot, writer.builder
    pairs = builder.sdiv(writer.add(at("tokens"), TILE - 1), writer.const(2 * TILE))
    border = writer.times(pairs, 2 * TILE)
    for start, end, count in ((writer.const(0), border, 2), (border, at("tokens"), 1)):
        with writer.loop(start, end, count * TILE) as token, writer.loop(first, stop) as span:
            inside = builder.sub(span, first)
            left = writer.smaller(builder.sub(at("tokens"), token), writer.const(count * TILE))
            for pair in range(0, tile.width, PAIR):
                part = panel.turned, inside, pair
                _sum_tiles(writer, tile, part, (token, span), count, sums)
                with writer.loop(writer.const(0), left) as index:
                    _add_sums(writer, tile, panel, (token, index, span, inside), pair, sums)


def _sum_tiles(
    writer: KernelWriter,
    tile: PackedTile,
    part: tuple[Any, Any, int],
    corner: tuple[Any, Any],
    count: int,
    sums: Any,
) -> None:
    """Sum the products of a span of the panel and some tiles of tokens, and store the sums."""
    (base, inside, pair), (token, span) = part, corner
    stride, line = writer.slot("rounded_stride"), PAIR * TILE_BYTES
    outputs = [[number * PAIR + vector for vector in range(PAIR)] for number in range(count)]
    for half in range(2):
        for number in (number for row in outputs for number in row):
            _call(writer, "tilezero", number)
        for vector in range(PAIR):
            index = writer.add(writer.times(inside, tile.vectors), half * TILE)
            place = panel_place(writer, tile, base, index, pair + vector)
            _call(writer, "tileloadd64", 6 + vector, place, writer.const(tile.width * TILE_BYTES))
        for number, row in enumerate(outputs):
            levels = find_line(writer, tile, writer.add(token, number * TILE), span).levels
            place = writer.address(levels, half * TILE_BYTES)
            _call(writer, "tileloadd64", 4 + number, place, stride)
            for vector, output in enumerate(row):
                _call(writer, "tdpbsud", output, 4 + number, 6 + vector)
        for number, row in enumerate(outputs):
            for vector, output in enumerate(row):
                offset = (half * PAIR + number) * TILE * line + vector * TILE_BYTES
                _call(
                    writer, "tilestored64", output, writer.address(sums, offset), writer.const(line)
                )


def _add_sums(
    writer: KernelWriter,
    tile: PackedTile,
    panel: Panel,
    place: tuple[Any, Any, Any, Any],
    pair: int,
    sums: Any,
) -> None:
    """Add a token's integer sums of a span to its sums so far."""
    first, index, span, inside = place
    token, line_bytes = writer.add(first, index), PAIR * TILE_BYTES
    line, kind = find_line(writer, tile, token, span), writer.vector(writer.i32, TILE)
    starts = [load_start(writer, tile, line, half) for half in range(2)]
    for vector in range(PAIR):
        inner = []
        for half, start in enumerate(starts):
            offset = half * PAIR * TILE * line_bytes + vector * TILE_BYTES
            offset = writer.add(writer.times(index, line_bytes), offset)
            total = writer.builder.add(writer.load(writer.address(sums, offset), kind), start)
            scale = load_piece_scale(writer, tile, panel, (inside, half), pair + vector)
            inner.append(add_piece(writer, total, None, scale))
        add_to_sums(writer, tile, panel, line, inner, (token, span, pair + vector))


TILED = KernelSource(SLOTS, write_tiles)
