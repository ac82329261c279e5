"""The kernel that multiplies in float32, by plain weights or by packed ones' exact values.

Owns the kernel's body. Knows nothing of torch, and rounds no input.

Every sum is one of `lanes` partial sums: lane `l` adds the products of columns `l`, `l + lanes`,
`l + 2 * lanes` and so on, in this order, and a tree of halves adds the lanes at the end. So how
many rows and tokens are multiplied at once, or which columns before others, changes no bit.
"""

from typing import Any, NamedTuple

from chatglm.cpu.dots import load_scale
from chatglm.cpu.rounding import GROUP
from chatglm.cpu.writer import KernelSource, KernelWriter

LINE = 64  # bytes of a cache line
PREFETCH = 2048  # bytes ahead of the weights being read in each row
PANEL = 64  # tokens that pass a block of weights before the others do
SPAN = 512  # columns that pass before the others do, of many tokens; a multiple of GROUP
SPAN_ROWS = 8  # weight rows of such a block, which with their span are in the first cache


class FloatTile(NamedTuple):
    """What a float kernel is compiled for.

    Attributes:
        weight_type: "i4" or "i8" for packed weights, "f32", "f16" or "bf16" for plain ones.
        rows, tokens: weight rows and input rows that are multiplied at once.
        scale_type, group_size: as in `DotTile`; plain weights have no scales.
        is_widened: whether a span of a block's weights is made float32 before all tokens pass it.
    """

    weight_type: str
    rows: int
    tokens: int
    scale_type: str = "f32"
    group_size: int | None = None
    is_widened: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether the weights are integers with scales."""
        return self.weight_type in ("i4", "i8")

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of weights."""
        return GROUP * {"i4": 4, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}[self.weight_type] // 8


class Corner(NamedTuple):
    """Where a tile begins, and where its partial sums wait for the next span.

    Attributes:
        row, token, column: of its first product.
        wide: address of this row's float32 weights, if they are widened first.
        partial: address of the tile's partial sums.
    """

    row: Any
    token: Any
    column: Any
    wide: Any
    partial: Any


def write_floats(writer: KernelWriter, tile: FloatTile) -> None:
    """Multiply in float32 with the weights' exact values; a block is a run of weight rows.

    The last block or tile may begin before its turn, and then repeats what another one did.
    """
    at, zero = writer.slot, writer.filled(writer.f32, writer.processor.lanes, 0.0)
    sums = [[writer.variable(zero) for _ in range(tile.tokens)] for _ in range(tile.rows)]
    wide = writer.reserve(4 * SPAN * SPAN_ROWS) if tile.is_widened else writer.const(0)
    partial = writer.reserve(4 * writer.processor.lanes * SPAN_ROWS * (PANEL + tile.tokens))
    with writer.parallel_for(at("blocks")) as block:
        first = writer.smaller(writer.times(block, at("block_rows")), at("last_first"))
        rows = first, writer.smaller(writer.add(first, at("block_rows")), at("rows"))
        with writer.loop(writer.const(0), at("tokens"), PANEL) as panel:
            tokens = panel, writer.smaller(writer.add(panel, PANEL), at("tokens"))
            with writer.loop(writer.const(0), at("columns"), at("span")) as column:
                if tile.is_widened:
                    _widen_span(writer, tile, rows, column, wide)
                _write_tiles(writer, tile, (rows, tokens, column), (wide, partial), sums)


def _write_tiles(
    writer: KernelWriter,
    tile: FloatTile,
    ranges: tuple[Any, Any, Any],
    places: tuple[Any, Any],
    sums: list[list[Any]],
) -> None:
    """Multiply a span of a block's rows by the tokens of a panel."""
    ((first_row, last_row), (first_token, last_token), column), (wide, partial) = ranges, places
    size = 4 * writer.processor.lanes * tile.rows * tile.tokens
    sizes = {"span": 4 * SPAN, "tile": size}
    with writer.loop(first_token, last_token, tile.tokens) as index:
        token = writer.smaller(index, writer.add(last_token, -tile.tokens))
        line = writer.builder.sdiv(writer.builder.sub(index, first_token), writer.i64(tile.tokens))
        line = writer.times(line, sizes["tile"] * (SPAN_ROWS // tile.rows))
        with writer.loop(first_row, last_row, tile.rows) as index:
            row = writer.smaller(index, writer.add(last_row, -tile.rows))
            wide_row = writer.times(writer.builder.sub(row, first_row), sizes["span"])
            turn = writer.builder.sdiv(writer.builder.sub(index, first_row), writer.i64(tile.rows))
            place = writer.add(writer.add(partial, line), writer.times(turn, sizes["tile"]))
            corner = Corner(row, token, column, writer.add(wide, wide_row), place)
            _multiply_tile(writer, tile, corner, sums)


def _multiply_tile(
    writer: KernelWriter, tile: FloatTile, corner: Corner, sums: list[list[Any]]
) -> None:
    """Add a span's products to a tile's sums, and store them where they are complete."""
    at, builder, zero = writer.slot, writer.builder, writer.const(0)
    end = writer.add(corner.column, at("span"))
    for variable in (variable for line in sums for variable in line):
        variable.set(writer.filled(writer.f32, writer.processor.lanes, 0.0))
    with writer.when(builder.icmp_signed(">", corner.column, zero)):
        _exchange(writer, corner, sums, is_loaded=True)
    left = builder.srem(at("columns"), writer.const(GROUP))
    full = builder.sub(at("columns"), left)
    with writer.loop(corner.column, writer.smaller(end, full), GROUP) as column:
        _add_group(writer, tile, corner, column, None, sums)
    is_last = builder.icmp_signed(">=", end, at("columns"))
    with writer.when(is_last):
        with writer.when(builder.icmp_signed(">", left, zero)):
            _add_group(writer, tile, corner, full, left, sums)
        _store_sums(writer, tile, corner, sums)
    with writer.when(builder.not_(is_last)):
        _exchange(writer, corner, sums, is_loaded=False)


def _exchange(writer: KernelWriter, corner: Corner, sums: list[list[Any]], is_loaded: bool) -> None:
    """Load the partial sums of an earlier span, or leave them for the next one."""
    lanes = writer.processor.lanes
    variables = [variable for line in sums for variable in line]
    for n, variable in enumerate(variables):
        place = writer.address(corner.partial, 4 * lanes * n)
        if is_loaded:
            variable.set(writer.load(place, writer.vector(writer.f32, lanes)))
        else:
            writer.store(variable.get(), place)


def _add_group(
    writer: KernelWriter,
    tile: FloatTile,
    corner: Corner,
    column: Any,
    left: Any,
    sums: list[list[Any]],
) -> None:
    """Multiply 32 columns of a tile's weights by every token's; `left` of them, or all."""
    lanes = writer.processor.lanes
    weights = _find_weights(writer, tile, corner, column, left)
    base = writer.times(writer.add(writer.times(corner.token, writer.slot("columns")), column), 4)
    base = writer.add(writer.slot("input"), base)
    for t in range(tile.tokens):
        place = writer.add(base, writer.times(writer.slot("columns"), 4 * t))
        numbers = writer.load_as_float(writer.address(place), GROUP, "f32", left)
        for start in range(0, GROUP, lanes):
            part = writer.shuffle(numbers, range(start, start + lanes))
            for line, row in zip(sums, weights):
                weight = writer.shuffle(row, range(start, start + lanes))
                line[t].set(writer.fma(weight, part, line[t].get()))


def _find_weights(
    writer: KernelWriter, tile: FloatTile, corner: Corner, column: Any, left: Any
) -> list[Any]:
    """Return 32 columns of each of a tile's weight rows as float32."""
    _prefetch(writer, tile, corner, column)
    if tile.is_widened:
        offset = writer.times(writer.builder.sub(column, corner.column), 4)
        places = [
            writer.address(corner.wide, writer.add(offset, 4 * SPAN * r)) for r in _rows(tile)
        ]
        return [writer.load(place, writer.vector(writer.f32, GROUP)) for place in places]
    rows = [writer.add(corner.row, r) for r in _rows(tile)]
    return [_load_weights(writer, tile, row, column, left) for row in rows]


def _rows(tile: FloatTile) -> range:
    return range(tile.rows)


def _widen_span(
    writer: KernelWriter, tile: FloatTile, rows: tuple[Any, Any], column: Any, wide: Any
) -> None:
    """Store a span of a block's weights as float32, zeros behind the last column."""
    at, (first, last) = writer.slot, rows
    left = writer.builder.srem(at("columns"), writer.const(GROUP))
    full = writer.builder.sub(at("columns"), left)
    end = writer.add(column, at("span"))
    is_last = writer.builder.icmp_signed(">=", end, at("columns"))
    is_cut = writer.builder.icmp_signed(">", left, writer.const(0))
    with writer.loop(first, last) as row:
        place = writer.add(wide, writer.times(writer.builder.sub(row, first), 4 * SPAN))
        with writer.loop(column, writer.smaller(end, full), GROUP) as group:
            _widen_group(writer, tile, (row, group, column), None, place)
        with writer.when(writer.builder.and_(is_last, is_cut)):
            _widen_group(writer, tile, (row, full, column), left, place)


def _widen_group(
    writer: KernelWriter, tile: FloatTile, spot: tuple[Any, Any, Any], left: Any, place: Any
) -> None:
    row, group, column = spot
    offset = writer.times(writer.builder.sub(group, column), 4)
    numbers = _load_weights(writer, tile, row, group, left)
    writer.store(numbers, writer.address(place, offset))


def _prefetch(writer: KernelWriter, tile: FloatTile, corner: Corner, column: Any) -> None:
    """Ask for weights that come later in each of a tile's rows: where they are widened, a span.

    Behind the end of a row that is the start of the one which takes its turn next.
    """
    at = writer.slot
    ahead, turn = (PREFETCH, tile.rows)
    if tile.is_widened:
        ahead, turn = SPAN // GROUP * tile.group_bytes, SPAN_ROWS
    offset = writer.add(_count_bytes(writer, tile, column), ahead)
    is_behind = writer.builder.icmp_signed(">=", offset, at("row_bytes"))
    skipped = writer.times(at("row_bytes"), turn - 1)
    offset = writer.add(offset, writer.builder.select(is_behind, skipped, writer.const(0)))
    for r in _rows(tile):
        start = writer.add(at("weight"), writer.times(writer.add(corner.row, r), at("row_bytes")))
        for line in range(0, tile.group_bytes, LINE):
            writer.prefetch(writer.address(start, writer.add(offset, line)))


def _count_bytes(writer: KernelWriter, tile: FloatTile, column: Any) -> Any:
    """Return how many bytes of a row stand before a column, which begins a group."""
    group = writer.builder.sdiv(column, writer.const(GROUP))
    return writer.times(group, tile.group_bytes)


def _load_weights(writer: KernelWriter, tile: FloatTile, row: Any, column: Any, left: Any) -> Any:
    """Load 32 columns of a weight row as float32, times the scales of groups if it has some."""
    at = writer.slot
    base = writer.add(at("weight"), writer.times(row, at("row_bytes")))
    place = writer.address(base, _count_bytes(writer, tile, column))
    if not tile.is_packed:
        return writer.load_as_float(place, GROUP, tile.weight_type, left)
    weights = _load_packed(writer, tile, place, left)
    if tile.group_size is None:
        return weights
    index = writer.add(writer.times(row, at("columns")), column)
    index = writer.builder.sdiv(index, writer.const(tile.group_size))
    return writer.builder.fmul(weights, load_scale(writer, tile, index, GROUP))


def _load_packed(writer: KernelWriter, tile: FloatTile, place: Any, left: Any) -> Any:
    """Load 32 columns of packed weights as float32, without their scales."""
    builder = writer.builder
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


def _store_sums(
    writer: KernelWriter, tile: FloatTile, corner: Corner, sums: list[list[Any]]
) -> None:
    """Store a tile's sums at `(token, row)`, times the row's scale if it has one."""
    at = writer.slot
    for r, line in enumerate(sums):
        row, scale = writer.add(corner.row, r), None
        if tile.is_packed and tile.group_size is None:
            scale = load_scale(writer, tile, row, 1)
            scale = writer.builder.extract_element(scale, writer.i32(0))
        for t, variable in enumerate(line):
            total = _add_lanes(writer, variable.get())
            total = total if scale is None else writer.builder.fmul(total, scale)
            place = writer.add(writer.times(writer.add(corner.token, t), at("rows")), row)
            writer.store(total, writer.address(at("output"), writer.times(place, 4)))


def _add_lanes(writer: KernelWriter, vector: Any) -> Any:
    """Return the sum of a vector's elements, halves added to halves."""
    count = vector.type.count
    while count > 1:
        count //= 2
        halves = (writer.shuffle(vector, range(start, start + count)) for start in (0, count))
        vector = writer.builder.fadd(*halves)
    return writer.builder.extract_element(vector, writer.i32(0))


FLOATS = KernelSource(
    (
        *("blocks", "block_rows", "last_first", "rows", "columns", "span", "row_bytes", "tokens"),
        *("weight", "scale", "input", "output"),
    ),
    write_floats,
)
