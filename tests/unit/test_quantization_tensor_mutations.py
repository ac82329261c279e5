"""Break the kernels for tensor cores in every way we could think of: each must be noticed."""

import re
from typing import NamedTuple

import pytest
import torch
from chatglm_6b.quantization_cuda_source import SOURCES
from ptx.cases import TENSOR, Case, assert_multiplies, simulate

HALF, BFLOAT = torch.float16, torch.bfloat16
OFF, OUTSIDE = "off by", "which lie in no one array"


class Mutant(NamedTuple):
    """A replacement in the source, for 11 rows, 37 features and 1,120 columns."""

    name: str
    old: str
    new: str
    reason: str = OFF  # what the simulator or the assertion says
    dtype: torch.dtype = HALF
    group: int | None = None
    bits: int = 4


MUTANTS = (
    Mutant("nibbles swapped", "__byte_perm(even, words[0],", "__byte_perm(words[0], even,"),
    Mutant("bytes out of order", "0x4400 + 0x1111 * k", "0x4400 + 0x1111 * (k ^ 1)"),
    Mutant("unsigned", "0x000f000fu, MAGIC | 0x00080008u", "0x000f000fu, MAGIC"),
    Mutant("half of a nibble", "0x000f000fu", "0x00070007u"),
    Mutant("bytes of a word swapped", "0x4140 + 0x0202", "0x4041 + 0x0202", bits=8),
    Mutant("the second word left out", "words[k / 2], 0,", "words[0], 0,", bits=8),
    Mutant("signs of bytes lost", "both ^ (MAGIC | 0x00800080u)", "both ^ MAGIC", bits=8),
    Mutant(
        "signs of bfloat16 lost",
        "mask_and_flip(both, 0x00800080u, MAGIC | NEGATIVE)",
        "MAGIC | NEGATIVE",
        dtype=BFLOAT,
        bits=8,
    ),
    Mutant("low bits of bfloat16 lost", "0x007f007fu", "0x007e007eu", dtype=BFLOAT, bits=8),
    Mutant("a bit of a magic number", "MAGIC 0x64006400u", "MAGIC 0x64016400u"),
    Mutant('operands of a core swapped', '"r"(low[0]), "r"(high[0]), "r"(low[1])',
           '"r"(low[0]), "r"(low[1]), "r"(high[0])'),
    Mutant('halves of the input swapped', '"r"(first), "r"(second)', '"r"(second), "r"(first)'),
    Mutant("results out of order", '"+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])\n'
           '        : "r"(low[0]), "r"(high[0])',
           '"+f"(sums[0]), "+f"(sums[2]), "+f"(sums[1]), "+f"(sums[3])\n'
           '        : "r"(low[0]), "r"(high[0])'),
    Mutant("the second step with the first's weights", "low + 2, high + 2", "low, high"),
    Mutant("the second step left out",
           "multiply_tile(target, low + 2, high + 2, x.z, x.w);", ""),
    Mutant("features not clamped", "min(row + 8 * r, out_features - 1)", "row + 8 * r", OUTSIDE),
    Mutant("rows not clamped", "min(first + t * 8 + lane / 4, batch - 1)",
           "(first + t * 8 + lane / 4)", OUTSIDE),
    Mutant("columns of the next thread", "in_features + column;\n    float sums",
           "in_features + (column ^ 8);\n    float sums"),
    Mutant("a step too many", "start + d < steps", "start + d <= steps", OUTSIDE),
    Mutant("a step too few", "start + d >= steps", "start + d >= steps - 1"),
    Mutant("warps take each other's steps", "start += WARPS * DEPTH", "start += DEPTH"),
    Mutant("one warp is not added", "for (int w = 1; w < WARPS; w++)",
           "for (int w = 2; w < WARPS; w++)"),
    Mutant("no barrier", "__syncthreads();", "", "without a barrier"),
    Mutant("stores unguarded", "token < batch && feature < out_features", "token < batch", OUTSIDE),
    Mutant("rows stored unguarded", "token < batch && feature", "feature", OUTSIDE),
    Mutant("features and rows mixed up", "row + warp / 2 * 8", "row + warp % 2 * 8",
           "two stores to one place"),
    Mutant("scale of the first feature", "widen_scale(scale[feature])", "widen_scale(scale[row])"),
    Mutant("scales of one half", "factors[i / 2], parts", "factors[0], parts", group=32),
    Mutant("scale of the first group", "rows[r], (start + d) * STEP", "rows[r], start * STEP",
           group=32),
    Mutant("groups overwritten", "__fmaf_rn(factors[i / 2], parts[i], sums[t][i])",
           "factors[i / 2] * parts[i]", group=32),
)  # fmt: skip


def keep_one_kernel(source: str) -> str:
    """Drop the kernels of other numbers of rows, which take most of the compiler's time."""
    return re.sub(r"TENSOR_KERNEL\(\d\) void MULTIPLY\(tensor_(?!16)\d+\).*", "", source)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_broken_kernel_is_noticed(mutant: Mutant) -> None:
    assert mutant.old in SOURCES["tensor"], "the mutant is out of date"
    source = keep_one_kernel(SOURCES["tensor"].replace(mutant.old, mutant.new))
    case = Case(mutant.bits, mutant.dtype, mutant.group, (37, 1120))
    with (
        pytest.raises(Exception, match=re.escape(mutant.reason)),
        simulate(TENSOR, sources=SOURCES | {"tensor": source}) as machine,
    ):
        assert_multiplies(machine.kernels, case, 11)


def test_the_kernel_that_is_broken_is_right_before() -> None:
    source = SOURCES | {"tensor": keep_one_kernel(SOURCES["tensor"])}
    for mutant in {(m.bits, m.dtype, m.group): m for m in MUTANTS}.values():
        case = Case(mutant.bits, mutant.dtype, mutant.group, (37, 1120))
        with simulate(TENSOR, sources=source) as machine:
            assert_multiplies(machine.kernels, case, 11)
