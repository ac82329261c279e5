"""Break the kernels in every way we could think of: the assertions on them must notice each.

A mutant that no assertion could notice, because it computes the same, is no mutant: the guard of
whole warps in `multiply`, say, whose rows are clamped again before they are loaded and stored.
"""

import re
from typing import NamedTuple

import pytest
import torch
from chatglm_6b.quantization_cuda_source import SOURCES
from ptx.cases import WIDE, Case, assert_dequantizes, assert_multiplies, simulate

HALF, BFLOAT = torch.float16, torch.bfloat16
ONE_ROW, THREE_ROWS, ANY, UNPACK, UNPACK_ANY = "1x4", "4x2", "any", "wide", "dequantize_any"


class Mutant(NamedTuple):
    """A replacement in the source, and the kernel that it breaks."""

    name: str
    kernel: str
    old: str
    new: str
    reason: str  # what the simulator or the assertion says
    dtype: torch.dtype = HALF
    group: int | None = None
    bits: int = 4


OFF, WRONG, OUTSIDE = "off by", "wrong, first", "which lie in no one array"
MUTANTS = (
    Mutant(
        "nibbles swapped",
        UNPACK,
        "out[0] = integer<4>(low), out[1] = integer<0>(low)",
        "out[0] = integer<0>(low), out[1] = integer<4>(low)",
        WRONG,
    ),
    Mutant(
        "nibbles of a byte swapped",
        ANY,
        "values[0] = integer<4>(stored), values[1] = integer<0>",
        "values[0] = integer<0>(stored), values[1] = integer<4>",
        OFF,
    ),
    Mutant("unsigned", UNPACK, "sign = 1u << (BITS - 1)", "sign = 0u", WRONG),
    Mutant("upper half shifted by 8", ONE_ROW, "high = low >> 16", "high = low >> 8", OFF, bits=8),
    Mutant(
        "bytes out of order",
        UNPACK,
        "out[2] = integer<0>(high), out[3] = integer<8>(high)",
        "out[2] = integer<8>(high), out[3] = integer<0>(high)",
        WRONG,
        bits=8,
    ),
    Mutant(
        "weights not clamped",
        ONE_ROW,
        "const i64 clamped = min(row + r, out_features - 1)",
        "const i64 clamped = row + r",
        OUTSIDE,
    ),
    Mutant(
        "input not clamped",
        THREE_ROWS,
        "const i64 clamped = min(first + m, batch - 1)",
        "const i64 clamped = first + m",
        OUTSIDE,
    ),
    Mutant(
        "rows stored unguarded",
        ONE_ROW,
        "lane == 0 && row + r < out_features",
        "lane == 0",
        OUTSIDE,
    ),
    Mutant("batch stored unguarded", THREE_ROWS, " && first + m < batch)", ")", OUTSIDE),
    Mutant(
        "all threads store", ONE_ROW, "lane == 0 && row + r", "row + r", "two stores to one place"
    ),
    Mutant(
        "warps unguarded",
        ANY,
        "bytes = in_features / PER_BYTE;\n    if (row >= out_features) return;",
        "bytes = in_features / PER_BYTE;",
        OUTSIDE,
    ),
    Mutant("columns unguarded", UNPACK, "if (column >= in_features) return;", "", OUTSIDE),
    Mutant("bytes unguarded", UNPACK_ANY, "if (byte >= bytes) return;", "", OUTSIDE),
    Mutant("a load too many", ONE_ROW, "chunk < chunks;", "chunk <= chunks;", OUTSIDE),
    Mutant("a load too few", ONE_ROW, "chunk < chunks;", "chunk < chunks - 1;", OFF),
    Mutant(
        "wrong input", ONE_ROW, "chunk * COLUMNS + step * 8", "chunk * COLUMNS + step * 8 % 24", OFF
    ),
    Mutant("half a reduction", ONE_ROW, "int distance = 16", "int distance = 8", OFF),
    Mutant(
        "warps part before they add",
        ONE_ROW,
        "if (row >= out_features) return;\n    float sums",
        "if (row >= out_features || lane == 5) return;\n    float sums",
        "gone or elsewhere",
    ),
    Mutant(
        "sums overwritten",
        ONE_ROW,
        "__fmaf_rn(factor, parts[m][r], sums[m][r])",
        "factor * parts[m][r]",
        OFF,
    ),
    Mutant(
        "scale of the first row",
        ONE_ROW,
        "widen_scale(scale[row + r])",
        "widen_scale(scale[row])",
        OFF,
    ),
    Mutant(
        "scale of the next row",
        UNPACK,
        "scale_at(scale, row, column, in_features, shift);\n    for (int i = 0",
        "scale_at(scale, row + 1, column, in_features, shift);\n    for (int i = 0",
        OUTSIDE,
    ),
    Mutant(
        "groups of twice the size",
        UNPACK,
        "(column >> shift)",
        "(column >> shift + 1)",
        WRONG,
        group=32,
    ),
    Mutant("a group too few a row", UNPACK, "row * groups", "row * (groups - 1)", WRONG, group=128),
    Mutant("rounding to zero", UNPACK, "cvt.rn.f16.f32", "cvt.rz.f16.f32", "not an instruction"),
    Mutant("bfloat16 cut off", UNPACK, "bits + 0x7fffu + (bits >> 16 & 1u)", "bits", WRONG, BFLOAT),
    Mutant("ties up", UNPACK, "0x7fffu + (bits >> 16 & 1u)", "0x8000u", WRONG, BFLOAT),
    Mutant(
        "bfloat16 scales",
        UNPACK,
        "(scale_t scale) { return scale; }",
        "(scale_t scale) { return __uint_as_float(__float_as_uint(scale) & 0xffff0000u); }",
        WRONG,
        BFLOAT,
    ),
)

CHECKS = {
    ONE_ROW: lambda kernels, case: assert_multiplies(kernels, case, 1),
    THREE_ROWS: lambda kernels, case: assert_multiplies(kernels, case, 3),
    ANY: lambda kernels, case: assert_multiplies(kernels, case._replace(shape=(19, 70)), 1),
    UNPACK: assert_dequantizes,
    UNPACK_ANY: lambda kernels, case: assert_dequantizes(kernels, case._replace(shape=(19, 70))),
}


def keep_one_kernel(source: str, kernel: str) -> str:
    """Drop the other instances of `multiply`, which take most of the compiler's time."""
    return re.sub(rf"KERNEL void MULTIPLY\(multiply_(?!{kernel})\dx\d\).*", "", source)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_broken_kernel_is_noticed(mutant: Mutant) -> None:
    whole = SOURCES["products"]
    assert whole.count(mutant.old) == 1, "the mutant is out of date"
    source = keep_one_kernel(whole.replace(mutant.old, mutant.new), mutant.kernel)
    case = Case(mutant.bits, mutant.dtype, mutant.group, WIDE)
    with (
        pytest.raises(Exception, match=re.escape(mutant.reason)),
        simulate(sources=SOURCES | {"products": source}) as machine,
    ):
        CHECKS[mutant.kernel](machine.kernels, case)
