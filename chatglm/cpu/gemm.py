"""The kernel for many tokens: it unpacks and turns a part of the weights first, for all of them.

Owns the kernel's body; the sums are those of `gemv`.
"""

from typing import Any, NamedTuple

from chatglm.cpu.gemv import add_dot, split_planes
from chatglm.cpu.rounding import Layout
from chatglm.cpu.writer import KernelSource, KernelWriter


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
    with writer.parallel_for(at("blocks")) as block:
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


PANELS = KernelSource(
    (
        *("blocks", "rows", "row_bytes", "spans", "tokens", "weight", "scale"),
        *("rounded", "rounded_stride", "output", "output_stride"),
    ),
    write_panels,
)
