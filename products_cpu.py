"""The CPU kernels for products with weights: what each of them computes, step by step.

Owns the kernels' bodies. Knows nothing of torch; which one runs when is `quantization_cpu`'s, how
code becomes a kernel `kernels_cpu`'s, and what a rounded input looks like `rounding_cpu`'s.

With a rounded input, products are sums of integers, times two scales:

    y[o] = weight_scale[o] * sum_g scale[g] * sum_{i in g} weight[o, i] * levels[i]

"Dot" kernels go along the weights' rows as they are stored: best where every weight is read for few
tokens. "Panel" kernels unpack and turn a part of the weights first, for many tokens. "Exact" ones
multiply in float32.
"""

from typing import Any, NamedTuple

from .kernels_cpu import KernelSource, KernelWriter
from .rounding_cpu import GROUP, Layout

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
    with writer.claimed_blocks(at("blocks")) as block:
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


class PanelTile(NamedTuple):
    """What a panel kernel is compiled for.

    Attributes:
        layout: of the rounded input; whole spans.
        tokens: input rows that are multiplied at once.
        scale_type: "f16" or "f32".
    """

    layout: Layout
    tokens: int
    scale_type: str

    @property
    def rows(self) -> int:
        """Weight rows of a panel: two vectors of them."""
        return 2 * self.layout.processor.lanes

    @property
    def row_groups(self) -> int:
        """Bytes of one step of a panel: four columns of every row."""
        return 4 * self.rows


def write_panels(writer: KernelWriter, tile: PanelTile) -> None:
    """Multiply many tokens; a block of the work is a panel of weight rows.

    A span of the panel is unpacked once, turned so that a vector holds four columns of as many
    rows as there are lanes, and then multiplied by all tokens. Input and output are padded to
    whole tiles; of the weights' last row nothing behind it is read.
    """
    at, layout = writer.slot, tile.layout
    panel = writer.reserve(layout.span_columns * tile.rows)
    zero = writer.filled(writer.i32, layout.processor.lanes, 0)
    sums = [[writer.variable(zero) for _ in range(2)] for _ in range(tile.tokens)]
    with writer.claimed_blocks(at("blocks")) as block:
        row = writer.times(block, tile.rows)
        scales = _load_row_scales(writer, tile, row)
        with writer.loop(writer.const(0), at("spans")) as span:
            _fill_panel(writer, tile, panel, row, span)
            is_first = writer.builder.icmp_signed("==", span, writer.const(0))
            with writer.loop(writer.const(0), at("tokens"), tile.tokens) as token:
                inputs = [
                    writer.add(at("rounded"), writer.times(index, at("rounded_stride")))
                    for index in (writer.add(token, t) for t in range(tile.tokens))
                ]
                offset = writer.times(span, layout.span_bytes)
                inputs = [writer.add(place, offset) for place in inputs]
                _add_panel_dots(writer, tile, panel, inputs, sums)
                _add_to_output(writer, tile, (row, token), (inputs, sums, scales), is_first)


def _load_row_scales(writer: KernelWriter, tile: PanelTile, row: Any) -> list[Any]:
    """Load the weight scales of a panel's rows."""
    lanes, size = tile.layout.processor.lanes, 2 if tile.scale_type == "f16" else 4
    scales = []
    for half in range(2):
        first = writer.add(row, half * lanes)
        place = writer.address(writer.slot("scale"), writer.times(first, size))
        left = writer.builder.sub(writer.slot("rows"), first)
        scales.append(writer.variable(writer.load_as_float(place, lanes, tile.scale_type, left)))
    return scales


def _fill_panel(writer: KernelWriter, tile: PanelTile, panel: Any, row: Any, span: Any) -> None:
    """Unpack a span of a panel's rows."""
    layout, lanes = tile.layout, tile.layout.processor.lanes
    with (
        writer.loop(writer.const(0), writer.const(layout.chunks)) as chunk,
        writer.loop(writer.const(0), writer.const(2)) as half,
    ):
        column = writer.add(writer.times(span, layout.chunks), chunk)
        column = writer.times(column, layout.chunk_bytes)
        first = writer.add(row, writer.times(half, lanes))
        target = writer.add(panel, writer.times(half, layout.chunk_bytes))
        target = writer.add(target, writer.times(chunk, layout.planes * lanes * tile.row_groups))
        left = writer.builder.sub(writer.slot("row_bytes"), column)
        size = writer.const(layout.chunk_bytes)
        for sign, count in ((">=", None), ("<", left)):
            with writer.when(writer.builder.icmp_signed(sign, left, size)):
                planes = _load_rows(writer, layout, first, column, count)
                _store_turned(writer, tile, planes, target)


def _store_turned(
    writer: KernelWriter, tile: PanelTile, planes: list[list[Any]], target: Any
) -> None:
    """Store rows so that a vector holds four columns of all of them."""
    lanes = tile.layout.processor.lanes
    for plane, vectors in enumerate(planes):
        for index, vector in enumerate(_transpose(writer, vectors)):
            place = (plane * lanes + index) * tile.row_groups
            writer.store(vector, writer.address(target, place))


def _load_rows(
    writer: KernelWriter, layout: Layout, first: Any, column: Any, count: Any
) -> list[list[Any]]:
    """Load a chunk, or `count` bytes of it, of as many rows as there are lanes.

    Returns:
        For each plane the rows, as vectors of int32.
    """
    at, lanes = writer.slot, layout.processor.lanes
    kind, wide = writer.vector(writer.i8, layout.chunk_bytes), writer.vector(writer.i32, lanes)
    planes: list[list[Any]] = [[] for _ in range(layout.planes)]
    for lane in range(lanes):
        row = writer.smaller(writer.add(first, lane), writer.add(at("rows"), -1))
        base = writer.add(at("weight"), writer.times(row, at("row_bytes")))
        place = writer.address(base, column)
        stored = (
            writer.load(place, kind) if count is None else writer.load_first(place, kind, count)
        )
        for vectors, plane in zip(planes, split_planes(writer, layout, stored)):
            vectors.append(writer.builder.bitcast(plane, wide))
    return planes


def _transpose(writer: KernelWriter, vectors: list[Any]) -> list[Any]:
    """Return the columns of a square of rows, by exchanging ever larger blocks."""
    count, distance = len(vectors), 1
    while distance < count:
        turned = list(vectors)
        for low in (index for index in range(count) if not index & distance):
            pair = vectors[low], vectors[low | distance]
            kept = [n if not n & distance else count + (n ^ distance) for n in range(count)]
            given = [n ^ distance if not n & distance else count + n for n in range(count)]
            turned[low] = writer.shuffle(pair[0], kept, pair[1])
            turned[low | distance] = writer.shuffle(pair[0], given, pair[1])
        vectors, distance = turned, 2 * distance
    return vectors


def _add_panel_dots(
    writer: KernelWriter, tile: PanelTile, panel: Any, inputs: list[Any], sums: list[list[Any]]
) -> None:
    """Multiply a span of a panel by a few tokens: four columns of every row at a step."""
    layout, lanes = tile.layout, tile.layout.processor.lanes
    kind = writer.vector(writer.i8, layout.chunk_bytes)
    for place, line in zip(inputs, sums):
        start = writer.load(writer.address(place, layout.span_columns), writer.i32)
        for variable in line:
            variable.set(writer.splat(start, lanes))
    with writer.loop(writer.const(0), writer.const(layout.span_columns // 4)) as step:
        base = writer.add(panel, writer.times(step, tile.row_groups))
        halves = [writer.load(writer.address(base, half * 4 * lanes), kind) for half in range(2)]
        for place, line in zip(inputs, sums):
            four = writer.load(writer.address(place, writer.times(step, 4)), writer.i32)
            levels = writer.builder.bitcast(writer.splat(four, lanes), kind)
            for weights, variable in zip(halves, line):
                variable.set(add_dot(writer, variable.get(), weights, levels))


def _add_to_output(
    writer: KernelWriter,
    tile: PanelTile,
    corner: tuple[Any, Any],
    operands: tuple[list[Any], list[list[Any]], list[Any]],
    is_first: Any,
) -> None:
    """Add a span's sums, times both scales, to the output; the first span only writes."""
    builder, at, (row, token) = writer.builder, writer.slot, corner
    layout, (inputs, sums, scales) = tile.layout, operands
    lanes = layout.processor.lanes
    kind = writer.vector(writer.f32, lanes)
    for t, (place, line) in enumerate(zip(inputs, sums)):
        scale = writer.load(writer.address(place, layout.span_columns + 4), writer.f32)
        target = writer.add(writer.times(writer.add(token, t), at("output_stride")), row)
        target = writer.add(at("output"), writer.times(target, 4))
        for half, (variable, row_scales) in enumerate(zip(line, scales)):
            factor = builder.fmul(writer.splat(scale, lanes), row_scales.get())
            address = writer.address(target, 4 * lanes * half)
            before = writer.load(address, kind)
            before = builder.select(is_first, writer.filled(writer.f32, lanes, 0.0), before)
            product = builder.sitofp(variable.get(), kind)
            writer.store(writer.fma(product, factor, before), address)


DOTS = KernelSource(
    (
        *("blocks", "block_rows", "rows", "columns", "row_bytes", "tokens", "weight"),
        *("scale", "scales", "rounded", "rounded_stride", "output"),
    ),
    write_dots,
)
PANELS = KernelSource(
    (
        *("blocks", "rows", "row_bytes", "spans", "tokens", "weight", "scale"),
        *("rounded", "rounded_stride", "output", "output_stride"),
    ),
    write_panels,
)


class ExactTile(NamedTuple):
    """What an exact kernel is compiled for.

    Attributes:
        weight_type: "i4" or "i8" for packed weights, "f32", "f16" or "bf16" for plain ones.
        tokens: input rows that are multiplied at once.
        scale_type, group_size: as in `DotTile`; plain weights have no scales.
    """

    weight_type: str
    tokens: int
    scale_type: str = "f32"
    group_size: int | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the weights are integers with scales."""
        return self.weight_type in ("i4", "i8")

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of weights."""
        return GROUP * {"i4": 4, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}[self.weight_type] // 8


def write_exact(writer: KernelWriter, tile: ExactTile) -> None:
    """Multiply in float32 with the weights' exact values; a block is a run of weight rows."""
    at, zero = writer.slot, writer.filled(writer.f32, GROUP, 0.0)
    sums = [writer.variable(zero) for _ in range(tile.tokens)]
    last_token = writer.add(at("tokens"), -tile.tokens)
    full = writer.builder.sdiv(at("columns"), writer.const(GROUP))
    left = writer.builder.srem(at("columns"), writer.const(GROUP))
    with writer.claimed_blocks(at("blocks")) as block:
        first = writer.times(block, at("block_rows"))
        stop = writer.smaller(writer.add(first, at("block_rows")), at("rows"))
        with (
            writer.loop(first, stop) as row,
            writer.loop(writer.const(0), at("tokens"), tile.tokens) as index,
        ):
            token = writer.smaller(index, last_token)
            for variable in sums:
                variable.set(zero)
            with writer.loop(writer.const(0), full) as group:
                _add_exact_group(writer, tile, (row, token, group), None, sums)
            with writer.when(writer.builder.icmp_signed(">", left, writer.const(0))):
                _add_exact_group(writer, tile, (row, token, full), left, sums)
            _store_exact(writer, tile, row, token, sums)


def _add_exact_group(
    writer: KernelWriter, tile: ExactTile, place: tuple[Any, Any, Any], left: Any, sums: list[Any]
) -> None:
    """Multiply 32 columns of a weight row by every token; `left` of them, or all."""
    at, (row, token, group) = writer.slot, place
    base = writer.add(at("weight"), writer.times(row, at("row_bytes")))
    base = writer.add(base, writer.times(group, tile.group_bytes))
    weights = _load_weights(writer, tile, base, left)
    if tile.group_size is not None:
        index = writer.add(writer.times(row, at("columns")), writer.times(group, GROUP))
        index = writer.builder.sdiv(index, writer.const(tile.group_size))
        weights = writer.builder.fmul(weights, _load_scale(writer, tile, index, GROUP))
    for t, variable in enumerate(sums):
        start = writer.times(writer.add(token, t), at("columns"))
        start = writer.times(writer.add(start, writer.times(group, GROUP)), 4)
        numbers = writer.load_as_float(writer.address(at("input"), start), GROUP, "f32", left)
        variable.set(writer.fma(weights, numbers, variable.get()))


def _load_weights(writer: KernelWriter, tile: ExactTile, base: Any, left: Any) -> Any:
    """Load 32 columns of weights as float32; without scales those of packed ones."""
    builder = writer.builder
    writer.prefetch(writer.address(base, PREFETCH))
    place = writer.address(base)
    if not tile.is_packed:
        return writer.load_as_float(place, GROUP, tile.weight_type, left)
    kind = writer.vector(writer.i8, tile.group_bytes)
    if left is not None and tile.weight_type == "i4":
        left = builder.sdiv(left, writer.const(2))
    stored = writer.load(place, kind) if left is None else writer.load_first(place, kind, left)
    if tile.weight_type == "i4":
        evens = builder.ashr(stored, writer.filled(writer.i8, kind.count, 4))
        odds = builder.shl(stored, writer.filled(writer.i8, kind.count, 4))
        odds = builder.ashr(odds, writer.filled(writer.i8, kind.count, 4))
        order = [n // 2 + (n % 2) * kind.count for n in range(GROUP)]
        stored = writer.shuffle(evens, order, odds)
    wide = builder.sext(stored, writer.vector(writer.i32, GROUP))
    return builder.sitofp(wide, writer.vector(writer.f32, GROUP))


def _load_scale(writer: KernelWriter, tile: ExactTile | DotTile, index: Any, count: int) -> Any:
    """Load one weight scale, as a vector."""
    size = 2 if tile.scale_type == "f16" else 4
    place = writer.address(writer.slot("scale"), writer.times(index, size))
    return writer.shuffle(writer.load_as_float(place, 1, tile.scale_type), [0] * count)


def _store_exact(
    writer: KernelWriter, tile: ExactTile, row: Any, token: Any, sums: list[Any]
) -> None:
    """Store a row's sums at `(token, row)`, times the row's scale if it has one."""
    at = writer.slot
    for t, variable in enumerate(sums):
        total = writer.sum(variable.get())
        if tile.is_packed and tile.group_size is None:
            scale = _load_scale(writer, tile, row, 1)
            total = writer.builder.fmul(total, writer.builder.extract_element(scale, writer.i32(0)))
        place = writer.add(writer.times(writer.add(token, t), at("rows")), row)
        writer.store(total, writer.address(at("output"), writer.times(place, 4)))


EXACT = KernelSource(
    (
        *("blocks", "block_rows", "rows", "columns", "row_bytes", "tokens", "weight"),
        *("scale", "input", "output"),
    ),
    write_exact,
)
