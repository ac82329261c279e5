"""How a CPU kernel's input is rounded to 8 bits, and how the rounded rows lie in memory.

Owns the layout that the product kernels read, and the kernel that writes it. Knows nothing of
weights' values.

An input row is rounded in *spans* of columns, with a scale of its own for every group:

    scale[g] = max_i |x[i]| / 127          levels[i] = round_half_to_even(x[i] / scale[g])

The processors' instructions take the weights unsigned: a stored 4-bit `w` is read as `w + 8`, and
with some of them an 8-bit one as `w + 128`. What that adds to a sum is known beforehand, and every
sum starts at minus that, its *start*.

A weight row is read as it is stored, a vector ("chunk") of `4 * lanes` bytes at a time. 4-bit
chunks hold two *planes*, the even and the odd columns; the levels are kept in planes as well.

Layout of a rounded row: its spans one after another, each of them so many chunks of levels, the
starts (int32), the scales (float32). With `whole` spans there is one start and scale a span, for
all its columns; otherwise one a lane: a lane's columns belong to one group of 32 (a span of one
chunk) or to several runs of 32 that share a scale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from chatglm.cpu.writer import KernelSource, KernelWriter, Processor

GROUP = 32  # columns whose levels are worked out at once
SMALLEST = 1e-36  # a group of smaller numbers becomes zeros: 127 / largest must be finite


class Layout(NamedTuple):
    """How rounded rows lie in memory.

    Attributes:
        processor: whose vectors they fit.
        bits: of the weights.
        chunks: of a span.
        whole: whether a span has one scale, rather than one a lane.
    """

    processor: Processor
    bits: int
    chunks: int
    whole: bool

    @property
    def planes(self) -> int:
        """Vectors of levels to a chunk of weights."""
        return 8 // self.bits

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a vector of weights or levels."""
        return 4 * self.processor.lanes

    @property
    def span_columns(self) -> int:
        """Columns of a span."""
        return self.chunks * self.planes * self.chunk_bytes

    @property
    def scales(self) -> int:
        """Starts, and scales, of a span."""
        return 1 if self.whole else self.processor.lanes

    @property
    def span_bytes(self) -> int:
        """Bytes of a rounded span."""
        return self.span_columns + 8 * self.scales

    @property
    def offset(self) -> int:
        """What reading a stored weight unsigned adds to it."""
        if self.bits == 4:
            return 8
        return 128 if self.processor.dot in ("vnni", "avx-vnni") else 0

    def count_spans(self, columns: int) -> int:
        """Return the spans of a row of so many columns."""
        return -(-columns // self.span_columns)


def write_rounding(writer: KernelWriter, layout: Layout) -> None:
    """Round rows of float32 to levels; a block of the work is a row."""
    at, span_columns = writer.slot, writer.const(layout.span_columns)
    full = writer.builder.sdiv(at("columns"), span_columns)
    with writer.parallel_for(at("rows")) as row:
        source = writer.add(at("input"), writer.times(row, at("input_stride")))
        target = writer.add(at("rounded"), writer.times(row, at("rounded_stride")))
        for start, stop, is_whole in ((writer.const(0), full, True), (full, at("spans"), False)):
            with writer.loop(start, stop) as span:
                first = writer.times(span, span_columns)
                place = writer.add(target, writer.times(span, layout.span_bytes))
                _round_span(writer, layout, (source, first), place, is_whole)


def _round_span(
    writer: KernelWriter, layout: Layout, source: tuple[Any, Any], target: Any, is_whole: bool
) -> None:
    """Round one span, all at once or by the groups of 32 that stand at the same lanes."""
    groups = layout.planes * layout.chunk_bytes // GROUP  # of a chunk
    rounds = [range(groups)] if layout.whole else [[group] for group in range(groups)]
    for picked in rounds:
        places = [(chunk, group) for chunk in range(layout.chunks) for group in picked]
        numbers = []
        for chunk, group in places:
            column = chunk * layout.planes * layout.chunk_bytes + group * GROUP
            numbers.append(_load_numbers(writer, source, column, is_whole))
        levels, scale = _round_group(writer, numbers)
        for place, vector in zip(places, levels):
            _store_levels(writer, layout, target, place, vector)
        _store_scales(writer, layout, target, picked[0], levels, scale)


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
    writer: KernelWriter, layout: Layout, target: Any, place: tuple[int, int], levels: Any
) -> None:
    """Store 32 levels into the planes of their chunk."""
    chunk, group = place
    narrow = writer.builder.trunc(levels, writer.vector(writer.i8, GROUP))
    for plane in range(layout.planes):
        picked = writer.shuffle(narrow, range(plane, GROUP, layout.planes))
        offset = (chunk * layout.planes + plane) * layout.chunk_bytes
        offset += group * GROUP // layout.planes
        writer.store(picked, writer.address(target, offset))


def _store_scales(
    writer: KernelWriter, layout: Layout, target: Any, group: int, levels: Sequence[Any], scale: Any
) -> None:
    """Store a group's scale, and minus what unsigned weights add to its sums, for each lane."""
    builder = writer.builder
    lanes = 1 if layout.whole else GROUP // (4 * layout.planes)
    total = levels[0]
    for vector in levels[1:]:
        total = builder.add(total, vector)
    while total.type.count > lanes:
        count = total.type.count
        evens, odds = range(0, count, 2), range(1, count, 2)
        total = builder.add(writer.shuffle(total, evens), writer.shuffle(total, odds))
    starts = builder.mul(total, writer.filled(writer.i32, lanes, -layout.offset))
    place = layout.span_columns + 4 * lanes * group
    writer.store(starts, writer.address(target, place))
    place += 4 * layout.scales
    writer.store(writer.splat(scale, lanes), writer.address(target, place))


ROUNDING = KernelSource(
    ("rows", "columns", "spans", "input", "input_stride", "rounded", "rounded_stride"),
    write_rounding,
)
