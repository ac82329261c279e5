"""CUDA kernels for packed weights: built at first use, launched through the driver API.

Owns the choice of a kernel for given shapes, its launch, and the reason when there is none. Knows
nothing of layers, of autograd, or of how a matrix came to be packed: `quantization.py` calls it,
and computes in torch whatever it declines. The kernels' source is in `quantization_cuda_source.py`,
the libraries they are built and launched with in `quantization_nvrtc.py`.

    multiply      output[m, o] = sum_i input[m, i] * integer[o, i] * scale[o, i / group]
    dequantize    output[o, i] = round(integer[o, i] * scale[o, i / group])

Shapes: `M` input rows, `O` output features, `I` input features, `C` stored columns: `I`, or `I / 2`
with 4 bits, `G` groups: `I / group`.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .quantization_cuda_source import MODULES, SOURCES, THREADS, WARPS, Variant
from .quantization_nvrtc import (
    KernelError,
    check_driver,
    choose_architecture,
    compile_source,
    load_driver,
    load_nvrtc,
)

logger = logging.get_logger(__name__)

# Up to how many rows a product is taken without a matrix in memory: by `multiply_NxN`, and by
# tensor cores. Beyond, one dequantized copy and a matrix product of cuBLAS move fewer bytes.
MAX_ROWS = 8
MAX_TENSOR_ROWS = 64
# How many blocks a grid may have along y, which counts rows of the input.
MAX_BLOCKS = 65535
# The first architecture with tensor cores for a dtype, and the columns that one step takes.
TENSOR_ARCHITECTURES = {torch.float16: 75, torch.bfloat16: 80}
TENSOR_COLUMNS = 32
TENSOR_FEATURES = 16
# "alone": a row's product has the same bits whatever the number of rows beside it.
ROWS_VARIABLE, ROWS_MODES = "CHATGLM_CUDA_ROWS", ("fast", "alone")
GROUP_SIZES = (32, 64, 128)
WIDE_BYTES = 16  # what a thread of `multiply_NxN` loads at once
WIDE_COLUMNS = 8  # what a thread of `dequantize_wide` makes
NUM_REGISTERS = 4  # what the driver calls CU_FUNC_ATTRIBUTE_NUM_REGS
# The dtype of the scales for each dtype of the input: bfloat16 would lose bits of them.
SCALE_DTYPES = {torch.float16: torch.float16, torch.bfloat16: torch.float32}


class CudaKernels:
    """The kernels of one device: built when first used, each given up when it first fails.

    Both products return None for what they do not compute: other dtypes than half with half scales
    and bfloat16 with float32 scales, other groups than of 32, 64 or 128 columns, tensors on
    different devices, shapes that do not fit together, empty results; and whatever a kernel would
    compute that has failed before. The log says once which dtypes have no kernel, and what failed;
    torch computes then. A module that cannot be built or loaded takes its kernels with it, a
    context that cannot be entered takes all of them.

    Args:
        driver: the driver's library, or what stands in for it.
        nvrtc: the compiler's library, or what stands in for it.
        index: of the device.
        capability: of the device, 10 * major + minor.
        multiprocessors: how many the device has.
        get_stream: returns the handle of the stream to launch on.
        sources: of the modules of kernels.
        is_alone: whether a row's product shall not depend on how many rows there are: then one kind
            of kernel computes any number of them.

    Raises:
        KernelError: if the driver does not give the device's context.
    """

    def __init__(
        self,
        driver: Any,
        nvrtc: Any,
        index: int,
        capability: int,
        multiprocessors: int,
        get_stream: Callable[[], int],
        sources: Mapping[str, str] = SOURCES,
        is_alone: bool = False,
    ) -> None:
        self._driver, self._nvrtc = driver, nvrtc
        self._index, self._capability = index, capability
        self._multiprocessors, self._get_stream = multiprocessors, get_stream
        self._sources, self._is_alone = sources, is_alone
        self._loaded: set[tuple[Variant, str]] = set()  # modules of variants
        self._functions: dict[tuple[Variant, str], ctypes.c_void_p] = {}
        # What is given up: a kernel of a variant, a module of it, or everything.
        self._failed: set[tuple[Variant, str] | None] = set()
        self._declined: set[str] = set()
        self._architecture: int | None = None
        # Torch's own context, which lives as long as the process does: never released here.
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bits: int,
        activations: str = "exact",
    ) -> Tensor | None:
        """Return `input @ W.T` of few rows, without ever making the matrix `W`.

        Up to 8 rows of any shape, stride and alignment are computed; the fast kernels want rows of
        weights of a multiple of 16 bytes, and both matrices to begin at one. Tensor cores compute 9
        to 64 rows, where the device has them for the dtype, and want a multiple of 32 columns too.

        Args:
            input: `(..., I)`, half or bfloat16, `M` rows in all.
            weight: int8 `(O, C)`.
            weight_scale: `(O,)`, or `(O, G)` in groups.
            bits: 4 or 8.
            activations: not asked: the input is never rounded here.

        Returns:
            `(..., O)` in the input's dtype, summed in float32; None for other numbers of rows.
        """
        in_features = input.shape[-1]
        num_rows = input.numel() // max(in_features, 1)
        group = self._find_group(weight, weight_scale, bits, input.dtype)
        if group is None or num_rows == 0 or input.device != weight.device:
            return None
        if in_features != weight.shape[1] * 8 // bits:
            return None
        if num_rows > MAX_ROWS and not self._takes_many(num_rows, input.dtype):
            return None
        tensors = [tensor.contiguous() for tensor in (input, weight, weight_scale)]
        is_wide = weight.shape[1] % WIDE_BYTES == 0 and all(
            tensor.data_ptr() % WIDE_BYTES == 0 for tensor in tensors[:2]
        )
        plan = self._plan(num_rows, weight.shape[0], in_features, is_wide, input.dtype)
        if plan is None:
            return None
        output = input.new_empty(*input.shape[:-1], weight.shape[0])
        sizes = (num_rows, weight.shape[0], in_features, group.bit_length() - 1)
        variant = _choose_variant(bits, input.dtype, weight_scale)
        return output if self._launch(variant, *plan, (*tensors, output, *sizes)) else None

    def dequantize(
        self, weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return the matrix that stored integers stand for, bit for bit as the torch path does.

        Args:
            weight: int8 `(O, C)`; any shape, stride and alignment.
            weight_scale: `(O,)`, or `(O, G)` in groups.
            bits: 4 or 8.
            dtype: of the result, half or bfloat16.

        Returns:
            `(O, I)`.
        """
        group = self._find_group(weight, weight_scale, bits, dtype)
        if group is None:
            return None
        weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
        out_features, columns = weight.shape
        in_features = columns * 8 // bits
        output = weight.new_empty(out_features, in_features, dtype=dtype)
        # The wide kernel loads 4 bytes at once.
        is_wide = in_features % WIDE_COLUMNS == 0 and weight.data_ptr() % 4 == 0
        wide, narrow = ("dequantize_wide", in_features // WIDE_COLUMNS), ("dequantize_any", columns)
        name, threads = wide if is_wide else narrow
        grid = (out_features, -(-threads // THREADS))
        arguments = (weight, weight_scale, output, in_features, group.bit_length() - 1)
        variant = _choose_variant(bits, dtype, weight_scale)
        return output if self._launch(variant, name, grid, arguments) else None

    def _find_group(
        self, weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype
    ) -> int | None:
        """Return the columns that share a scale, or None for what the kernels do not compute."""
        if None in self._failed or bits not in (4, 8) or weight.dim() != 2 or not weight.numel():
            return None
        if weight.dtype != torch.int8 or self._declines(dtype, weight_scale.dtype):
            return None
        if weight_scale.device != weight.device or weight_scale.shape[:1] != weight.shape[:1]:
            return None
        in_features = weight.shape[1] * 8 // bits
        if weight_scale.dim() == 1:
            return in_features
        groups = weight_scale.shape[1] if weight_scale.dim() == 2 else 0
        return next((size for size in GROUP_SIZES if size * groups == in_features), None)

    def _declines(self, dtype: torch.dtype, scale_dtype: torch.dtype) -> bool:
        """Tell whether there is no kernel for numbers with such scales, and log that once."""
        if scale_dtype == SCALE_DTYPES.get(dtype):
            return False
        if (dtypes := f"{dtype} with scales of {scale_dtype}") not in self._declined:
            self._declined.add(dtypes)
            remedy = "cast the model by half() or bfloat16()"
            _report(self._index, f"there is no kernel for {dtypes}; {remedy}")
        return True

    def _has_tensor_cores(self, dtype: torch.dtype) -> bool:
        """Tell whether kernels for tensor cores are compiled for this device."""
        if self._architecture is None:
            try:
                self._architecture = choose_architecture(self._nvrtc, self._capability)
            except KernelError as error:
                self._architecture = 0
                self._give_up(None, error)
        return self._architecture >= TENSOR_ARCHITECTURES[dtype]

    def _takes_many(self, num_rows: int, dtype: torch.dtype) -> bool:
        """Tell whether more than 8 rows may be multiplied without the matrix."""
        if self._is_alone:
            return num_rows <= MAX_BLOCKS
        return num_rows <= MAX_TENSOR_ROWS and self._has_tensor_cores(dtype)

    def _plan(
        self,
        num_rows: int,
        out_features: int,
        in_features: int,
        is_wide: bool,
        dtype: torch.dtype,
    ) -> tuple[str, tuple[int, int]] | None:
        """Choose the kernel and the grid: output features along x, rows of the input along y."""
        is_tensor = num_rows > MAX_ROWS or self._is_alone
        has_steps = is_wide and in_features % TENSOR_COLUMNS == 0
        if is_tensor and has_steps and self._has_tensor_cores(dtype):
            rows = next((n for n in (8, 16, 32) if num_rows <= n), MAX_TENSOR_ROWS)
            return f"tensor_{rows}", (-(-out_features // TENSOR_FEATURES), -(-num_rows // rows))
        if num_rows > MAX_ROWS and not self._is_alone:
            return None
        return self._plan_multiply(num_rows, out_features, is_wide)

    def _plan_multiply(
        self, num_rows: int, out_features: int, is_wide: bool
    ) -> tuple[str, tuple[int, int]]:
        """Choose among the kernels without tensor cores; a row's sum is the same in all wide."""
        if not is_wide:
            return "multiply_any", (-(-out_features // WARPS), num_rows)
        batch = 1 if num_rows == 1 else 2 if num_rows == 2 else 4
        # Four features a warp read the input least often, but must leave each multiprocessor four
        # blocks, to keep its share of the memory busy; with more rows the registers run out.
        is_long = out_features >= 4 * 4 * WARPS * self._multiprocessors
        features = 4 if batch == 1 and is_long else 2
        grid = (-(-out_features // (WARPS * features)), -(-num_rows // batch))
        return f"multiply_{batch}x{features}", grid

    def _launch(
        self, variant: Variant, name: str, grid: tuple[int, int], arguments: tuple[Any, ...]
    ) -> bool:
        """Launch a kernel on the current stream; False, with the reason logged, if it fails."""
        if not self._failed.isdisjoint({(variant, name), (variant, _find_module(name)), None}):
            return False
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int(value)
            for value in arguments
        ]
        block = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(self._get_stream())
        scope = None
        try:
            # Whichever device torch is at, the kernel is launched on the operands' own.
            self._call("cuCtxPushCurrent_v2", self._context)
            try:
                scope = variant, _find_module(name)
                if scope not in self._loaded:
                    if self._is_captured(stream, name):
                        return False
                    self._load_module(*scope)
                scope = variant, name
                function, sizes = self._find_function(scope), (*grid, 1, THREADS, 1, 1, 0)
                self._call("cuLaunchKernel", function, *sizes, stream, block, None)
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        except KernelError as error:
            self._give_up(scope, error)
            return False
        return True

    def _is_captured(self, stream: ctypes.c_void_p, name: str) -> bool:
        """Tell whether a stream is being captured, when nothing may be loaded, and log that."""
        status = ctypes.c_int()
        self._call("cuStreamIsCapturing", stream, ctypes.byref(status))
        if status.value and name not in self._declined:
            self._declined.add(name)
            logger.warning(
                "A CUDA graph on cuda:%d is captured before the kernel %s has ever run, and holds "
                "torch's operations in its place, which are slower. Run the model with as many "
                "rows once before the capture.",
                *(self._index, name),
            )
        return bool(status.value)

    def _give_up(self, scope: tuple[Variant, str] | None, error: KernelError) -> None:
        """Never try again what has failed, and say so in a line."""
        self._failed.add(scope)
        if scope is None:
            return _report(self._index, error)
        variant, name = scope
        what = f"kernels of the module {name}" if name in MODULES else f"kernel {name}"
        message = "The %s on cuda:%d (%s) is off, and torch computes in its place: %s."
        logger.warning(message, what, self._index, variant.describe(), error)

    def _find_function(self, key: tuple[Variant, str]) -> ctypes.c_void_p:
        if key not in self._functions:
            raise KernelError("the module does not have it")
        return self._functions[key]

    def _load_module(self, variant: Variant, module_name: str) -> None:
        """Build a module and load all of its kernels, so that a later capture finds them loaded."""
        source, options = self._sources[module_name], variant.list_options()
        image = compile_source(self._nvrtc, source, self._capability, options)
        module, registers = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._loaded.add((variant, module_name))
        for name in MODULES[module_name]:
            function = ctypes.c_void_p()
            slot = ctypes.byref(function)
            if self._driver.cuModuleGetFunction(slot, module, name.encode()) == 0:
                # To be asked about a kernel makes a driver load it that would put that off.
                self._driver.cuFuncGetAttribute(ctypes.byref(registers), NUM_REGISTERS, function)
                self._functions[variant, name] = function

    def _call(self, name: str, *arguments: Any) -> None:
        check_driver(self._driver, getattr(self._driver, name)(*arguments), name)


def _find_module(name: str) -> str:
    return "tensor" if name.startswith("tensor") else "products"


def _choose_variant(bits: int, dtype: torch.dtype, weight_scale: Tensor) -> Variant:
    return Variant(bits, dtype == torch.bfloat16, weight_scale.dim() == 2)


def _report(index: int, reason: Exception | str) -> None:
    message = "Quantized layers on cuda:%d compute in plain torch, which is slower: %s."
    logger.warning(message, index, reason)


_found: dict[int, CudaKernels | None] = {}


def find_kernels(device: torch.device) -> CudaKernels | None:
    """Return the kernels of a device, always the same object for the same device.

    Args:
        device: any; one without an index means the current one.

    Returns:
        None for a device that is not of CUDA, and for one of CUDA without kernels: the log then has
        said the reason, once.
    """
    if device.type != "cuda":
        return None
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if index not in _found:
        try:
            _found[index] = _open_kernels(index)
        except (KernelError, OSError) as error:
            _found[index] = None
            _report(index, error)
    return _found[index]


def _open_kernels(index: int) -> CudaKernels:
    if torch.version.hip:
        raise KernelError("this torch is built for ROCm, and the kernels for CUDA")
    if not torch.cuda.is_available():
        raise KernelError("torch finds no GPU")
    gpu = torch.cuda.get_device_properties(index)
    sizes = (10 * gpu.major + gpu.minor, gpu.multi_processor_count)
    libraries = (load_driver(), load_nvrtc())
    return CudaKernels(
        *libraries,
        index,
        *sizes,
        lambda: torch.cuda.current_stream(index).cuda_stream,
        is_alone=read_rows_mode() == "alone",
    )


def read_rows_mode() -> str:
    """Return how `CHATGLM_CUDA_ROWS` wants rows to be multiplied: "fast" or "alone".

    Raises:
        ValueError: for any other value of the variable.
    """
    mode = os.environ.get(ROWS_VARIABLE) or ROWS_MODES[0]
    if mode not in ROWS_MODES:
        raise ValueError(f"{ROWS_VARIABLE} must be one of {', '.join(ROWS_MODES)}, got {mode!r}")
    return mode


__all__ = ["CudaKernels", "find_kernels"]
