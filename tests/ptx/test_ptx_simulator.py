"""The simulator stops at what it promises to stop at: without that, it would prove nothing."""

import ctypes

import numpy as np
import pytest
import torch

from ptx.driver import DeviceMemory
from ptx.simulator import TABLE, WARP, Grid, Trap, parse

HEAD = """
.version 9.0
.target sm_75
.address_size 64
.visible .entry kernel(
    .param .u64 kernel_param_0
)
.maxntid 128, 1, 1
{
    .reg .pred %p<4>;
    .reg .b16 %rs<4>;
    .reg .b32 %r<8>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 tile[128];
    ld.param.u64 %rd1, [kernel_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd3, %rd2, %rd3;
"""
# Each thread stores its number in a place of its own of what a block shares.
SHARE = """
    mov.u32 %r2, tile;
    shl.b32 %r4, %r1, 2;
    add.s32 %r3, %r2, %r4;
    and.b32 %r4, %r3, 63;
    mov.b32 %f1, %r1;
    st.shared.f32 [%r3], %f1;
"""
CORE = (
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
    "{%f1, %f1, %f1, %f1}, {%r4, %r4}, {%r4}, {%f1, %f1, %f1, %f1};"
)
# Store %r7 where each thread may: 16 bytes of its own.
RESULT = """
    mul.wide.u32 %rd1, %r1, 16;
    add.s64 %rd1, %rd2, %rd1;
    st.global.v4.u32 [%rd1], {%r7, %r7, %r7, %r7};
"""


def run(body: str, count: int = WARP, size: int = 4 * WARP) -> list[int]:
    """Run a warp over an array of `size` numbers; return every fourth, which a thread can store."""
    text = HEAD + body.replace(";", ";\n").replace(":", ":\n") + "\nret;\n}\n"
    with DeviceMemory() as memory:
        array = torch.zeros(size, dtype=torch.int32)
        block = bytes(ctypes.c_uint64(array.data_ptr()))
        Grid(parse(text)["kernel"], memory.arrays, (1, 1), count, block).run()
    return array[::4].tolist()


def test_threads_that_part_meet_again() -> None:
    odd = "and.b32 %r2, %r1, 1; setp.eq.s32 %p1, %r2, 1; mov.u32 %r7, 10; @%p1 bra $ODD; "
    even = "add.s32 %r7, %r7, 1; bra.uni $MEET; $ODD: add.s32 %r7, %r7, 2; $MEET: "
    swap = "shfl.sync.bfly.b32 %r7|%p2, %r7, 1, 31, -1; "
    assert run(odd + even + swap + RESULT) == [12, 11] * 16


def test_loops_run_as_often_as_each_thread_wants() -> None:
    loop = (
        "mov.u32 %r7, 0; $AGAIN: add.s32 %r7, %r7, 1; setp.lt.s32 %p1, %r7, %r1; @%p1 bra $AGAIN; "
    )
    assert run(loop + RESULT) == [max(1, thread) for thread in range(32)]


def test_what_a_block_shares_is_seen_behind_a_barrier() -> None:
    other = "xor.b32 %r5, %r3, 124; bar.sync 0; ld.shared.f32 %f2, [%r5]; mov.b32 %r7, %f2; "
    assert run(SHARE + other + RESULT) == list(range(32))[::-1]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_tensor_core_multiplies_matrices(depth: int) -> None:
    """All of A is 1, column n of B is n, and C is 0.5; the registers are those of each thread."""
    ones = "0x3C003C00"
    # The half of n is built from that of 2^10 + n, whose last bits count ones.
    half = (
        "shr.u32 %r2, %r1, 2; or.b32 %r2, %r2, 0x6400; prmt.b32 %r2, %r2, %r2, 0x1010; "
        "fma.rn.f16x2 %r3, %r2, 0x3C003C00, 0xE400E400; "
    )
    a = ", ".join(["%r4"] * (depth // 4))
    b = ", ".join(["%r3"] * (depth // 8))
    core = (
        f"mov.u32 %r4, {ones}; mov.b32 %f1, 0f3F000000; "
        f"mma.sync.aligned.m16n8k{depth}.row.col.f32.f16.f16.f32 "
        f"{{%f0, %f1, %f2, %f3}}, {{{a}}}, {{{b}}}, {{%f1, %f1, %f1, %f1}}; mov.b32 %r7, %f3; "
    )
    found = np.array(run(half + core + RESULT), "i4").view("f4")
    # The last of a thread's four places is in column 2 * (thread % 4) + 1.
    assert found.tolist() == [depth * (2 * (thread % 4) + 1) + 0.5 for thread in range(32)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("add.s32 %r7, %r6, 1;", "%r6 is read before it is written"),
        (
            "setp.lt.s32 %p1, %r1, 9; @%p1 mov.u32 %r6, 0; add.s32 %r7, %r6, 1;",
            "%r6 is read before",
        ),
        ("ld.global.nc.u32 %r7, [%rd3+512];", "which lie in no one array"),
        ("ld.global.nc.u32 %r7, [%rd3+-4];", "which lie in no one array"),
        ("ld.global.nc.v4.u32 {%r4, %r5, %r6, %r7}, [%rd3];", "16 bytes at an address that is no"),
        ("mov.u32 %r7, 0; st.global.v4.u32 [%rd2], {%r7, %r7, %r7, %r7};", "two stores to one"),
        ("mov.u16 %rs1, 0; st.global.u16 [%rd3], %rs1; st.global.u16 [%rd3], %rs1;", "two stores"),
        (
            "setp.lt.s32 %p1, %r1, 1; @%p1 ret; shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;",
            "gone or else",
        ),
        ("shfl.sync.bfly.b32 %r7, %r1, 1, 15, -1;", "a part of a warp"),
        ("shfl.sync.bfly.b32 %r7, %r1, 1, 31, 255;", "a part of a warp"),
        ("setp.lt.s32 %p1, %r1, 1; @%p1 ret; bar.sync 0;", "a barrier with threads that are gone"),
        ("mov.u32 %r2, tile; ld.shared.f32 %f1, [%r2];", "read before it is written"),
        (SHARE + "st.shared.f32 [%r3], %f1;", "two stores to one place of shared"),
        (SHARE + "ld.shared.f32 %f2, [%r4+4];", "without a barrier"),
        (SHARE + "ld.shared.f32 %f2, [%r3+-4];", "shared memory"),
        (SHARE + "ld.shared.f32 %f2, [%r3+128];", "shared memory ends at 128, not at 256"),
        ("prmt.b32 %r7, %r1, %r1, 0x8000;", "a permutation that repeats signs"),
        (f"setp.lt.s32 %p1, %r1, 1; @%p1 ret; {CORE}", "a tensor core with threads that are gone"),
        (f"mov.b32 %f1, 0f00000000; {CORE}", "%r4 is read before"),
        ("cvt.rz.f16.f32 %rs1, %f1;", "cvt.rz.f16.f32 is not an instruction"),
        ("fma.rn.ftz.f32 %f1, %f1, %f1, %f1;", "fma.rn.ftz.f32 is not an instruction"),
        ("ld.global.u32 %r7, [%rd3];", "ld.global.u32 is not an instruction"),
        ("mov.u32 %r7, %rd1;", "%rd1 is read as u32"),
        ("mov.u64 %r7, %rd1;", "%r7 is too narrow"),
        ("ld.param.u32 %r7, [kernel_param_1];", "there is no parameter"),
        ("$AGAIN: bra $AGAIN;", "a loop without end"),
        (".local .b32 x;", "not understood"),
    ],
)
def test_what_a_gpu_would_do_wrong_stops_the_simulator(body: str, reason: str) -> None:
    with pytest.raises(Trap, match=reason):
        run(body)


def test_a_thread_beyond_the_array_is_stopped() -> None:
    body = "mov.u32 %r7, 1; " + RESULT
    assert run(body) == [1] * 32
    with pytest.raises(Trap, match="which lie in no one array"):
        run(body, size=4 * WARP - 1)


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("shl.b32", (1, 32), 0),
        ("shl.b32", (3, 31), 2**31),
        ("shr.u32", (2**31, 40), 0),
        ("shr.s32", (-(2**31), 40), -1),
        ("mul.wide.s32", (-3, 2**31 - 1), -3 * (2**31 - 1)),
        ("mad.lo.s32", (2**30, 4, 5), 5),
        ("prmt.b32", (0x33221100, 0x77665544, 0x4702), 0x44770022),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfi.b32", (0xFF5, 0xABCD, 4, 8), 0xAF5D),
        ("fma.rn.f16x2", (0x66013C00, 0x3C003C00, 0xE6003C00), 0x3C004000),
        ("fma.rn.bf16x2", (0x43083F80, 0x3F803F80, 0xC3083F80), 0x00004000),
        ("lop3.b32", (0b1100, 0b1010, 0b0110, 0x6A), 0b1000 ^ 0b0110),
        ("lop3.b32", (0b1100, 0b1010, 0b0110, 0xE8), 0b1110),
        ("cvt.rn.f16.f32", (2049.0,), 2048.0),
        ("cvt.rn.f16.f32", (2051.0,), 2052.0),
        ("cvt.rn.f16.f32", (65520.0,), np.inf),
        ("cvt.rn.f16.f32", (2.0**-25 * 1.5,), 2.0**-24),
        ("fma.rn.f32", (1 + 2.0**-23, 1 - 2.0**-23, -1.0), -(2.0**-46)),
        ("cvt.u32.u8", (0x1FF,), 0xFF),
    ],
)
def test_instructions_round_and_clamp_as_ptx_says(
    name: str, operands: tuple[float, ...], expected: float
) -> None:
    from ptx.simulator import DTYPES

    result_type, types, function = TABLE[name]
    arrays = [
        np.array([value]).astype(DTYPES[t])
        for value, t in zip(operands, types.split(), strict=True)
    ]
    with np.errstate(all="ignore"):
        assert function(*arrays).astype(DTYPES[result_type]).tolist() == [expected]
