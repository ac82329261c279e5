"""What holds for every build of the kernels, asserted alike in the simulator and on a GPU.

Shapes: `M` input rows, `O` output features, `I` input features, `C` stored columns, `G` groups.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from chatglm_6b.quantization import dequantize_weight
from chatglm_6b.quantization_cuda import SCALE_DTYPES, CudaKernels
from chatglm_6b.quantization_cuda_source import SOURCES
from chatglm_6b.quantization_nvrtc import KernelError, load_nvrtc
from torch import Tensor

from .driver import NVCC, STREAM, DeviceMemory, NvccAsNvrtc, SimulatedDriver

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")
# Both are newer than nvcc's 7.5 and 12.1, and so get the PTX of those: the compiler has one front
# end for GPUs before sm_100 and another one from there on, which write different PTX.
OLDER, NEWER = 76, 129
# Of the older front end too, and with tensor cores for bfloat16.
TENSOR = 91
DTYPES = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """Operands: `shape` is `(O, I)`, `group` the columns that share a scale, or None."""

    bits: int
    dtype: torch.dtype
    group: int | None
    shape: tuple[int, int]

    def __str__(self) -> str:
        group = "" if self.group is None else f"-groups-of-{self.group}"
        size = "x".join(map(str, self.shape))
        return f"{self.bits}-bits-{str(self.dtype).removeprefix('torch.')}{group}-{size}"


def list_cases(shape: tuple[int, int], *groups: int | None) -> list[Case]:
    return [
        Case(bits, dtype, group, shape) for bits in (4, 8) for dtype in DTYPES for group in groups
    ]


# Rows of 36 and of 72 loads of 16 bytes, so that some threads of a warp have one more than others,
# and an odd number of them, so that the last warp has rows too many.
WIDE = (67, 1152)
CASES = list_cases(WIDE, None, 32, 128)
HALF = Case(4, torch.float16, None, WIDE)
# Every value of bits, of dtype and of grouping, in few of their combinations.
FEW_CASES = [
    Case(bits, dtype, 64 if (bits == 8) == (dtype == torch.float16) else None, WIDE)
    for bits in (4, 8)
    for dtype in DTYPES
]
# Rows of a single load, of an odd number of bytes, and of one byte.
SMALL_CASES = [case for size in (32, 38, 2) for case in list_cases((5, size), None)]
ODD_CASES = [Case(8, dtype, None, (19, 37)) for dtype in DTYPES]


def make_operands(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return a weight that holds every byte, if it is large enough, and its scales.

    Every row and group has another scale; the first scale is zero, the second a power of two, which
    makes many a product lie halfway between two bfloat16.
    """
    generator = torch.Generator().manual_seed(sum(case.shape))
    rows, columns = case.shape[0], case.shape[1] * case.bits // 8
    order = torch.randperm(rows * columns, generator=generator)
    weight = (order % 256 - 128).to(torch.int8).view(rows, columns)
    size = (rows,) if case.group is None else (rows, case.shape[1] // case.group)
    scale = torch.rand(size, generator=generator) * torch.logspace(-4, 0, size[0]).view(
        -1, *[1] * (len(size) - 1)
    )
    scale.view(-1)[0] = 0
    scale.view(-1)[1:2] = 2.0**-7
    scale = scale.half().to(SCALE_DTYPES[case.dtype])
    return weight.to(device), scale.to(device)


def make_input(case: Case, *rows: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(rows))
    values = torch.randn(*rows, case.shape[1], generator=generator)
    return values.to(case.dtype).to(device)


def assert_product(
    output: Tensor | None, input: Tensor, matrix: Tensor, slack: float = 2.0**-21
) -> None:
    """Assert that an output is the exact product, rounded once, but for the order of the sum.

    Args:
        output: `(..., O)`, or None where there should be one.
        input: `(..., I)`.
        matrix: `(O, I)`, float64, exact.
        slack: what the sum may be off by, of the sum of magnitudes.
    """
    assert output is not None, "declined"
    assert output.dtype == input.dtype
    exact = input.double() @ matrix.T
    assert output.shape == exact.shape
    rounding = exact.abs() * torch.finfo(input.dtype).eps / 2 + 2.0**-25
    summing = (input.double().abs() @ matrix.abs().T) * slack
    excess = (output.double() - exact).abs() - rounding - summing
    assert excess.max() <= 0, f"off by {excess.max().item()} at {excess.argmax().item()}"


def assert_multiplies(
    kernels: CudaKernels,
    case: Case,
    *rows: int,
    device: str = "cpu",
    slack: float = 2.0**-21,
) -> None:
    weight, scale = make_operands(case, device)
    input = make_input(case, *rows, device=device)
    before = input.clone(), weight.clone(), scale.clone()
    output = kernels.multiply(input, weight, scale, case.bits)
    matrix = dequantize_weight(weight, scale.double(), case.bits, torch.float64)
    assert_product(output, input, matrix, slack)
    assert all(map(torch.equal, before, (input, weight, scale)))
    if case.group is None:
        assert output is not None and output[..., 0].eq(0).all()  # the row of scale 0


def assert_dequantizes(kernels: CudaKernels, case: Case, device: str = "cpu") -> None:
    weight, scale = make_operands(case, device)
    expected = dequantize_weight(weight, scale, case.bits, case.dtype)
    actual = kernels.dequantize(weight, scale, case.bits, case.dtype)
    assert actual is not None, "declined"
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    wrong = (actual != expected).nonzero().tolist()
    assert not wrong, f"{len(wrong)} wrong, first {wrong[:5]}"


class Machine(NamedTuple):
    """Kernels on a simulated device."""

    kernels: CudaKernels
    driver: SimulatedDriver
    nvrtc: Any
    memory: Any


def find_compiler() -> Any:
    """Return nvcc, whose results are kept, or else NVRTC, or skip the test."""
    try:
        return NvccAsNvrtc() if NVCC else load_nvrtc()
    except KernelError:
        pytest.skip("there is neither nvcc on the path nor NVRTC in a package")


@contextmanager
def simulate(
    capability: int = OLDER,
    multiprocessors: int = 1,
    sources: Mapping[str, str] = SOURCES,
    nvrtc: Any = None,
    device: int = 0,
    is_alone: bool = False,
) -> Iterator[Machine]:
    """Make kernels for a simulated device, whose memory is what is allocated meanwhile.

    Raises at the end what a kernel or a stand-in raised: the host code has seen an error code.
    """
    nvrtc = nvrtc or find_compiler()
    memory = DeviceMemory()
    driver = SimulatedDriver(memory, device)
    sizes = (device, capability, multiprocessors)
    kernels = CudaKernels(driver, nvrtc, *sizes, lambda: STREAM, sources, is_alone)
    try:
        with memory:
            yield Machine(kernels, driver, nvrtc, memory)
    finally:
        if driver.error:
            raise driver.error
        assert driver.depth == 0, "a context was pushed and not popped"
