"""The small kernels between the products of a decoding step: norm, GELU, bias.

Owns their bodies. Knows nothing of modules or of the order in which they run (`decoding_step`).

Shapes: `T` tokens of all rows together, `H` hidden, `F` any width.
"""

from typing import Any, NamedTuple

from chatglm.cpu.attention import exponential
from chatglm.cpu.writer import KernelSource, KernelWriter

STEP = 16  # numbers that are worked on at once
GELU_INNER, GELU_CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cube's share


class Width(NamedTuple):
    """What an elementwise kernel is compiled for.

    Attributes:
        kind: "f32", "f16" or "bf16", of the biases.
        norm_kind: the same of a norm's own parameters.
    """

    kind: str
    norm_kind: str = ""


def write_norm(writer: KernelWriter, width: Width) -> None:
    """Add to the residual stream and normalize; a block of the work is a token.

        stream = residual * alpha + update + bias
        output = (stream - mean) / sqrt(variance + epsilon) * weight + shift

    Without an update (0) the stream is the residual. The columns are a multiple of 16.
    """
    at, builder = writer.slot, writer.builder
    with writer.parallel_for(at("tokens")) as token:
        row = writer.times(writer.times(token, at("columns")), 4)
        total = writer.variable(writer.filled(writer.f32, STEP, 0.0))
        with writer.loop(writer.const(0), at("columns"), STEP) as column:
            stream = _add_to_stream(writer, width, row, column)
            writer.store(stream, _place(writer, "stream", row, column))
            total.set(builder.fadd(total.get(), stream))
        count = builder.sitofp(at("columns"), writer.f32)
        mean = writer.splat(builder.fdiv(writer.sum(total.get()), count), STEP)
        total.set(writer.filled(writer.f32, STEP, 0.0))
        with writer.loop(writer.const(0), at("columns"), STEP) as column:
            centered = builder.fsub(_numbers(writer, "stream", row, column), mean)
            total.set(writer.fma(centered, centered, total.get()))
        variance = builder.fdiv(writer.sum(total.get()), count)
        scale = builder.fadd(variance, _number(writer, "epsilon"))
        scale = builder.fdiv(writer.f32(1.0), writer.call_vector("sqrt", scale))
        _store_normed(writer, width, row, mean, writer.splat(scale, STEP))


def _add_to_stream(writer: KernelWriter, width: Width, row: Any, column: Any) -> Any:
    """Return 16 numbers of the residual stream."""
    residual = _numbers(writer, "residual", row, column)
    alpha = writer.splat(_number(writer, "alpha"), STEP)
    update = _numbers(writer, "update", row, column)
    update = writer.builder.fadd(update, _parameters(writer, width.kind, "bias", column))
    return writer.fma(residual, alpha, update)


def _store_normed(writer: KernelWriter, width: Width, row: Any, mean: Any, scale: Any) -> None:
    builder = writer.builder
    with writer.loop(writer.const(0), writer.slot("columns"), STEP) as column:
        centered = builder.fsub(_numbers(writer, "stream", row, column), mean)
        normed = builder.fmul(centered, scale)
        weight = _parameters(writer, width.norm_kind, "weight", column)
        normed = writer.fma(normed, weight, _parameters(writer, width.norm_kind, "shift", column))
        writer.store(normed, _place(writer, "output", row, column))


def write_gelu(writer: KernelWriter, width: Width) -> None:
    """Add the bias and apply GELU in its tanh form, in place; a block is 1024 numbers of a token.

    gelu(x) = x * (1 + tanh(u)) / 2 = x - x / (1 + exp(2 * u)),   u = a * (x + b * x**3)
    """
    at, builder = writer.slot, writer.builder
    with writer.parallel_for(at("blocks")) as block:
        token = builder.sdiv(block, at("parts"))
        first = writer.times(builder.srem(block, at("parts")), 1024)
        row = writer.times(writer.times(token, at("columns")), 4)
        stop = writer.smaller(writer.add(first, 1024), at("columns"))
        with writer.loop(first, stop, STEP) as column:
            numbers = _numbers(writer, "output", row, column)
            numbers = builder.fadd(numbers, _parameters(writer, width.kind, "bias", column))
            writer.store(_gelu(writer, numbers), _place(writer, "output", row, column))


def _gelu(writer: KernelWriter, numbers: Any) -> Any:
    builder = writer.builder

    def constant(value: float) -> Any:
        return writer.filled(writer.f32, STEP, value)

    cubed = builder.fmul(builder.fmul(numbers, numbers), constant(GELU_CUBE))
    inner = builder.fmul(numbers, constant(2 * GELU_INNER))
    inner = writer.fma(inner, cubed, inner)  # 2 * u
    magnitude = writer.call_vector("fabs", inner)
    small = exponential(writer, builder.fsub(constant(0.0), magnitude))  # exp(-|2 * u|)
    share = builder.fdiv(constant(1.0), builder.fadd(constant(1.0), small))
    is_negative = builder.fcmp_ordered("<", inner, constant(0.0))
    share = builder.select(is_negative, builder.fmul(share, small), share)
    return builder.fmul(numbers, share)


def write_bias(writer: KernelWriter, width: Width) -> None:
    """Add a bias in place; a block of the work is a token."""
    at = writer.slot
    with writer.parallel_for(at("tokens")) as token:
        row = writer.times(writer.times(token, at("columns")), 4)
        with writer.loop(writer.const(0), at("columns"), STEP) as column:
            numbers = _numbers(writer, "output", row, column)
            bias = _parameters(writer, width.kind, "bias", column)
            numbers = writer.builder.fadd(numbers, bias)
            writer.store(numbers, _place(writer, "output", row, column))


def _place(writer: KernelWriter, name: str, row: Any, column: Any) -> Any:
    return writer.address(writer.add(writer.slot(name), row), writer.times(column, 4))


def _numbers(writer: KernelWriter, name: str, row: Any, column: Any) -> Any:
    """Load 16 float32 numbers of a row."""
    return writer.load_as_float(_place(writer, name, row, column), STEP, "f32")


def _parameters(writer: KernelWriter, kind: str, name: str, column: Any) -> Any:
    """Load 16 parameters of a kind."""
    size = 4 if kind == "f32" else 2
    place = writer.address(writer.slot(name), writer.times(column, size))
    return writer.load_as_float(place, STEP, kind)


def _number(writer: KernelWriter, name: str) -> Any:
    return writer.load(writer.address(writer.slot(name)), writer.f32)


ELEMENTS = ("tokens", "columns")
NORM = KernelSource(
    (
        *ELEMENTS,
        *("residual", "alpha", "update", "bias", "stream", "epsilon", "weight", "shift", "output"),
    ),
    write_norm,
)
GELU = KernelSource(("blocks", "parts", "columns", "bias", "output"), write_gelu)
BIAS = KernelSource((*ELEMENTS, "bias", "output"), write_bias)
