"""CUDA kernels for packed weights: built by NVRTC at first use, launched through the driver API.

Owns the kernels' source, the libraries they are built and launched with, the choice of a kernel for
given shapes, and the reason when there is none. Knows nothing of layers, of autograd, or of how a
matrix came to be packed: `quantization.py` calls it, and computes in torch whatever it declines.

Every CUDA build of torch carries NVRTC and loads the driver; nothing else is needed, no compiler
and no package. Both libraries are called by ctypes.

    multiply      output[m, o] = sum_i input[m, i] * integer[o, i] * scale[o, i / group]
    dequantize    output[o, i] = round(integer[o, i] * scale[o, i / group])

Shapes: `M` input rows, `O` output features, `I` input features, `C` stored columns: `I`, or `I / 2`
with 4 bits, `G` groups: `I / group`.
"""

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Beyond this many rows one dequantized copy and a matrix product of cuBLAS move fewer bytes.
MAX_ROWS = 8
GROUP_SIZES = (32, 64, 128)
THREADS = 128  # of a block; the source says so too
WARPS = THREADS // 32
WIDE_BYTES = 16  # what a thread of `multiply_NxN` loads at once
WIDE_COLUMNS = 8  # what a thread of `dequantize_wide` makes
# The dtype of the scales for each dtype of the input: bfloat16 would lose bits of them.
SCALE_DTYPES = {torch.float16: torch.float16, torch.bfloat16: torch.float32}

# Built for BITS (4, 8), BFLOAT16 (0, 1) and GROUPED (0, 1). Includes no header, since users have
# none. In `multiply` a warp computes ROWS output features for BATCH input rows: 16-byte loads of
# weights, which pass by the L1 cache and leave it to the input; sums in float32; no atomics, so
# that a result is the same on every run. `_any` kernels go byte by byte, where rows of weights are
# not whole multiples of what the others load.
SOURCE = r"""
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
#define INLINE static __device__ __forceinline__
#define KERNEL extern "C" __global__ __launch_bounds__(128)
#define WARPS 4
#define COLUMNS (128 / BITS)   // of 16 bytes
#define PER_BYTE (8 / BITS)

#if BFLOAT16
typedef float scale_t;
INLINE float widen(u16 bits) { return __uint_as_float((u32)bits << 16); }
INLINE float widen_scale(scale_t scale) { return scale; }
// Rounds to nearest even by hand: the instruction for it came with sm_80.
INLINE u16 narrow(float value) {
    const u32 bits = __float_as_uint(value);
    return value == value ? (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16) : (u16)0x7fff;
}
#else
typedef u16 scale_t;
INLINE float widen(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
INLINE float widen_scale(scale_t scale) { return widen(scale); }
INLINE u16 narrow(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

INLINE float scale_at(const scale_t *scale, int row, int column, int in_features, int shift) {
    const i64 groups = in_features >> shift;
    return widen_scale(scale[GROUPED ? row * groups + (column >> shift) : row]);
}

// The signed integer at bit SHIFT of a word, as a float. Its bits, the sign's flipped, become the
// lowest of the mantissa of 2^23, which one exact fma takes away again: two instructions where a
// conversion would need three, one of them slow. As C operators the first becomes two on sm_75.
template <int SHIFT> INLINE float integer(u32 word) {
    const u32 mask = ((1u << BITS) - 1u) << SHIFT, sign = 1u << (BITS - 1);
    const float unit = 1.0f / (1u << SHIFT);
    u32 bits;   // word & mask ^ (2^23 with the sign's bit)
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;"
        : "=r"(bits) : "r"(word), "r"(mask), "r"(0x4b000000u ^ sign << SHIFT));
    return __fmaf_rn(__uint_as_float(bits), unit, -(8388608.0f * unit + (float)sign));
}

// The columns of one byte: with 4 bits the even one is in the high half.
INLINE void decode_byte(u32 stored, float *values) {
#if BITS == 4
    values[0] = integer<4>(stored), values[1] = integer<0>(stored);
#else
    values[0] = integer<0>(stored);
#endif
}

// The 8 columns of BITS bytes, first byte lowest. Only shifts below 16 leave the mantissa room.
INLINE void decode(const u32 *words, float *values) {
    for (int i = 0; i < BITS / 4; i++) {
        const u32 low = words[i], high = low >> 16;
        float *out = values + 4 * PER_BYTE * i;
#if BITS == 4
        out[0] = integer<4>(low), out[1] = integer<0>(low);
        out[2] = integer<12>(low), out[3] = integer<8>(low);
        out[4] = integer<4>(high), out[5] = integer<0>(high);
        out[6] = integer<12>(high), out[7] = integer<8>(high);
#else
        out[0] = integer<0>(low), out[1] = integer<8>(low);
        out[2] = integer<0>(high), out[3] = integer<8>(high);
#endif
    }
}

#if __CUDA_ARCH__ >= 700
#define STREAM "ld.global.nc.L1::no_allocate.v4.u32"
#else
#define STREAM "ld.global.nc.v4.u32"
#endif
INLINE void load_weights(const u8 *address, u32 *words) {
    asm(STREAM " {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(address));
}

INLINE void load_input(const u16 *address, float *values) {
    const uint4 loaded = *(const uint4 *)address;
    const u32 pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    for (int i = 0; i < 4; i++) {
        values[2 * i] = widen((u16)pairs[i]);
        values[2 * i + 1] = widen((u16)(pairs[i] >> 16));
    }
}

INLINE float sum_warp(float value) {
    for (int distance = 16; distance; distance >>= 1)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

#define MULTIPLY(name) name( \
    const u16 *__restrict__ input, const u8 *__restrict__ weight, \
    const scale_t *__restrict__ scale, u16 *__restrict__ output, \
    int batch, int out_features, int in_features, int shift)

template <int BATCH, int ROWS> INLINE void MULTIPLY(multiply) {
    const int lane = threadIdx.x % 32, row = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    const int first = blockIdx.y * BATCH, chunks = in_features / COLUMNS;
    if (row >= out_features) return;
    float sums[BATCH][ROWS] = {};
    for (int chunk = lane; chunk < chunks; chunk += 32) {
        u32 words[ROWS][4];
        for (int r = 0; r < ROWS; r++) {
            const i64 clamped = min(row + r, out_features - 1);
            load_weights(weight + (clamped * chunks + chunk) * 16, words[r]);
        }
        float parts[BATCH][ROWS] = {};
        for (int step = 0; step < COLUMNS / 8; step++) {
            float x[BATCH][8];
            for (int m = 0; m < BATCH; m++) {
                const i64 clamped = min(first + m, batch - 1);
                load_input(input + clamped * in_features + chunk * COLUMNS + step * 8, x[m]);
            }
            for (int r = 0; r < ROWS; r++) {
                float q[8];
                decode(words[r] + step * BITS / 4, q);
                for (int m = 0; m < BATCH; m++)
                    for (int k = 0; k < 8; k++) parts[m][r] = __fmaf_rn(q[k], x[m][k], parts[m][r]);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            const int clamped = min(row + r, out_features - 1);
            const float factor =
                GROUPED ? scale_at(scale, clamped, chunk * COLUMNS, in_features, shift) : 1.0f;
            for (int m = 0; m < BATCH; m++) sums[m][r] = __fmaf_rn(factor, parts[m][r], sums[m][r]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < BATCH; m++) {
            const float sum = sum_warp(sums[m][r]);
            if (lane == 0 && row + r < out_features && first + m < batch) {
                const float factor = GROUPED ? 1.0f : widen_scale(scale[row + r]);
                output[(i64)(first + m) * out_features + row + r] = narrow(sum * factor);
            }
        }
}

#define ARGUMENTS input, weight, scale, output, batch, out_features, in_features, shift
KERNEL void MULTIPLY(multiply_1x4) { multiply<1, 4>(ARGUMENTS); }
KERNEL void MULTIPLY(multiply_1x2) { multiply<1, 2>(ARGUMENTS); }
KERNEL void MULTIPLY(multiply_2x2) { multiply<2, 2>(ARGUMENTS); }
KERNEL void MULTIPLY(multiply_4x2) { multiply<4, 2>(ARGUMENTS); }

KERNEL void MULTIPLY(multiply_any) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    const int bytes = in_features / PER_BYTE;
    if (row >= out_features) return;
    weight += (i64)row * bytes;
    input += (i64)blockIdx.y * in_features;
    float sum = 0.0f;
    for (int byte = lane; byte < bytes; byte += 32) {
        float q[PER_BYTE], part = 0.0f;
        decode_byte(weight[byte], q);
        for (int k = 0; k < PER_BYTE; k++) part += q[k] * widen(input[byte * PER_BYTE + k]);
        sum += part * (GROUPED ? scale_at(scale, row, byte * PER_BYTE, in_features, shift) : 1.0f);
    }
    sum = sum_warp(sum);
    if (lane == 0)
        output[(i64)blockIdx.y * out_features + row] =
            narrow(GROUPED ? sum : sum * widen_scale(scale[row]));
}

#define DEQUANTIZE(name) name( \
    const u8 *__restrict__ weight, const scale_t *__restrict__ scale, u16 *__restrict__ output, \
    int in_features, int shift)

// A block has one row, so that nothing is divided; rows lie along x, the only long side of a grid.
KERNEL void DEQUANTIZE(dequantize_wide) {
    const int row = blockIdx.x, column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (column >= in_features) return;
    const i64 start = (i64)row * in_features + column;
    const u32 *stored = (const u32 *)(weight + start / PER_BYTE);
    u32 words[BITS / 4], pairs[4];
    for (int i = 0; i < BITS / 4; i++) words[i] = stored[i];
    float q[8];
    decode(words, q);
    const float factor = scale_at(scale, row, column, in_features, shift);
    for (int i = 0; i < 4; i++)
        pairs[i] = narrow(__fmul_rn(q[2 * i], factor))
            | (u32)narrow(__fmul_rn(q[2 * i + 1], factor)) << 16;
    *(uint4 *)(output + start) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

KERNEL void DEQUANTIZE(dequantize_any) {
    const int row = blockIdx.x, byte = blockIdx.y * blockDim.x + threadIdx.x;
    const int bytes = in_features / PER_BYTE, column = byte * PER_BYTE;
    if (byte >= bytes) return;
    float q[PER_BYTE];
    decode_byte(weight[(i64)row * bytes + byte], q);
    const float factor = scale_at(scale, row, column, in_features, shift);
    for (int k = 0; k < PER_BYTE; k++)
        output[(i64)row * in_features + column + k] = narrow(__fmul_rn(q[k], factor));
}
"""


class KernelError(RuntimeError):
    """Why the kernels cannot be used on a device."""


class Variant(NamedTuple):
    """What a module of kernels is built for."""

    bits: int
    is_bfloat16: bool
    is_grouped: bool

    def list_options(self) -> list[str]:
        """Return the compiler's options that select this variant of the source."""
        names = ("BITS", "BFLOAT16", "GROUPED")
        return [f"-D{name}={int(value)}" for name, value in zip(names, self)]


# NVRTC


def compile_source(nvrtc: Any, source: str, capability: int, options: list[str]) -> bytes:
    """Compile CUDA C for a device.

    Args:
        nvrtc: the library, or what stands in for it.
        source: CUDA C that includes nothing.
        capability: of the device, 10 * major + minor.
        options: further options of the compiler.

    Returns:
        Machine code if NVRTC knows the device; otherwise, as for devices newer than it, zero-ended
        PTX of the newest architecture before the device's, for the driver to translate.

    Raises:
        KernelError: if NVRTC knows no such architecture, or refuses the source.
    """
    architecture = _choose_architecture(nvrtc, capability)
    is_exact = architecture == capability
    target = f"--gpu-architecture={'sm' if is_exact else 'compute'}_{architecture}"
    encoded = [option.encode() for option in (target, *options)]
    arguments = (ctypes.c_char_p * len(encoded))(*encoded)
    program = ctypes.c_void_p()
    slot, name = ctypes.byref(program), b"quantization.cu"
    _check_nvrtc(nvrtc, nvrtc.nvrtcCreateProgram(slot, source.encode(), name, 0, None, None))
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(encoded), arguments)
        _check_nvrtc(nvrtc, code, program)
        return _read_nvrtc(nvrtc, program, "CUBIN" if is_exact else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(slot)


def _choose_architecture(nvrtc: Any, capability: int) -> int:
    """Return the newest architecture of NVRTC that is not newer than the device."""
    count = ctypes.c_int()
    _check_nvrtc(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check_nvrtc(nvrtc, nvrtc.nvrtcGetSupportedArchs(known))
    if capability < min(known):
        raise KernelError(
            f"NVRTC compiles from sm_{min(known)} on, and this GPU is sm_{capability}"
        )
    return max(architecture for architecture in known if architecture <= capability)


def _read_nvrtc(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check_nvrtc(nvrtc: Any, code: int, program: ctypes.c_void_p | None = None) -> None:
    """Raise what an error code of NVRTC means, with the first error of the program's log."""
    if code == 0:
        return
    reason = f"NVRTC failed with error {code}"
    if program:
        lines = _read_nvrtc(nvrtc, program, "ProgramLog").decode(errors="replace").splitlines()
        reason += "".join([f": {line}" for line in lines if "error" in line][:1])
    raise KernelError(reason)


def load_nvrtc() -> Any:
    """Load the NVRTC that torch was built with.

    Raises:
        KernelError: if it is nowhere to be found.
    """
    for name in list_nvrtc_files(Path(torch.__file__).parent, torch.version.cuda or ""):
        try:
            # NVRTC looks for its built-in functions by a bare name, which finds what is mapped. A
            # bare name of its own has no folder: never load from the current one.
            if Path(name).is_absolute():
                for builtins in Path(name).parent.glob("libnvrtc-builtins*.so*"):
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError as error:
            logger.debug("%s: %s", name, error)
    raise KernelError(f"there is no NVRTC of CUDA {torch.version.cuda} that can be loaded")


def list_nvrtc_files(torch_folder: Path, version: str) -> Iterator[str]:
    """Yield where NVRTC may be, best first: mapped, in packages, with torch, known to the loader.

    Args:
        torch_folder: the folder of the package torch.
        version: of CUDA, as in torch.version.cuda.
    """
    major = version.partition(".")[0]
    maps = Path("/proc/self/maps")
    if maps.exists():
        yield from sorted(set(re.findall(r"/.*/libnvrtc\.so\S*", maps.read_text())))
    for folder, pattern in (
        (torch_folder.parent, f"nvidia/*/lib/libnvrtc.so.{major}*"),
        (torch_folder.parent, f"nvidia/*/bin/**/nvrtc64_{major}?_0.dll"),
        (torch_folder, f"lib/libnvrtc-????????.so.{major}*"),
        (torch_folder, f"lib/nvrtc64_{major}?_0.dll"),
    ):
        yield from (str(path) for path in sorted(folder.glob(pattern)))
    suffix = "11.2" if major == "11" else major  # the loader's names stayed at 11.2
    windows = f"nvrtc64_{suffix.replace('.', '').ljust(3, '0')}_0.dll"
    yield windows if sys.platform == "win32" else f"libnvrtc.so.{suffix}"


# The driver


def load_driver() -> Any:
    """Load the driver's library, which torch has loaded before.

    Raises:
        OSError: if there is none.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check_driver(driver: Any, code: int, action: str) -> None:
    """Raise what an error code of the driver means."""
    if code == 0:
        return
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    raise KernelError(f"{action} failed: {(name.value or b'unknown').decode()} ({code})")


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
        _check_driver(self._driver, getattr(self._driver, name)(*arguments), name)


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
