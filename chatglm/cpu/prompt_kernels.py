"""The kernel of a prompt's attention: many tokens to many keys, in memory that the caches hold.

Owns the kernel's body. Knows nothing of torch, of masks' meaning or of which tokens are pads.

    scores[k, s] = key[k] . query[s] * scaling + mask[k, s]     (from the key `masked` on)
    output[s]    = sum_k exp(scores[k, s] - max_k scores[k, s]) * value[k] / sum_k exp(...)

A block of the work is a head and up to `PromptShape.queries` tokens; keys pass by in chunks, and
what was summed is scaled down whenever a chunk brings a larger score (Milakov and Gimelshein,
https://arxiv.org/abs/1805.02867). A lane is a token: nothing is summed across lanes, and a token's
result depends on its keys and their order alone, not on how many tokens are beside it.

Both products are `sums[i, s] += sum_k left[i, k] * right[k, s]`: by tile registers of halves where
the processor has them (`prompt_tiles`), else in float32.
"""

from typing import Any, NamedTuple

from chatglm.cpu.attention import exponential
from chatglm.cpu.prompt_tiles import (
    KEYS,
    TileSpace,
    configure,
    multiply_tiles,
    release,
    split_rows,
    spread_keys,
    spread_values,
    turn,
)
from chatglm.cpu.writer import KernelSource, KernelWriter

TILE_QUERIES, VECTOR_QUERIES = 128, 64  # tokens of a block, with tile registers and without
COLUMNS = 2  # vectors of tokens that are multiplied at once
LOWEST = float("-inf")


class PromptShape(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        head_dim: D, a multiple of 16, with tiles of 32.
        kind: "f32", "f16" or "bf16" keys and values.
        query_kind: the same of the tokens and of what comes out.
        has_tiles: whether tile registers multiply; only for halves.
    """

    head_dim: int
    kind: str
    query_kind: str
    has_tiles: bool

    @property
    def queries(self) -> int:
        """Tokens of a block."""
        return TILE_QUERIES if self.has_tiles else VECTOR_QUERIES

    @property
    def line_bytes(self) -> int:
        """Bytes from one key's scores, or one dimension's sums, to the next one's."""
        return 4 * self.queries

    @property
    def parts(self) -> int:
        """Bfloat16 numbers that a number becomes: two hold all of a half's bits."""
        return 1 if self.kind == "bf16" else 2


class Buffers(NamedTuple):
    """Memory of a thread, by address.

    Attributes:
        query: the tokens of a block turned, `(D, queries)`.
        scores: of a chunk of keys, `(KEYS, queries)`.
        sums: of values, `(D, queries)`.
        peaks, totals, factors: `(queries,)`, the largest score, the sum of exponentials, and what
            earlier sums are worth beside this chunk.
        left: keys or values as a product takes them.
        tiles: the same of tokens and exponentials, with tile registers.
    """

    query: Any
    scores: Any
    sums: Any
    peaks: Any
    totals: Any
    factors: Any
    left: Any
    tiles: TileSpace | None


class Block(NamedTuple):
    """Where a block's operands are.

    Attributes:
        head: its number.
        first: its first token.
        left: how many tokens there are from that one on.
        width: tokens that are computed, a multiple of what is multiplied at once.
    """

    head: Any
    first: Any
    left: Any
    width: Any


def write_prompt(writer: KernelWriter, shape: PromptShape) -> None:
    """Attend."""
    at, builder = writer.slot, writer.builder
    buffers = _reserve(writer, shape)
    if shape.has_tiles:
        configure(writer)
    with writer.parallel_for(at("blocks")) as number:
        head = builder.sdiv(number, at("parts"))
        first = writer.times(builder.srem(number, at("parts")), shape.queries)
        left = builder.sub(at("tokens"), first)
        step = COLUMNS * writer.processor.lanes
        width = writer.add(writer.smaller(left, writer.const(shape.queries)), step - 1)
        width = writer.times(builder.sdiv(width, writer.const(step)), step)
        block = Block(head, first, left, width)
        _begin(writer, shape, block, buffers)
        with writer.loop(writer.const(0), at("keys"), KEYS) as start:
            _attend_chunk(writer, shape, block, buffers, start)
        _finish(writer, shape, block, buffers)
    if shape.has_tiles:
        release(writer)


def _reserve(writer: KernelWriter, shape: PromptShape) -> Buffers:
    """Make room; scores and sums of a block stay in the second cache."""

    def make_room(lines: int) -> Any:
        return writer.reserve(lines * shape.line_bytes)

    tiles = None
    if shape.has_tiles:
        tiles = TileSpace(query=make_room(shape.head_dim), weights=make_room(KEYS))
    return Buffers(
        query=make_room(shape.head_dim),
        scores=make_room(KEYS),
        sums=make_room(shape.head_dim),
        peaks=make_room(1),
        totals=make_room(1),
        factors=make_room(1),
        left=writer.reserve(4 * shape.head_dim * KEYS),
        tiles=tiles,
    )


def _begin(writer: KernelWriter, shape: PromptShape, block: Block, buffers: Buffers) -> None:
    """Turn the tokens of a block, and start all sums."""
    lanes = writer.processor.lanes
    size = 4 if shape.query_kind == "f32" else 2
    base = writer.times(block.head, writer.slot("query_head"))
    base = writer.add(writer.slot("query"), base)
    last = writer.add(writer.slot("tokens"), -1)
    with writer.loop(writer.const(0), block.width, lanes) as column:
        for name, value in (("peaks", LOWEST), ("totals", 0.0)):
            place = writer.address(getattr(buffers, name), writer.times(column, 4))
            writer.store(writer.filled(writer.f32, lanes, value), place)
        with writer.loop(writer.const(0), writer.const(shape.head_dim), lanes) as dim:
            rows = []
            for lane in range(lanes):
                token = writer.add(writer.add(block.first, column), lane)
                token = writer.times(writer.smaller(token, last), writer.slot("query_token"))
                place = writer.address(writer.add(base, token), writer.times(dim, size))
                rows.append(writer.load_as_float(place, lanes, shape.query_kind))
            zeros = writer.filled(writer.f32, lanes, 0.0)
            for n, vector in enumerate(turn(writer, rows)):
                offset = _find_line(writer, shape, writer.add(dim, n), column)
                writer.store(vector, writer.address(buffers.query, offset))
                writer.store(zeros, writer.address(buffers.sums, offset))
    if buffers.tiles is not None:
        lines = (buffers.query, writer.const(shape.head_dim), shape.line_bytes)
        split_rows(writer, shape.parts, lines, block.width, buffers.tiles.query)


def _find_line(writer: KernelWriter, shape: PromptShape, line: Any, column: Any) -> Any:
    """Return how many bytes a token is behind the first one of the first line."""
    return writer.add(writer.times(line, shape.line_bytes), writer.times(column, 4))


def _attend_chunk(
    writer: KernelWriter, shape: PromptShape, block: Block, buffers: Buffers, start: Any
) -> None:
    """Add a chunk of keys to what the tokens have seen."""
    count = writer.smaller(writer.builder.sub(writer.slot("keys"), start), writer.const(KEYS))
    keys = _find_chunk(writer, shape, "key", block, start)
    _multiply_keys(writer, shape, block, buffers, (keys, count))
    with writer.loop(writer.const(0), block.width, writer.processor.lanes) as column:
        _weigh(writer, shape, (block, buffers), column, (start, count))
    values = _find_chunk(writer, shape, "value", block, start)
    _multiply_values(writer, shape, block, buffers, (values, count))


def _find_chunk(
    writer: KernelWriter, shape: PromptShape, name: str, block: Block, start: Any
) -> Any:
    """Return the address of a head's keys or values, from one on."""
    size = shape.head_dim * (4 if shape.kind == "f32" else 2)
    base = writer.times(block.head, writer.slot(f"{name}_head"))
    return writer.add(writer.add(writer.slot(name), base), writer.times(start, size))


def _multiply_keys(
    writer: KernelWriter, shape: PromptShape, block: Block, buffers: Buffers, chunk: Any
) -> None:
    """Write the products of a chunk's keys with the tokens."""
    if buffers.tiles is not None:
        spread_keys(writer, (shape.kind, shape.head_dim), chunk, buffers.left)
        out = (buffers.scores, writer.const(KEYS), shape.line_bytes)
        right = (buffers.tiles.query, shape.head_dim // 32)
        multiply_tiles(writer, shape.parts, (buffers.left, right, out), block.width, False)
        return
    _widen(writer, shape, chunk, buffers.left)
    left = (buffers.left, writer.const(4 * shape.head_dim), writer.const(4))
    count = _round_up(writer, chunk[1])
    out = (buffers.scores, count, writer.const(shape.head_dim))
    _multiply(writer, shape, (left, buffers.query, out), block.width, False)


def _multiply_values(
    writer: KernelWriter, shape: PromptShape, block: Block, buffers: Buffers, chunk: Any
) -> None:
    """Scale down what was summed, and add the chunk's values, weighted by exponentials."""
    lanes = writer.processor.lanes
    with (
        writer.loop(writer.const(0), writer.const(shape.head_dim)) as dim,
        writer.loop(writer.const(0), block.width, lanes) as column,
    ):
        place = writer.address(buffers.sums, _find_line(writer, shape, dim, column))
        factor = _load(writer, buffers.factors, writer.times(column, 4))
        kind = writer.vector(writer.f32, lanes)
        writer.store(writer.builder.fmul(writer.load(place, kind), factor), place)
    if buffers.tiles is not None:
        spread_values(writer, (shape.kind, shape.head_dim), chunk, buffers.left)
        _clear_rest(writer, shape, block, buffers, chunk[1])
        lines = (buffers.scores, writer.const(KEYS), shape.line_bytes)
        split_rows(writer, shape.parts, lines, block.width, buffers.tiles.weights)
        out = (buffers.sums, writer.const(shape.head_dim), shape.line_bytes)
        right = (buffers.tiles.weights, KEYS // 32)
        multiply_tiles(writer, shape.parts, (buffers.left, right, out), block.width, True)
        return
    _widen(writer, shape, chunk, buffers.left)
    left = (buffers.left, writer.const(4), writer.const(4 * shape.head_dim))
    out = (buffers.sums, writer.const(shape.head_dim), chunk[1])
    _multiply(writer, shape, (left, buffers.scores, out), block.width, True)


def _clear_rest(
    writer: KernelWriter, shape: PromptShape, block: Block, buffers: Buffers, count: Any
) -> None:
    """Let the keys behind the last one, of which tiles have some, count for nothing."""
    lanes = writer.processor.lanes
    with (
        writer.loop(count, writer.const(KEYS)) as key,
        writer.loop(writer.const(0), block.width, lanes) as column,
    ):
        place = writer.address(buffers.scores, _find_line(writer, shape, key, column))
        writer.store(writer.filled(writer.f32, lanes, 0.0), place)


def _round_up(writer: KernelWriter, count: Any) -> Any:
    """Return a number of lines that are multiplied at once a whole number of times."""
    size = _count_lines(writer)
    return writer.times(writer.builder.sdiv(writer.add(count, size - 1), writer.const(size)), size)


def _count_lines(writer: KernelWriter) -> int:
    """Return how many lines' sums fill the registers beside each other."""
    return 8 if writer.processor.lanes == 16 else 4


def _widen(writer: KernelWriter, shape: PromptShape, chunk: tuple[Any, Any], target: Any) -> None:
    """Write a chunk's keys or values as float32, the last one again where lines are computed."""
    base, count = chunk
    size, lanes = 4 if shape.kind == "f32" else 2, writer.processor.lanes
    last = writer.add(count, -1)
    with writer.loop(writer.const(0), _round_up(writer, count)) as key:
        line = writer.times(writer.smaller(key, last), shape.head_dim * size)
        source, place = writer.add(base, line), writer.times(key, 4 * shape.head_dim)
        for dim in range(0, shape.head_dim, lanes):
            numbers = writer.load_as_float(writer.address(source, dim * size), lanes, shape.kind)
            writer.store(numbers, writer.address(target, writer.add(place, 4 * dim)))


def _multiply(
    writer: KernelWriter, shape: PromptShape, operands: Any, width: Any, adds: bool
) -> None:
    """Multiply in float32.

    Args:
        operands: the left one's address, bytes a line and bytes a step; the right one's address;
            the address of the sums, how many lines they have, and how many steps are summed.
        width: tokens.
        adds: whether to what is there.
    """
    (left, by_line, by_step), right, (sums, lines, steps) = operands
    lanes, height = writer.processor.lanes, _count_lines(writer)
    kind = writer.vector(writer.f32, lanes)
    cells = [(row, vector) for row in range(height) for vector in range(COLUMNS)]
    totals = [writer.variable(writer.filled(writer.f32, lanes, 0.0)) for _ in cells]
    with (
        writer.loop(writer.const(0), lines, height) as line,
        writer.loop(writer.const(0), width, COLUMNS * lanes) as column,
    ):
        starts = writer.add(left, writer.times(line, by_line))
        corner = writer.add(sums, _find_line(writer, shape, line, column))
        offsets = [row * shape.line_bytes + 4 * lanes * vector for row, vector in cells]
        for total, offset in zip(totals, offsets):
            zero = writer.filled(writer.f32, lanes, 0.0)
            total.set(writer.load(writer.address(corner, offset), kind) if adds else zero)
        with writer.loop(writer.const(0), steps) as step:
            base = writer.add(right, _find_line(writer, shape, step, column))
            found = [
                writer.load(writer.address(base, 4 * lanes * vector), kind)
                for vector in range(COLUMNS)
            ]
            start = writer.add(starts, writer.times(step, by_step))
            for row in range(height):
                place = writer.address(start, writer.times(by_line, row))
                number = writer.splat(writer.load(place, writer.f32), lanes)
                for vector in range(COLUMNS):
                    total = totals[row * COLUMNS + vector]
                    total.set(writer.fma(number, found[vector], total.get()))
        for total, offset in zip(totals, offsets):
            writer.store(total.get(), writer.address(corner, offset))


def _load(writer: KernelWriter, base: Any, offset: Any) -> Any:
    kind = writer.vector(writer.f32, writer.processor.lanes)
    return writer.load(writer.address(base, offset), kind)


def _weigh(
    writer: KernelWriter, shape: PromptShape, place: tuple[Block, Buffers], column: Any, chunk: Any
) -> None:
    """Replace a vector of tokens' scores with a chunk by exponentials, and keep the sums."""
    (_, buffers), (_, count), builder = place, chunk, writer.builder
    offset = writer.times(column, 4)
    before = _load(writer, buffers.peaks, offset)
    peak = _find_peak(writer, shape, place, column, chunk, before)
    factor = exponential(writer, builder.fsub(before, peak))
    total = writer.variable(builder.fmul(_load(writer, buffers.totals, offset), factor))
    with writer.loop(writer.const(0), count) as key:
        line = _find_line(writer, shape, key, column)
        score = _load(writer, buffers.scores, line)
        weight = exponential(writer, builder.fsub(score, peak))
        total.set(builder.fadd(total.get(), weight))
        writer.store(weight, writer.address(buffers.scores, line))
    for base, value in (
        (buffers.peaks, peak),
        (buffers.totals, total.get()),
        (buffers.factors, factor),
    ):
        writer.store(value, writer.address(base, offset))


def _find_peak(
    writer: KernelWriter,
    shape: PromptShape,
    place: tuple[Block, Buffers],
    column: Any,
    chunk: Any,
    before: Any,
) -> Any:
    """Scale and mask a vector of tokens' scores; return the largest so far."""
    (block, buffers), (start, count), builder = place, chunk, writer.builder
    lanes = writer.processor.lanes
    scaling = writer.load(writer.address(writer.slot("scaling")), writer.f32)
    scaling, peak = writer.splat(scaling, lanes), writer.variable(before)

    def go(first: Any, stop: Any, is_masked: bool) -> None:
        with writer.loop(first, stop) as key:
            line = _find_line(writer, shape, key, column)
            score = builder.fmul(_load(writer, buffers.scores, line), scaling)
            if is_masked:
                score = builder.fadd(score, _load_mask(writer, block, column, (start, key)))
            writer.store(score, writer.address(buffers.scores, line))
            # A NaN is never larger, but it stays among the scores and so in their sum.
            is_larger = builder.fcmp_ordered(">", score, peak.get())
            peak.set(builder.select(is_larger, score, peak.get()))

    edge = writer.smaller(builder.sub(writer.slot("masked"), start), count)
    is_before = builder.icmp_signed("<", edge, writer.const(0))
    edge = builder.select(is_before, writer.const(0), edge)
    go(writer.const(0), edge, False)
    go(edge, count, True)
    return peak.get()


def _load_mask(writer: KernelWriter, block: Block, column: Any, key: tuple[Any, Any]) -> Any:
    """Load what is added to the scores of a vector of tokens with a key."""
    line = writer.builder.sub(writer.add(*key), writer.slot("masked"))
    offset = writer.times(line, writer.slot("mask_key"))
    token = writer.times(writer.add(block.first, column), 4)
    return _load(writer, writer.add(writer.slot("mask"), offset), token)


def _finish(writer: KernelWriter, shape: PromptShape, block: Block, buffers: Buffers) -> None:
    """Write the means of a block's tokens."""
    lanes, builder = writer.processor.lanes, writer.builder
    size = 4 if shape.query_kind == "f32" else 2
    turned = writer.reserve(4 * lanes * lanes)
    base = writer.times(block.head, writer.slot("output_head"))
    base = writer.add(writer.slot("output"), base)
    ones = writer.filled(writer.f32, lanes, 1.0)
    last = writer.smaller(block.width, block.left)
    with writer.loop(writer.const(0), last, lanes) as column:
        share = builder.fdiv(ones, _load(writer, buffers.totals, writer.times(column, 4)))
        stop = writer.smaller(builder.sub(block.left, column), writer.const(lanes))
        with writer.loop(writer.const(0), writer.const(shape.head_dim), lanes) as dim:
            rows = []
            for n in range(lanes):
                line = _find_line(writer, shape, writer.add(dim, n), column)
                rows.append(builder.fmul(_load(writer, buffers.sums, line), share))
            for n, vector in enumerate(turn(writer, rows)):
                writer.store(vector, writer.address(turned, 4 * lanes * n))
            with writer.loop(writer.const(0), stop) as token:
                found = _load(writer, turned, writer.times(token, 4 * lanes))
                number = writer.add(writer.add(block.first, column), token)
                line = writer.times(number, writer.slot("output_token"))
                place = writer.address(writer.add(base, line), writer.times(dim, size))
                writer.store_as(found, place, shape.query_kind)


PROMPT_ATTENTION = KernelSource(
    (
        *("blocks", "parts", "tokens", "keys", "query", "query_token", "query_head"),
        *("key", "key_head", "value", "value_head", "mask", "masked", "mask_key", "scaling"),
        *("output", "output_token", "output_head"),
    ),
    write_prompt,
)

__all__ = ["PROMPT_ATTENTION", "PromptShape"]
