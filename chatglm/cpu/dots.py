"""What kernels of packed weights are made of: weights in vectors, and dot products of bytes.

Owns how stored bytes become what a processor multiplies. Knows nothing of a kernel's loops.
"""

from typing import Any

from chatglm.cpu.rounding import Layout
from chatglm.cpu.writer import KernelWriter


def add_dot(writer: KernelWriter, layout: Layout, sums: Any, weights: Any, levels: Any) -> Any:
    """Add to every lane's sum the products of its four bytes of weights and of levels."""
    dot, lanes = writer.processor.dot, writer.processor.lanes
    kind, cast = sums.type, writer.builder.bitcast
    if dot in ("vnni", "avx-vnni"):
        # Declared as before LLVM 21, which newer ones understand too.
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return writer.call(name, kind, [sums, cast(weights, kind), cast(levels, kind)])
    if dot == "neon":
        return _add_neon(writer, sums, weights, levels)
    if dot == "avx2":
        return writer.builder.add(sums, _multiply_avx2(writer, layout, weights, levels))
    return writer.builder.add(sums, _multiply_wide(writer, weights, levels))


def _add_neon(writer: KernelWriter, sums: Any, weights: Any, levels: Any) -> Any:
    """Add four products each by NEON's instruction, whose vectors are half as wide."""
    halves = []
    for start in (0, 4):
        picks = range(start, start + 4), range(4 * start, 4 * start + 16)
        parts = [writer.shuffle(sums, picks[0])]
        parts += [writer.shuffle(vector, picks[1]) for vector in (weights, levels)]
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        halves.append(writer.call(name, parts[0].type, parts))
    return writer.shuffle(halves[0], range(8), halves[1])


def _multiply_avx2(writer: KernelWriter, layout: Layout, weights: Any, levels: Any) -> Any:
    """Return the sums of four products each; pairs fit 16 bits (2 * 128 * 127 at most).

    One factor of the instruction is unsigned. 4-bit weights are; of others the sign goes to the
    levels, which hold -127 at least.
    """
    bytes_kind, lanes = weights.type, writer.processor.lanes
    if layout.bits == 8:
        levels = writer.call("llvm.x86.avx2.psign.b", bytes_kind, [levels, weights])
        zero = writer.filled(writer.i8, 4 * lanes, 0)
        is_negative = writer.builder.icmp_signed("<", weights, zero)
        weights = writer.builder.select(is_negative, writer.builder.sub(zero, weights), weights)
    kind = writer.vector(writer.i16, 2 * lanes)
    pairs = writer.call("llvm.x86.avx2.pmadd.ub.sw", kind, [weights, levels])
    ones = writer.filled(writer.i16, 2 * lanes, 1)
    kind = writer.vector(writer.i32, lanes)
    return writer.call("llvm.x86.avx2.pmadd.wd", kind, [pairs, ones])


def _multiply_wide(writer: KernelWriter, weights: Any, levels: Any) -> Any:
    """Return the sums of four products each, by way of 16-bit numbers."""
    builder, lanes = writer.builder, writer.processor.lanes
    wide = writer.vector(writer.i16, 4 * lanes)
    weights, levels = builder.sext(weights, wide), builder.sext(levels, wide)
    products = builder.mul(weights, levels)  # at most 128 * 127: no overflow
    products = builder.sext(products, writer.vector(writer.i32, 4 * lanes))
    return _add_neighbours(writer, _add_neighbours(writer, products))


def _add_neighbours(writer: KernelWriter, vector: Any) -> Any:
    """Return the sums of elements 0 and 1, 2 and 3, and so on."""
    count = vector.type.count
    evens, odds = (writer.shuffle(vector, range(start, count, 2)) for start in (0, 1))
    return writer.builder.add(evens, odds)


def split_planes(writer: KernelWriter, layout: Layout, chunk: Any) -> list[Any]:
    """Return the weights of a stored chunk as the products take them: even and odd columns."""
    builder, count = writer.builder, layout.chunk_bytes
    if layout.bits == 8:
        flip = writer.filled(writer.i8, count, -128)
        return [builder.xor(chunk, flip)] if layout.offset else [chunk]
    chunk = builder.xor(chunk, writer.filled(writer.i8, count, 0x88 - 256))
    low = writer.filled(writer.i8, count, 15)
    pairs = writer.vector(writer.i16, count // 2)  # there is no shift of bytes
    shifted = builder.lshr(builder.bitcast(chunk, pairs), writer.filled(writer.i16, count // 2, 4))
    return [builder.and_(builder.bitcast(shifted, chunk.type), low), builder.and_(chunk, low)]


def transpose(writer: KernelWriter, vectors: list[Any]) -> list[Any]:
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


def load_scale(writer: KernelWriter, tile: Any, index: Any, count: int) -> Any:
    """Load one weight scale of a tile that has a `scale_type`, as a vector."""
    size = 2 if tile.scale_type == "f16" else 4
    place = writer.address(writer.slot("scale"), writer.times(index, size))
    return writer.shuffle(writer.load_as_float(place, 1, tile.scale_type), [0] * count)
