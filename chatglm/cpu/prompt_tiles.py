"""Products of a prompt's attention by tile registers of halves (AMX).

Owns how keys, values, tokens and exponentials become tiles, and the product of two rows of tiles.
What is multiplied with what, `prompt_kernels` says.

A tile product sums pairs of bfloat16 numbers in float32. Where keys are float16, every operand
becomes the sum of two bfloat16 numbers, which keep all 11 bits of a float16 number and 16 of a
float32 number; of their products the smallest is left out:

    sums = left1 * right1 + left2 * right1 + left1 * right2
"""

from typing import Any, NamedTuple

from chatglm.cpu.writer import KernelWriter

KEYS = 128  # of a chunk
SIDE = 16  # rows of a tile, and its numbers of 32 bits across
CHUNK = 32  # halves across a tile
TILE_BYTES = 1024
UPPER = 0xFFFF0000  # the bits of a float32 number that a bfloat16 one has


class TileSpace(NamedTuple):
    """Where the tiles of right operands are: of the tokens, and of the exponentials."""

    query: Any
    weights: Any


def configure(writer: KernelWriter) -> None:
    """Tell this thread's tile registers that all of them are whole."""
    data = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8]
    kind, place = writer.vector(writer.i8, 64), writer.reserve(64)
    writer.store(writer.ir.Constant(kind, data), writer.address(place))
    writer.call("llvm.x86.ldtilecfg", writer.ir.VoidType(), [writer.address(place)])


def release(writer: KernelWriter) -> None:
    """Give the tile registers back, whose state the system would save else."""
    writer.call("llvm.x86.tilerelease", writer.ir.VoidType(), [])


def split_rows(writer: KernelWriter, parts: int, lines: Any, width: Any, target: Any) -> None:
    """Split float32 lines into tiles of pairs of lines: `[column / 16][line / 32][part]`.

    Args:
        lines: the first one's address, how many there are, a multiple of 32, and bytes a line.
        width: columns.
    """
    base, count, line_bytes = lines
    chunks = writer.builder.sdiv(count, writer.const(CHUNK))
    with (
        writer.loop(writer.const(0), width, SIDE) as column,
        writer.loop(writer.const(0), count, 2) as line,
    ):
        source = writer.add(base, writer.times(line, line_bytes))
        source = writer.add(source, writer.times(column, 4))
        kind = writer.vector(writer.f32, SIDE)
        pair = [writer.load(writer.address(source, n * line_bytes), kind) for n in (0, 1)]
        tile = writer.times(writer.builder.sdiv(column, writer.const(SIDE)), chunks)
        tile = writer.add(tile, writer.builder.sdiv(line, writer.const(CHUNK)))
        row = writer.builder.srem(line, writer.const(CHUNK))  # two lines are a row of 64 bytes
        place = writer.add(writer.times(tile, parts * TILE_BYTES), writer.times(row, CHUNK))
        place = writer.add(target, place)
        for part in range(parts):
            uppers, pair = zip(*(_take_part(writer, x, part == parts - 1) for x in pair))
            first = writer.builder.lshr(uppers[0], writer.filled(writer.i32, SIDE, 16))
            writer.store(
                writer.builder.or_(first, uppers[1]), writer.address(place, part * TILE_BYTES)
            )


def _take_part(writer: KernelWriter, numbers: Any, is_last: bool) -> tuple[Any, Any]:
    """Return the upper halves of float32 numbers, the last ones rounded, and what is left."""
    builder, count = writer.builder, numbers.type.count

    def filled(value: int) -> Any:
        return writer.filled(writer.i32, count, value)

    bits = builder.bitcast(numbers, writer.vector(writer.i32, count))
    if is_last:
        is_odd = builder.and_(builder.lshr(bits, filled(16)), filled(1))
        bits = builder.add(bits, builder.add(is_odd, filled(0x7FFF)))
    upper = builder.and_(bits, filled(UPPER))
    return upper, builder.fsub(numbers, builder.bitcast(upper, numbers.type))


def spread_keys(writer: KernelWriter, operand: tuple[str, int], chunk: Any, target: Any) -> None:
    """Write a chunk's keys as tiles of 16 keys: `[key / 16][dim / 32][part]`.

    Args:
        operand: "f16" or "bf16", and D.
        chunk: the first key's address, and how many there are; the last one is repeated.
    """
    (kind, head_dim), (base, count) = operand, chunk
    parts, last = _count_parts(kind), writer.add(count, -1)
    with writer.loop(writer.const(0), writer.const(KEYS)) as key:
        source = writer.times(writer.smaller(key, last), 2 * head_dim)
        source = writer.add(base, source)
        tile = writer.times(writer.builder.sdiv(key, writer.const(SIDE)), head_dim // CHUNK)
        row = writer.times(writer.builder.srem(key, writer.const(SIDE)), 2 * CHUNK)
        place = writer.add(writer.times(tile, parts * TILE_BYTES), row)
        place = writer.add(target, place)
        for number in range(head_dim // CHUNK):
            halves = writer.vector(writer.i16, CHUNK)
            stored = writer.load(writer.address(source, number * 2 * CHUNK), halves)
            _store_parts(writer, kind, stored, writer.add(place, number * parts * TILE_BYTES))


def spread_values(writer: KernelWriter, operand: tuple[str, int], chunk: Any, target: Any) -> None:
    """Write a chunk's values as tiles of 16 dimensions: `[dim / 16][key / 32][part]`."""
    (kind, head_dim), (base, count) = operand, chunk
    parts, last = _count_parts(kind), writer.add(count, -1)
    with (
        writer.loop(writer.const(0), writer.const(KEYS // CHUNK)) as number,
        writer.loop(writer.const(0), writer.const(head_dim), SIDE) as dim,
    ):
        pairs = []
        for row in range(SIDE):
            key = writer.add(writer.times(number, CHUNK), 2 * row)
            pairs.append(_load_pair(writer, (base, dim), (key, last), 2 * head_dim))
        tile = writer.times(writer.builder.sdiv(dim, writer.const(SIDE)), KEYS // CHUNK)
        place = writer.times(writer.add(tile, number), parts * TILE_BYTES)
        place = writer.add(target, place)
        for row, vector in enumerate(turn(writer, pairs)):
            halves = writer.builder.bitcast(vector, writer.vector(writer.i16, CHUNK))
            _store_parts(writer, kind, halves, writer.add(place, row * 2 * CHUNK))


def _load_pair(writer: KernelWriter, start: Any, key: tuple[Any, Any], key_bytes: int) -> Any:
    """Load 16 dimensions of a value and of the next one, side by side as numbers of 32 bits."""
    (base, dim), (key, last) = start, key
    halves = []
    for number in (key, writer.add(key, 1)):
        line = writer.times(writer.smaller(number, last), key_bytes)
        place = writer.address(writer.add(base, line), writer.times(dim, 2))
        halves.append(writer.load(place, writer.vector(writer.i16, SIDE)))
    order = [n // 2 + (n % 2) * SIDE for n in range(2 * SIDE)]
    mixed = writer.shuffle(halves[0], order, halves[1])
    return writer.builder.bitcast(mixed, writer.vector(writer.i32, SIDE))


def turn(writer: KernelWriter, vectors: list[Any]) -> list[Any]:
    """Return the columns of as many vectors as each has elements, a power of two."""
    count, found = len(vectors), list(vectors)
    half = count // 2
    while half:
        # Of each pair the first takes both left parts, and the second both right ones.
        left = [n if not n & half else count + n - half for n in range(count)]
        right = [n + half if not n & half else count + n for n in range(count)]
        for n in (n for n in range(count) if not n & half):
            first, second = found[n], found[n + half]
            found[n] = writer.shuffle(first, left, second)
            found[n + half] = writer.shuffle(first, right, second)
        half //= 2
    return found


def _count_parts(kind: str) -> int:
    return 1 if kind == "bf16" else 2


def _store_parts(writer: KernelWriter, kind: str, halves: Any, place: Any) -> None:
    """Store 32 stored numbers as one or two rows of bfloat16 numbers."""
    if kind == "bf16":
        writer.store(halves, writer.address(place))
        return
    builder = writer.builder
    stored = builder.bitcast(halves, writer.vector(writer.f16, CHUNK))
    numbers = builder.fpext(stored, writer.vector(writer.f32, CHUNK))
    for part in range(2):
        upper, numbers = _take_part(writer, numbers, part == 1)
        bits = builder.bitcast(upper, writer.vector(writer.i16, 2 * CHUNK))
        writer.store(
            writer.shuffle(bits, range(1, 2 * CHUNK, 2)), writer.address(place, part * TILE_BYTES)
        )


def multiply_tiles(writer: KernelWriter, parts: int, operands: Any, width: Any, adds: bool) -> None:
    """Multiply two lines of left tiles by two columns of right ones at a time.

    Args:
        operands: the left tiles' address; the right ones', and how many 32 steps are summed; the
            address of the sums, how many lines they have, a multiple of 32, and bytes a line.
        width: columns.
        adds: whether to what is there.
    """
    left, (right, chunks), (sums, lines, line_bytes) = operands
    size, stride = chunks * parts * TILE_BYTES, writer.const(line_bytes)
    with (
        writer.loop(writer.const(0), lines, 2 * SIDE) as line,
        writer.loop(writer.const(0), width, 2 * SIDE) as column,
    ):
        corner = writer.add(writer.times(line, line_bytes), writer.times(column, 4))
        corner = writer.add(sums, corner)
        places = [writer.add(corner, i * SIDE * line_bytes + j * 64) for i, j in CELLS]
        for register, place in enumerate(places):
            if adds:
                _move(writer, "loadd", register, place, stride)
            else:
                writer.call("llvm.x86.tilezero", writer.ir.VoidType(), [writer.i8(register)])
        starts = [
            writer.add(base, writer.times(writer.builder.sdiv(index, writer.const(SIDE)), size))
            for base, index in ((left, line), (right, column))
        ]
        with writer.loop(writer.const(0), writer.const(size), parts * TILE_BYTES) as step:
            _multiply_step(writer, parts, [writer.add(start, step) for start in starts], size)
        for register, place in enumerate(places):
            _move(writer, "stored", register, place, stride)


CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # lines and columns of tiles whose sums are registers
LEFT, RIGHT = 4, 6  # the first registers of operands


def _multiply_step(writer: KernelWriter, parts: int, places: list[Any], size: int) -> None:
    """Add 32 steps of four cells, each tile loaded as late and as seldom as can be."""
    left, right = places
    # The left operand's rest, then the left operand, then the right one's rest.
    turns = [("left", 1), ("right", 0), ("left", 0), ("right", 1)]
    loaded = set()
    for side, part in turns if parts == 2 else turns[1:3]:
        first, base = (LEFT, left) if side == "left" else (RIGHT, right)
        for n in (0, 1):
            place = writer.add(base, n * size + part * TILE_BYTES)
            _move(writer, "loadd", first + n, place, writer.const(64))
        loaded.add(side)
        if len(loaded) == 2:
            for register, (i, j) in enumerate(CELLS):
                operands = [writer.i8(n) for n in (register, LEFT + i, RIGHT + j)]
                writer.call("llvm.x86.tdpbf16ps", writer.ir.VoidType(), operands)


def _move(writer: KernelWriter, action: str, register: int, place: Any, stride: Any) -> None:
    """Load ("loadd") or store ("stored") a tile register."""
    arguments = [writer.i8(register), writer.address(place), stride]
    writer.call(f"llvm.x86.tile{action}64", writer.ir.VoidType(), arguments)


__all__ = [
    "KEYS",
    "TileSpace",
    "configure",
    "multiply_tiles",
    "release",
    "split_rows",
    "spread_keys",
    "spread_values",
    "turn",
]
