"""The kernel for few tokens: products along the rows of packed weights as they are stored.

Owns the kernel's body, and the dot products of bytes that it shares with `gemm`. Knows nothing of
torch; which kernel runs when is `linear`'s, and what a rounded input looks like `rounding`'s.

With a rounded input, products are sums of integers, times two scales:

    y[o] = weight_scale[o] * sum_g scale[g] * sum_{i in g} weight[o, i] * levels[i]
"""

from typing import Any, NamedTuple

from chatglm.cpu.rounding import Layout
from chatglm.cpu.writer import KernelSource, KernelWriter

PREFETCH = 4096  # bytes ahead of the weights being read


def add_dot(writer: KernelWriter, sums: Any, weights: Any, levels: Any) -> Any:
    """Add to every lane's sum the products of its four bytes of weights and of levels."""
    dot, lanes = writer.processor.dot, writer.processor.lanes
    kind, cast = sums.type, writer.builder.bitcast
    if dot in ("vnni", "avx-vnni"):
        # Declared as before LLVM 21, which newer ones understand too.
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return writer.call(name, kind, [sums, cast(weights, kind), cast(levels, kind)])
    if dot == "neon":
        name, halves = "llvm.aarch64.neon.sdot.v4i32.v16i8", []
        for start in (0, 4):
            picks = range(start, start + 4), range(4 * start, 4 * start + 16)
            parts = [writer.shuffle(sums, picks[0])]
            parts += [writer.shuffle(vector, picks[1]) for vector in (weights, levels)]
            halves.append(writer.call(name, parts[0].type, parts))
        return writer.shuffle(halves[0], range(lanes), halves[1])
    return writer.builder.add(sums, _multiply_wide(writer, weights, levels))


def _multiply_wide(writer: KernelWriter, weights: Any, levels: Any) -> Any:
    """Return the sums of four products each, by way of 16-bit numbers."""
    builder, lanes = writer.builder, writer.processor.lanes
    wide = writer.vector(writer.i16, 4 * lanes)
    weights, levels = builder.sext(weights, wide), builder.sext(levels, wide)
    if writer.processor.dot == "avx2":
        pairs = []
        for half in (range(2 * lanes), range(2 * lanes, 4 * lanes)):
            picked = [writer.shuffle(vector, half) for vector in (weights, levels)]
            kind = writer.vector(writer.i32, lanes)
            pairs.append(writer.call("llvm.x86.avx2.pmadd.wd", kind, picked))
        sums = writer.shuffle(pairs[0], range(2 * lanes), pairs[1])
        return _add_neighbours(writer, sums)
    products = builder.mul(weights, levels)  # at most 128 * 127: no overflow
    products = builder.sext(products, writer.vector(writer.i32, 4 * lanes))
    return _add_neighbours(writer, _add_neighbours(writer, products))


def _add_neighbours(writer: KernelWriter, vector: Any) -> Any:
    """Return the sums of elements 0 and 1, 2 and 3, and so on."""
    count = vector.type.count
    evens, odds = (writer.shuffle(vector, range(start, count, 2)) for start in (0, 1))
    return writer.builder.add(evens, odds)


def split_planes(writer: KernelWriter, layout: Layout, chunk: Any) -> list[Any]:
    """Return the weights of a stored chunk as the products take them: even and odd columns."""
    builder, count = writer.builder, layout.chunk_bytes
    if layout.bits == 8:
        flip = writer.filled(writer.i8, count, -128)
        return [builder.xor(chunk, flip)] if layout.offset else [chunk]
    chunk = builder.xor(chunk, writer.filled(writer.i8, count, 0x88 - 256))
    low = writer.filled(writer.i8, count, 15)
    pairs = writer.vector(writer.i16, count // 2)  # there is no shift of bytes
    shifted = builder.lshr(builder.bitcast(chunk, pairs), writer.filled(writer.i16, count // 2, 4))
    return [builder.and_(builder.bitcast(shifted, chunk.type), low), builder.and_(chunk, low)]


class DotTile(NamedTuple):
    """What a dot kernel is compiled for.

    Attributes:
        layout: of the rounded input; spans of one chunk.
        rows: weight rows that are multiplied at once, and tokens (input rows).
        tokens: ditto.
        scale_type: "f16" or "f32".
        group_size: columns that share a weight scale, or None for whole rows.
    """

    layout: Layout
    rows: int
    tokens: int
    scale_type: str
    group_size: int | None

    @property
    def scale_bytes(self) -> int:
        """Bytes of a weight scale."""
        return 2 if self.scale_type == "f16" else 4


def write_dots(writer: KernelWriter, tile: DotTile) -> None:
    """Multiply along the rows, as they are stored; a block of the work is a run of weight rows.

    The last tile of a block may begin before its turn, and then repeats what another one did.
    """
    at, zero = writer.slot, writer.filled(writer.f32, tile.layout.processor.lanes, 0.0)
    sums = [[writer.variable(zero) for _ in range(tile.tokens)] for _ in range(tile.rows)]
    last_row, last_token = (
        writer.add(at("rows"), -tile.rows),
        writer.add(at("tokens"), -tile.tokens),
    )
    with writer.parallel_for(at("blocks")) as block:
        first = writer.times(block, at("block_rows"))
        stop = writer.smaller(writer.add(first, at("block_rows")), at("rows"))
        with writer.loop(writer.const(0), at("tokens"), tile.tokens) as index:
            token = writer.smaller(index, last_token)
            with writer.loop(first, stop, tile.rows) as index:
                row = writer.smaller(index, last_row)
                for variable in (variable for line in sums for variable in line):
                    variable.set(zero)
                _add_row_dots(writer, tile, (row, token), sums)
                _store_dots(writer, tile, (row, token), sums)


def _add_row_dots(
    writer: KernelWriter, tile: DotTile, corner: tuple[Any, Any], sums: list[list[Any]]
) -> None:
    """Go along the columns of a tile."""
    at, (row, token) = writer.slot, corner
    size = tile.layout.chunk_bytes
    weights = [
        writer.add(at("weight"), writer.times(writer.add(row, r), at("row_bytes")))
        for r in range(tile.rows)
    ]
    inputs = [
        writer.add(at("rounded"), writer.times(writer.add(token, t), at("rounded_stride")))
        for t in range(tile.tokens)
    ]
    full = writer.builder.sdiv(at("row_bytes"), writer.const(size))
    left = writer.builder.srem(at("row_bytes"), writer.const(size))
    with writer.loop(writer.const(0), full) as chunk:
        _add_chunk_dots(writer, tile, (weights, inputs, row), chunk, None, sums)
    with writer.when(writer.builder.icmp_signed(">", left, writer.const(0))):
        _add_chunk_dots(writer, tile, (weights, inputs, row), full, left, sums)


def _add_chunk_dots(
    writer: KernelWriter,
    tile: DotTile,
    operands: tuple[list[Any], list[Any], Any],
    chunk: Any,
    count: Any,
    sums: list[list[Any]],
) -> None:
    """Multiply one chunk of every row by every token; `count` bytes of it, or all."""
    layout, builder = tile.layout, writer.builder
    weights, inputs, row = operands
    offset = writer.times(chunk, layout.chunk_bytes)
    planes, scales = [], []
    for r, base in enumerate(weights):
        place = writer.address(base, offset)
        kind = writer.vector(writer.i8, layout.chunk_bytes)
        stored = (
            writer.load(place, kind) if count is None else writer.load_first(place, kind, count)
        )
        writer.prefetch(writer.address(base, writer.add(offset, PREFETCH)))
        planes.append(split_planes(writer, layout, stored))
        scales.append(_load_group_scales(writer, tile, writer.add(row, r), chunk))
    for t, base in enumerate(inputs):
        place = writer.add(base, writer.times(chunk, layout.span_bytes))
        levels, start, factor = _load_rounded(writer, layout, place)
        for r, line in enumerate(sums):
            total = start
            for plane, vector in zip(planes[r], levels):
                total = add_dot(writer, total, plane, vector)
            product = builder.sitofp(total, factor.type)
            if scales[r] is not None:
                product = builder.fmul(product, scales[r])
            line[t].set(writer.fma(product, factor, line[t].get()))


def _load_rounded(writer: KernelWriter, layout: Layout, place: Any) -> tuple[list[Any], Any, Any]:
    """Load the levels, starts and scales of a span of one chunk."""
    size, lanes = layout.chunk_bytes, layout.processor.lanes
    kind = writer.vector(writer.i8, size)
    levels = [writer.load(writer.address(place, p * size), kind) for p in range(layout.planes)]
    base = writer.add(place, layout.span_columns)
    start = writer.load(writer.address(base), writer.vector(writer.i32, lanes))
    scale = writer.load(writer.address(base, 4 * lanes), writer.vector(writer.f32, lanes))
    return levels, start, scale


def _load_group_scales(writer: KernelWriter, tile: DotTile, row: Any, chunk: Any) -> Any:
    """Load the weight scales of a chunk, one a lane; None if the whole row has one."""
    if tile.group_size is None:
        return None
    columns, lanes = tile.layout.span_columns, tile.layout.processor.lanes
    groups = max(1, columns // tile.group_size)  # of this chunk
    column = writer.add(writer.times(row, writer.slot("columns")), writer.times(chunk, columns))
    index = writer.builder.sdiv(column, writer.const(tile.group_size))
    place = writer.address(writer.slot("scale"), writer.times(index, tile.scale_bytes))
    left = writer.builder.sub(writer.slot("scales"), index)
    found = writer.load_as_float(place, groups, tile.scale_type, left)
    return writer.shuffle(found, [lane * groups // lanes for lane in range(lanes)])


def _store_dots(
    writer: KernelWriter, tile: DotTile, corner: tuple[Any, Any], sums: list[list[Any]]
) -> None:
    """Store the sums of a tile's rows, times their scales, at `(token, row)`."""
    at, (row, token) = writer.slot, corner
    for r, line in enumerate(sums):
        index = writer.add(row, r)
        scale = None
        if tile.group_size is None:
            place = writer.address(at("scale"), writer.times(index, tile.scale_bytes))
            scale = writer.builder.extract_element(
                writer.load_as_float(place, 1, tile.scale_type), writer.i32(0)
            )
        for t, variable in enumerate(line):
            total = writer.sum(variable.get())
            total = total if scale is None else writer.builder.fmul(total, scale)
            place = writer.times(writer.add(token, t), at("rows"))
            place = writer.times(writer.add(place, index), 4)
            writer.store(total, writer.address(at("output"), place))


def load_scale(writer: KernelWriter, tile: Any, index: Any, count: int) -> Any:
    """Load one weight scale of a tile that has a `scale_type`, as a vector."""
    size = 2 if tile.scale_type == "f16" else 4
    place = writer.address(writer.slot("scale"), writer.times(index, size))
    return writer.shuffle(writer.load_as_float(place, 1, tile.scale_type), [0] * count)


DOTS = KernelSource(
    (
        *("blocks", "block_rows", "rows", "columns", "row_bytes", "tokens", "weight"),
        *("scale", "scales", "rounded", "rounded_stride", "output"),
    ),
    write_dots,
)
