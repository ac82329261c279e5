"""Writes the LLVM code of a kernel, statement by statement.

Owns the writer: values, memory, loops and number formats as the processor has them. Knows nothing
of what a kernel computes, and does not compile it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Processor(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        name: LLVM's name of the CPU.
        features: LLVM's feature string.
        dot: how four products of bytes are summed: "vnni", "avx-vnni", "avx2", "neon", "generic".
        lanes: numbers of 32 bits that one step of a dot product yields.
        triple: LLVM's name of the platform; None for this one, the only one that can be run.
    """

    name: str
    features: str
    dot: str
    lanes: int
    triple: str | None = None


class KernelWriter:
    """Writes the LLVM code of one kernel.

    Args:
        compiler: a `Compiler`, for its processor.
        name: of the kernel.
        slots: names of the slots behind the counter.
    """

    def __init__(self, compiler: Any, name: str, slots: Sequence[str]) -> None:
        self.ir, self.processor = compiler.ir, compiler.processor
        ir = self.ir
        self.i8, self.i16, self.i32, self.i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
        self.f16, self.f32 = ir.HalfType(), ir.FloatType()
        self.pointer = ir.PointerType()
        self.module = ir.Module(name)
        kind = ir.FunctionType(ir.VoidType(), [self.pointer])
        self.function = ir.Function(self.module, kind, name)
        self.entry = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.slots = dict(zip(slots, range(1, len(slots) + 1)))
        self.builder = ir.IRBuilder(self.function.append_basic_block("body"))
        self._values: dict[str, Any] = {}

    def finish(self) -> str:
        """Return the module's text."""
        self.entry.branch(self.function.basic_blocks[1])
        self.builder.ret_void()
        return str(self.module)

    # -- values ---------------------------------------------------------------------------------

    def const(self, value: int) -> Any:
        """Return a 64-bit integer."""
        return self.i64(value)

    def slot(self, name: str) -> Any:
        """Return the number in a slot."""
        if name not in self._values:
            place = self.entry.gep(
                self.function.args[0], [self.i64(self.slots[name])], source_etype=self.i64
            )
            self._values[name] = self.entry.load(place, typ=self.i64)
        return self._values[name]

    def vector(self, element: Any, count: int) -> Any:
        """Return a vector type."""
        return self.ir.VectorType(element, count)

    def add(self, first: Any, second: Any) -> Any:
        """Return a sum of 64-bit integers, the second maybe a Python number."""
        return self.builder.add(first, self.const(second) if isinstance(second, int) else second)

    def times(self, first: Any, second: Any) -> Any:
        """Return a product of 64-bit integers, the second maybe a Python number."""
        return self.builder.mul(first, self.const(second) if isinstance(second, int) else second)

    def smaller(self, first: Any, second: Any) -> Any:
        """Return the smaller of two 64-bit integers."""
        return self.builder.select(self.builder.icmp_signed("<", first, second), first, second)

    def larger(self, first: Any, second: Any) -> Any:
        """Return the larger of two 64-bit integers."""
        return self.builder.select(self.builder.icmp_signed(">", first, second), first, second)

    def splat(self, value: Any, count: int) -> Any:
        """Return a vector of one value."""
        kind = self.vector(value.type, count)
        first = self.builder.insert_element(
            self.ir.Constant(kind, self.ir.Undefined), value, self.i32(0)
        )
        return self.shuffle(first, [0] * count)

    def filled(self, element: Any, count: int, value: float | int) -> Any:
        """Return a constant vector of one number."""
        return self.ir.Constant(self.vector(element, count), [value] * count)

    def shuffle(self, vector: Any, picks: Sequence[int], other: Any = None) -> Any:
        """Return the picked elements of one or two vectors."""
        other = self.ir.Constant(vector.type, self.ir.Undefined) if other is None else other
        mask = self.ir.Constant(self.vector(self.i32, len(picks)), list(picks))
        return self.builder.shuffle_vector(vector, other, mask)

    def call(self, name: str, result: Any, arguments: Sequence[Any], fastmath: Any = ()) -> Any:
        """Call an intrinsic."""
        function = self.module.globals.get(name)
        if function is None:
            kind = self.ir.FunctionType(result, [argument.type for argument in arguments])
            function = self.ir.Function(self.module, kind, name)
        return self.builder.call(function, arguments, fastmath=fastmath)

    def call_vector(self, name: str, *arguments: Any) -> Any:
        """Call `llvm.NAME.TYPE`, whose arguments and result are of one type."""
        kind = arguments[0].type
        return self.call(f"llvm.{name}.{self._suffix(kind)}", kind, arguments)

    def _suffix(self, kind: Any) -> str:
        count = getattr(kind, "count", None)
        element = kind.element if count else kind
        names = {str(self.f32): "f32", str(self.f16): "f16"}
        name = names.get(str(element), str(element))
        return f"v{count}{name}" if count else name

    def call_address(self, address: Any, result: Any, *arguments: Any) -> Any:
        """Call the function at an address."""
        kind = self.ir.PointerType()
        # llvmlite calls through pointers that say to what they point.
        kind.pointee = self.ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(self.builder.inttoptr(address, kind), arguments)

    def pause(self) -> None:
        """Tell the processor that this thread is waiting."""
        if self.processor.dot == "neon":
            self.call("llvm.aarch64.hint", self.ir.VoidType(), [self.i32(1)])
        elif self.processor.dot != "generic":
            self.call("llvm.x86.sse2.pause", self.ir.VoidType(), [])

    def fma(self, first: Any, second: Any, added: Any) -> Any:
        """Return `first * second + added`, rounded once where the processor can."""
        product = self.builder.fmul(first, second, flags=["contract"])
        return self.builder.fadd(product, added, flags=["contract"])

    def sum(self, vector: Any) -> Any:
        """Return the sum of a float vector, in an order of the compiler's."""
        name = f"llvm.vector.reduce.fadd.{self._suffix(vector.type)}"
        return self.call(name, self.f32, [self.f32(0.0), vector], ["reassoc"])

    def largest(self, vector: Any) -> Any:
        """Return the largest element of a vector of unsigned integers."""
        name = f"llvm.vector.reduce.umax.{self._suffix(vector.type)}"
        return self.call(name, vector.type.element, [vector])

    # -- memory ---------------------------------------------------------------------------------

    def address(self, base: Any, offset: Any = 0) -> Any:
        """Return the pointer to a number of bytes behind an address."""
        return self.builder.inttoptr(self.add(base, offset), self.pointer)

    def load(self, place: Any, kind: Any) -> Any:
        """Load from wherever it stands, aligned or not."""
        return self.builder.load(place, align=1, typ=kind)

    def load_first(self, place: Any, kind: Any, count: Any) -> Any:
        """Load the first elements of a vector, and zeros behind them."""
        builder = self.builder
        steps = self.ir.Constant(self.vector(self.i64, kind.count), list(range(kind.count)))
        mask = builder.icmp_signed("<", steps, self.splat(count, kind.count))
        zeros = self.ir.Constant(kind, [0] * kind.count)
        name = f"llvm.masked.load.{self._suffix(kind)}.p0"
        return self.call(name, kind, [place, self.i32(1), mask, zeros])

    def store(self, value: Any, place: Any) -> None:
        """Store to wherever it stands, aligned or not."""
        self.builder.store(value, place, align=1)

    def store_first(self, value: Any, place: Any, count: Any) -> None:
        """Store the first elements of a vector, and nothing behind them."""
        steps = self.ir.Constant(
            self.vector(self.i64, value.type.count), list(range(value.type.count))
        )
        mask = self.builder.icmp_signed("<", steps, self.splat(count, value.type.count))
        name = f"llvm.masked.store.{self._suffix(value.type)}.p0"
        self.call(name, self.ir.VoidType(), [value, place, self.i32(1), mask])

    def load_as_float(self, place: Any, count: int, kind: str, left: Any = None) -> Any:
        """Load a vector of "f32", "f16" or "bf16" numbers as float32; of `left`, if fewer."""
        builder, result = self.builder, self.vector(self.f32, count)
        stored = self.vector({"f32": self.f32, "f16": self.f16, "bf16": self.i16}[kind], count)
        found = self.load(place, stored) if left is None else self.load_first(place, stored, left)
        if kind != "bf16":
            return self.as_float(found)
        bits = builder.zext(found, self.vector(self.i32, count))
        return builder.bitcast(builder.shl(bits, self.filled(self.i32, count, 16)), result)

    def as_float(self, vector: Any) -> Any:
        """Return a vector of halves or float32 as float32."""
        if vector.type.element == self.f32:
            return vector
        if self.processor.dot == "generic":
            return self._widen_halves(vector)
        return self.builder.fpext(vector, self.vector(self.f32, vector.type.count))

    def _widen_halves(self, halves: Any) -> Any:
        """Return halves as float32 by their bits, which takes no library function.

        One would be called where there is no instruction, and compiled code cannot find it.
        """
        builder, count = self.builder, halves.type.count
        wide, filled = self.vector(self.i32, count), functools.partial(self.filled, self.i32, count)
        bits = builder.zext(builder.bitcast(halves, self.vector(self.i16, count)), wide)
        exponent = builder.and_(bits, filled(0x7C00))
        # The exponents' bias is 112 more; an infinity or NaN has the largest exponent in both.
        is_number = builder.icmp_unsigned("<", exponent, filled(0x7C00))
        bias = builder.select(is_number, filled(112 << 23), filled(224 << 23))
        number = builder.shl(builder.and_(bits, filled(0x7FFF)), filled(13))
        number = builder.add(number, bias)
        denormal = builder.uitofp(builder.and_(bits, filled(0x03FF)), self.vector(self.f32, count))
        denormal = builder.fmul(denormal, self.filled(self.f32, count, 2.0**-24))
        is_denormal = builder.icmp_unsigned("==", exponent, filled(0))
        number = builder.select(is_denormal, builder.bitcast(denormal, wide), number)
        sign = builder.shl(builder.and_(bits, filled(0x8000)), filled(16))
        return builder.bitcast(builder.or_(number, sign), denormal.type)

    def store_as(self, vector: Any, place: Any, kind: str) -> None:
        """Store float32 numbers as "f32", "f16" or "bf16", rounded to nearest, halves to even."""
        builder = self.builder
        if kind == "f16":
            is_slow = self.processor.dot == "generic"
            halves = self.vector(self.f16, vector.type.count)
            vector = self._narrow_to_halves(vector) if is_slow else builder.fptrunc(vector, halves)
        if kind == "bf16":
            vector = self._narrow(vector)
        self.store(vector, place)

    def _narrow(self, vector: Any) -> Any:
        """Return the upper halves of float32 numbers, rounded; a NaN stays one."""
        builder, count = self.builder, vector.type.count
        wide, filled = self.vector(self.i32, count), functools.partial(self.filled, self.i32, count)
        bits = builder.bitcast(vector, wide)
        is_odd = builder.and_(builder.lshr(bits, filled(16)), filled(1))
        rounded = builder.add(bits, builder.add(is_odd, filled(0x7FFF)))
        is_number = builder.fcmp_ordered("ord", vector, vector)
        rounded = builder.select(is_number, rounded, builder.or_(bits, filled(0x400000)))
        return builder.trunc(builder.lshr(rounded, filled(16)), self.vector(self.i16, count))

    def _narrow_to_halves(self, vector: Any) -> Any:
        """Return float32 numbers as halves by their bits; see `_widen_halves`."""
        builder, count = self.builder, vector.type.count
        wide, filled = self.vector(self.i32, count), functools.partial(self.filled, self.i32, count)
        bits = builder.bitcast(vector, wide)
        sign = builder.and_(builder.lshr(bits, filled(16)), filled(0x8000))
        bits = builder.and_(bits, filled(0x7FFFFFFF))
        is_odd = builder.and_(builder.lshr(bits, filled(13)), filled(1))
        number = builder.add(bits, builder.add(is_odd, filled(0x0FFF)))
        number = builder.sub(builder.lshr(number, filled(13)), filled(112 << 10))
        # Beside 0.5 the last place of a float32 is that of the smallest halves.
        shifted = builder.fadd(
            builder.bitcast(bits, vector.type), self.filled(self.f32, count, 0.5)
        )
        denormal = builder.sub(builder.bitcast(shifted, wide), filled(0x3F000000))
        is_small = builder.icmp_unsigned("<", bits, filled(113 << 23))
        number = builder.select(is_small, denormal, number)
        is_large = builder.icmp_unsigned(">=", bits, filled(0x477FF000))
        number = builder.select(is_large, filled(0x7C00), number)
        is_nan = builder.icmp_unsigned(">", bits, filled(0x7F800000))
        number = builder.or_(builder.select(is_nan, filled(0x7E00), number), sign)
        return builder.trunc(number, self.vector(self.i16, count))

    def reserve(self, size: int) -> Any:
        """Return the address of so many bytes that belong to this thread."""
        place = self.entry.alloca(self.ir.ArrayType(self.i8, size))
        place.align = 64
        return self.entry.ptrtoint(place, self.i64)

    def prefetch(self, place: Any) -> None:
        """Ask for the memory at a place, which may also not exist."""
        flags = [self.i32(0), self.i32(3), self.i32(1)]  # to read, into all caches, data
        self.call("llvm.prefetch.p0", self.ir.VoidType(), [place, *flags])

    def variable(self, value: Any) -> "Variable":
        """Return a variable that starts with a value."""
        place = self.entry.alloca(value.type)
        variable = Variable(self, place, value.type)
        variable.set(value)
        return variable

    # -- control --------------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Any]:
        """Repeat what is written inside for every index from start up to stop.

        The step is a Python number, or one that stands in a slot.
        """
        builder, append = self.builder, self.function.append_basic_block
        before, head, body, after = builder.block, append(), append(), append()
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(self.i64)
        index.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
        builder.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, step), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def parallel_for(self, count: Any) -> Iterator[Any]:
        """Run what is written inside once a block, in whichever thread claims that block."""
        builder, append = self.builder, self.function.append_basic_block
        head, body, after = append(), append(), append()
        builder.branch(head)
        builder.position_at_end(head)
        block = builder.atomic_rmw("add", self.function.args[0], self.i64(1), "monotonic")
        builder.cbranch(builder.icmp_signed("<", block, count), body, after)
        builder.position_at_end(body)
        yield block
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Do what is written inside only if a condition holds."""
        with self.builder.if_then(condition):
            yield


class Variable:
    """A place for a value that changes; the optimizer makes it a register."""

    def __init__(self, writer: KernelWriter, place: Any, kind: Any) -> None:
        self.writer, self.place, self.kind = writer, place, kind

    def get(self) -> Any:
        """Return the value."""
        return self.writer.builder.load(self.place, typ=self.kind)

    def set(self, value: Any) -> None:
        """Replace the value."""
        self.writer.builder.store(value, self.place)


class KernelSource(NamedTuple):
    """A kernel before it is compiled.

    Attributes:
        slots: the names of its slots, in order.
        write: writes its body, given a writer and the parameters that it is compiled for.
    """

    slots: tuple[str, ...]
    write: Callable[..., None]
