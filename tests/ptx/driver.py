"""Stands in for the CUDA driver and for NVRTC on a machine without a GPU.

Both are called as the libraries are: through C function pointers, with the arguments that ctypes
makes of what the host code passes. `SimulatedDriver` runs kernels in the simulator, on tensors of
the CPU; `NvccAsNvrtc` lets nvcc compile. Neither knows the kernels.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .simulator import Grid, Kernel, Memory, parse

CONTEXT, STREAM = 0xC0DE, 0x57EA
SUCCESS, INVALID_VALUE, INVALID_IMAGE, INVALID_CONTEXT, NOT_FOUND, LAUNCH_FAILED, CAPTURED = (
    *(0, 1, 200, 201),
    *(500, 719, 900),
)
ERROR_NAMES = {
    INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
    INVALID_IMAGE: b"CUDA_ERROR_INVALID_IMAGE",
    INVALID_CONTEXT: b"CUDA_ERROR_INVALID_CONTEXT",
    NOT_FOUND: b"CUDA_ERROR_NOT_FOUND",
    LAUNCH_FAILED: b"CUDA_ERROR_LAUNCH_FAILED",
    CAPTURED: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
}
MAX_GRID = (2**31 - 1, 65535, 65535)


class DeviceMemory(TorchDispatchMode):
    """While it is entered, kernels may touch every tensor that is made, and no other memory.

    What `torch.empty` makes holds NaN, so that a place that no kernel stores to is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrays = Memory()
        self._alive: list[Any] = []  # an address belongs to one array until the end

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
                continue
            if tensor.untyped_storage().nbytes():
                self.add(tensor)
        if "empty" in func.__name__ and result.dtype.is_floating_point:
            result.fill_(torch.nan)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Let kernels touch a tensor that was made before."""
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self.arrays.add(storage.data_ptr(), storage.nbytes())


def export(result: Any, *types: Any) -> Callable[[Any], Any]:
    """Mark a method as a function of a C library, of these types."""

    def mark(method: Any) -> Any:
        method.prototype = ctypes.CFUNCTYPE(result, *types)
        return method

    return mark


class Library:
    """Makes the marked methods callable as C functions, by their own names.

    Attributes:
        calls: the functions called, in order.
        failures: name of a function to the error code that it shall return.
        error: what was raised by the last function that raised, whose callers saw error 719.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        self.error: Exception | None = None
        for name in dir(type(self)):
            if prototype := getattr(getattr(type(self), name), "prototype", None):
                setattr(self, name, prototype(self._guard(name, getattr(self, name))))

    def _guard(self, name: str, method: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            try:
                return self.failures[name] if name in self.failures else method(*arguments)
            except Exception as error:  # ctypes would drop it, and return anything
                self.error = error
                return LAUNCH_FAILED

        return call


class SimulatedDriver(Library):
    """The functions of libcuda that kernels need, of which one device will run kernels.

    Attributes:
        launches: name and grid of each kernel that was launched.
        images: the modules that were loaded.
        is_capturing: whether the stream is being captured, which allows launches alone.
        failing_kernels: the names of kernels whose launch shall fail with error 719.
    """

    def __init__(self, memory: DeviceMemory, device: int = 0) -> None:
        super().__init__()
        self.memory = memory.arrays
        self.context = CONTEXT + device
        self.launches: list[tuple[str, tuple[int, int]]] = []
        self.images: list[bytes] = []
        self.is_capturing = False
        self.failing_kernels: set[str] = set()
        self._contexts: list[int] = []
        self._modules: dict[int, dict[str, Kernel]] = {}
        self._functions: dict[int, tuple[str, Kernel]] = {}

    @property
    def depth(self) -> int:
        """How many contexts have been pushed and not popped."""
        return len(self._contexts)

    @export(c_int, c_int, POINTER(c_char_p))
    def cuGetErrorName(self, code: int, name: Any) -> int:
        name[0] = ERROR_NAMES.get(code)
        return SUCCESS

    @export(c_int, POINTER(c_int), c_int)
    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device[0] = 100 + ordinal
        return SUCCESS

    @export(c_int, POINTER(c_void_p), c_int)
    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context[0] = CONTEXT + device - 100
        return SUCCESS

    @export(c_int, c_void_p)
    def cuCtxPushCurrent_v2(self, context: int) -> int:
        self._contexts.append(context)
        return SUCCESS

    @export(c_int, POINTER(c_void_p))
    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context[0] = self._contexts.pop()
        return SUCCESS

    @export(c_int, POINTER(c_void_p), c_void_p)
    def cuModuleLoadData(self, module: Any, image: int) -> int:
        if self._contexts[-1:] != [self.context]:
            return INVALID_CONTEXT
        if self.is_capturing:
            return CAPTURED
        data = ctypes.string_at(image)
        self.images.append(data)
        if data.startswith(b"\x7fELF"):
            return INVALID_IMAGE
        self._modules[len(self.images)] = parse(data.decode())
        module[0] = len(self.images)
        return SUCCESS

    @export(c_int, c_void_p, POINTER(c_int))
    def cuStreamIsCapturing(self, stream: int, status: Any) -> int:
        status[0] = self.is_capturing
        return SUCCESS if stream == STREAM else INVALID_CONTEXT

    @export(c_int, POINTER(c_int), c_int, c_void_p)
    def cuFuncGetAttribute(self, value: Any, attribute: int, function: int) -> int:
        value[0] = 32
        return SUCCESS if function in self._functions and attribute == 4 else INVALID_VALUE

    @export(c_int, POINTER(c_void_p), c_void_p, c_char_p)
    def cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> int:
        kernel = self._modules[module].get(name.decode())
        if kernel is None:
            return NOT_FOUND
        function[0] = 1000 + len(self._functions)
        self._functions[function[0]] = name.decode(), kernel
        return SUCCESS

    @export(c_int, c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p)
    def cuLaunchKernel(self, function: int, *arguments: Any) -> int:
        *sizes, shared, stream, parameters, extra = arguments
        grid, block = tuple(sizes[:3]), tuple(sizes[3:])
        name, kernel = self._functions[function]
        if self._contexts[-1:] != [self.context] or stream != STREAM:
            return INVALID_CONTEXT
        if not all(0 < size <= limit for size, limit in zip(grid, MAX_GRID)) or grid[2] != 1:
            return INVALID_VALUE
        if block[0] > kernel.max_threads or block[1:] != (1, 1) or shared or extra:
            return INVALID_VALUE
        if name in self.failing_kernels:
            return LAUNCH_FAILED
        sizes_in_bytes = kernel.parameters.values()
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes_in_bytes)]
        self.launches.append((name, grid[:2]))
        self.memory.begin()
        Grid(kernel, self.memory, grid[:2], block[0], b"".join(values)).run()
        return SUCCESS


# The compiler

NVCC = shutil.which("nvcc")


@functools.cache
def list_nvcc_architectures() -> list[int]:
    listing = subprocess.run(
        [NVCC or "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    return sorted(int(line.removeprefix("compute_")) for line in listing.stdout.split())


@functools.cache
def run_nvcc(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compile; an empty result comes with the compiler's errors."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "quantization.cu"), Path(folder, "output")
        file.write_text(source)
        kind = "-cubin" if "=sm_" in options[0] else "-ptx"
        command = [NVCC or "nvcc", kind, *options, "-o", str(output), str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        return (output.read_bytes() if output.exists() else b""), done.stderr


class NvccAsNvrtc(Library):
    """The functions of NVRTC that kernels need, done by nvcc.

    Attributes:
        compiled: the options of each program that was compiled.
    """

    def __init__(self, architectures: list[int] | None = None) -> None:
        super().__init__()
        self.architectures = architectures or list_nvcc_architectures()
        self.compiled: list[tuple[str, ...]] = []
        self.destroyed = 0
        self._sources: list[str] = []
        self._results: dict[int, bytes] = {}
        self._logs: dict[int, bytes] = {}

    @export(c_int, POINTER(c_int))
    def nvrtcGetNumSupportedArchs(self, count: Any) -> int:
        count[0] = len(self.architectures)
        return SUCCESS

    @export(c_int, POINTER(c_int))
    def nvrtcGetSupportedArchs(self, architectures: Any) -> int:
        for i, architecture in enumerate(self.architectures):
            architectures[i] = architecture
        return SUCCESS

    @export(c_int, POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p)
    def nvrtcCreateProgram(self, program: Any, source: bytes, *rest: Any) -> int:
        self._sources.append(source.decode())
        program[0] = len(self._sources)
        return SUCCESS

    @export(c_int, c_void_p, c_int, POINTER(c_char_p))
    def nvrtcCompileProgram(self, program: int, count: int, options: Any) -> int:
        arguments = tuple(options[i].decode() for i in range(count))
        self.compiled.append(arguments)
        result, log = run_nvcc(self._sources[program - 1], arguments)
        self._results[program], self._logs[program] = result + b"\0", log.encode() + b"\0"
        return SUCCESS if result else 6

    def _read(self, results: dict[int, bytes], program: int, size: Any = None, to: int = 0) -> int:
        if size is not None:
            size[0] = len(results[program])
        else:
            ctypes.memmove(to, results[program], len(results[program]))
        return SUCCESS

    @export(c_int, c_void_p, POINTER(c_size_t))
    def nvrtcGetPTXSize(self, program: int, size: Any) -> int:
        return self._read(self._results, program, size)

    @export(c_int, c_void_p, c_void_p)
    def nvrtcGetPTX(self, program: int, to: int) -> int:
        return self._read(self._results, program, to=to)

    nvrtcGetCUBINSize, nvrtcGetCUBIN = nvrtcGetPTXSize, nvrtcGetPTX

    @export(c_int, c_void_p, POINTER(c_size_t))
    def nvrtcGetProgramLogSize(self, program: int, size: Any) -> int:
        return self._read(self._logs, program, size)

    @export(c_int, c_void_p, c_void_p)
    def nvrtcGetProgramLog(self, program: int, to: int) -> int:
        return self._read(self._logs, program, to=to)

    @export(c_int, POINTER(c_void_p))
    def nvrtcDestroyProgram(self, program: Any) -> int:
        self.destroyed += 1
        return SUCCESS
