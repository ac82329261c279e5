"""The source of the CUDA kernels for packed weights, and what it can be built for.

Owns the text that NVRTC compiles, the sizes that it fixes, and the names of its variants. Knows
nothing of how it is compiled or launched: `quantization_cuda.py` does both.

    multiply      output[m, o] = sum_i input[m, i] * integer[o, i] * scale[o, i / group]
    dequantize    output[o, i] = round(integer[o, i] * scale[o, i / group])

Shapes: `M` input rows, `O` output features, `I` input features, `C` stored columns: `I`, or `I / 2`
with 4 bits, `G` groups: `I / group`.
"""

import re
from typing import NamedTuple

THREADS = 128  # of a block; the source says so too
WARPS = THREADS // 32

# Built for BITS (4, 8), BFLOAT16 (0, 1) and GROUPED (0, 1). Includes no header, since users have
# none. What both modules of kernels begin with.
_COMMON = r"""
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

#define MULTIPLY(name) name( \
    const u16 *__restrict__ input, const u8 *__restrict__ weight, \
    const scale_t *__restrict__ scale, u16 *__restrict__ output, \
    int batch, int out_features, int in_features, int shift)

#define ARGUMENTS input, weight, scale, output, batch, out_features, in_features, shift
"""

# In `multiply` a warp computes ROWS output features for BATCH input rows: 16-byte loads of
# weights, which pass by the L1 cache and leave it to the input; sums in float32; no atomics, so
# that a result is the same on every run. `_any` kernels go byte by byte, where rows of weights are
# not whole multiples of what the others load.
_PRODUCTS = r"""
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

# Nine rows and more, on tensor cores. A block has 16 output features, of which each warp takes
# every fourth run of DEPTH * STEP columns; a step of a tensor core multiplies 16 features by 8 rows
# of the input. Integers are exact in both dtypes and are scaled after their sum. A row's sums are
# taken in one order, whatever the rows beside it and whichever kernel computes it. Which columns a
# core calls which is free, as long as weights and input agree: a thread has 8 adjacent ones.
_TENSOR = r"""
#define STEP 32    // columns, twice what a tensor core takes at once; the smallest group
#define DEPTH 4    // steps whose weights are on their way at once
#define WORDS (BITS / 4)

#if BFLOAT16
#define TYPE "bf16"
#define UNIT 0x3f803f80u    // 1 and 1
#define MAGIC 0x43004300u   // 128 and 128, whose last bits count ones
#else
#define TYPE "f16"
#define UNIT 0x3c003c00u
#define MAGIC 0x64006400u   // 1024 and 1024
#endif
#define NEGATIVE 0x80008000u

INLINE u32 mask_and_flip(u32 word, u32 mask, u32 flipped) {
    u32 bits;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(bits) : "r"(word), "r"(mask), "r"(flipped));
    return bits;
}

INLINE u32 add_pairs(u32 pair, u32 added) {
    u32 sum;   // an addition of bfloat16 came with sm_90, and this with sm_80
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(pair), "r"(UNIT), "r"(added));
    return sum;
}

// 8 columns as four pairs of the input's dtype, the even column lower.
INLINE void decode_pairs(const u32 *words, u32 *pairs) {
#if BITS == 4
    const u32 even = words[0] >> 4;
    for (int k = 0; k < 4; k++) {
        const u32 both = __byte_perm(even, words[0], 0x4400 + 0x1111 * k);
        const u32 shifted = mask_and_flip(both, 0x000f000fu, MAGIC | 0x00080008u);
        pairs[k] = add_pairs(shifted, MAGIC | 0x00080008u | NEGATIVE);
    }
#else
    for (int k = 0; k < 4; k++) {
        const u32 both = __byte_perm(words[k / 2], 0, 0x4140 + 0x0202 * (k % 2));
#if BFLOAT16   // has no room for 8 bits: the highest doubles what is taken away
        pairs[k] = add_pairs(mask_and_flip(both, 0x007f007fu, MAGIC),
                             mask_and_flip(both, 0x00800080u, MAGIC | NEGATIVE));
#else
        pairs[k] = add_pairs(both ^ (MAGIC | 0x00800080u), MAGIC | 0x00800080u | NEGATIVE);
#endif
    }
#endif
}

// Add 16 features by 8 rows: `low` and `high` are two pairs of columns of features 0 and 8.
INLINE void multiply_tile(float *sums, const u32 *low, const u32 *high, u32 first, u32 second) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(first), "r"(second));
#else
    for (int i = 0; i < 2; i++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(low[i]), "r"(high[i]), "r"(i ? second : first));
#endif
}

INLINE void load_words(const u8 *address, u32 *words) {
#if BITS == 4
    words[0] = *(const u32 *)address;
#else
    const uint2 loaded = *(const uint2 *)address;
    words[0] = loaded.x, words[1] = loaded.y;
#endif
}

template <int TILES> INLINE void MULTIPLY(multiply_tiles) {
    __shared__ float shared[WARPS][TILES][4][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = in_features / STEP;
    const int row = blockIdx.x * 16 + lane / 4, first = blockIdx.y * TILES * 8;
    const int column = lane % 4 * 8;   // of a step
    int rows[2];
    const u8 *weights[2];
    for (int r = 0; r < 2; r++) {
        rows[r] = min(row + 8 * r, out_features - 1);
        weights[r] = weight + ((i64)rows[r] * in_features + column) / PER_BYTE;
    }
    const u16 *inputs[TILES];
    for (int t = 0; t < TILES; t++)
        inputs[t] = input + (i64)min(first + t * 8 + lane / 4, batch - 1) * in_features + column;
    float sums[TILES][4] = {};
    for (int start = warp * DEPTH; start < steps; start += WARPS * DEPTH) {
        u32 words[DEPTH][2][WORDS];
        for (int d = 0; d < DEPTH; d++)
            for (int r = 0; r < 2; r++)
                if (start + d < steps)
                    load_words(weights[r] + (i64)(start + d) * (STEP / PER_BYTE), words[d][r]);
        for (int d = 0; d < DEPTH; d++) {
            if (start + d >= steps) break;   // whole warps
            u32 low[4], high[4];
            decode_pairs(words[d][0], low);
            decode_pairs(words[d][1], high);
            float factors[2] = {1.0f, 1.0f};
            if (GROUPED)
                for (int r = 0; r < 2; r++)
                    factors[r] = scale_at(scale, rows[r], (start + d) * STEP, in_features, shift);
            for (int t = 0; t < TILES; t++) {
                const uint4 x = *(const uint4 *)(inputs[t] + (start + d) * STEP);
                float parts[4] = {};
                float *target = GROUPED ? parts : sums[t];
                multiply_tile(target, low, high, x.x, x.y);
                multiply_tile(target, low + 2, high + 2, x.z, x.w);
                if (GROUPED)
                    for (int i = 0; i < 4; i++)
                        sums[t][i] = __fmaf_rn(factors[i / 2], parts[i], sums[t][i]);
            }
        }
    }
    for (int t = 0; t < TILES; t++)
        for (int i = 0; i < 4; i++) shared[warp][t][i][lane] = sums[t][i];
    __syncthreads();
    // Each warp adds and stores what all have of one of four places.
    const int feature = row + warp / 2 * 8;
    for (int t = 0; t < TILES; t++) {
        const int token = first + t * 8 + lane % 4 * 2 + warp % 2;
        float sum = shared[0][t][warp][lane];
        for (int w = 1; w < WARPS; w++) sum += shared[w][t][warp][lane];
        if (token < batch && feature < out_features) {
            const float factor = GROUPED ? 1.0f : widen_scale(scale[feature]);
            output[(i64)token * out_features + feature] = narrow(sum * factor);
        }
    }
}

// How many blocks a multiprocessor shall hold: with fewer in mind the compiler spills a register or
// two of 32 to be at 48 or 80, which nothing here gains from.
#define TENSOR_KERNEL(blocks) extern "C" __global__ __launch_bounds__(128, blocks)
#if __CUDA_ARCH__ >= 750 + 50 * BFLOAT16   // tensor cores for the dtype
TENSOR_KERNEL(4) void MULTIPLY(tensor_8) { multiply_tiles<1>(ARGUMENTS); }
TENSOR_KERNEL(4) void MULTIPLY(tensor_16) { multiply_tiles<2>(ARGUMENTS); }
TENSOR_KERNEL(4) void MULTIPLY(tensor_32) { multiply_tiles<4>(ARGUMENTS); }
TENSOR_KERNEL(3) void MULTIPLY(tensor_64) { multiply_tiles<8>(ARGUMENTS); }
#endif
"""

# What a module of kernels is compiled from, and the kernels that are in it. A module of its own for
# tensor cores: who decodes one answer need not wait for it, and if it fails the other one stays.
SOURCES = {"products": _COMMON + _PRODUCTS, "tensor": _COMMON + _TENSOR}
_ENTRY = re.compile(r"KERNEL.* void \w+\((\w+)\)")
MODULES = {name: tuple(_ENTRY.findall(source)) for name, source in SOURCES.items()}


class Variant(NamedTuple):
    """What a module of kernels is built for."""

    bits: int
    is_bfloat16: bool
    is_grouped: bool

    def list_options(self) -> list[str]:
        """Return the compiler's options that select this variant of the source."""
        names = ("BITS", "BFLOAT16", "GROUPED")
        return [f"-D{name}={int(value)}" for name, value in zip(names, self)]

    def describe(self) -> str:
        """Return what a line of the log calls this variant."""
        dtype = "bfloat16" if self.is_bfloat16 else "float16"
        return f"{self.bits} bits, {dtype}{', groups' if self.is_grouped else ''}"


__all__ = ["MODULES", "SOURCES", "THREADS", "WARPS", "Variant"]
