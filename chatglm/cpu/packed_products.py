"""The kernels that multiply a rounded input by packed weights.

Owns the kernels' bodies. Knows nothing of torch; which kernel runs when is `linear`'s, and what a
rounded input looks like `rounding`'s.

    y[o] = weight_scale[o] * sum_g scale[g] * sum_{i in g} weight[o, i] * levels[i]

A vector holds four columns of as many weight rows as there are lanes: rows are loaded as they are
stored and turned in registers. So a lane is a row, and no sum crosses lanes. The inner sums are of
integers, exact in any order; the outer ones go span by span. Weights with several scales a row add
their pieces of a span, times their scales, in order before that. Both kernels do the same
arithmetic, so that a product does not depend on how many tokens are multiplied beside it:

- `TURNED`, for few tokens: every weight is turned, used for all tokens and forgotten.
- `PANELS`, for many: a part of some rows is turned once, and kept for all tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from chatglm.cpu.dots import add_dot, split_planes, transpose
from chatglm.cpu.rounding import HALF, SPAN, Layout
from chatglm.cpu.writer import KernelSource, KernelWriter

PREFETCH = 256  # bytes ahead of the weights being read, in every row
PART_SPANS = 4  # of a panel: the first cache holds it beside the input
TILE_TOKENS = (8, 4, 2, 1)  # that are multiplied by a panel at once


class PackedTile(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        layout: of the rounded input.
        tokens: input rows: of TURNED all of them, of the other kernels the most.
        scale_type: "f16" or "f32".
        group_size: columns that share a weight scale, or None for whole rows.
        is_ragged: whether the last vector of weight rows has fewer than the others.
        width: vectors of rows in a panel.
    """

    layout: Layout
    tokens: int
    scale_type: str
    group_size: int | None = None
    is_ragged: bool = False
    width: int = 2

    @property
    def lanes(self) -> int:
        """Weight rows of a vector."""
        return self.layout.processor.lanes

    @property
    def scale_bytes(self) -> int:
        """Bytes of a weight scale."""
        return 2 if self.scale_type == "f16" else 4

    @property
    def vectors(self) -> int:
        """Turned vectors of a span: four columns of every row each, in the order of the levels."""
        return SPAN // 4

    def find_vector(self, column: int, plane: int) -> int:
        """Return which turned vector holds a column of a span, or its neighbours of a plane."""
        half, rest = divmod(column, HALF)
        return (half * HALF + (plane * HALF + rest) // self.layout.planes) // 4

    def list_pieces(self, half: int) -> range:
        """Return the pieces of half a span."""
        count = self.layout.pieces // 2
        return range(half * count, (half + 1) * count)

    def list_runs(self, piece: int) -> list[tuple[int, int]]:
        """Return the turned vectors of a piece of a span, as runs `(first, stop)`."""
        width = SPAN // self.layout.pieces
        count = width // (4 * self.layout.planes)
        firsts = [self.find_vector(piece * width, p) for p in range(self.layout.planes)]
        return [(first, first + count) for first in firsts]


class Rows(NamedTuple):
    """A vector of weight rows: the first one's number, and where each row and its scales begin."""

    first: Any
    weights: list[Any]
    scales: list[Any]


def find_rows(writer: KernelWriter, tile: PackedTile, first: Any) -> Rows:
    """Return the rows from one on; behind the last one it is that one again and again."""
    at, last = writer.slot, writer.add(writer.slot("rows"), -1)
    weights, scales = [], []
    for lane in range(tile.lanes):
        row = writer.add(first, lane)
        row = writer.smaller(row, last) if tile.is_ragged else row
        weights.append(writer.add(at("weight"), writer.times(row, at("row_bytes"))))
        index = writer.times(writer.times(row, at("groups")), tile.scale_bytes)
        scales.append(writer.add(at("scale"), index))
    return Rows(first, weights, scales)


def _load_turned(
    writer: KernelWriter, tile: PackedTile, rows: Rows, span: Any, is_whole: bool
) -> list[Any]:
    """Load a span of rows, and return its vectors in the order of the levels."""
    layout, columns = tile.layout, 4 * tile.layout.planes
    turned: list[Any] = [None] * tile.vectors
    for chunk in range(layout.chunks):
        for step, vector in enumerate(_turn_chunk(writer, tile, rows, span, chunk, is_whole)):
            planes = split_planes(writer, layout, vector)
            for plane, weights in enumerate(planes):
                column = (chunk * tile.lanes + step) * columns
                turned[tile.find_vector(column, plane)] = weights
    return turned


def _turn_chunk(
    writer: KernelWriter, tile: PackedTile, rows: Rows, span: Any, chunk: int, is_whole: bool
) -> list[Any]:
    """Load a vector of each row, and return them turned, as they are stored otherwise."""
    layout = tile.layout
    kind = writer.vector(writer.i8, layout.chunk_bytes)
    wide = writer.vector(writer.i32, tile.lanes)
    offset = writer.add(writer.times(span, SPAN // layout.planes), chunk * layout.chunk_bytes)
    left = writer.builder.sub(writer.slot("row_bytes"), offset)
    vectors = []
    for base in rows.weights:
        place = writer.address(base, offset)
        stored = writer.load(place, kind) if is_whole else writer.load_first(place, kind, left)
        vectors.append(writer.builder.bitcast(stored, wide))
    return [writer.builder.bitcast(vector, kind) for vector in transpose(writer, vectors)]


def _load_piece_scales(
    writer: KernelWriter, tile: PackedTile, rows: Rows, span: Any
) -> list[Any] | None:
    """Return the weight scales of a span's pieces, a vector of rows each; None if rows have one."""
    size, pieces = tile.group_size, tile.layout.pieces
    if size is None:
        return None
    width = SPAN // pieces
    if size == width:
        return _load_neighbours(writer, tile, rows, writer.times(span, pieces))
    found = []
    for piece in range(pieces):
        column = writer.add(writer.times(span, SPAN), piece * width)
        index = writer.builder.sdiv(column, writer.const(size))
        index = writer.smaller(index, writer.add(writer.slot("groups"), -1))
        found += _load_neighbours(writer, tile, rows, index, 1)
    return found


def _load_neighbours(
    writer: KernelWriter, tile: PackedTile, rows: Rows, index: Any, count: int = 0
) -> list[Any]:
    """Return some scales of every row, from an index on: of each a vector of rows."""
    count = count or tile.layout.pieces
    offset = writer.times(index, tile.scale_bytes)
    element = writer.f16 if tile.scale_type == "f16" else writer.f32
    left = writer.builder.sub(writer.slot("groups"), index)
    vectors = []
    for base in rows.scales:
        place = writer.address(base, offset)
        kind = writer.vector(element, count)
        is_one = count == 1
        vectors.append(writer.load(place, kind) if is_one else writer.load_first(place, kind, left))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2])
        vectors = [writer.shuffle(a, range(2 * a.type.count), b) for a, b in pairs]
    picks = [range(piece, count * tile.lanes, count) for piece in range(count)]
    return [writer.as_float(writer.shuffle(vectors[0], pick)) for pick in picks]


class Line(NamedTuple):
    """A rounded input row: where a span's levels and notes are."""

    levels: Any
    notes: Any


def find_line(writer: KernelWriter, tile: PackedTile, token: Any, span: Any) -> Line:
    """Return where a span of an input row stands."""
    at = writer.slot
    base = writer.add(at("rounded"), writer.times(token, at("rounded_stride")))
    notes = writer.add(base, writer.times(at("spans"), SPAN))
    notes = writer.add(notes, writer.times(span, tile.layout.note_bytes))
    return Line(writer.add(base, writer.times(span, SPAN)), notes)


def load_start(writer: KernelWriter, tile: PackedTile, line: Line, piece: int) -> Any:
    """Return what the integer sums of a piece begin at."""
    start = writer.load(writer.address(line.notes, 8 + 4 * piece), writer.i32)
    return writer.splat(start, tile.lanes)


def _load_levels(writer: KernelWriter, tile: PackedTile, line: Line, position: Any) -> Any:
    """Return four levels for every lane."""
    four = writer.load(writer.address(line.levels, writer.times(position, 4)), writer.i32)
    kind = writer.vector(writer.i8, 4 * tile.lanes)
    return writer.builder.bitcast(writer.splat(four, tile.lanes), kind)


def add_piece(writer: KernelWriter, total: Any, before: Any, scale: Any) -> Any:
    """Return the sum of a span's pieces with one more, whose integers are `total`."""
    number = writer.builder.sitofp(total, writer.vector(writer.f32, total.type.count))
    if scale is None:
        return number
    if before is None:
        return writer.builder.fmul(number, scale)
    return writer.fma(number, scale, before)


def add_half(
    writer: KernelWriter, tile: PackedTile, line: Line, half: int, inner: Any, before: Any
) -> Any:
    """Return the sum of all halves of spans with one more."""
    scale = writer.load(writer.address(line.notes, 4 * half), writer.f32)
    return writer.fma(inner, writer.splat(scale, tile.lanes), before)


def write_turned(writer: KernelWriter, tile: PackedTile) -> None:
    """Multiply few tokens; a block of the work is a run of weight rows."""
    at, lanes = writer.slot, tile.lanes
    zero = writer.filled(writer.f32, lanes, 0.0)
    sums = [writer.variable(zero) for _ in range(tile.tokens)]
    full = writer.builder.sdiv(at("columns"), writer.const(SPAN))
    with writer.parallel_for(at("blocks")) as block:
        begin = writer.times(block, at("block_rows"))
        stop = writer.smaller(writer.add(begin, at("block_rows")), at("rows"))
        with writer.loop(begin, stop, lanes) as index:
            rows = find_rows(writer, tile, index)
            for variable in sums:
                variable.set(zero)
            with writer.loop(writer.const(0), full) as span:
                _prefetch(writer, tile, rows, span)
                _add_turned(writer, tile, rows, span, sums, True)
            with writer.loop(full, at("spans")) as span:
                _add_turned(writer, tile, rows, span, sums, False)
            scale = None if tile.group_size is not None else _load_row_scale(writer, tile, rows)
            for token, variable in enumerate(sums):
                total = variable.get()
                total = total if scale is None else writer.builder.fmul(total, scale)
                _store_rows(writer, tile, total, writer.const(token), rows.first)


def _prefetch(writer: KernelWriter, tile: PackedTile, rows: Rows, span: Any) -> None:
    """Ask for weights a little ahead in every row; at the rows' end, for the next rows' begin."""
    builder, row_bytes = writer.builder, writer.slot("row_bytes")
    ahead = writer.add(writer.times(span, SPAN // tile.layout.planes), PREFETCH)
    jump = writer.times(row_bytes, tile.lanes - 1)
    is_beyond = builder.icmp_signed(">=", ahead, row_bytes)
    ahead = builder.select(is_beyond, writer.add(ahead, jump), ahead)
    for base in rows.weights:
        for line in range(0, SPAN // tile.layout.planes, 64):
            writer.prefetch(writer.address(base, writer.add(ahead, line)))


def _add_turned(
    writer: KernelWriter,
    tile: PackedTile,
    rows: Rows,
    span: Any,
    sums: list[Any],
    is_whole: bool,
) -> None:
    """Add a span of a vector of rows to the sums of all tokens."""
    turned = _load_turned(writer, tile, rows, span, is_whole)
    scales = _load_piece_scales(writer, tile, rows, span)
    lines = [find_line(writer, tile, writer.const(t), span) for t in range(tile.tokens)]
    for half in range(2):
        inner: list[Any] = [None] * tile.tokens
        for piece in tile.list_pieces(half):
            totals = _sum_turned(writer, tile, turned, lines, piece)
            for t, total in enumerate(totals):
                inner[t] = add_piece(writer, total, inner[t], scales and scales[piece])
        for variable, line, value in zip(sums, lines, inner):
            variable.set(add_half(writer, tile, line, half, value, variable.get()))


def _sum_turned(
    writer: KernelWriter, tile: PackedTile, turned: list[Any], lines: list[Line], piece: int
) -> list[Any]:
    """Return the integer sums of a piece of a span, one a token."""
    totals = [load_start(writer, tile, line, piece) for line in lines]
    others = [writer.filled(writer.i32, tile.lanes, 0)] * tile.tokens
    for position in (n for run in tile.list_runs(piece) for n in range(*run)):
        for t, line in enumerate(lines):
            levels = _load_levels(writer, tile, line, writer.const(position))
            totals[t] = add_dot(writer, tile.layout, totals[t], turned[position], levels)
        # Two sums take turns: one alone would wait for itself.
        totals, others = others, totals
    return [writer.builder.add(*pair) for pair in zip(totals, others)]


def _load_row_scale(writer: KernelWriter, tile: PackedTile, rows: Rows) -> Any:
    """Return the one scale of every row."""
    (scale,) = _load_neighbours(writer, tile, rows, writer.const(0), 1)
    return scale


def _store_rows(writer: KernelWriter, tile: PackedTile, sums: Any, token: Any, first: Any) -> None:
    """Store a vector of rows of the output at `(token, first)`."""
    index = writer.add(writer.times(token, writer.slot("rows")), first)
    place = writer.address(writer.slot("output"), writer.times(index, 4))
    if tile.is_ragged:
        writer.store_first(sums, place, writer.builder.sub(writer.slot("rows"), first))
    else:
        writer.store(sums, place)


SLOTS = (
    *("blocks", "block_rows", "rows", "columns", "row_bytes", "spans", "tokens", "weight"),
    *("scale", "groups", "rounded", "rounded_stride", "output"),
)
TURNED = KernelSource(SLOTS, write_turned)


def write_panels(writer: KernelWriter, tile: PackedTile) -> None:
    """Multiply many tokens; a block of the work is a panel of weight rows.

    A part of the panel is turned once, and then multiplied by all tokens. Their sums wait in the
    output.
    """
    for_each_part(writer, tile, functools.partial(_multiply_part, writer, tile))


class Panel(NamedTuple):
    """A panel of weight rows: addresses of what belongs to a thread, and which rows these are.

    Attributes:
        turned: of a part's turned vectors, those of all vectors of rows side by side.
        scales: of its pieces' weight scales, likewise.
        sums: of the float32 sums so far, those of a token side by side.
        rows: vectors of rows.
    """

    turned: Any
    scales: Any
    sums: Any
    rows: Sequence[Rows]


def for_each_part(
    writer: KernelWriter, tile: PackedTile, multiply_part: Callable[[Panel, Any, Any], None]
) -> None:
    """Turn the parts of all panels, one after another, and multiply each by all tokens.

    The sums wait side by side: in the output they are rows apart, which caches may have few places
    for.

    Args:
        multiply_part: writes the product with a part, given the panel, the part's first span and
            the one behind its last.
    """
    at, size = writer.slot, tile.width * 4 * tile.lanes
    sizes = PART_SPANS * tile.vectors, PART_SPANS * tile.layout.pieces, tile.tokens
    turned, scales, sums = (writer.reserve(count * size) for count in sizes)
    with writer.parallel_for(at("blocks")) as block:
        begin = writer.times(block, tile.width * tile.lanes)
        halves = [
            find_rows(writer, tile, writer.add(begin, half * tile.lanes))
            for half in range(tile.width)
        ]
        panel = Panel(turned, scales, sums, halves)
        with writer.loop(writer.const(0), at("spans"), PART_SPANS) as first:
            stop = writer.smaller(writer.add(first, PART_SPANS), at("spans"))
            _fill_part(writer, tile, panel, first, stop)
            multiply_part(panel, first, stop)
        _store_panel(writer, tile, panel)


def _fill_part(writer: KernelWriter, tile: PackedTile, panel: Panel, first: Any, stop: Any) -> None:
    """Turn some spans of a panel's rows."""
    full = writer.builder.sdiv(writer.slot("columns"), writer.const(SPAN))
    whole, rest = writer.smaller(stop, full), writer.larger(first, full)
    # Row after row: so many rows at once would be in each other's way in the first cache.
    for half in range(tile.width):
        for start, end, is_whole in ((first, whole, True), (rest, stop, False)):
            with writer.loop(start, end) as span:
                inside = writer.builder.sub(span, first)
                _prefetch(writer, tile, panel.rows[half], writer.add(span, PART_SPANS - 2))
                _fill_panel(writer, tile, panel, half, (inside, span), is_whole)


def _fill_panel(
    writer: KernelWriter,
    tile: PackedTile,
    panel: Panel,
    half: int,
    where: tuple[Any, Any],
    is_whole: bool,
) -> None:
    """Turn a span of a vector of a panel's rows."""
    (inside, span), rows = where, panel.rows[half]
    for position, vector in enumerate(_load_turned(writer, tile, rows, span, is_whole)):
        index = writer.add(writer.times(inside, tile.vectors), position)
        writer.store(vector, panel_place(writer, tile, panel.turned, index, half))
    for piece, vector in enumerate(_load_piece_scales(writer, tile, rows, span) or ()):
        index = writer.add(writer.times(inside, tile.layout.pieces), piece)
        writer.store(vector, panel_place(writer, tile, panel.scales, index, half))


def panel_place(writer: KernelWriter, tile: PackedTile, base: Any, index: Any, half: int) -> Any:
    """Return where the vector of one vector of rows of a panel stands."""
    size = 4 * tile.lanes
    return writer.address(base, writer.add(writer.times(index, tile.width * size), half * size))


def load_piece_scale(
    writer: KernelWriter, tile: PackedTile, panel: Panel, where: tuple[Any, int], half: int
) -> Any:
    """Return the weight scales of a piece of a part's span; None if rows have one."""
    if tile.group_size is None:
        return None
    inside, piece = where
    index = writer.add(writer.times(inside, tile.layout.pieces), piece)
    kind = writer.vector(writer.f32, tile.lanes)
    return writer.load(panel_place(writer, tile, panel.scales, index, half), kind)


def add_to_sums(
    writer: KernelWriter,
    tile: PackedTile,
    panel: Panel,
    line: Line,
    inner: Sequence[Any],
    where: tuple[Any, Any, int],
) -> None:
    """Add both halves of a span to a token's sums with some rows; the first span only writes."""
    token, span, vector = where
    place = panel_place(writer, tile, panel.sums, token, vector)
    before = writer.load(place, writer.vector(writer.f32, tile.lanes))
    is_first = writer.builder.icmp_signed("==", span, writer.const(0))
    total = writer.builder.select(is_first, writer.filled(writer.f32, tile.lanes, 0.0), before)
    for half, value in enumerate(inner):
        total = add_half(writer, tile, line, half, value, total)
    writer.store(total, place)


def _store_panel(writer: KernelWriter, tile: PackedTile, panel: Panel) -> None:
    """Store the sums of a panel, times its rows' scales if each has one."""
    kind, scales = writer.vector(writer.f32, tile.lanes), None
    if tile.group_size is None:
        scales = [writer.variable(_load_row_scale(writer, tile, rows)) for rows in panel.rows]
    with writer.loop(writer.const(0), writer.slot("tokens")) as token:
        for half, rows in enumerate(panel.rows):
            sums = writer.load(panel_place(writer, tile, panel.sums, token, half), kind)
            if scales is not None:
                sums = writer.builder.fmul(sums, scales[half].get())
            _store_rows(writer, tile, sums, token, rows.first)


def _multiply_part(
    writer: KernelWriter, tile: PackedTile, panel: Panel, first: Any, stop: Any
) -> None:
    """Multiply a part of a panel by all tokens, as many at once as there are or fit."""
    done = writer.const(0)
    for count in TILE_TOKENS:
        left = writer.builder.sub(writer.slot("tokens"), done)
        border = writer.add(
            done, writer.times(writer.builder.sdiv(left, writer.const(count)), count)
        )
        with writer.loop(done, border, count) as token, writer.loop(first, stop) as span:
            tokens = [writer.add(token, t) for t in range(count)]
            lines = [find_line(writer, tile, number, span) for number in tokens]
            inner = _add_panel(writer, tile, panel, writer.builder.sub(span, first), lines)
            for number, line, row in zip(tokens, lines, inner):
                for vector, halves in enumerate(row):
                    add_to_sums(writer, tile, panel, line, halves, (number, span, vector))
        done = border


def _add_panel(
    writer: KernelWriter, tile: PackedTile, panel: Panel, inside: Any, lines: Sequence[Line]
) -> list[list[list[Any]]]:
    """Return the inner sums of a span: of some tokens, vectors of rows and halves."""
    vectors, zero = range(tile.width), writer.filled(writer.i32, tile.lanes, 0)
    totals = [[writer.variable(zero) for _ in vectors] for _ in lines]
    inner: list[list[list[Any]]] = [[[None, None] for _ in vectors] for _ in lines]
    for piece in range(tile.layout.pieces):
        for line, row in zip(lines, totals):
            for variable in row:
                variable.set(load_start(writer, tile, line, piece))
        for run in tile.list_runs(piece):
            _add_run(writer, tile, (panel.turned, inside), run, lines, totals)
        half = 2 * piece // tile.layout.pieces
        for vector in vectors:
            scale = load_piece_scale(writer, tile, panel, (inside, piece), vector)
            for found, row in zip(inner, totals):
                before = found[vector][half]
                found[vector][half] = add_piece(writer, row[vector].get(), before, scale)
    return inner


def _add_run(
    writer: KernelWriter,
    tile: PackedTile,
    part: tuple[Any, Any],
    run: tuple[int, int],
    lines: Sequence[Line],
    totals: list[list[Any]],
) -> None:
    """Add a run of turned vectors to the integer sums, two at a step."""
    (base, inside), kind = part, writer.vector(writer.i8, 4 * tile.lanes)
    with writer.loop(writer.const(run[0]), writer.const(run[1]), 2) as step:
        for position in (step, writer.add(step, 1)):
            index = writer.add(writer.times(inside, tile.vectors), position)
            places = [panel_place(writer, tile, base, index, half) for half in range(tile.width)]
            weights = [writer.load(place, kind) for place in places]
            for line, row in zip(lines, totals):
                levels = _load_levels(writer, tile, line, position)
                for vector, variable in zip(weights, row):
                    variable.set(add_dot(writer, tile.layout, variable.get(), vector, levels))


PANELS = KernelSource(SLOTS, write_panels)
