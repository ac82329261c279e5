"""The kernels that multiply halves by the tile registers of a processor that has them (AMX).

Owns both kernels' bodies: one splits the input, one multiplies. Knows nothing of torch.

A tile product sums pairs of bfloat16 numbers in float32. So a float32 input becomes the sum of two
bfloat16 numbers, which keep 16 of its 24 bits (and all 11 of a float16 number's, all 8 of a
bfloat16's); a float16 weight becomes the sum of two as well, exactly:

    y = w1 * x1 + w1 * x2 + w2 * x1        (w2 * x2 is below what is left out of x)

What a sum adds, and in which order, is the same whatever stands beside it in the tiles. Numbers
below 2**-126 count as zeros, and a product of float16 weights with an infinite input may be NaN.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from chatglm.cpu.writer import KernelSource, KernelWriter

SIDE = 16  # rows of a tile register: weight rows, or pairs of columns
CHUNK = 32  # columns of a tile product
TILE_BYTES = 1024  # of a tile of weights
SPAN = 512  # columns that pass before the others do, of all tokens; a multiple of CHUNK
REGISTERS, WEIGHTS = 8, 4  # of tiles; the first ones hold sums, those from 4 on the operands
UNIT = 4  # tile products along the columns whose weights are split at once
PREFETCH = 2048  # bytes ahead of the weights being read in each row


class TileShape(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        weight_type: "f16" or "bf16".
        tokens: input rows in a tile, 1 to 16.
        panels: how many tiles of them are multiplied side by side: 1, 2 or 4.
        parts: bfloat16 numbers that an input number becomes, 1 or 2.
        block_rows: weight rows of a block, a multiple of 32.
        block_panels: tiles of tokens that pass a block together, a multiple of `panels`.
        is_direct: whether all tokens are in the registers at once, so that weights are read once
            and none of them has to wait in memory.
    """

    weight_type: str
    tokens: int
    panels: int
    parts: int
    block_rows: int
    block_panels: int
    is_direct: bool

    @property
    def lines(self) -> int:
        """Tiles of weights side by side: the sums have four registers."""
        return 1 if self.panels == 4 else 2

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Which part of the weights meets which part of the input, in the order of the sums."""
        with_weights = [(0, part) for part in range(self.parts)]
        return with_weights if self.weight_type == "bf16" else [*with_weights, (1, 0)]

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
    """Multiply split tokens by halves; a block is a run of weight rows."""
    at = writer.slot
    spread_rows = SIDE * shape.lines if shape.is_direct else shape.block_rows
    columns = 2 * UNIT * CHUNK if shape.is_direct else SPAN
    wide = writer.reserve(spread_rows * columns * 2 * shape.weight_parts)
    tiles = shape.block_rows // SIDE * shape.block_panels
    partial = writer.reserve(tiles * shape.input_bytes)
    _configure(writer, shape)
    with writer.parallel_for(at("blocks")) as block:
        first = writer.times(block, shape.block_rows)
        if shape.is_direct:
            _multiply_direct(writer, shape, first, (wide, partial))
        else:
            _multiply_spans(writer, shape, first, (wide, partial))
    writer.call("llvm.x86.tilerelease", writer.ir.VoidType(), [])


def _multiply_spans(
    writer: KernelWriter, shape: TileShape, first: Any, places: tuple[Any, Any]
) -> None:
    """Multiply a block by many tokens, whose sums wait while the next span is made ready."""
    at, (wide, partial) = writer.slot, places
    with writer.loop(writer.const(0), at("panels"), shape.block_panels) as panel:
        stop = writer.smaller(writer.add(panel, shape.block_panels), at("panels"))
        with writer.loop(writer.const(0), at("columns"), SPAN) as column:
            _spread_weights(writer, shape, (first, column), wide)
            with (
                writer.loop(panel, stop, shape.panels) as index,
                writer.loop(writer.const(0), writer.const(shape.block_rows), 32) as row,
            ):
                _multiply_tiles(writer, shape, (first, row, panel, index, column), places)
        _store_sums(writer, shape, (first, panel, stop), partial)


def _multiply_direct(
    writer: KernelWriter, shape: TileShape, first: Any, places: tuple[Any, Any]
) -> None:
    """Multiply a block by few tokens; the last block may repeat rows of the one before."""
    at, (wide, partial), zero = writer.slot, places, writer.const(0)
    first = writer.smaller(first, writer.add(at("rows"), -shape.block_rows))
    step = SIDE * shape.lines
    left = writer.builder.srem(at("columns"), writer.const(CHUNK))
    full = writer.builder.sub(at("columns"), left)
    with writer.loop(zero, writer.const(shape.block_rows), step) as row:
        base = writer.times(writer.add(first, row), at("row_bytes"))
        base = writer.add(at("weight"), base)
        for n in range(shape.lines * shape.panels):
            writer.call("llvm.x86.tilezero", writer.ir.VoidType(), [writer.i8(n)])
        _add_products(writer, shape, (base, full, left), wide)
        for n in range(shape.lines * shape.panels):
            line = writer.add(row, n // shape.panels * SIDE)
            place = _find_sums(writer, shape, partial, line, writer.const(n % shape.panels))
            _move_tile(writer, "stored", n, place, writer.const(4 * shape.tokens))
    _store_sums(writer, shape, (first, zero, at("panels")), partial)


def _add_products(
    writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any, Any], wide: Any
) -> None:
    """Go along the columns of a few tiles' rows: `full` of them by 32, and `left` at the end."""
    (base, full, left), zero = spot, writer.const(0)
    start = zero
    if shape.weight_type == "f16":
        start = _add_units(writer, shape, (base, full), wide)
    with writer.loop(start, full, CHUNK) as column:
        if shape.weight_type == "bf16":  # stored as a tile product takes it
            _prefetch_rows(writer, shape, base, column)
            _multiply_rows(writer, shape, column, base, writer.slot("row_bytes"))
        else:
            _spread_rows(writer, shape, (base, column, None), wide)
            _multiply_rows(writer, shape, column, wide)
    with writer.when(writer.builder.icmp_signed(">", left, zero)):
        _spread_rows(writer, shape, (base, full, left), wide)
        _multiply_rows(writer, shape, full, wide)


def _add_units(writer: KernelWriter, shape: TileShape, spot: tuple[Any, Any], wide: Any) -> Any:
    """Split weights by units, each while the one before is multiplied; return where they end."""
    (base, full), zero, size = spot, writer.const(0), UNIT * CHUNK
    end = writer.times(writer.builder.sdiv(full, writer.const(size)), size)
    with writer.when(writer.builder.icmp_signed(">", end, zero)):
        with writer.loop(zero, writer.const(UNIT)) as part:
            _run(_spread_unit(writer, shape, (base, zero, part), wide))
        with (
            writer.loop(writer.const(size), end, size) as column,
            writer.loop(zero, writer.const(UNIT)) as part,
        ):
            spreading = _spread_unit(writer, shape, (base, column, part), wide)
            before = writer.add(writer.add(column, -size), writer.times(part, CHUNK))
            place = _find_turn(writer, shape, before, wide)
            multiplying = _multiply_chunk(
                writer, shape, *_list_operands(writer, shape, before, place)
            )
            # Each takes the units of the processor that the other one leaves free.
            every = SIDE * shape.lines // (shape.lines * shape.panels * len(shape.pairs))
            for n, _ in enumerate(spreading):
                if n % max(1, every) == 0:
                    next(multiplying, None)
            _run(multiplying)
        with writer.loop(writer.add(end, -size), end, CHUNK) as column:
            _multiply_rows(writer, shape, column, _find_turn(writer, shape, column, wide))
    return end


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


def _multiply_rows(
    writer: KernelWriter, shape: TileShape, column: Any, place: Any, stride: Any = None
) -> None:
    """Multiply 32 columns of a few tiles' rows that stand somewhere."""
    if stride is not None:
        place = writer.add(place, writer.times(column, 2))
    _run(_multiply_chunk(writer, shape, *_list_operands(writer, shape, column, place, stride)))


def _list_operands(
    writer: KernelWriter, shape: TileShape, column: Any, place: Any, stride: Any = None
) -> tuple[list[Any], list[Any], Any]:
    """Return the addresses of a few tiles of weights, the numbers of those of input, a stride."""
    chunk = writer.builder.sdiv(column, writer.const(CHUNK))
    inputs = [
        writer.add(writer.times(writer.slot("chunks"), p), chunk) for p in range(shape.panels)
    ]
    size: Any = TILE_BYTES * shape.weight_parts
    if stride is not None:
        size = writer.times(stride, SIDE)
    lines = [place, writer.add(place, size)][: shape.lines]
    return lines, inputs, stride


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
    widths[WEIGHTS : WEIGHTS + shape.lines] = [TILE_BYTES // SIDE] * shape.lines
    data = [1, *[0] * 15]
    for width in widths:
        data += [width, 0]
    data += [0] * 16 + [SIDE] * len(widths) + [0] * 8
    place = writer.reserve(64)
    kind = writer.vector(writer.i8, 64)
    writer.store(writer.ir.Constant(kind, data), writer.address(place))
    writer.call("llvm.x86.ldtilecfg", writer.ir.VoidType(), [writer.address(place)])


def _spread_weights(
    writer: KernelWriter, shape: TileShape, corner: tuple[Any, Any], wide: Any
) -> None:
    """Store a span of a block's weights tile by tile, zeros behind the last column."""
    at, builder, (first, column) = writer.slot, writer.builder, corner
    end = writer.smaller(writer.add(column, SPAN), at("columns"))
    left = builder.srem(at("columns"), writer.const(CHUNK))
    full = builder.sub(at("columns"), left)
    is_cut = builder.icmp_signed("<", full, end)
    with writer.loop(writer.const(0), writer.const(shape.block_rows)) as row:
        index = writer.smaller(writer.add(first, row), writer.add(at("rows"), -1))
        base = writer.add(at("weight"), writer.times(index, at("row_bytes")))
        place = _find_tile(writer, shape, wide, row, writer.const(0))
        side = builder.srem(row, writer.const(SIDE))
        place = writer.add(place, writer.times(side, TILE_BYTES // SIDE))
        with writer.loop(column, writer.smaller(end, full), CHUNK) as start:
            target = _find_chunk(writer, shape, place, (start, column))
            _spread_chunk(writer, shape, base, start, target, None)
        with writer.when(is_cut):
            target = _find_chunk(writer, shape, place, (full, column))
            _spread_chunk(writer, shape, base, full, target, left)


def _find_tile(writer: KernelWriter, shape: TileShape, wide: Any, row: Any, chunk: Any) -> Any:
    """Return the address of a tile of spread weights, by a row in the block and a chunk."""
    tile = writer.times(writer.builder.sdiv(row, writer.const(SIDE)), SPAN // CHUNK)
    tile = writer.add(tile, chunk)
    return writer.add(wide, writer.times(tile, TILE_BYTES * shape.weight_parts))


def _find_chunk(
    writer: KernelWriter, shape: TileShape, place: Any, columns: tuple[Any, Any]
) -> Any:
    """Return the address of a row's 32 columns in spread weights that begin with some column."""
    start, first = columns
    chunk = writer.builder.sdiv(writer.builder.sub(start, first), writer.const(CHUNK))
    return writer.add(place, writer.times(chunk, TILE_BYTES * shape.weight_parts))


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


def _multiply_tiles(
    writer: KernelWriter, shape: TileShape, spot: tuple[Any, ...], places: tuple[Any, Any]
) -> None:
    """Add a span's products to the sums of two tiles of rows by one or two of tokens."""
    (first, row, panel, index, column), (wide, partial) = spot, places
    sums = [
        _find_sums(writer, shape, partial, writer.add(row, SIDE * r), writer.add(line, p))
        for line in [writer.builder.sub(index, panel)]
        for r in range(shape.lines)
        for p in range(shape.panels)
    ]
    _load_sums(writer, shape, sums, column)
    end = writer.smaller(writer.add(column, SPAN), writer.slot("columns"))
    chunks = writer.builder.sdiv(
        writer.add(writer.builder.sub(end, column), CHUNK - 1), writer.const(CHUNK)
    )
    with writer.loop(writer.const(0), chunks) as chunk:
        _prefetch(writer, shape, writer.add(first, row), (column, chunk))
        weights = [
            _find_tile(writer, shape, wide, writer.add(row, SIDE * r), chunk)
            for r in range(shape.lines)
        ]
        whole = writer.add(writer.builder.sdiv(column, writer.const(CHUNK)), chunk)
        inputs = [
            writer.add(writer.times(writer.add(index, p), writer.slot("chunks")), whole)
            for p in range(shape.panels)
        ]
        _run(_multiply_chunk(writer, shape, weights, inputs))
    for n, place in enumerate(sums):
        _move_tile(writer, "stored", n, place, writer.const(4 * shape.tokens))


def _find_sums(writer: KernelWriter, shape: TileShape, partial: Any, row: Any, panel: Any) -> Any:
    """Return the address of a tile of partial sums, by a row and a panel of the block."""
    tile = writer.times(writer.builder.sdiv(row, writer.const(SIDE)), shape.block_panels)
    return writer.add(partial, writer.times(writer.add(tile, panel), shape.input_bytes))


def _load_sums(writer: KernelWriter, shape: TileShape, sums: list[Any], column: Any) -> None:
    """Load what earlier spans have summed, or zeros."""
    is_first = writer.builder.icmp_signed("==", column, writer.const(0))
    with writer.builder.if_else(is_first) as (then, otherwise):
        with then:
            for n in range(len(sums)):
                writer.call("llvm.x86.tilezero", writer.ir.VoidType(), [writer.i8(n)])
        with otherwise:
            for n, place in enumerate(sums):
                _move_tile(writer, "loadd", n, place, writer.const(4 * shape.tokens))


def _multiply_chunk(
    writer: KernelWriter,
    shape: TileShape,
    weights: list[Any],
    inputs: list[Any],
    stride: Any = None,
) -> Iterator[None]:
    """Multiply 32 columns of the tiles of weights by those of the tokens, step by step."""
    stride = writer.const(TILE_BYTES // SIDE) if stride is None else stride
    held: dict[int, Any] = {}  # by registers
    for weight_part, input_part in shape.pairs:
        for n in range(shape.lines * shape.panels):
            line, panel = divmod(n, shape.panels)
            place = writer.add(weights[line], weight_part * TILE_BYTES)
            wanted = WEIGHTS + line, ("weight", line, weight_part), place, stride
            _hold(writer, held, *wanted)
            place = writer.times(inputs[panel], shape.parts * shape.input_bytes)
            place = writer.add(place, input_part * shape.input_bytes)
            place = writer.add(writer.slot("split"), place)
            first = WEIGHTS + shape.lines
            register = first + panel % (REGISTERS - first)
            wanted = register, ("input", panel, input_part), place, writer.const(4 * shape.tokens)
            _hold(writer, held, *wanted)
            registers = [writer.i8(x) for x in (n, WEIGHTS + line, register)]
            writer.call("llvm.x86.tdpbf16ps", writer.ir.VoidType(), registers)
            yield


def _hold(
    writer: KernelWriter, held: dict[int, Any], register: int, name: Any, place: Any, stride: Any
) -> None:
    """Load a tile into a register, unless that is what it holds."""
    if held.get(register) != name:
        _move_tile(writer, "loadd", register, place, stride)
        held[register] = name


def _move_tile(writer: KernelWriter, action: str, register: int, place: Any, stride: Any) -> None:
    """Load ("loadd") or store ("stored") a tile register."""
    arguments = [writer.i8(register), writer.address(place), stride]
    writer.call(f"llvm.x86.tile{action}64", writer.ir.VoidType(), arguments)


def _prefetch(writer: KernelWriter, shape: TileShape, row: Any, columns: tuple[Any, Any]) -> None:
    """Ask for the weights of the next span, or behind a row's end of the next block's."""
    at, (column, chunk) = writer.slot, columns
    ahead = writer.add(writer.add(column, SPAN), writer.times(chunk, CHUNK))
    offset = writer.times(ahead, 2)
    is_behind = writer.builder.icmp_signed(">=", offset, at("row_bytes"))
    skipped = writer.times(at("row_bytes"), shape.block_rows - 1)
    offset = writer.add(offset, writer.builder.select(is_behind, skipped, writer.const(0)))
    offset = writer.add(offset, writer.times(row, at("row_bytes")))
    offset = writer.add(offset, at("weight"))
    for r in range(shape.lines * SIDE):
        writer.prefetch(writer.address(offset, writer.times(at("row_bytes"), r)))


def _store_sums(
    writer: KernelWriter, shape: TileShape, ranges: tuple[Any, Any, Any], partial: Any
) -> None:
    """Store a block's sums at `(token, row)`."""
    at, (first, panel, stop) = writer.slot, ranges
    rows = writer.smaller(writer.builder.sub(at("rows"), first), writer.const(shape.block_rows))
    start = writer.times(panel, shape.tokens)
    last = writer.smaller(writer.times(stop, shape.tokens), at("tokens"))
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
        *("blocks", "chunks", "panels", "tokens", "rows", "columns", "row_bytes", "weight"),
        *("split", "output"),
    ),
    write_tiles,
)
