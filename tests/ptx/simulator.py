"""Runs PTX without a GPU: all threads of a grid at once, in numpy, on the memory of this process.

Owns what each instruction does and what a kernel may not do; knows nothing of the kernels. It
stops at whatever a GPU would do wrong, do differently from run to run, or do silently: an access
outside an array or across its alignment, two stores to one place, a shuffle that waits for threads
which have gone, a register without a value, a loop without end, an instruction not in its table.

Threads stand at different instructions after a branch. Those at the earliest one always go first,
which brings them together again where the paths of structured code meet.

Three differences from a GPU: `fma` rounds twice in the rare case that its exact value has more
bits than a float64; a tensor core's sum of 16 or 8 products is rounded once, where a GPU cuts off
bits in a way that is nowhere written down; and memory has no order between threads, of which `two
stores` leaves no trace. What a block shares is ordered by its barriers, and a load that no barrier
parts from the store of another thread is stopped.
"""

import ctypes
import functools
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

WARP = 32
MAX_STEPS = 10_000
NAN = np.uint32(0x7FFFFFFF).view("f4")  # the only one that arithmetic returns
REGISTER_DTYPES = {"pred": bool, "b16": "u2", "b32": "u4", "f32": "u4", "b64": "u8"}
DTYPES = {
    "pred": "?",
    "f16": "f2",
    "f32": "f4",
    **{
        f"{kind}{bits}": f"{kind}{bits // 8}".replace("b", "u").replace("s", "i")
        for kind in "bus"
        for bits in (8, 16, 32, 64)
    },
}


class Trap(Exception):
    """What a kernel did that it may not do."""


# Memory


@dataclass
class Array:
    """One allocation, and which of its bytes the running kernel has stored."""

    address: int
    size: int
    stored: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = np.frombuffer((ctypes.c_uint8 * self.size).from_address(self.address), "u1")
        self.stored = np.zeros(self.size, bool)


class Memory:
    """The arrays that kernels may touch."""

    def __init__(self) -> None:
        self.arrays: dict[int, Array] = {}

    def add(self, address: int, size: int) -> None:
        if address not in self.arrays or self.arrays[address].size < size:
            self.arrays[address] = Array(address, size)

    def begin(self) -> None:
        """Forget what the last kernel stored."""
        for array in self.arrays.values():
            array.stored[:] = False

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return `(threads, size)` bytes."""
        array, places = self._find(addresses, size)
        return array.bytes[places]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store `(threads, size)` bytes."""
        array, places = self._find(addresses, values.shape[1])
        if array.stored[places].any() or len(np.unique(addresses)) < len(addresses):
            raise Trap("two stores to one place")
        array.stored[places] = True
        array.bytes[places] = values

    def _find(self, addresses: np.ndarray, size: int) -> tuple[Array, np.ndarray]:
        """Return the array and the bytes in it; one instruction never means two arrays."""
        lowest, highest = int(addresses.min()), int(addresses.max()) + size
        if (addresses % np.uint64(size)).any():
            raise Trap(f"{size} bytes at an address that is no multiple of it")
        for array in self.arrays.values():
            if array.address <= lowest and highest <= array.address + array.size:
                offsets = (addresses - np.uint64(array.address)).astype(np.int64)
                return array, offsets[:, None] + np.arange(size)
        raise Trap(f"{size} bytes of [{lowest:#x}, {highest:#x}), which lie in no one array")


class SharedMemory:
    """What the threads of each block share: every byte is stored once, and read after a barrier."""

    def __init__(self, blocks: int, size: int) -> None:
        self.bytes = np.zeros((blocks, size), "u1")
        self.writers = np.full((blocks, size), -1)
        self.times = np.zeros((blocks, size), np.int64)
        self.time = np.zeros(blocks, np.int64)  # how many barriers each block has passed

    def load(self, threads: np.ndarray, blocks: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return `(threads, size)` bytes."""
        rows = blocks[:, None], self._check(places)
        writers = self.writers[rows]
        if (writers < 0).any():
            raise Trap("shared memory is read before it is written")
        if ((writers != threads[:, None]) & (self.times[rows] == self.time[rows[0]])).any():
            raise Trap("shared memory is read without a barrier after it was written")
        return self.bytes[rows]

    def store(
        self, threads: np.ndarray, blocks: np.ndarray, places: np.ndarray, values: np.ndarray
    ) -> None:
        """Store `(threads, size)` bytes."""
        rows = blocks[:, None], self._check(places)
        unique = np.unique(blocks * self.bytes.shape[1] + places[:, 0])
        if (self.writers[rows] >= 0).any() or len(unique) < len(blocks):
            raise Trap("two stores to one place of shared memory")
        self.bytes[rows], self.times[rows] = values, self.time[rows[0]]
        self.writers[rows] = threads[:, None]

    def _check(self, places: np.ndarray) -> np.ndarray:
        if places.min() < 0 or places.max() >= self.bytes.shape[1]:
            raise Trap(f"shared memory ends at {self.bytes.shape[1]}, not at {places.max() + 1}")
        if (places[:, 0] % places.shape[1]).any():
            raise Trap("shared memory at an address that is no multiple of the size")
        return places


# Programs


class Instruction(NamedTuple):
    guard: str  # "", "%p1" or "!%p1"
    name: str
    operands: list[str]


@dataclass
class Kernel:
    """A parsed `.entry`."""

    parameters: dict[str, int] = field(default_factory=dict)  # name to size in bytes
    registers: dict[str, tuple[Any, int]] = field(default_factory=dict)  # prefix to dtype, count
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # name to the place where it begins
    shared_size: int = 0
    max_threads: int = 1024


PARAMETER = re.compile(r"\.param \.[ub](\d+)(?: \.ptr(?: \.align \d+)?)? (\w+)")
REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%[a-z]+)<(\d+)>;")
SHARED = re.compile(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];")
STATEMENT = re.compile(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);")
OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+")


@functools.cache
def parse(text: str) -> dict[str, Kernel]:
    """Read the kernels of a PTX module; a line that is not understood is an error."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel()
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    # How the compiler takes the upper half of a register; the lower one goes nowhere.
    text = re.sub(r"\{ \.reg \.b16 tmp; (mov\.b32 \{)tmp(, %\w+\}, %\w+;) \}", r"\1_\2", text)
    for line in text.splitlines():
        line = line.strip().rstrip(",")
        if entry := re.match(r"\.visible \.entry (\w+)\(", line):
            kernel = kernels[entry[1]] = Kernel()
        elif parameter := PARAMETER.fullmatch(line):
            kernel.parameters[parameter[2]] = int(parameter[1]) // 8
        elif registers := REGISTERS.fullmatch(line):
            kernel.registers[registers[2]] = REGISTER_DTYPES[registers[1]], int(registers[3])
        elif shared := SHARED.fullmatch(line):
            start = -(-kernel.shared_size // int(shared[1])) * int(shared[1])
            kernel.shared[shared[2]], kernel.shared_size = start, start + int(shared[3])
        elif line.startswith(".maxntid"):
            kernel.max_threads = int(line.split()[1].rstrip(","))
        elif re.fullmatch(r"\$\w+:", line):
            kernel.labels[line[:-1]] = len(kernel.code)
        elif statement := STATEMENT.fullmatch(line):
            operands = OPERAND.findall(statement[3])
            kernel.code.append(Instruction(statement[1] or "", statement[2], operands))
        elif line not in ("", "{", "}", ")") and not re.match(
            r"\.(version|target|address_size|pragma|minnctapersm) ", line
        ):
            raise Trap(f"not understood: {line}")
    return kernels


# Instructions


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any function of three bits, looked up bit by bit."""
    result = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            terms = (x if index >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0)))
            result = result | np.bitwise_and.reduce(list(np.broadcast_arrays(*terms)))
    return result


def shift(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Shift as PTX does: by more bits than there are means by all of them."""

    def apply(value: np.ndarray, amount: np.ndarray) -> np.ndarray:
        bits = value.dtype.itemsize * 8
        half = np.minimum(amount, bits) // 2
        rest = np.minimum(amount, bits) - half
        return function(function(value, half.astype(value.dtype)), rest.astype(value.dtype))

    return apply


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype("f8") * b.astype("f8") + c.astype("f8")


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Choose four bytes of eight."""
    if (selector & np.uint32(0x8888)).any():
        raise Trap("a permutation that repeats signs")
    bytes_ = np.stack(np.broadcast_arrays(a, b), -1).view("u1")  # (threads, 8)
    chosen = [selector >> np.uint32(4 * i) & np.uint32(7) for i in range(4)]
    places = np.stack(np.broadcast_arrays(bytes_[:, 0], *chosen)[1:], -1).astype(np.int64)
    return np.take_along_axis(bytes_, places, 1).view("u4")[:, 0]


def insert(a: np.ndarray, b: np.ndarray, place: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Put the lowest bits of `a` into `b`."""
    mask = ((np.uint64(1) << size.astype("u8")) - np.uint64(1)) << place.astype("u8")
    moved = a.astype("u8") << place.astype("u8")
    return ((b.astype("u8") & ~mask) | (moved & mask)).astype("u4")


def split_pairs(words: np.ndarray, kind: str) -> np.ndarray:
    """Return the two numbers of each word, `(..., 2)`, exactly."""
    halves = np.ascontiguousarray(words)[..., None].view("u2")
    if kind == "f16":
        return halves.view("f2").astype("f8")
    return (halves.astype("u4") << np.uint32(16)).view("f4").astype("f8")


def join_pairs(values: np.ndarray, kind: str) -> np.ndarray:
    """Round `(..., 2)` numbers to words of two, ties to even."""
    if kind == "f16":
        return values.astype("f2").view("u4")[..., 0]
    bits = values.astype("f4").view("u4")
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.ascontiguousarray((bits >> np.uint32(16)).astype("u2")).view("u4")[..., 0]


def fma_pairs(kind: str) -> Callable[..., np.ndarray]:
    def apply(*words: np.ndarray) -> np.ndarray:
        a, b, c = (split_pairs(word, kind) for word in np.broadcast_arrays(*words))
        return join_pairs(a * b + c, kind)

    return apply


def same(value: np.ndarray) -> np.ndarray:
    return value


# What is whitelisted: full mnemonic to the type of the result, those of the operands, and the
# function. A register is read as the operand's type, and must be as wide.
TABLE: dict[str, tuple[str, str, Callable[..., Any]]] = {
    **{f"mov.{t}": (t, t, same) for t in ("b16", "u16", "b32", "u32", "f32", "b64", "u64")},
    **{f"add.{t}": (t, f"{t} {t}", operator.add) for t in ("s32", "s64", "f32")},
    **{f"mul.{t}": (t[-3:], f"{t[-3:]} {t[-3:]}", operator.mul) for t in ("f32", "rn.f32")},
    **{f"mul.lo.{t}": (t, f"{t} {t}", operator.mul) for t in ("s32", "s64")},
    **{f"mad.lo.{t}": (t, f"{t} {t} {t}", lambda a, b, c: a * b + c) for t in ("s32", "s64")},
    "mul.wide.s32": ("s64", "s32 s32", lambda a, b: a.astype("i8") * b.astype("i8")),
    "mul.wide.u32": ("u64", "u32 u32", lambda a, b: a.astype("u8") * b.astype("u8")),
    "fma.rn.f32": ("f32", "f32 f32 f32", fma),
    "min.s32": ("s32", "s32 s32", np.minimum),
    "neg.s32": ("s32", "s32", operator.neg),
    **{f"and.{t}": (t, f"{t} {t}", operator.and_) for t in ("pred", "b16", "b32", "b64")},
    **{f"or.{t}": (t, f"{t} {t}", operator.or_) for t in ("pred", "b16", "b32", "b64")},
    **{f"xor.{t}": (t, f"{t} {t}", operator.xor) for t in ("b32", "b64")},
    **{f"not.{t}": (t, t, operator.invert) for t in ("pred", "b32")},
    "prmt.b32": ("b32", "b32 b32 u32", permute),
    "bfe.u32": ("u32", "u32 u32 u32", lambda a, place, size: a >> place & (1 << size) - 1),
    "bfi.b32": ("b32", "b32 b32 u32 u32", insert),
    **{f"fma.rn.{kind}x2": ("b32", "b32 b32 b32", fma_pairs(kind)) for kind in ("f16", "bf16")},
    "lop3.b32": ("b32", "b32 b32 b32 u32", lop3),
    **{f"shl.{t}": (t, f"{t} u32", shift(operator.lshift)) for t in ("b32", "b64")},
    **{
        f"shr.{t}": (t, f"{t} u32", shift(operator.rshift))
        for t in ("s32", "u32", "s64", "u64", "u16")
    },
    **{
        f"setp.{name}.{t}": ("pred", f"{t} {t}", getattr(operator, name))
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for t in ("s32", "u32")
    },
    "setp.nan.f32": ("pred", "f32 f32", lambda a, b: np.isnan(a) | np.isnan(b)),
    "setp.num.f32": ("pred", "f32 f32", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
    **{
        f"selp.{t}": (t, f"{t} {t} pred", lambda a, b, chosen: np.where(chosen, a, b))
        for t in ("b16", "b32")
    },
    "cvta.to.global.u64": ("u64", "u64", same),
    "cvt.f32.f16": ("f32", "f16", same),
    "cvt.rn.f16.f32": ("f16", "f32", same),
    "cvt.u16.u32": ("u16", "u32", same),
    "cvt.u32.u64": ("u32", "u64", same),
    "cvt.u32.u16": ("u32", "u16", same),
    "cvt.u32.u8": ("u32", "u16", lambda a: a & np.uint16(0xFF)),
    "cvt.s64.s32": ("s64", "s32", same),
    "cvt.u64.u32": ("u64", "u32", same),
}
# Loads and stores: the bytes that each thread moves, in one register or in four.
LOADS = {
    "ld.global.nc.u8": 1,
    "ld.global.nc.u16": 2,
    "ld.global.nc.u32": 4,
    "ld.global.nc.f32": 4,
    "ld.global.nc.v2.u32": 8,
    "ld.global.nc.v4.u32": 16,
    "ld.global.nc.L1::no_allocate.v4.u32": 16,
}
TILES = re.compile(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(b?f16)\.\2\.f32")
STORES = {"st.global.u16": 2, "st.global.v4.u32": 16}


class Grid:
    """The threads of one launch, each with its registers and its place in the code."""

    def __init__(
        self, kernel: Kernel, memory: Memory, grid: Iterable[int], threads: int, block: bytes
    ) -> None:
        width, height = grid
        self.kernel, self.memory, self.block = kernel, memory, block
        index = np.arange(width * height * threads)
        self.count = len(index)
        self.places = np.zeros(self.count, np.int64)
        self.values: dict[str, np.ndarray] = {}
        for prefix, (dtype, count) in kernel.registers.items():
            self.values |= {f"{prefix}{n}": np.zeros(self.count, dtype) for n in range(count)}
        self.written = {name: np.zeros(self.count, bool) for name in self.values}
        self.writers: dict[str, np.ndarray] = {}
        self.threads, self.blocks = threads, index // threads
        self.shared = SharedMemory(width * height, kernel.shared_size)
        self.special = {
            "%tid.x": index % threads,
            "%ntid.x": np.full(self.count, threads),
            "%ctaid.x": index // threads % width,
            "%ctaid.y": index // threads // width,
        }

    def run(self) -> None:
        """Run all threads to their end."""
        end = len(self.kernel.code)
        with np.errstate(all="ignore"):
            for _ in range(MAX_STEPS):
                place = int(self.places.min())
                if place == end:
                    return
                here = self.places == place
                waiting = int(self.places.min(where=~here, initial=end))
                self._run_together(place, waiting, np.flatnonzero(here))
        raise Trap("a loop without end")

    def _run_together(self, place: int, waiting: int, active: np.ndarray) -> None:
        """Run some threads until they branch, end, or reach where others wait."""
        while place < waiting:
            guard, name, operands = self.kernel.code[place]
            place += 1
            chosen = active
            if guard:
                holds = self.read(guard.lstrip("!"), "pred", active)
                chosen = active[holds ^ guard.startswith("!")]
            if name in ("bra", "bra.uni", "ret"):
                self.places[active] = place
                gone = len(self.kernel.code)
                self.places[chosen] = gone if name == "ret" else self.kernel.labels[operands[0]]
                return
            if len(chosen):
                self.execute(name, operands, chosen)
        self.places[active] = place

    def execute(self, name: str, operands: list[str], active: np.ndarray) -> None:
        if name in TABLE:
            result_type, types, function = TABLE[name]
            values = [self.read(o, t, active) for o, t in zip(operands[1:], types.split())]
            if len(operands) != 1 + len(values):
                raise Trap(f"{name} with {len(operands)} operands")
            result = function(*values)
            if result_type == "f32" and not name.startswith("mov"):
                result = np.where(np.isnan(result), NAN, result)
            self.write(operands[0], result, result_type, active)
        elif name in LOADS:
            self.load(LOADS[name], operands, active)
        elif name in STORES:
            self.store(STORES[name], operands, active)
        else:
            self.execute_together(name, operands, active)

    def execute_together(self, name: str, operands: list[str], active: np.ndarray) -> None:
        """Execute what threads do with others, or with the arguments of the kernel."""
        if name in ("ld.param.u32", "ld.param.u64"):
            self.load_parameter(name[-3:], operands, active)
        elif name in ("ld.shared.f32", "st.shared.f32"):
            self.share(name[:2], operands, active)
        elif name == "bar.sync":
            self.wait(active)
        elif tile := TILES.fullmatch(name):
            self.multiply_tiles(int(tile[1]), tile[2], operands, active)
        elif name == "shfl.sync.bfly.b32":
            self.shuffle(operands, active)
        else:
            raise Trap(f"{name} is not an instruction that kernels may use")

    def read(self, operand: str, type_name: str, active: np.ndarray) -> np.ndarray:
        dtype = np.dtype(DTYPES[type_name])
        if operand in self.special:
            return self.special[operand][active].astype(dtype)
        if operand in self.values:
            # Mostly the same threads have just written it, which is faster to see.
            if self.writers.get(operand) is not active and not self.written[operand][active].all():
                raise Trap(f"{operand} is read before it is written")
            values = self.values[operand][active]
            if values.dtype.itemsize != dtype.itemsize:
                raise Trap(f"{operand} is read as {type_name}")
            return values.view(dtype)
        if operand.startswith("{"):  # two halves, the lower first
            halves = OPERAND.findall(operand.strip("{}"))
            half_type = f"u{dtype.itemsize * 4}"
            columns = [
                np.broadcast_to(self.read(h, half_type, active), len(active)) for h in halves
            ]
            return np.stack(columns, 1).view(dtype)[:, 0]
        if operand in self.kernel.shared:
            return np.array([self.kernel.shared[operand]], dtype)
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        bits = number % (1 << 8 * dtype.itemsize)
        return np.array([bits], f"u{dtype.itemsize}").view(dtype)

    def write(self, operand: str, value: np.ndarray, type_name: str, active: np.ndarray) -> None:
        typed = value.astype(DTYPES[type_name])
        if operand.startswith("{"):
            return self.write_bytes(operand, typed[:, None].view("u1"), active)
        register = self.values[operand]
        if typed.itemsize > register.itemsize:
            raise Trap(f"{operand} is too narrow for {type_name}")
        register[active] = typed.view(f"u{typed.itemsize}")
        self.written[operand][active] = True
        self.writers[operand] = active

    def write_bytes(self, operand: str, data: np.ndarray, active: np.ndarray) -> None:
        """Write `(threads, size)` bytes to a register, or parts of them to several."""
        names = OPERAND.findall(operand.strip("{}"))
        columns = data.view(f"u{data.shape[1] // len(names)}")
        for name, column in zip(names, columns.T):
            if name != "_":
                self.write(name, column, f"u{column.itemsize * 8}", active)

    def locate(self, operand: str, active: np.ndarray) -> np.ndarray:
        register, _, offset = operand[1:-1].partition("+")
        return self.read(register, "u64", active) + np.uint64(int(offset or 0) % 2**64)

    def load(self, size: int, operands: list[str], active: np.ndarray) -> None:
        data = self.memory.load(self.locate(operands[1], active), size)
        self.write_bytes(operands[0], data, active)

    def store(self, size: int, operands: list[str], active: np.ndarray) -> None:
        names = OPERAND.findall(operands[1].strip("{}"))
        part_type = f"u{size // len(names) * 8}"
        columns = [np.broadcast_to(self.read(n, part_type, active), active.shape) for n in names]
        self.memory.store(self.locate(operands[0], active), np.stack(columns, 1).view("u1"))

    def load_parameter(self, type_name: str, operands: list[str], active: np.ndarray) -> None:
        start = 0
        for name, size in self.kernel.parameters.items():
            if name == operands[1][1:-1]:
                value = np.frombuffer(self.block[start : start + size], DTYPES[type_name])
                return self.write(operands[0], value, type_name, active)
            start += size
        raise Trap(f"there is no parameter {operands[1]}")

    def shuffle(self, operands: list[str], active: np.ndarray) -> None:
        """Exchange between threads whose numbers differ in a bit; whole warps only."""
        target, source, *rest = operands
        distance, clamp, members = (self.read(operand, "b32", active) for operand in rest)
        if (clamp != WARP - 1).any() or (members != 0xFFFFFFFF).any() or len(set(distance)) > 1:
            raise Trap("a shuffle of a part of a warp")
        self.check_warps(active, "a shuffle")
        values = self.read(source, "b32", active).reshape(-1, WARP)
        swapped = values[:, np.arange(WARP) ^ int(distance[0])].reshape(-1)
        result, _, predicate = target.partition("|")
        self.write(result, swapped, "b32", active)
        if predicate:
            self.write(predicate, np.ones(len(active), bool), "pred", active)

    def check_warps(self, active: np.ndarray, what: str) -> None:
        warps = active[::WARP, None] // WARP * WARP + np.arange(WARP)
        if not np.array_equal(active, warps.reshape(-1)):
            raise Trap(f"{what} with threads that are gone or elsewhere")

    def share(self, action: str, operands: list[str], active: np.ndarray) -> None:
        """Move 4 bytes a thread between a register and what its block shares."""
        address = operands[1] if action == "ld" else operands[0]
        register, _, offset = address[1:-1].partition("+")
        start = np.broadcast_to(self.read(register, "u32", active), active.shape).astype(np.int64)
        places = start[:, None] + int(offset or 0) + np.arange(4)
        where = active, self.blocks[active], places
        if action == "ld":
            return self.write_bytes(operands[0], self.shared.load(*where), active)
        values = np.broadcast_to(self.read(operands[1], "u32", active), active.shape)
        self.shared.store(*where, np.ascontiguousarray(values)[:, None].view("u1"))

    def wait(self, active: np.ndarray) -> None:
        """Let blocks pass a barrier, which all of their threads must have reached."""
        blocks, counts = np.unique(self.blocks[active], return_counts=True)
        if (counts != self.threads).any():
            raise Trap("a barrier with threads that are gone or elsewhere")
        self.shared.time[blocks] += 1

    def multiply_tiles(
        self, depth: int, kind: str, operands: list[str], active: np.ndarray
    ) -> None:
        """Add the product of a 16 x depth and a depth x 8 matrix to a 16 x 8 one, in each warp."""
        self.check_warps(active, "a tensor core")
        names = [OPERAND.findall(operand.strip("{}")) for operand in operands]
        if [len(group) for group in names] != [4, depth // 4, depth // 8, 4]:
            raise Trap(f"a tensor core with {names}")
        lane = np.arange(WARP)
        row, pair = lane // 4, lane % 4 * 2
        warps = len(active) // WARP
        a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        sums = np.zeros((warps, 16, 8))
        for i, name in enumerate(names[1]):
            numbers = split_pairs(self.read_warps(name, "b32", active), kind)
            for k in (0, 1):
                a[:, row + i % 2 * 8, pair + i // 2 * 8 + k] = numbers[..., k]
        for i, name in enumerate(names[2]):
            numbers = split_pairs(self.read_warps(name, "b32", active), kind)
            for k in (0, 1):
                b[:, pair + i * 8 + k, row] = numbers[..., k]
        for i, name in enumerate(names[3]):
            sums[:, row + i // 2 * 8, pair + i % 2] = self.read_warps(name, "f32", active)
        sums += a @ b
        for i, name in enumerate(names[0]):
            result = sums[:, row + i // 2 * 8, pair + i % 2].astype("f4").reshape(-1)
            self.write(name, np.where(np.isnan(result), NAN, result), "f32", active)

    def read_warps(self, operand: str, type_name: str, active: np.ndarray) -> np.ndarray:
        """Return `(warps, 32)`."""
        return np.broadcast_to(self.read(operand, type_name, active), active.shape).reshape(
            -1, WARP
        )
