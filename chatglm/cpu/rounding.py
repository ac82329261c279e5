"""How a CPU kernel's input is rounded to 8 bits, and how the rounded rows lie in memory.

Owns the layout that the product kernels read, and the kernel that writes it. Knows nothing of
weights' values.

An input row is rounded in halves of *spans*, 64 of 128 columns, with a scale for each:

    scale[g] = max_i |x[i]| / 127          levels[i] = round_half_to_even(x[i] / scale[g])

The processors' instructions take the weights unsigned: a stored 4-bit `w` is read as `w + 8`, and
with some of them an 8-bit one as `w + 128`. What that adds to a sum is known beforehand, and every
sum starts at minus that, its *start*.

A byte of 4-bit weights holds an even and an odd column. So the levels of each half are kept in
*planes*: the even columns, then the odd ones; those of 8-bit weights in one.

Layout of a rounded row: the levels of all its spans; then for each span its two scales (float32)
and the starts (int32) of its pieces: halves, or quarters where weights' groups are that narrow.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from chatglm.cpu.writer import KernelSource, KernelWriter, Processor

GROUP = 32  # columns whose levels are worked out at once
HALF = 64  # columns that share a scale
SPAN = 2 * HALF  # columns that are loaded at a time: a vector of 4-bit weights, or more vectors
SMALLEST = 1e-36  # a half of smaller numbers becomes zeros: 127 / largest must be finite
LINE = 64  # bytes; every row begins with a cache line


class Layout(NamedTuple):
    """How rounded rows lie in memory.

    Attributes:
        processor: whose vectors they fit.
        bits: of the weights.
        pieces: of a span, which have a start each: 2 or 4.
    """

    processor: Processor
    bits: int
    pieces: int = 2

    @property
    def planes(self) -> int:
        """Vectors of levels to a chunk of weights."""
        return 8 // self.bits

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a vector of weights or levels."""
        return 4 * self.processor.lanes

    @property
    def chunks(self) -> int:
        """Vectors of weights to a span."""
        return SPAN // (self.planes * self.chunk_bytes)

    @property
    def note_bytes(self) -> int:
        """Bytes of what is noted of a span: scales and starts."""
        return 8 + 4 * self.pieces

    @property
    def offset(self) -> int:
        """What reading a stored weight unsigned adds to it."""
        if self.bits == 4:
            return 8
        return 128 if self.processor.dot in ("vnni", "avx-vnni") else 0

    def count_spans(self, columns: int) -> int:
        """Return the spans of a row of so many columns."""
        return -(-columns // SPAN)

    def count_bytes(self, columns: int) -> int:
        """Return the bytes of a rounded row of so many columns."""
        used = self.count_spans(columns) * (SPAN + self.note_bytes)
        return -(-used // LINE) * LINE


def write_rounding(writer: KernelWriter, layout: Layout) -> None:
    """Round rows of float32 to levels; a block of the work is a row."""
    at, spans = writer.slot, writer.slot("spans")
    full = writer.builder.sdiv(at("columns"), writer.const(SPAN))
    with writer.parallel_for(at("rows")) as row:
        source = writer.add(at("input"), writer.times(row, at("input_stride")))
        target = writer.add(at("rounded"), writer.times(row, at("rounded_stride")))
        for start, stop, is_whole in ((writer.const(0), full, True), (full, spans, False)):
            with writer.loop(start, stop) as span:
                first = writer.times(span, SPAN)
                notes = writer.add(target, writer.times(spans, SPAN))
                notes = writer.add(notes, writer.times(span, layout.note_bytes))
                places = writer.add(target, first), notes
                _round_span(writer, layout, (source, first), places, is_whole)


def _round_span(
    writer: KernelWriter,
    layout: Layout,
    source: tuple[Any, Any],
    places: tuple[Any, Any],
    is_whole: bool,
) -> None:
    """Round one span, and note its scales and starts."""
    target, notes = places
    found = []
    for half in range(2):
        columns = range(half * HALF, (half + 1) * HALF, GROUP)
        numbers = [_load_numbers(writer, source, column, is_whole) for column in columns]
        levels, scale = _round_group(writer, numbers)
        writer.store(scale, writer.address(notes, 4 * half))
        found += levels
    for group, vector in enumerate(found):
        _store_levels(writer, layout, target, group, vector)
    count = len(found) // layout.pieces
    for piece in range(layout.pieces):
        start = _find_start(writer, layout, found[piece * count : (piece + 1) * count])
        writer.store(start, writer.address(notes, 8 + 4 * piece))


def _load_numbers(
    writer: KernelWriter, source: tuple[Any, Any], column: int, is_whole: bool
) -> Any:
    """Load 32 numbers of a row; behind its end there are zeros."""
    base, first = source
    first = writer.add(first, column)
    place = writer.address(base, writer.times(first, 4))
    kind = writer.vector(writer.f32, GROUP)
    if is_whole:
        return writer.load(place, kind)
    return writer.load_first(place, kind, writer.builder.sub(writer.slot("columns"), first))


def _round_group(writer: KernelWriter, numbers: Sequence[Any]) -> tuple[list[Any], Any]:
    """Return the levels of vectors that share a scale, as int32, and the scale.

    The largest is found among the bits, where a NaN is larger than any number, so that it reaches
    the scale and everything that is multiplied by it.
    """
    builder, kind = writer.builder, writer.vector(writer.i32, GROUP)
    largest = None
    for vector in numbers:
        bits = builder.and_(
            builder.bitcast(vector, kind), writer.filled(writer.i32, GROUP, 0x7FFFFFFF)
        )
        is_larger = None if largest is None else builder.icmp_unsigned(">", bits, largest)
        largest = bits if is_larger is None else builder.select(is_larger, bits, largest)
    peak = builder.bitcast(writer.largest(largest), writer.f32)
    is_usable = builder.fcmp_ordered(">", peak, writer.f32(SMALLEST))
    inverse = builder.fdiv(writer.f32(127.0), peak)
    inverse = writer.splat(builder.select(is_usable, inverse, writer.f32(0.0)), GROUP)
    levels = []
    for vector in numbers:
        rounded = writer.call_vector("rint", builder.fmul(vector, inverse))
        name = f"llvm.fptosi.sat.v{GROUP}i32.v{GROUP}f32"
        levels.append(writer.call(name, kind, [rounded]))
    return levels, builder.fdiv(peak, writer.f32(127.0))


def _store_levels(
    writer: KernelWriter, layout: Layout, target: Any, group: int, levels: Any
) -> None:
    """Store 32 levels into the planes of their half."""
    narrow = writer.builder.trunc(levels, writer.vector(writer.i8, GROUP))
    half, column = divmod(group * GROUP, HALF)
    for plane in range(layout.planes):
        picked = writer.shuffle(narrow, range(plane, GROUP, layout.planes))
        offset = half * HALF + (plane * HALF + column) // layout.planes
        writer.store(picked, writer.address(target, offset))


def _find_start(writer: KernelWriter, layout: Layout, levels: Sequence[Any]) -> Any:
    """Return minus what unsigned weights add to the sum of a piece."""
    total = levels[0]
    for vector in levels[1:]:
        total = writer.builder.add(total, vector)
    name = f"llvm.vector.reduce.add.v{GROUP}i32"
    total = writer.call(name, writer.i32, [total])
    return writer.builder.mul(total, writer.i32(-layout.offset))


ROUNDING = KernelSource(
    ("rows", "columns", "spans", "input", "input_stride", "rounded", "rounded_stride"),
    write_rounding,
)
