"""Runs compiled kernels on torch's threads.

Owns the calls of a kernel and the threads that they run on. Knows nothing of what a kernel
computes.

A kernel is `void kernel(int64 *slots)`. Slots hold pointers and numbers; slot 0 is a counter from
which every thread claims blocks of the work until none is left. So a kernel needs no index of its
thread, any number of threads may run it, and what a block computes does not depend on who does it.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

WORTH_A_THREAD = 2**15  # bytes; less is read sooner than another thread is woken


class Kernel(NamedTuple):
    """A compiled kernel."""

    address: int
    slots: tuple[str, ...]

    def prepare(self, threads: int, **values: int) -> "Call":
        """Return a call on so many threads, with the values that are the same every time."""
        return Call(self, threads, values)


class Call:
    """A kernel with some of its slots filled, made once and run for every token.

    Args:
        kernel: what to run.
        threads: at least 1.
        values: numbers by the names of slots.
    """

    def __init__(self, kernel: Kernel, threads: int, values: dict[str, int]) -> None:
        self.kernel, self.address, self.threads = kernel, kernel.address, threads
        self.places = {name: place + 1 for place, name in enumerate(kernel.slots)}
        self._numbers = [0, *(values.get(name, 0) for name in kernel.slots)]
        self._array = ctypes.c_int64 * len(self._numbers)

    def lay_out(self, **values: int) -> Any:
        """Return the slots as an array, with more values in them."""
        numbers = self._numbers.copy()
        for name, value in values.items():
            numbers[self.places[name]] = value
        return self._array(*numbers)

    def bind(self, **values: int) -> "Call":
        """Return the same call with more values."""
        numbers = dict(zip(self.kernel.slots, self._numbers[1:]))
        return Call(self.kernel, self.threads, numbers | values)

    def run(self, **values: int) -> None:
        """Run with the values of the other slots, pointers mostly; return when all is done."""
        slots = self.lay_out(**values)
        run_on_threads(self.address, ctypes.addressof(slots), self.threads)


def run_on_threads(address: int, argument: int, threads: int) -> None:
    """Call native code with one argument on several threads at once.

    Torch's own OpenMP threads do it where they can be reached (GNU's runtime, or LLVM's under its
    names); elsewhere Python threads, which a native call does not keep waiting.
    """
    if threads == 1:
        _make_function(address)(argument)
        return
    runtime = find_runtime()
    if runtime is not None:
        runtime.fork(address, argument, threads, 0)
        return
    function = _make_function(address)
    others = [_python_threads().submit(function, argument) for _ in range(threads - 1)]
    function(argument)
    for other in others:
        other.result()


@functools.cache
def _make_function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


class Runtime(NamedTuple):
    """The OpenMP runtime that torch has loaded.

    Attributes:
        fork: its `GOMP_parallel`.
        yield_processor: the address of the system's `sched_yield`.
        sleep: the address of its `usleep`, which takes microseconds.
    """

    fork: Any
    yield_processor: int
    sleep: int


@functools.cache
def find_runtime() -> Runtime | None:
    """Return the OpenMP runtime of this process, or None where it cannot be reached."""
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None)
    names = ("GOMP_parallel", "sched_yield", "usleep")
    fork, yielding, sleep = (getattr(library, name, None) for name in names)
    if fork is None or yielding is None or sleep is None:
        return None
    fork.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    fork.restype = None
    addresses = [
        ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (yielding, sleep)
    ]
    return Runtime(fork, *addresses)


@functools.cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="chatglm-kernel")


def count_threads(blocks: int, size: int) -> int:
    """Return how many of torch's threads to use for so many blocks that read `size` bytes."""
    return max(1, min(torch.get_num_threads(), blocks, size // WORTH_A_THREAD))
