"""The kernels that multiply halves by the tile registers of a processor that has them (AMX).

Owns both kernels' bodies: one splits the input, one multiplies. Knows nothing of torch.

A tile product sums pairs of bfloat16 numbers in float32. So a float32 input becomes the sum of two
bfloat16 numbers, which keep 16 of its 24 bits (and all 11 of a float16 number's, all 8 of a
bfloat16's); a float16 weight becomes the sum of two as well, exactly:

    y = w1 * x1 + w2 * x1 + w1 * x2        (w2 * x2 is below what is left out of x)

What a sum adds, and in which order, is the same whatever stands beside it in the tiles. Numbers
below 2**-126 count as zeros, and a product of float16 weights with an infinite input may be NaN.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from chatglm.cpu.writer import KernelSource, KernelWriter

SIDE = 16  # rows of a tile register: weight rows, or pairs of columns
CHUNK = 32  # columns of a tile product
TILE_BYTES = 1024  # of a tile of weights
REGISTERS = 8  # of tiles: the first ones hold sums, then come weights, then input
UNIT = 2  # tile products along the columns whose weights are split at once
PREFETCH = 2048  # bytes ahead of the weights being read in each row


class TileShape(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        weight_type: "f16" or "bf16".
        tokens: input rows in a tile, 1 to 16.
        panels: how many tiles of them are multiplied side by side: 1, 2 or 4.
        parts: bfloat16 numbers that an input number becomes, 1 or 2.
        block_rows: weight rows of a block, a multiple of 32.
    """

    weight_type: str
    tokens: int
    panels: int
    parts: int
    block_rows: int

    @property
    def lines(self) -> int:
        """Tiles of weights side by side: the sums have four registers."""
        return 1 if self.panels == 4 else 2

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Which part of the weights meets which part of the input, in the order of the sums."""
        with_input = [(part, 0) for part in range(self.weight_parts)]
        return [*with_input, *[(0, part) for part in range(1, self.parts)]]

    @property
    def steps(self) -> list[tuple[int, int, tuple[int, int]]]:
        """Lines, panels and pairs in the order in which the fewest tiles are loaded."""
        lines, panels = range(self.lines), range(self.panels)
        if self.lines == 1:
            return [(0, panel, pair) for panel in panels for pair in self.pairs]
        return [(line, panel, pair) for pair in self.pairs for line in lines for panel in panels]

    @property
    def weight_registers(self) -> range:
        """The registers of weights; the sums are before them."""
        sums = self.lines * self.panels
        return range(sums, sums + (4 if sums == 2 else 2))

    @property
    def input_registers(self) -> range:
        """The registers of tokens."""
        return range(self.weight_registers.stop, REGISTERS)

    @property
    def weight_parts(self) -> int:
        """Bfloat16 numbers that a weight becomes."""
        return 1 if self.weight_type == "bf16" else 2

    @property
    def input_bytes(self) -> int:
        """Bytes of a tile of input, and of its sums."""
        return SIDE * self.tokens * 4


def write_split(writer: KernelWriter, shape: TileShape) -> None:
    """Split float32 `(T, I)` into tiles of pairs of columns; a block is a tile's columns.

    Behind the last token it is repeated, behind the last column are zeros.
    """
    at = writer.slot
    left = writer.builder.srem(at("columns"), writer.const(CHUNK))
    is_cut = writer.builder.icmp_signed(">", left, writer.const(0))
    with writer.parallel_for(at("blocks")) as block:
        panel = writer.builder.sdiv(block, at("chunks"))
        chunk = writer.builder.srem(block, at("chunks"))
        last = writer.builder.icmp_signed("==", writer.add(chunk, 1), at("chunks"))
        is_left = writer.builder.and_(last, is_cut)
        count = writer.builder.select(is_left, left, writer.const(CHUNK))
        place = writer.times(block, shape.parts * shape.input_bytes)
        place = writer.add(at("split"), place)
        for t in range(shape.tokens):
            token = writer.add(writer.times(panel, shape.tokens), t)
            token = writer.smaller(token, writer.add(at("tokens"), -1))
            start = writer.add(writer.times(token, at("columns")), writer.times(chunk, CHUNK))
            start = writer.address(at("input"), writer.times(start, 4))
            numbers = writer.load_as_float(start, CHUNK, "f32", count)
            _store_parts(writer, shape, numbers, writer.add(place, 4 * t))


def _store_parts(writer: KernelWriter, shape: TileShape, numbers: Any, place: Any) -> None:
    """Store a token's 32 numbers as pairs, one below the other."""
    builder = writer.builder
    for part in range(shape.parts):
        upper = _round_to_upper(writer, numbers)
        pairs = builder.bitcast(_take_upper(writer, upper), writer.vector(writer.i32, SIDE))
        for row in range(SIDE):
            offset = part * shape.input_bytes + row * shape.tokens * 4
            pair = builder.extract_element(pairs, writer.i32(row))
            writer.store(pair, writer.address(place, offset))
        rest = builder.fsub(numbers, builder.bitcast(upper, numbers.type))
        # What is no number or infinite is whole in its first part: infinity less itself is NaN.
        is_finite = builder.fcmp_ordered("ord", rest, rest)
        numbers = builder.select(is_finite, rest, writer.filled(writer.f32, CHUNK, 0.0))


def _round_to_upper(writer: KernelWriter, numbers: Any) -> Any:
    """Return the bits of float32 numbers rounded to their upper halves; none becomes infinite."""
    builder, wide = writer.builder, writer.vector(writer.i32, CHUNK)

    def filled(value: int) -> Any:
        return writer.filled(writer.i32, CHUNK, value)

    bits = builder.bitcast(numbers, wide)
    is_odd = builder.and_(builder.lshr(bits, filled(16)), filled(1))
    rounded = builder.add(bits, builder.add(is_odd, filled(0x7FFF)))
    exponent = builder.and_(rounded, filled(0x7F800000))
    is_large = builder.icmp_unsigned("==", exponent, filled(0x7F800000))
    is_number = builder.fcmp_ordered("ord", numbers, numbers)
    rounded = builder.select(is_large, bits, rounded)
    rounded = builder.select(is_number, rounded, builder.or_(bits, filled(0x400000)))
    return builder.and_(rounded, filled(0xFFFF0000))


def _take_upper(writer: KernelWriter, bits: Any) -> Any:
    """Return the upper halves of 32-bit numbers."""
    count = bits.type.count
    halves = writer.builder.bitcast(bits, writer.vector(writer.i16, 2 * count))
    return writer.shuffle(halves, range(1, 2 * count, 2))


def write_tiles(writer: KernelWriter, shape: TileShape) -> None:
    """Multiply split tokens by halves; a block is a run of weight rows, a few tiles of tokens.

    The last run may begin before its turn, and then repeats what another one did.
    """
    at, step = writer.slot, SIDE * shape.lines
    wide = writer.reserve(2 * UNIT * shape.lines * shape.weight_parts * TILE_BYTES)
    partial = writer.reserve(shape.block_rows // SIDE * shape.panels * shape.input_bytes)
    _configure(writer, shape)
    with writer.parallel_for(at("blocks")) as block:
        # All weights pass a few tiles of tokens, which stay in the second cache meanwhile.
        first = writer.times(writer.builder.srem(block, at("row_blocks")), shape.block_rows)
        first = writer.smaller(first, writer.add(at("rows"), -shape.block_rows))
        panel = writer.times(writer.builder.sdiv(block, at("row_blocks")), shape.panels)
        with writer.loop(writer.const(0), writer.const(shape.block_rows), step) as row:
            _multiply_lines(writer, shape, (first, row, panel), (wide, partial))
        _store_sums(writer, shape, (first, panel), partial)
    writer.call("llvm.x86.tilerelease", writer.ir.VoidType(), [])


def _multiply_lines(
    writer: KernelWriter, shape: TileShape, corner: tuple[Any, Any, Any], places: tuple[Any, Any]
) -> None:
    """Multiply a few tiles of weights, along all columns, by a few of tokens."""
    at, (first, row, panel), (wide, partial) = writer.slot, corner, places
    base = writer.times(writer.add(first, row), at("row_bytes"))
    base = writer.add(at("weight"), base)
    for n in range(shape.lines * shape.panels):
        writer.call("llvm.x86.tilezero", writer.ir.VoidType(), [writer.i8(n)])
    _add_products(writer, shape, (base, panel), wide)
    for n in range(shape.lines * shape.panels):
        line, index = divmod(n, shape.panels)
        place = _find_sums(writer, shape, partial, writer.add(row, SIDE * line), index)
        _move_tile(writer, "stored", n, place, writer.const(4 * shape.tokens))


def _add_products(writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any], wide: Any) -> None:
    """Go along the columns of a few tiles' rows by 32, zeros behind the last one."""
    (base, panel), start = spot, writer.const(0)
    left = writer.builder.srem(writer.slot("columns"), writer.const(CHUNK))
    full = writer.builder.sub(writer.slot("columns"), left)
    if shape.weight_type == "f16":
        start = _add_units(writer, shape, (base, panel, full), wide)
    with writer.loop(start, full, CHUNK) as column:
        if shape.weight_type == "bf16":  # stored as a tile product takes it
            _prefetch_rows(writer, shape, base, column)
            place = writer.add(base, writer.times(column, 2))
            stride = writer.slot("row_bytes")
        else:
            _spread_rows(writer, shape, (base, column, None), wide)
            place, stride = wide, None
        _run(_multiply_chunk(writer, shape, (panel, column), place, stride))
    with writer.when(writer.builder.icmp_signed(">", left, writer.const(0))):
        _spread_rows(writer, shape, (base, full, left), wide)
        _run(_multiply_chunk(writer, shape, (panel, full), wide))


def _add_units(
    writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any, Any], wide: Any
) -> Any:
    """Split weights by units, each while the one before is multiplied; return where they end."""
    (base, panel, full), zero, size = spot, writer.const(0), UNIT * CHUNK
    end = writer.times(writer.builder.sdiv(full, writer.const(size)), size)
    with writer.when(writer.builder.icmp_signed(">", end, zero)):
        with writer.loop(zero, writer.const(UNIT)) as part:
            _run(_spread_unit(writer, shape, (base, zero, part), wide))
        with (
            writer.loop(writer.const(size), end, size) as column,
            writer.loop(zero, writer.const(UNIT)) as part,
        ):
            before = writer.add(writer.add(column, -size), writer.times(part, CHUNK))
            place = _find_turn(writer, shape, before, wide)
            multiplying = _multiply_chunk(writer, shape, (panel, before), place)
            _mix(_spread_unit(writer, shape, (base, column, part), wide), multiplying)
        with writer.loop(writer.add(end, -size), end, CHUNK) as column:
            place = _find_turn(writer, shape, column, wide)
            _run(_multiply_chunk(writer, shape, (panel, column), place))
    return end


def _mix(first: Iterator[None], second: Iterator[None]) -> None:
    """Write the steps of both in turn: each takes the units of the processor the other leaves."""
    for n, _ in enumerate(first):
        if n % 3 == 0:
            next(second, None)
    _run(second)


def _run(steps: Iterator[None]) -> None:
    """Write all steps at once."""
    for _ in steps:
        pass


def _find_turn(writer: KernelWriter, shape: TileShape, column: Any, wide: Any) -> Any:
    """Return where a chunk of split weights is, in memory for two units of them."""
    turn = writer.builder.sdiv(column, writer.const(CHUNK))
    turn = writer.builder.srem(turn, writer.const(2 * UNIT))
    return writer.add(wide, writer.times(turn, TILE_BYTES * shape.weight_parts * shape.lines))


def _spread_unit(
    writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any, Any], wide: Any
) -> Iterator[None]:
    """Split a part of the rows of a unit, and ask for what comes later in them, step by step."""
    base, column, part = spot
    count = SIDE * shape.lines // UNIT
    first, row_bytes = writer.times(part, count), writer.slot("row_bytes")
    size = TILE_BYTES * shape.weight_parts
    place = writer.times(writer.builder.sdiv(first, writer.const(SIDE)), size)
    side = writer.times(writer.builder.srem(first, writer.const(SIDE)), TILE_BYTES // SIDE)
    place = writer.add(_find_turn(writer, shape, column, wide), writer.add(place, side))
    base = writer.add(base, writer.times(first, row_bytes))
    later = _find_later(writer, shape, column)
    for row in range(count):
        start = writer.add(base, writer.times(row_bytes, row))
        for chunk in range(UNIT):
            target = writer.add(place, chunk * size * shape.lines + row * (TILE_BYTES // SIDE))
            _spread_chunk(writer, shape, start, writer.add(column, chunk * CHUNK), target, None)
            writer.prefetch(writer.address(start, writer.add(later, chunk * CHUNK * 2)))
            yield


def _spread_rows(
    writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any, Any], wide: Any
) -> None:
    """Store 32 columns of a few tiles' rows as a tile product takes them."""
    base, column, left = spot
    with writer.loop(writer.const(0), writer.const(SIDE * shape.lines)) as row:
        tile = writer.builder.sdiv(row, writer.const(SIDE))
        place = writer.add(wide, writer.times(tile, TILE_BYTES * shape.weight_parts))
        side = writer.builder.srem(row, writer.const(SIDE))
        place = writer.add(place, writer.times(side, TILE_BYTES // SIDE))
        start = writer.add(base, writer.times(writer.slot("row_bytes"), row))
        _spread_chunk(writer, shape, start, column, place, left)


def _find_later(writer: KernelWriter, shape: TileShape, column: Any) -> Any:
    """Return which of a row's bytes to ask for: later ones, or the start of the next row."""
    row_bytes = writer.slot("row_bytes")
    offset = writer.add(writer.times(column, 2), PREFETCH)
    is_behind = writer.builder.icmp_signed(">=", offset, row_bytes)
    skipped = writer.times(row_bytes, SIDE * shape.lines - 1)
    return writer.add(offset, writer.builder.select(is_behind, skipped, writer.const(0)))


def _prefetch_rows(writer: KernelWriter, shape: TileShape, base: Any, column: Any) -> None:
    """Ask for what comes later in each of a few tiles' rows."""
    later = writer.add(base, _find_later(writer, shape, column))
    for row in range(SIDE * shape.lines):
        writer.prefetch(writer.address(later, writer.times(writer.slot("row_bytes"), row)))


def _configure(writer: KernelWriter, shape: TileShape) -> None:
    """Tell this thread's tile registers their sizes."""
    widths = [4 * shape.tokens] * REGISTERS
    for register in shape.weight_registers:
        widths[register] = TILE_BYTES // SIDE
    data = [1, *[0] * 15]
    for width in widths:
        data += [width, 0]
    data += [0] * 16 + [SIDE] * len(widths) + [0] * 8
    place = writer.reserve(64)
    kind = writer.vector(writer.i8, 64)
    writer.store(writer.ir.Constant(kind, data), writer.address(place))
    writer.call("llvm.x86.ldtilecfg", writer.ir.VoidType(), [writer.address(place)])


def _spread_chunk(
    writer: KernelWriter, shape: TileShape, base: Any, start: Any, place: Any, left: Any
) -> None:
    """Store 32 weights of a row as one or two rows of bfloat16 numbers."""
    source = writer.address(base, writer.times(start, 2))
    if shape.weight_type == "bf16":
        kind = writer.vector(writer.i16, CHUNK)
        stored = (
            writer.load(source, kind) if left is None else writer.load_first(source, kind, left)
        )
        writer.store(stored, writer.address(place))
        return
    numbers = writer.load_as_float(source, CHUNK, "f16", left)
    bits = writer.builder.bitcast(numbers, writer.vector(writer.i32, CHUNK))
    upper = writer.builder.and_(bits, writer.filled(writer.i32, CHUNK, 0xFFFF0000))
    rest = writer.builder.fsub(numbers, writer.builder.bitcast(upper, numbers.type))
    for part, half in enumerate((upper, writer.builder.bitcast(rest, upper.type))):
        writer.store(_take_upper(writer, half), writer.address(place, part * TILE_BYTES))


def _find_sums(writer: KernelWriter, shape: TileShape, partial: Any, row: Any, panel: Any) -> Any:
    """Return the address of a tile of partial sums, by a row and a panel of the block."""
    tile = writer.times(writer.builder.sdiv(row, writer.const(SIDE)), shape.panels)
    return writer.add(partial, writer.times(writer.add(tile, panel), shape.input_bytes))


def _multiply_chunk(
    writer: KernelWriter,
    shape: TileShape,
    spot: tuple[Any, Any],
    place: Any,
    stride: Any = None,
) -> Iterator[None]:
    """Multiply 32 columns of the tiles of weights by those of the tokens, step by step.

    Args:
        spot: the first tile of tokens, and the column.
        place: the address of the weights.
        stride: bytes between their rows, if they are not split.
    """
    size: Any = TILE_BYTES * shape.weight_parts if stride is None else writer.times(stride, SIDE)
    stride = writer.const(TILE_BYTES // SIDE) if stride is None else stride
    lines = [place, writer.add(place, size)]
    registers = Registers(writer, shape)
    for line, panel, (weight_part, input_part) in shape.steps:
        place = writer.add(lines[line], weight_part * TILE_BYTES)
        weight = registers.load("weight", (line, weight_part), place, stride)
        place = _find_input(writer, shape, spot, (panel, input_part))
        input = registers.load("input", (panel, input_part), place, writer.const(4 * shape.tokens))
        operands = [writer.i8(n) for n in (line * shape.panels + panel, weight, input)]
        writer.call("llvm.x86.tdpbf16ps", writer.ir.VoidType(), operands)
        yield


def _find_input(
    writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any], wanted: tuple[int, int]
) -> Any:
    """Return the address of a tile of tokens, behind a first one, and of a part of it."""
    (first, column), (panel, part) = spot, wanted
    tile = writer.times(writer.add(first, panel), writer.slot("chunks"))
    tile = writer.add(tile, writer.builder.sdiv(column, writer.const(CHUNK)))
    place = writer.add(writer.times(tile, shape.parts), part)
    return writer.add(writer.slot("split"), writer.times(place, shape.input_bytes))


class Registers:
    """The registers of operands while a chunk is multiplied; what was used last stays longest."""

    def __init__(self, writer: KernelWriter, shape: TileShape) -> None:
        self.writer, self.held = writer, {}
        self.free = {"weight": list(shape.weight_registers), "input": list(shape.input_registers)}

    def load(self, kind: str, name: tuple[int, int], place: Any, stride: Any) -> int:
        """Return the register that holds a tile, loaded if none does."""
        held: dict[tuple[int, int], int] = self.held.setdefault(kind, {})
        if name not in held:
            free = self.free[kind]
            register = free.pop(0) if free else held.pop(next(iter(held)))
            _move_tile(self.writer, "loadd", register, place, stride)
        else:
            register = held.pop(name)
        held[name] = register
        return register


def _move_tile(writer: KernelWriter, action: str, register: int, place: Any, stride: Any) -> None:
    """Load ("loadd") or store ("stored") a tile register."""
    arguments = [writer.i8(register), writer.address(place), stride]
    writer.call(f"llvm.x86.tile{action}64", writer.ir.VoidType(), arguments)


def _store_sums(
    writer: KernelWriter, shape: TileShape, corner: tuple[Any, Any], partial: Any
) -> None:
    """Store a block's sums at `(token, row)`."""
    at, (first, panel) = writer.slot, corner
    rows, start = writer.const(shape.block_rows), writer.times(panel, shape.tokens)
    last = writer.add(start, shape.panels * shape.tokens)
    last = writer.smaller(last, at("tokens"))
    with writer.loop(start, last) as token:
        line = writer.builder.sub(token, start)
        side = writer.builder.srem(line, writer.const(shape.tokens))
        line = writer.builder.sdiv(line, writer.const(shape.tokens))
        target = writer.times(writer.add(writer.times(token, at("rows")), first), 4)
        target = writer.add(at("output"), target)
        with writer.loop(writer.const(0), rows) as row:
            place = _find_sums(writer, shape, partial, row, line)
            inner = writer.times(writer.builder.srem(row, writer.const(SIDE)), shape.tokens)
            place = writer.add(place, writer.times(writer.add(inner, side), 4))
            value = writer.load(writer.address(place), writer.f32)
            writer.store(value, writer.address(target, writer.times(row, 4)))


SPLIT = KernelSource(
    ("blocks", "chunks", "tokens", "columns", "input", "split"),
    write_split,
)
TILES = KernelSource(
    (
        *("blocks", "row_blocks", "chunks", "tokens", "rows", "columns", "row_bytes", "weight"),
        *("split", "output"),
    ),
    write_tiles,
)
