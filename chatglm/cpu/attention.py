"""Attention of a few new tokens to a long past on a CPU: one pass over the keys, one over values.

Owns the kernel and the choice of when it is used. Knows nothing of caches or positions: it reads
keys and values where they stand, head after head, in their own dtype or as integers with scales.
The twin that it falls back to is whatever attention the model is configured with.

Shapes: `B` batch, `N` heads, `S` new tokens, `K` keys, `D` head dim.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chatglm.cpu.compiler import find_kernel
from chatglm.cpu.products import TYPE_NAMES, is_plain, wants_graph
from chatglm.cpu.runtime import Call, Kernel, count_threads
from chatglm.cpu.writer import KernelSource, KernelWriter

MOST_TOKENS = 8  # beyond, the keys are better multiplied as matrices
STEP = 16  # keys that are scored, and scores that are made exponentials, at once
LINE, AHEAD = 64, 4096  # bytes that memory gives at once, and that are asked for before their use

LARGEST_INTEGER = 127.0  # of an 8-bit cache
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # of ln 2; the first has few bits
# exp(r) for |r| <= ln(2) / 2, from r**6 down: Taylor's, within 2e-7 there.
EXP_TERMS = tuple(1 / math.factorial(n) for n in range(6, -1, -1))
LAST_BITS = 1.5 * 2.0**23  # beside it, the last place of a float32 is 1
LOWEST_EXPONENT = -87.0  # below, exp would leave the normal numbers


class HeadShape(NamedTuple):
    """What an attention kernel is compiled for.

    Attributes:
        head_dim: D.
        kind: "f32", "f16" or "bf16" keys and values, or "i8" with a float32 scale each.
        has_mask: whether something is added to the scores.
        axes: P, if the kernel also rotates the new tokens and writes them to the cache; 0 if not.
        input_kind: of the new tokens and their angles then.
    """

    head_dim: int
    kind: str
    has_mask: bool
    axes: int = 0
    input_kind: str = "f32"

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.head_dim * {"f32": 4, "f16": 2, "bf16": 2, "i8": 1}[self.kind]

    @property
    def input_bytes(self) -> int:
        """Bytes of one number of the new tokens."""
        return 4 if self.input_kind == "f32" else 2


def write_attention(writer: KernelWriter, shape: HeadShape) -> None:
    """Attend; a block of the work is one head of one row of the batch.

        scores[s, k] = query[s] . key[k] + mask[s, k]
        output[s]    = sum_k exp(scores[s, k] - max_k scores[s, k]) * value[k] / sum_k exp(...)

    The query comes scaled.
    """
    at = writer.slot
    with writer.parallel_for(at("blocks")) as block:
        past = _find_head(writer, shape, block)
        with writer.loop(writer.const(0), at("tokens")) as token:
            place = writer.add(writer.times(block, at("tokens")), token)
            place = writer.address(at("query"), writer.times(place, 4 * shape.head_dim))
            query = writer.load_as_float(place, shape.head_dim, "f32")
            row, head = _split_block(writer, block)
            scores = writer.add(writer.times(block, at("tokens")), token)
            scores = writer.add(at("scores"), writer.times(scores, at("scores_bytes")))
            index = writer.add(writer.times(row, at("tokens")), token)
            mask = writer.add(at("mask"), writer.times(index, writer.times(at("keys"), 4)))
            output = writer.add(writer.times(index, at("heads")), head)
            _attend_token(writer, shape, (past, at("keys")), query, (scores, mask, output))


def write_step(writer: KernelWriter, shape: HeadShape) -> None:
    """Rotate the new tokens, write their keys and values behind the others, and attend.

    What is read is the joint projection of all tokens, `(T, N, 3 * D)`; a block is a head of a row.
    Two tables say where a row is: `rows` for all layers, `places` for one (`ROW_FIELDS` and
    `PLACE_FIELDS`, 64-bit integers).
    """
    at, builder = writer.slot, writer.builder
    with writer.parallel_for(at("blocks")) as block:
        number, head = _split_block(writer, block)
        row = _load_fields(writer, "rows", ROW_FIELDS, number)
        places = _load_fields(writer, "places", PLACE_FIELDS, number)
        past = {
            name: writer.add(places[name], writer.times(head, places[f"{name}_head"]))
            for name in _operands(shape)
        }
        with writer.loop(writer.const(0), row["count"]) as index:
            token = writer.add(row["first"], index)
            _, key, value = _load_mixed(writer, shape, head, token)
            column = writer.add(row["past"], index)
            key = _rotate(writer, shape, key, token)
            _store_column(writer, shape, past, "key", column, key)
            _store_column(writer, shape, past, "value", column, value)
        with writer.loop(writer.const(0), row["count"]) as index:
            token = writer.add(row["first"], index)
            query = _rotate(writer, shape, _load_mixed(writer, shape, head, token)[0], token)
            scaling = writer.load_as_float(writer.address(at("scaling")), 1, "f32")
            query = builder.fmul(query, writer.shuffle(scaling, [0] * shape.head_dim))
            seen = writer.add(row["seen"], writer.times(index, row["growth"]))
            scores = writer.add(writer.times(head, at("tokens")), token)
            scores = writer.add(at("scores"), writer.times(scores, at("scores_bytes")))
            mask = writer.add(row["mask"], writer.times(index, writer.times(seen, 4)))
            output = writer.add(writer.times(token, at("heads")), head)
            _attend_token(writer, shape, (past, seen), query, (scores, mask, output))


def _load_fields(
    writer: KernelWriter, table: str, fields: tuple[str, ...], number: Any
) -> dict[str, Any]:
    """Load a line of a table."""
    line = writer.add(writer.slot(table), writer.times(number, 8 * len(fields)))
    return {
        name: writer.load(writer.address(line, 8 * place), writer.i64)
        for place, name in enumerate(fields)
    }


def _find_head(writer: KernelWriter, shape: HeadShape, block: Any) -> dict[str, Any]:
    """Return where a block's keys and values begin, and their scales."""
    at, past = writer.slot, {}
    row, head = _split_block(writer, block)
    for name in _operands(shape):
        offset = writer.times(row, at(f"{name}_row"))
        offset = writer.add(offset, writer.times(head, at(f"{name}_head")))
        past[name] = writer.add(at(name), offset)
    return past


def _split_block(writer: KernelWriter, block: Any) -> tuple[Any, Any]:
    """Return the row of the batch and the head that a block stands for."""
    heads = writer.slot("heads")
    return writer.builder.sdiv(block, heads), writer.builder.srem(block, heads)


def _load_mixed(writer: KernelWriter, shape: HeadShape, head: Any, token: Any) -> list[Any]:
    """Load a head's new query, key and value of one token."""
    index = writer.add(writer.times(token, writer.slot("heads")), head)
    size = shape.head_dim * shape.input_bytes
    base = writer.add(writer.slot("mixed"), writer.times(index, 3 * size))
    places = [writer.address(base, part * size) for part in range(3)]
    return [writer.load_as_float(place, shape.head_dim, shape.input_kind) for place in places]


def _rotate(writer: KernelWriter, shape: HeadShape, states: Any, token: Any) -> Any:
    """Turn a query or key by its positions, each axis its part of the dimensions."""
    builder, width = writer.builder, shape.head_dim // shape.axes
    half, parts = width // 2, range(0, shape.head_dim, width)
    swapped = [part + (n + half) % width for part in parts for n in range(width)]
    signs = [-1.0 if n % width < half else 1.0 for n in range(shape.head_dim)]
    signs = writer.ir.Constant(states.type, signs)
    turned = builder.fmul(writer.shuffle(states, swapped), signs)
    cos, sin = (_load_angles(writer, shape, name, token) for name in ("cos", "sin"))
    return writer.fma(states, cos, builder.fmul(turned, sin))


def _store_column(
    writer: KernelWriter,
    shape: HeadShape,
    past: dict[str, Any],
    name: str,
    column: Any,
    states: Any,
) -> None:
    """Write a head's new key or value, as the cache keeps it."""
    place = writer.address(past[name], writer.times(column, shape.row_bytes))
    if shape.kind != "i8":
        writer.store_as(states, place, shape.kind)
        return
    integers, scale = round_states(writer, states)
    writer.store(integers, place)
    writer.store(scale, writer.address(past[f"{name}_scale"], writer.times(column, 4)))


def round_states(writer: KernelWriter, states: Any) -> tuple[Any, Any]:
    """Return a vector's integers and scale; the twin is the cache's `quantize_columns`.

    An infinity or NaN has the largest bits, and becomes the scale, as there.
    """
    builder, count = writer.builder, states.type.count
    wide = writer.vector(writer.i32, count)
    bits = builder.and_(builder.bitcast(states, wide), writer.filled(writer.i32, count, 0x7FFFFFFF))
    largest = builder.bitcast(writer.largest(bits), writer.f32)
    scale = builder.fdiv(largest, writer.f32(LARGEST_INTEGER))
    whole = writer.call_vector("rint", builder.fdiv(states, writer.splat(scale, count)))
    zeros = writer.filled(writer.f32, count, 0.0)
    whole = builder.select(builder.fcmp_ordered("ord", whole, whole), whole, zeros)
    for sign, limit in ((">", LARGEST_INTEGER), ("<", -LARGEST_INTEGER)):
        limits = writer.filled(writer.f32, count, limit)
        whole = builder.select(builder.fcmp_ordered(sign, whole, limits), limits, whole)
    integers = builder.trunc(builder.fptosi(whole, wide), writer.vector(writer.i8, count))
    return integers, scale


def _load_angles(writer: KernelWriter, shape: HeadShape, name: str, token: Any) -> Any:
    """Load a token's cosines or sines, `(T, P, D / P)`, all axes in one vector."""
    size = shape.head_dim * shape.input_bytes
    place = writer.address(writer.slot(name), writer.times(token, size))
    return writer.load_as_float(place, shape.head_dim, shape.input_kind)


def _attend_token(
    writer: KernelWriter,
    shape: HeadShape,
    past: tuple[Any, Any],
    query: Any,
    places: tuple[Any, Any, Any],
) -> None:
    """Write what one head of one token sees.

    Args:
        past: where its keys and values begin, and how many of them it sees.
        query: scaled.
        places: addresses of its scores and its mask, and its number in the output.
    """
    (operands, keys), (scores, mask, output) = past, places
    largest = _score_keys(writer, shape, (query, operands, mask, keys), scores)
    total = _exponentiate(writer, scores, largest, keys)
    _sum_values(writer, shape, (operands, keys), scores, total, output)


def _operands(shape: HeadShape) -> tuple[str, ...]:
    names = ("key", "value")
    return (*names, "key_scale", "value_scale") if shape.kind == "i8" else names


def _load_row(writer: KernelWriter, shape: HeadShape, base: Any, index: Any) -> Any:
    """Load a key or value as float32, without its scale."""
    place = writer.address(base, writer.times(index, shape.row_bytes))
    if shape.kind != "i8":
        return writer.load_as_float(place, shape.head_dim, shape.kind)
    stored = writer.load(place, writer.vector(writer.i8, shape.head_dim))
    wide = writer.builder.sext(stored, writer.vector(writer.i32, shape.head_dim))
    return writer.builder.sitofp(wide, writer.vector(writer.f32, shape.head_dim))


def _score_keys(
    writer: KernelWriter, shape: HeadShape, operands: tuple[Any, Any, Any, Any], scores: Any
) -> Any:
    """Write a token's scores, 16 keys at once, and return the largest.

    Behind the last key there is room for what completes its group: -inf, whose weight is 0.
    """
    builder, keys = writer.builder, operands[3]
    kind = writer.vector(writer.f32, STEP)
    largest = writer.variable(writer.filled(writer.f32, STEP, -math.inf))
    whole = builder.and_(keys, writer.const(-STEP))

    def keep(first: Any, found: Any) -> None:
        writer.store(found, writer.address(scores, writer.times(first, 4)))
        # A NaN is never larger, but it stays among the scores and so in their sum.
        is_larger = builder.fcmp_ordered(">", found, largest.get())
        largest.set(builder.select(is_larger, found, largest.get()))

    with writer.loop(writer.const(0), whole, STEP) as first:
        keep(first, _score_group(writer, shape, operands, first, None))
    left = builder.sub(keys, whole)
    with writer.when(builder.icmp_signed(">", left, writer.const(0))):
        found = _score_group(writer, shape, operands, whole, left)
        places = writer.ir.Constant(writer.vector(writer.i64, STEP), list(range(STEP)))
        is_key = builder.icmp_signed("<", places, writer.splat(left, STEP))
        keep(whole, builder.select(is_key, found, writer.ir.Constant(kind, [-math.inf] * STEP)))
    return _largest_of(writer, largest.get())


def _score_group(
    writer: KernelWriter,
    shape: HeadShape,
    operands: tuple[Any, Any, Any, Any],
    first: Any,
    left: Any,
) -> Any:
    """Return the scores of 16 keys; of `left`, if fewer, and then of the last one over again."""
    builder, (query, past, mask, _) = writer.builder, operands
    products = []
    for number in range(STEP):
        index: Any = writer.const(number)
        if left is not None:
            is_key = builder.icmp_signed("<", index, left)
            index = builder.select(is_key, index, builder.sub(left, writer.const(1)))
        index = writer.add(first, index)
        _fetch_ahead(writer, shape, past["key"], index)
        products.append(_fold(writer, shape, _load_row(writer, shape, past["key"], index), query))
    score = _sum_each(writer, products)
    offset = writer.times(first, 4)
    if shape.kind == "i8":
        scale = writer.address(past["key_scale"], offset)
        score = builder.fmul(score, _load_group(writer, scale, left))
    if shape.has_mask:
        score = builder.fadd(score, _load_group(writer, writer.address(mask, offset), left))
    return score


def _load_group(writer: KernelWriter, place: Any, left: Any) -> Any:
    """Load a number for each key of a group, and nothing behind the last one."""
    kind = writer.vector(writer.f32, STEP)
    return writer.load(place, kind) if left is None else writer.load_first(place, kind, left)


def _fetch_ahead(writer: KernelWriter, shape: HeadShape, base: Any, index: Any) -> None:
    """Ask for the row that is read a page later: the processor itself stops at a page's end."""
    place = writer.add(base, writer.times(index, shape.row_bytes))
    for offset in range(AHEAD, AHEAD + shape.row_bytes, LINE):
        writer.prefetch(writer.address(place, offset))


def _fold(writer: KernelWriter, shape: HeadShape, row: Any, query: Any) -> Any:
    """Multiply a key by the query, and add up the products till one register holds them."""
    width = math.gcd(shape.head_dim, STEP)
    sums = None
    for start in range(0, shape.head_dim, width):
        picks = range(start, start + width)
        factors = writer.shuffle(row, picks), writer.shuffle(query, picks)
        sums = writer.builder.fmul(*factors) if sums is None else writer.fma(*factors, sums)
    return sums


def _sum_each(writer: KernelWriter, vectors: list[Any]) -> Any:
    """Return the sums of some vectors as one vector, every sum in the same order.

    Two vectors at a time lay their first halves side by side, and so their second halves, and are
    added: so many sums share their steps, where one alone would leave most of a register empty.
    """
    parts = vectors
    size = parts[0].type.count  # numbers still to be added up to one
    while size > 1:
        parts = [_add_halves(writer, *pair, size) for pair in zip(parts[::2], parts[1::2])]
        size //= 2
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        parts = [writer.shuffle(a, range(count), b) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def _add_halves(writer: KernelWriter, first: Any, second: Any, size: int) -> Any:
    """Add the halves of every `size` numbers of two vectors, the first one's before the other's."""
    starts = range(0, 2 * first.type.count, size)
    half = size // 2
    low = [start + n for start in starts for n in range(half)]
    halves = (writer.shuffle(first, [n + add for n in low], second) for add in (0, half))
    return writer.builder.fadd(*halves)


def _largest_of(writer: KernelWriter, vector: Any) -> Any:
    """Return the largest number of a vector that holds no NaN."""
    builder, count = writer.builder, vector.type.count
    while count > 1:
        count //= 2
        low, high = (writer.shuffle(vector, range(n, n + count)) for n in (0, count))
        vector = builder.select(builder.fcmp_ordered(">", high, low), high, low)
    return builder.extract_element(vector, writer.i32(0))


def _exponentiate(writer: KernelWriter, scores: Any, largest: Any, keys: Any) -> Any:
    """Replace scores by exponentials of what they are below the largest; return their sum.

    The last step may go beyond the keys, where there is room and what it adds is left out.
    """
    builder, kind = writer.builder, writer.vector(writer.f32, STEP)
    total, peak = writer.variable(writer.filled(writer.f32, STEP, 0.0)), writer.splat(largest, STEP)
    with writer.loop(writer.const(0), keys, STEP) as first:
        place = writer.address(scores, writer.times(first, 4))
        left = builder.sub(keys, first)
        score = writer.load_first(place, kind, left)
        weights = exponential(writer, builder.fsub(score, peak))
        writer.store(weights, place)
        total.set(builder.fadd(total.get(), writer.load_first(place, kind, left)))
    return writer.sum(total.get())


def exponential(writer: KernelWriter, numbers: Any) -> Any:
    """Return exp of a vector of numbers up to 0; what would not be a normal number becomes 0.

    exp(x) = 2**n * exp(r) with n = round(x / ln 2) and r = x - n * ln 2 (Cody and Waite, 1980).
    """
    builder, count = writer.builder, numbers.type.count

    def constant(value: float) -> Any:
        return writer.filled(writer.f32, count, value)

    whole = writer.call_vector("rint", builder.fmul(numbers, constant(LOG2_E)))
    rest = writer.fma(whole, constant(-LN2_HIGH), numbers)
    rest = writer.fma(whole, constant(-LN2_LOW), rest)
    result = constant(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        result = writer.fma(result, rest, constant(term))
    # The last bits of so large a sum are n. A conversion that minds what fits in no integer, as of
    # the tiny numbers below, would be made number by number.
    bits = builder.fadd(whole, constant(LAST_BITS))
    bits = builder.bitcast(bits, writer.vector(writer.i32, count))
    power = builder.shl(bits, writer.filled(writer.i32, count, 23))
    power = builder.add(power, writer.filled(writer.i32, count, 127 << 23))
    result = builder.fmul(result, builder.bitcast(power, numbers.type))
    is_tiny = builder.fcmp_ordered("<", numbers, constant(LOWEST_EXPONENT))
    return builder.select(is_tiny, constant(0.0), result)


def _sum_values(
    writer: KernelWriter,
    shape: HeadShape,
    operands: tuple[Any, Any],
    scores: Any,
    total: Any,
    output: Any,
) -> None:
    """Write the values' mean, weighted by the exponentials."""
    builder, count, (past, keys) = writer.builder, shape.head_dim, operands
    sums = writer.variable(writer.filled(writer.f32, count, 0.0))
    with writer.loop(writer.const(0), keys) as key:
        weight = writer.load(writer.address(scores, writer.times(key, 4)), writer.f32)
        if shape.kind == "i8":
            place = writer.address(past["value_scale"], writer.times(key, 4))
            weight = builder.fmul(weight, writer.load(place, writer.f32))
        _fetch_ahead(writer, shape, past["value"], key)
        value = _load_row(writer, shape, past["value"], key)
        sums.set(writer.fma(value, writer.splat(weight, count), sums.get()))
    mean = builder.fdiv(sums.get(), writer.splat(total, count))
    writer.store(mean, writer.address(writer.slot("output"), writer.times(output, 4 * count)))


PLACES = tuple(
    f"{name}{suffix}"
    for name in ("key", "value", "key_scale", "value_scale")
    for suffix in ("", "_row", "_head")
)
SHARED = ("blocks", "heads", "tokens", "keys", *PLACES, "mask", "scores", "scores_bytes", "output")
ATTENTION = KernelSource((*SHARED, "query"), write_attention)
# Of a row in a step: its first token and how many, the columns cached before, how many keys the
# first token sees and each further one more, and where its mask stands, a line a token.
ROW_FIELDS = ("first", "count", "past", "seen", "growth", "mask")
# Of a row in a layer: where keys and values begin, and the bytes from head to head; of integers
# also their scales.
PLACE_FIELDS = tuple(name for name in PLACES if not name.endswith("_row"))
STEP_ATTENTION = KernelSource(
    (
        *("blocks", "heads", "tokens", "rows", "places", "mixed", "cos", "sin", "scaling"),
        *("scores", "scores_bytes", "output"),
    ),
    write_step,
)


def attend(
    module: Any, query: Tensor, past: Any, attention_mask: Tensor | None, output_attentions: bool
) -> tuple[Tensor, None] | None:
    """Attend with the kernel, or return None if these operands are not for it.

    Args:
        module: whose attention it is, with its configuration and the factor on the scores.
        query: `(B, N, S, D)`, at most 8 new tokens.
        past: the model's `KeyValues`: `(B, N, K, D)`, or integers with scales `(B, N, K)`.
        attention_mask: `(B, 1, S, K)`, added to the scores, or None.
        output_attentions: whether the weights are wanted, which the kernel does not keep.

    Returns:
        The attended values, `(B, S, N, D)`, and no weights.
    """
    if output_attentions or module.config._attn_implementation != "sdpa":
        return None
    kind = "i8" if past.key.dtype == torch.int8 else TYPE_NAMES.get(past.key.dtype)
    has_mask = attention_mask is not None
    if kind is None or query.shape[2] > MOST_TOKENS or not are_ready(query, past):
        return None
    if not fits_mask(attention_mask, query.shape[0], query.shape[2], past.key.shape[2]):
        return None
    kernel = find_kernel(ATTENTION, HeadShape(query.shape[-1], kind, has_mask))
    if kernel is None:
        return None
    scaled = (query.float() * module.scaling).contiguous()
    attended = _run(kernel, past, query.shape[2], attention_mask, scaled)
    return attended.to(query.dtype), None


def are_ready(query: Tensor, past: Any) -> bool:
    """Tell whether the kernel can read the operands, and torch need not see it."""
    tensors = [tensor for tensor in past if tensor is not None]
    if wants_graph(query, *tensors) or query.dtype not in TYPE_NAMES or query.numel() == 0:
        return False
    if not _fit_together(query, past):
        return False
    if query.device.type != "cpu" or not all(map(is_plain, (query, *tensors))):
        return False
    # Each head's keys must follow one another.
    return all(tensor.is_contiguous() for part in tensors for tensor in (part[0, 0],))


def _fit_together(query: Tensor, past: Any) -> bool:
    """Tell whether all shapes and types are those that the kernel walks through."""
    batch, heads, _, head_dim = query.shape
    shape = (batch, heads, past.key.shape[2], head_dim)
    if past.key.shape != shape or past.value.shape != shape or past.key.dtype != past.value.dtype:
        return False
    scales = (past.key_scale, past.value_scale)
    if past.key.dtype != torch.int8:
        return scales == (None, None)
    return all(s is not None and s.shape == shape[:3] and s.dtype == torch.float32 for s in scales)


def fits_mask(mask: Tensor | None, batch: int, tokens: int, keys: int) -> bool:
    """Tell whether a mask can be expanded to `(B, 1, S, K)`, or there is none.

    Others are the model's own code's, whose result or error is torch's.
    """
    if mask is None:
        return True
    if mask.dim() != 4 or not is_plain(mask):
        return False
    sizes = ((1, batch), (1,), (1, tokens), (keys,))
    return all(size in allowed for size, allowed in zip(mask.shape, sizes))


def _run(
    kernel: Kernel,
    past: Any,
    tokens: int,
    attention_mask: Tensor | None,
    scaled: Tensor,
) -> Tensor:
    """Run a kernel for so many new tokens, `(B, S, N, D)`."""
    batch, heads, keys, head_dim = past.key.shape
    padded = -(-keys // STEP) * STEP
    options: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    scores = torch.empty(batch * heads * tokens, padded, **options)
    output = torch.empty(batch, tokens, heads, head_dim, **options)
    mask = None
    if attention_mask is not None:
        mask = attention_mask.expand(batch, 1, tokens, keys).float().contiguous()
    call = _prepare(kernel, batch, heads, count_threads(batch * heads, past.key.nbytes))
    call.run(
        tokens=tokens,
        keys=keys,
        **_places(past),
        mask=0 if mask is None else mask.data_ptr(),
        scores=scores.data_ptr(),
        scores_bytes=4 * padded,
        output=output.data_ptr(),
        query=scaled.data_ptr(),
    )
    return output


@functools.lru_cache(maxsize=1024)
def _prepare(kernel: Kernel, batch: int, heads: int, threads: int) -> Call:
    return kernel.prepare(threads, blocks=batch * heads, heads=heads)


def _places(past: Any) -> dict[str, int]:
    """Return where each operand stands, and how far apart its rows and heads are, in bytes."""
    places = {}
    for name, tensor in past._asdict().items():
        if tensor is not None:
            size = tensor.element_size()
            places[name] = tensor.data_ptr()
            places[f"{name}_row"] = tensor.stride(0) * size
            places[f"{name}_head"] = tensor.stride(1) * size
    return places


__all__ = ["are_ready", "attend", "fits_mask"]
