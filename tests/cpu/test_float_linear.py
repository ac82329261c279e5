"""Products in float32 of plain and packed weights: the same in any company, against float64."""

import platform
import sys
from typing import Any

import pytest
import torch
from conftest import forget_kernels
from torch import Tensor, nn

from chatglm.cpu import amx, fast_products, float_linear, linear
from chatglm.cpu import compiler as compiling
from chatglm.cpu import runtime as running
from chatglm.cpu.compiler import Compiler
from chatglm.cpu.writer import Processor

pytest.importorskip("llvmlite")

HOST = Compiler().processor
LANES = {dot: lanes for dot, _, lanes in compiling.DOTS}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COLUMNS, ROWS = 96, 40
# Rows and columns: one of each, ends of tiles, blocks, groups and spans, more than one of them.
SHAPES = [(1, 1), (3, 31), (70, 514), (9, 1056), (33, 1537)]


def list_processors() -> list[str]:
    """Return the ways of multiplying that this CPU can play, its own first."""
    found = Compiler().binding.get_host_cpu_features()
    can_play = {dot for dot, needed, _ in compiling.DOTS if all(found.get(f) for f in needed)}
    return [HOST.dot, *sorted(can_play & {"avx2", "generic"} - {HOST.dot})]


@pytest.fixture(params=list_processors())
def played(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let kernels be those of this processor, or of a simpler one."""
    dot = request.param
    forget_kernels(monkeypatch)
    if dot != HOST.dot:
        name = "haswell" if dot == "avx2" else "x86-64"
        if HOST.dot == "neon":
            name = HOST.name
        compiler = Compiler(Processor(name, "", dot, LANES[dot]))
        for module in (compiling, linear, float_linear):
            monkeypatch.setattr(module, "find_compiler", lambda: compiler)
    return dot


def multiply(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply by the engine, and no other way."""
    product = float_linear.multiply_plain(states, weight)
    assert product is not None and product.dtype == states.dtype
    return product


def assert_near(output: Tensor, states: Tensor, weight: Tensor) -> None:
    """Compare with float64, relative to norms; halves may be rounded once more."""
    states, weight, dtype = states.double(), weight.double(), output.dtype
    norms = states.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    true = states @ weight.T
    rounding = torch.finfo(dtype).eps / 2 * true.abs() * 1.01
    assert ((output.double() - true).abs() <= 2e-6 * norms + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_know_its_company(dtype: torch.dtype, played: str) -> None:
    is_own = played == HOST.dot
    generator = torch.Generator().manual_seed(4)
    for rows, columns in SHAPES if is_own else SHAPES[1:3]:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        states = torch.randn(64, columns, generator=generator).to(dtype)
        whole = multiply(states, weight)
        assert_near(whole, states, weight)
        for tokens in (1, 2, 3, 5, 7, 13, 33) if is_own else (1, 7):
            picked = torch.randperm(64, generator=generator)[:tokens]
            assert torch.equal(multiply(states[picked], weight), whole[picked]), (rows, tokens)


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_too_with_exact_activations(bits: int, group_size: int | None) -> None:
    torch.manual_seed(5)
    weight = torch.randint(-128, 128, (37, 1088 * bits // 8), dtype=torch.int8)
    scale = torch.rand(37, *(() if group_size is None else (1088 // group_size,)))
    states = torch.randn(64, 1088)
    kernels = linear.find_kernels()
    assert kernels is not None
    whole = kernels.multiply(states, weight, scale, bits, "exact")
    assert whole is not None
    for tokens in (1, 3, 9):
        picked = torch.randperm(64)[:tokens]
        part = kernels.multiply(states[picked], weight, scale, bits, "exact")
        assert part is not None and torch.equal(part, whole[picked])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    weight, states = torch.randn(1030, 320).to(dtype), torch.randn(9, 320).to(dtype)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            outputs.append((multiply(states, weight), multiply(states[:1], weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(many, outputs[0][0]) for many, _ in outputs)
    assert all(torch.equal(one, outputs[0][0][:1]) for _, one in outputs)


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    weight, states = torch.randn(70, 514), torch.randn(3, 514)
    expected = multiply(states, weight)
    for size in (1, 5000, 2**20):
        forget_kernels(monkeypatch)
        monkeypatch.setattr(float_linear, "BLOCK_BYTES", size)
        assert torch.equal(multiply(states, weight), expected)


def has_tiles() -> bool:
    return float_linear.multiplies_tiles(float_linear.Weights(HOST, "f16"), ROWS)


@pytest.mark.skipif(not has_tiles(), reason="this CPU has no tile registers for halves")
def test_a_float16_prompt_is_as_its_tokens_are_alone() -> None:
    torch.manual_seed(9)
    weight, states = torch.randn(161, 514).half(), torch.randn(600, 514).half()
    whole = multiply(states, weight)
    assert_near(whole, states, weight)
    for tokens in (1, 40, 65, 512, 599):
        assert torch.equal(multiply(states[-tokens:], weight), whole[-tokens:])


@pytest.mark.skipif(not has_tiles(), reason="this CPU has no tile registers for halves")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_tiles_keep_16_bits_of_a_float32_input(dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    weight, states = torch.randn(64, 2048).to(dtype), torch.randn(3, 2048)
    weight[0, 5], weight[1, 6] = 6e-8, 6e4  # the smallest float16, and nearly the largest
    kind = "f16" if dtype == torch.float16 else "bf16"
    sizes = float_linear.Sizes(float_linear.Weights(HOST, kind), 3, 64, 2048, 4096, 1)
    product = float_linear.plan_exact(sizes)
    assert isinstance(product, float_linear.TileProduct)
    true = states.double() @ weight.double().T
    error = (product.run(states, weight.data_ptr(), 0).double() - true).abs()
    bound = 2**-16 * (states.double().abs() @ weight.double().abs().T)
    assert (error <= bound).all() and error.max() > 0
    zeros = torch.zeros(3, 2048)
    zeros[:, 5] = 3e38
    assert product.run(zeros, weight.data_ptr(), 0)[:, 0].isfinite().all()


def test_without_the_system_s_leave_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(11)
    weight, states = torch.randn(ROWS, COLUMNS).half(), torch.randn(3, COLUMNS).half()
    forget_kernels(monkeypatch)
    asked: list[tuple[int, ...]] = []

    class Library:
        def syscall(self, *arguments: int) -> int:
            asked.append(arguments)
            return -1

    monkeypatch.setattr(amx.ctypes, "CDLL", lambda name: Library())
    assert not amx.ask_for_tiles()
    assert len(asked) == (sys.platform == "linux" and platform.machine() == "x86_64")
    assert not has_tiles()
    assert_near(multiply(states, weight), states, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype, value: float) -> None:
    torch.manual_seed(8)
    weight, states = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(9, COLUMNS).to(dtype)
    before, true = multiply(states, weight), nn.functional.linear
    states[4, 70] = value
    after, expected = multiply(states, weight), true(states.float(), weight.float())
    assert torch.equal(after[[0, 1, 2, 3, 5, 6, 7, 8]], before[[0, 1, 2, 3, 5, 6, 7, 8]])
    assert torch.equal(after[4].isfinite(), expected[4].isfinite())
    if dtype != torch.float16:  # whose weights may be split in two, one of them zero
        assert torch.equal(after[4].isposinf(), expected[4].isposinf())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows", [1, 256, 257, 600])
def test_halves_that_the_cpu_cannot_multiply_are_widened(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    weight, states = torch.randn(rows, 70).to(dtype), torch.randn(13, 5, 70).to(dtype)
    monkeypatch.setattr(float_linear, "ask_for_tiles", lambda: False)
    monkeypatch.setattr(float_linear, "_multiplies", lambda processor, dtype: True)
    assert float_linear.multiply_plain(states, weight) is None
    monkeypatch.setattr(float_linear, "_multiplies", lambda processor, dtype: False)
    output = multiply(states, weight)
    assert output.shape == (13, 5, rows)
    assert_near(output, states, weight)


@pytest.mark.parametrize(
    ("features", "dtype", "expected"),
    [
        ("+avx512f,+avx512bf16", torch.bfloat16, True),
        ("+avx512f,+avx512bf16", torch.float16, False),
        ("+avx512f,-avx512bf16", torch.bfloat16, False),
        ("+amx-fp16", torch.float16, True),
        ("", torch.float32, True),
    ],
)
def test_a_cpu_says_which_halves_it_multiplies(
    features: str, dtype: torch.dtype, expected: bool
) -> None:
    processor = Processor("any", features, "generic", 4)
    assert float_linear._multiplies(processor, dtype) is expected


@pytest.mark.parametrize("has_bias", [True, False])
def test_plain_layers_are_torch_s_for_many_tokens(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run = running.run_on_threads

    def note(*arguments: int) -> None:
        runs.append(1)
        run(*arguments)

    monkeypatch.setattr(running, "run_on_threads", note)
    layer = nn.Linear(COLUMNS, ROWS, has_bias)
    for shape, num_runs in (((1, 1), 1), ((2, 1), 1), ((1, 64), 1), ((5, 13), 0)):
        states = torch.randn(*shape, COLUMNS)
        with torch.no_grad(), fast_products():
            output = layer(states)
        assert len(runs) == num_runs, shape
        torch.testing.assert_close(output, layer(states))
        with fast_products():
            assert layer(states).requires_grad
        assert len(runs) == num_runs  # a graph is torch's
        runs.clear()
    with torch.no_grad(), fast_products():
        double: Any = layer.double()(torch.randn(1, COLUMNS, dtype=torch.float64))
    assert double.dtype == torch.float64 and not runs
