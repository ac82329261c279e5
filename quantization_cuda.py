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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .quantization_cuda_source import SOURCE, THREADS, WARPS, Variant
from .quantization_nvrtc import (
    KernelError,
    check_driver,
    compile_source,
    load_driver,
    load_nvrtc,
)

logger = logging.get_logger(__name__)

# Beyond this many rows one dequantized copy and a matrix product of cuBLAS move fewer bytes.
MAX_ROWS = 8
GROUP_SIZES = (32, 64, 128)
WIDE_BYTES = 16  # what a thread of `multiply_NxN` loads at once
WIDE_COLUMNS = 8  # what a thread of `dequantize_wide` makes
# The dtype of the scales for each dtype of the input: bfloat16 would lose bits of them.
SCALE_DTYPES = {torch.float16: torch.float16, torch.bfloat16: torch.float32}


class CudaKernels:
    """The kernels of one device: built when first used, given up when they first fail.

    Both products return None for what they do not compute: other dtypes than half with half scales
    and bfloat16 with float32 scales, other groups than of 32, 64 or 128 columns, tensors on
    different devices, shapes that do not fit together, empty results; and anything at all after a
    failure. The log says once which dtypes have no kernel, or what failed; torch computes then.

    Args:
        driver: the driver's library, or what stands in for it.
        nvrtc: the compiler's library, or what stands in for it.
        index: of the device.
        capability: of the device, 10 * major + minor.
        multiprocessors: how many the device has.
        get_stream: returns the handle of the stream to launch on.
        source: of the kernels.

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
        source: str = SOURCE,
    ) -> None:
        self._driver, self._nvrtc = driver, nvrtc
        self._index, self._capability = index, capability
        self._multiprocessors, self._get_stream, self._source = multiprocessors, get_stream, source
        self._modules: dict[Variant, ctypes.c_void_p] = {}
        self._functions: dict[tuple[Variant, str], ctypes.c_void_p] = {}
        self._has_failed = False
        self._declined: set[str] = set()
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
        """Return `input @ W.T` of at most 8 rows, without ever making the matrix `W`.

        Any shape, stride and alignment is computed; the fast kernels want rows of weights of a
        multiple of 16 bytes, and both matrices to begin at one.

        Args:
            input: `(..., I)`, half or bfloat16, `M` rows in all.
            weight: int8 `(O, C)`.
            weight_scale: `(O,)`, or `(O, G)` in groups.
            bits: 4 or 8.
            activations: not asked: the input is never rounded here.

        Returns:
            `(..., O)` in the input's dtype, summed in float32; None for more than 8 rows.
        """
        in_features = input.shape[-1]
        num_rows = input.numel() // max(in_features, 1)
        group = self._find_group(weight, weight_scale, bits, input.dtype)
        if group is None or not 0 < num_rows <= MAX_ROWS or input.device != weight.device:
            return None
        if in_features != weight.shape[1] * 8 // bits:
            return None
        tensors = [tensor.contiguous() for tensor in (input, weight, weight_scale)]
        output = input.new_empty(*input.shape[:-1], weight.shape[0])
        is_wide = weight.shape[1] % WIDE_BYTES == 0 and all(
            tensor.data_ptr() % WIDE_BYTES == 0 for tensor in tensors[:2]
        )
        name, grid = self._plan_multiply(num_rows, weight.shape[0], is_wide)
        sizes = (num_rows, weight.shape[0], in_features, group.bit_length() - 1)
        variant = _choose_variant(bits, input.dtype, weight_scale)
        return output if self._launch(variant, name, grid, (*tensors, output, *sizes)) else None

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
        if self._has_failed or bits not in (4, 8) or weight.dim() != 2 or not weight.numel():
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

    def _plan_multiply(
        self, num_rows: int, out_features: int, is_wide: bool
    ) -> tuple[str, tuple[int, int]]:
        """Choose the kernel and the grid: output features along x, rows of the input along y."""
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
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int(value)
            for value in arguments
        ]
        block = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(self._get_stream())
        try:
            # Whichever device torch is at, the kernel is launched on the operands' own.
            self._call("cuCtxPushCurrent_v2", self._context)
            try:
                function, sizes = self._get_function(variant, name), (*grid, 1, THREADS, 1, 1, 0)
                self._call("cuLaunchKernel", function, *sizes, stream, block, None)
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        except KernelError as error:
            self._has_failed = True
            _report(self._index, error)
        return not self._has_failed

    def _get_function(self, variant: Variant, name: str) -> ctypes.c_void_p:
        if (variant, name) not in self._functions:
            function = ctypes.c_void_p()
            module = self._get_module(variant)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            self._functions[variant, name] = function
        return self._functions[variant, name]

    def _get_module(self, variant: Variant) -> ctypes.c_void_p:
        if variant not in self._modules:
            options = variant.list_options()
            image = compile_source(self._nvrtc, self._source, self._capability, options)
            module = ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), image)
            self._modules[variant] = module
        return self._modules[variant]

    def _call(self, name: str, *arguments: Any) -> None:
        check_driver(self._driver, getattr(self._driver, name)(*arguments), name)


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
        *libraries, index, *sizes, lambda: torch.cuda.current_stream(index).cuda_stream
    )


__all__ = ["CudaKernels", "find_kernels"]
