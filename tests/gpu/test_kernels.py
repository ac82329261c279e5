"""The kernels on a real GPU: the assertions of the simulator, and how near the memory's speed.

    python -m pytest tests/gpu        what this file asserts, and the bandwidth
    python -m benchmarks.bench_gpu    a step of 1, 8 and 32 rows, float16 and INT4, captured

The project's own machines have no GPU: docs/quantization.md says where this has run.
"""

import statistics
import sys
from collections.abc import Callable

import pytest
import torch
from chatglm_6b import quantization_cuda
from chatglm_6b.quantization import QuantizedLinear, quantized_linear
from chatglm_6b.quantization_cuda import CudaKernels, find_kernels
from ptx.cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    ODD_CASES,
    SMALL_CASES,
    Case,
    assert_dequantizes,
    assert_multiplies,
    make_input,
    make_operands,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None,
        reason="there is no CUDA device; on one run python -m pytest tests/gpu, "
        "and python -m benchmarks.bench_gpu",
    ),
]
ALL_CASES = [*CASES, *FEW_CASES, *SMALL_CASES, *ODD_CASES]
# The linear layers of the 6B model, outputs by inputs.
SHAPES = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384))
REPEATS = 50


@pytest.fixture
def kernels() -> CudaKernels:
    found = find_kernels(torch.device("cuda"))
    assert found is not None, "the log says why"
    return found


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_matrices_are_unpacked_bit_for_bit(case: Case, kernels: CudaKernels) -> None:
    assert_dequantizes(kernels, case, "cuda")


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_products_are_exact(case: Case, rows: int, kernels: CudaKernels) -> None:
    assert_multiplies(kernels, case, rows, device="cuda")


@pytest.mark.parametrize("rows", [9, 16, 17, 33, 64])
@pytest.mark.parametrize("case", [*CASES, *FEW_CASES], ids=str)
def test_products_on_tensor_cores_are_near_exact(
    case: Case, rows: int, kernels: CudaKernels
) -> None:
    """A tensor core cuts bits off within its sums, so the bound is wider than that of an fma."""
    if not kernels._has_tensor_cores(case.dtype):
        pytest.skip("this GPU has no tensor cores for the dtype")
    assert_multiplies(kernels, case, rows, device="cuda", slack=2.0**-16)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_a_row_is_the_same_in_any_company(case: Case, kernels: CudaKernels) -> None:
    if not kernels._has_tensor_cores(case.dtype):
        pytest.skip("this GPU has no tensor cores for the dtype")
    operands, input = make_operands(case, "cuda"), make_input(case, 64, device="cuda")
    for rows, parts in ((64, ((0, 9), (20, 45), (7, 64))), (8, ((0, 1), (2, 7), (6, 8)))):
        whole = kernels.multiply(input[:rows], *operands, case.bits)
        assert whole is not None
        for first, last in parts:
            part = kernels.multiply(input[first:last].clone(), *operands, case.bits)
            assert part is not None and torch.equal(part, whole[first:last])


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_rows_are_not_slower_than_a_matrix_and_cublas(
    rows: int, shape: tuple[int, int], kernels: CudaKernels, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(4, torch.float16, None, shape)
    weight, scale = make_operands(case, "cuda")
    input = make_input(case, rows, device="cuda")
    half = torch.randn(shape, dtype=torch.float16, device="cuda")

    def unpack_and_multiply() -> torch.Tensor:
        matrix = kernels.dequantize(weight, scale, 4, torch.float16)
        assert matrix is not None
        return torch.nn.functional.linear(input, matrix)

    packed = measure(lambda: kernels.multiply(input, weight, scale, 4))
    matrix = measure(unpack_and_multiply)
    plain = measure(lambda: torch.nn.functional.linear(input, half))
    with capsys.disabled():
        sys.stdout.write(
            f"\n{torch.cuda.get_device_name()}, 4 bits, {shape}, {rows} rows: "
            f"{packed * 1e6:.0f} us; by a matrix {matrix * 1e6:.0f} us; half {plain * 1e6:.0f} us"
        )
    assert packed < matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_the_real_sizes_are_exact(shape: tuple[int, int], kernels: CudaKernels) -> None:
    for case in (Case(4, torch.float16, None, shape), Case(8, torch.bfloat16, 128, shape)):
        assert_multiplies(kernels, case, 1, device="cuda")
        assert_dequantizes(kernels, case, "cuda")


def make_layer() -> QuantizedLinear:
    return QuantizedLinear.from_linear(torch.nn.Linear(4096, 4096).half().cuda(), 4).eval()


@pytest.mark.parametrize("rows", [1, 8, 9, 65])
def test_a_captured_graph_launches_the_kernels(rows: int) -> None:
    layer, states = make_layer(), torch.randn(rows, 4096, dtype=torch.float16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(states)  # the first launch loads the kernel, which a capture does not allow
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = layer(states)
        states.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, layer(states))


@pytest.mark.parametrize("rows", [1, 8, 9, 65])
def test_a_compiled_layer_launches_the_kernels(rows: int) -> None:
    """The third run replays what the second one captured."""
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        states = torch.randn(rows, 4096, dtype=torch.float16, device="cuda")
        with torch.no_grad():
            assert torch.equal(compiled(states), layer(states))


def test_kernels_wait_for_the_stream_they_are_launched_on(kernels: CudaKernels) -> None:
    case = Case(4, torch.float16, None, (4096, 4096))
    weight, scale = make_operands(case, "cuda")
    input = make_input(case, 1, device="cuda")
    expected = kernels.multiply(input, weight, scale, 4)
    late, stream = torch.zeros_like(input), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(input)
        output = kernels.multiply(late, weight, scale, 4)
    torch.cuda.synchronize()
    assert output is not None and expected is not None
    assert torch.equal(output, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device only")
def test_kernels_run_on_the_device_of_their_operands() -> None:
    other = find_kernels(torch.device("cuda", 1))
    assert other is not None, "the log says why"
    with torch.cuda.device(0):
        assert_multiplies(other, SMALL_CASES[0], 1, device="cuda:1")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_plain_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(512, 96, device="cuda"), 4).to(dtype)
    gradients = []
    for found in (None, {}):
        if found is None:  # as on a device without kernels
            monkeypatch.setitem(quantization_cuda._found, torch.cuda.current_device(), None)
        else:
            monkeypatch.undo()
        input = torch.ones(3, 512, device="cuda", dtype=dtype, requires_grad=True)
        output = quantized_linear(input, layer.weight, layer.weight_scale, 4)
        output.sum().backward()
        gradients.append(input.grad)
    assert torch.equal(*gradients)


def measure(function: Callable[[], object]) -> float:
    """Return the seconds of the middle call on the device, its weights out of the cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_row_is_faster_than_with_half_weights(
    bits: int, shape: tuple[int, int], kernels: CudaKernels, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(bits, torch.float16, None, shape)
    weight, scale = make_operands(case, "cuda")
    input = make_input(case, 1, device="cuda")
    half = torch.randn(shape, dtype=torch.float16, device="cuda")
    packed = measure(lambda: kernels.multiply(input, weight, scale, bits))
    plain = measure(lambda: torch.nn.functional.linear(input, half))
    with capsys.disabled():
        sys.stdout.write(
            f"\n{torch.cuda.get_device_name()}, {bits} bits, {shape}: {packed * 1e6:.0f} us, "
            f"{weight.nbytes / packed / 1e9:.0f} GB/s; half {plain * 1e6:.0f} us, "
            f"{half.nbytes / plain / 1e9:.0f} GB/s"
        )
    assert packed < plain
