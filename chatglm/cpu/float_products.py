"""The kernel that multiplies in float32, by plain weights or by packed ones' exact values.

Owns the kernel's body. Knows nothing of torch, and rounds no input.
"""

from typing import Any, NamedTuple

from chatglm.cpu.gemv import PREFETCH, load_scale
from chatglm.cpu.rounding import GROUP
from chatglm.cpu.writer import KernelSource, KernelWriter


class ExactTile(NamedTuple):
    """What an exact kernel is compiled for.

    Attributes:
        weight_type: "i4" or "i8" for packed weights, "f32", "f16" or "bf16" for plain ones.
        tokens: input rows that are multiplied at once.
        scale_type, group_size: as in `DotTile`; plain weights have no scales.
    """

    weight_type: str
    tokens: int
    scale_type: str = "f32"
    group_size: int | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the weights are integers with scales."""
        return self.weight_type in ("i4", "i8")

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of weights."""
        return GROUP * {"i4": 4, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}[self.weight_type] // 8


def write_exact(writer: KernelWriter, tile: ExactTile) -> None:
    """Multiply in float32 with the weights' exact values; a block is a run of weight rows."""
    at, zero = writer.slot, writer.filled(writer.f32, GROUP, 0.0)
    sums = [writer.variable(zero) for _ in range(tile.tokens)]
    last_token = writer.add(at("tokens"), -tile.tokens)
    full = writer.builder.sdiv(at("columns"), writer.const(GROUP))
    left = writer.builder.srem(at("columns"), writer.const(GROUP))
    with writer.parallel_for(at("blocks")) as block:
        first = writer.times(block, at("block_rows"))
        stop = writer.smaller(writer.add(first, at("block_rows")), at("rows"))
        with (
            writer.loop(first, stop) as row,
            writer.loop(writer.const(0), at("tokens"), tile.tokens) as index,
        ):
            token = writer.smaller(index, last_token)
            for variable in sums:
                variable.set(zero)
            with writer.loop(writer.const(0), full) as group:
                _add_exact_group(writer, tile, (row, token, group), None, sums)
            with writer.when(writer.builder.icmp_signed(">", left, writer.const(0))):
                _add_exact_group(writer, tile, (row, token, full), left, sums)
            _store_exact(writer, tile, row, token, sums)


def _add_exact_group(
    writer: KernelWriter, tile: ExactTile, place: tuple[Any, Any, Any], left: Any, sums: list[Any]
) -> None:
    """Multiply 32 columns of a weight row by every token; `left` of them, or all."""
    at, (row, token, group) = writer.slot, place
    base = writer.add(at("weight"), writer.times(row, at("row_bytes")))
    base = writer.add(base, writer.times(group, tile.group_bytes))
    weights = _load_weights(writer, tile, base, left)
    if tile.group_size is not None:
        index = writer.add(writer.times(row, at("columns")), writer.times(group, GROUP))
        index = writer.builder.sdiv(index, writer.const(tile.group_size))
        weights = writer.builder.fmul(weights, load_scale(writer, tile, index, GROUP))
    for t, variable in enumerate(sums):
        start = writer.times(writer.add(token, t), at("columns"))
        start = writer.times(writer.add(start, writer.times(group, GROUP)), 4)
        numbers = writer.load_as_float(writer.address(at("input"), start), GROUP, "f32", left)
        variable.set(writer.fma(weights, numbers, variable.get()))


def _load_weights(writer: KernelWriter, tile: ExactTile, base: Any, left: Any) -> Any:
    """Load 32 columns of weights as float32; without scales those of packed ones."""
    builder = writer.builder
    writer.prefetch(writer.address(base, PREFETCH))
    place = writer.address(base)
    if not tile.is_packed:
        return writer.load_as_float(place, GROUP, tile.weight_type, left)
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


def _store_exact(
    writer: KernelWriter, tile: ExactTile, row: Any, token: Any, sums: list[Any]
) -> None:
    """Store a row's sums at `(token, row)`, times the row's scale if it has one."""
    at = writer.slot
    for t, variable in enumerate(sums):
        total = writer.sum(variable.get())
        if tile.is_packed and tile.group_size is None:
            scale = load_scale(writer, tile, row, 1)
            total = writer.builder.fmul(total, writer.builder.extract_element(scale, writer.i32(0)))
        place = writer.add(writer.times(writer.add(token, t), at("rows")), row)
        writer.store(total, writer.address(at("output"), writer.times(place, 4)))


EXACT = KernelSource(
    (
        *("blocks", "block_rows", "rows", "columns", "row_bytes", "tokens", "weight"),
        *("scale", "input", "output"),
    ),
    write_exact,
)
