"""A decoding step on a CPU as one native call: all blocks of the network, without Python between.

At a few tokens a step the time between the kernels counts: some forty calls of torch a block, each
of microseconds. Here the kernels of a step stand in a list, each with the slots it is run with, and
one more kernel, the conductor, lets all threads go through that list together. Only what changes
from token to token is written anew.

Owns the list, the small kernels between the products, and the conductor. Knows nothing of modules:
`decoding_cpu` says which weights a model's blocks have.

Shapes: `T` tokens of all rows together, `H` hidden, `F` any width.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .attention_cpu import exponential
from .kernels_cpu import Call, KernelSource, KernelWriter, find_kernel, find_runtime

STEP = 16  # numbers that are worked on at once
GELU_INNER, GELU_CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cube's share
PATIENCE = 4000  # looks at a barrier before the processor is offered to others


class Width(NamedTuple):
    """What an elementwise kernel is compiled for.

    Attributes:
        kind: "f32", "f16" or "bf16", of the parameters.
    """

    kind: str


def write_norm(writer: KernelWriter, width: Width) -> None:
    """Add to the residual stream and normalize; a block of the work is a token.

        stream = residual * alpha + update + bias
        output = (stream - mean) / sqrt(variance + epsilon) * weight + shift

    Without an update (0) the stream is the residual. The columns are a multiple of 16.
    """
    at, builder = writer.slot, writer.builder
    with writer.claimed_blocks(at("tokens")) as token:
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
    update = writer.builder.fadd(update, _parameters(writer, width, "bias", column))
    return writer.fma(residual, alpha, update)


def _store_normed(writer: KernelWriter, width: Width, row: Any, mean: Any, scale: Any) -> None:
    builder = writer.builder
    with writer.loop(writer.const(0), writer.slot("columns"), STEP) as column:
        centered = builder.fsub(_numbers(writer, "stream", row, column), mean)
        normed = builder.fmul(centered, scale)
        weight = _parameters(writer, width, "weight", column)
        normed = writer.fma(normed, weight, _parameters(writer, width, "shift", column))
        writer.store(normed, _place(writer, "output", row, column))


def write_gelu(writer: KernelWriter, width: Width) -> None:
    """Add the bias and apply GELU in its tanh form, in place; a block is 1024 numbers of a token.

    gelu(x) = x * (1 + tanh(u)) / 2 = x - x / (1 + exp(2 * u)),   u = a * (x + b * x**3)
    """
    at, builder = writer.slot, writer.builder
    with writer.claimed_blocks(at("blocks")) as block:
        token = builder.sdiv(block, at("parts"))
        first = writer.times(builder.srem(block, at("parts")), 1024)
        row = writer.times(writer.times(token, at("columns")), 4)
        stop = writer.smaller(writer.add(first, 1024), at("columns"))
        with writer.loop(first, stop, STEP) as column:
            numbers = _numbers(writer, "output", row, column)
            numbers = builder.fadd(numbers, _parameters(writer, width, "bias", column))
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
    with writer.claimed_blocks(at("tokens")) as token:
        row = writer.times(writer.times(token, at("columns")), 4)
        with writer.loop(writer.const(0), at("columns"), STEP) as column:
            numbers = _numbers(writer, "output", row, column)
            bias = _parameters(writer, width, "bias", column)
            numbers = writer.builder.fadd(numbers, bias)
            writer.store(numbers, _place(writer, "output", row, column))


def _place(writer: KernelWriter, name: str, row: Any, column: Any) -> Any:
    return writer.address(writer.add(writer.slot(name), row), writer.times(column, 4))


def _numbers(writer: KernelWriter, name: str, row: Any, column: Any) -> Any:
    """Load 16 float32 numbers of a row."""
    return writer.load_as_float(_place(writer, name, row, column), STEP, "f32")


def _parameters(writer: KernelWriter, width: Width, name: str, column: Any) -> Any:
    """Load 16 parameters, in the model's own type."""
    size = 4 if width.kind == "f32" else 2
    place = writer.address(writer.slot(name), writer.times(column, size))
    return writer.load_as_float(place, STEP, width.kind)


def _number(writer: KernelWriter, name: str) -> Any:
    return writer.load(writer.address(writer.slot(name)), writer.f32)


def write_conductor(writer: KernelWriter) -> None:
    """Go through the stages, all threads together.

    A stage is an address of a kernel and one of its slots. After a stage each thread counts itself
    in, and waits until all have; the last one puts the stage's counter back for the next time. How
    many threads there are the runtime knows, which may give fewer than were asked for.
    """
    builder, at = writer.builder, writer.slot
    threads = builder.sext(writer.call_address(at("team_size"), writer.i32), writer.i64)
    with writer.loop(writer.const(0), at("count")) as index:
        stage = writer.add(at("stages"), writer.times(index, 16))
        kernel = writer.load(writer.address(stage), writer.i64)
        slots = writer.load(writer.address(stage, 8), writer.i64)
        writer.call_address(kernel, writer.ir.VoidType(), writer.address(slots))
        turn, released = writer.add(index, 1), writer.address(at("released"))
        arrivals = writer.address(at("arrivals"))
        arrived = builder.atomic_rmw("add", arrivals, writer.i64(1), "acq_rel")
        is_last = builder.icmp_signed("==", writer.add(arrived, 1), writer.times(turn, threads))
        with builder.if_then(is_last):
            writer.store(writer.const(0), writer.address(slots))
            builder.atomic_rmw("xchg", released, turn, "acq_rel")
        _wait(writer, released, turn)


def _wait(writer: KernelWriter, place: Any, value: Any) -> None:
    """Look at a number until it is a value; offer the processor to others after a while."""
    builder, append = writer.builder, writer.function.append_basic_block
    before, head, again, tired, after = builder.block, append(), append(), append(), append()
    builder.branch(head)
    builder.position_at_end(head)
    looks = builder.phi(writer.i64)
    looks.add_incoming(writer.const(0), before)
    found = builder.load_atomic(place, "acquire", 8, typ=writer.i64)
    builder.cbranch(builder.icmp_signed("<", found, value), again, after)
    builder.position_at_end(again)
    writer.pause()
    looked = writer.add(looks, 1)
    looks.add_incoming(looked, again)
    is_tired = builder.icmp_signed(">", looked, writer.const(PATIENCE))
    builder.cbranch(is_tired, tired, head)
    builder.position_at_end(tired)
    writer.call_address(writer.slot("yield"), writer.i32)
    looks.add_incoming(looked, tired)
    builder.branch(head)
    builder.position_at_end(after)


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
CONDUCTOR = KernelSource(
    ("count", "stages", "arrivals", "released", "team_size", "yield"), write_conductor
)


class Program:
    """Stages that are run one after another by all threads.

    Args:
        calls: the stages, with everything in their slots that does not change.
        threads: at least 1.
        kept: what the slots point to, to be kept alive.

    Raises:
        RuntimeError: if torch's threads cannot be reached; ask `can_run` first.
    """

    def __init__(self, calls: Sequence[Call], threads: int, kept: Sequence[Any]) -> None:
        kernel, runtime = find_kernel(CONDUCTOR), find_runtime()
        if kernel is None or runtime is None:
            raise RuntimeError("a program needs the kernels' compiler and torch's OpenMP threads")
        self._calls, self._kept = calls, kept
        self._slots = [call.lay_out() for call in calls]
        pairs = []
        for call, slots in zip(calls, self._slots):
            pairs += [call.address, ctypes.addressof(slots)]
        self._stages = (ctypes.c_int64 * len(pairs))(*pairs)
        # On cache lines of their own: the second one is looked at all the time.
        self._counters = torch.zeros(64, dtype=torch.int64, device="cpu")
        self._conductor = kernel.prepare(
            threads,
            count=len(calls),
            stages=ctypes.addressof(self._stages),
            arrivals=self._counters.data_ptr(),
            released=self._counters.data_ptr() + 256,
            team_size=runtime.team_size,
            **{"yield": runtime.yield_processor},
        )

    def change(self, stage: int, **values: int) -> None:
        """Write anew what stands in some slots of a stage."""
        slots, places = self._slots[stage], self._calls[stage].places
        for name, value in values.items():
            slots[places[name]] = value

    def run(self) -> None:
        """Run all stages; return when the last one is done."""
        self._counters.zero_()
        self._conductor.run()


def can_run() -> bool:
    """Tell whether programs can be run here."""
    return find_runtime() is not None and find_kernel(CONDUCTOR) is not None


__all__ = ["BIAS", "GELU", "NORM", "Program", "Width", "can_run"]
