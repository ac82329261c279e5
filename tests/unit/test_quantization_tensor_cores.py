"""Products of 9 to 64 rows on tensor cores, in the simulator: values, choices, company.

As in test_quantization_cuda.py the PTX and the host code are the shipped ones. How a GPU's tensor
cores round within one of their sums is not shown here: nobody has written it down.
"""

import ctypes
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.quantization import dequantize_weight
from chatglm_6b.quantization_cuda import read_rows_mode
from chatglm_6b.quantization_cuda_source import SOURCES, Variant
from chatglm_6b.quantization_nvrtc import compile_source
from ptx.cases import (
    NEWER,
    OLDER,
    TENSOR,
    Case,
    assert_dequantizes,
    assert_multiplies,
    assert_product,
    list_cases,
    make_input,
    make_operands,
    simulate,
)
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16
# 35 steps of 32 columns: runs of 4 for four warps, of which one has less to do and one run is not
# whole; and two and a bit blocks of 16 features.
UNEVEN = (37, 1120)
CASES = [*list_cases(UNEVEN, None, 32), *list_cases((37, 1152), 128)]
FEW_CASES = [
    Case(bits, dtype, 64 if (bits == 8) == (dtype == HALF) else None, (21, 576))
    for bits in (4, 8)
    for dtype in (HALF, BFLOAT)
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)


def names(machine: Any) -> list[str]:
    return [name for name, _ in machine.driver.launches]


# Values


@each_case
def test_products_of_nine_rows_and_of_all_sixty_four_are_exact(case: Case) -> None:
    with simulate(TENSOR) as machine:
        assert_multiplies(machine.kernels, case, 9)
        assert_multiplies(machine.kernels, case, 64)
    assert machine.driver.launches == [("tensor_16", (3, 1)), ("tensor_64", (3, 1))]


@few_cases
def test_numbers_of_rows_between_are_exact(case: Case) -> None:
    with simulate(TENSOR) as machine:
        for rows in (16, 17, 33):
            assert_multiplies(machine.kernels, case, rows)
        assert_multiplies(machine.kernels, case, 2, 3, 4)
    assert names(machine) == ["tensor_16", "tensor_32", "tensor_64", "tensor_32"]


@few_cases
def test_the_compilers_other_front_end_writes_the_same_kernels(case: Case) -> None:
    with simulate(NEWER) as machine:
        assert_multiplies(machine.kernels, case, 11)
        assert_multiplies(machine.kernels, case, 33)
    assert names(machine) == ["tensor_16", "tensor_64"]


@few_cases
def test_the_first_tensor_cores_have_half_the_depth_and_no_bfloat16(case: Case) -> None:
    with simulate(OLDER) as machine:
        if case.dtype == HALF:
            assert_multiplies(machine.kernels, case, 11)
            assert b"m16n8k8" in machine.driver.images[0]
            assert b"m16n8k16" not in machine.driver.images[0]
        else:
            operands = make_input(case, 11), *make_operands(case)
            assert machine.kernels.multiply(*operands, case.bits) is None
    assert names(machine) == ["tensor_16"] * (case.dtype == HALF)


@few_cases
def test_a_single_step_of_columns_is_computed(case: Case) -> None:
    small = case._replace(shape=(5, 64))
    with simulate(TENSOR) as machine:
        assert_multiplies(machine.kernels, small, 9)
    assert names(machine) == ["tensor_16"]


@few_cases
def test_nan_and_infinity_reach_their_rows_only(case: Case) -> None:
    with simulate(TENSOR) as machine:
        weight, scale = make_operands(case)
        input = make_input(case, 12)
        input[1, 5], input[2, 7] = torch.nan, torch.inf
        output = machine.kernels.multiply(input, weight, scale, case.bits)
    assert output is not None
    assert output[[0, *range(3, 12)]].isfinite().all()
    assert output[1].isnan().all()
    assert not output[2].isfinite().all(0).any()


# Company


def multiply(machine: Any, case: Case, input: Tensor, operands: tuple[Tensor, Tensor]) -> Tensor:
    output = machine.kernels.multiply(input, *operands, case.bits)
    assert output is not None, "declined"
    return output


@few_cases
def test_a_row_is_the_same_in_any_company_of_nine_to_sixty_four(case: Case) -> None:
    with simulate(TENSOR) as machine:
        operands, input = make_operands(case), make_input(case, 64)
        whole = multiply(machine, case, input, operands)
        for first, last in ((0, 9), (3, 20), (30, 63), (7, 64)):
            part = multiply(machine, case, input[first:last].clone(), operands)
            assert torch.equal(part, whole[first:last])
    assert set(names(machine)) == {"tensor_16", "tensor_32", "tensor_64"}


@few_cases
def test_a_row_is_the_same_in_any_company_of_one_to_eight(case: Case) -> None:
    with simulate(TENSOR) as machine:
        case = case._replace(shape=(67, 576))  # long enough for four features a warp
        operands, input = make_operands(case), make_input(case, 8)
        whole = multiply(machine, case, input, operands)
        for first, last in ((0, 1), (7, 8), (2, 4), (1, 6)):
            part = multiply(machine, case, input[first:last].clone(), operands)
            assert torch.equal(part, whole[first:last])
    assert set(names(machine)) == {"multiply_1x4", "multiply_2x2", "multiply_4x2"}


@pytest.mark.parametrize(
    ("capability", "shape", "kinds"),
    [
        (TENSOR, (21, 576), {"tensor_8", "tensor_16", "tensor_64"}),
        (OLDER, (21, 576), {"multiply_1x2", "multiply_4x2"}),
        (TENSOR, (7, 38), {"multiply_any"}),
    ],
    ids=["tensor cores", "none for bfloat16", "odd sizes"],
)
def test_rows_alone_are_the_same_in_any_company(
    capability: int, shape: tuple[int, int], kinds: set[str]
) -> None:
    case = Case(4, BFLOAT, None, shape)
    with simulate(capability, is_alone=True) as machine:
        operands, input = make_operands(case), make_input(case, 70)
        whole = multiply(machine, case, input, operands)
        weight, scale = operands
        matrix = dequantize_weight(weight, scale.double(), case.bits, torch.float64)
        assert_product(whole, input, matrix)
        for first, last in ((0, 1), (69, 70), (4, 11), (9, 25)):
            part = multiply(machine, case, input[first:last].clone(), operands)
            assert torch.equal(part, whole[first:last])
    assert set(names(machine)) == kinds


def test_the_mode_of_rows_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATGLM_CUDA_ROWS", raising=False)
    assert read_rows_mode() == "fast"
    monkeypatch.setenv("CHATGLM_CUDA_ROWS", "alone")
    assert read_rows_mode() == "alone"
    monkeypatch.setenv("CHATGLM_CUDA_ROWS", "together")
    with pytest.raises(ValueError, match="must be one of fast, alone, got 'together'"):
        read_rows_mode()


# Choices


@pytest.mark.parametrize(
    "case",
    [Case(4, HALF, None, (5, 38)), Case(8, HALF, None, (5, 48)), Case(8, BFLOAT, None, (5, 37))],
    ids=str,
)
def test_sizes_that_no_step_divides_are_left_to_a_matrix(case: Case) -> None:
    with simulate(TENSOR) as machine:
        operands = make_input(case, 9), *make_operands(case)
        assert machine.kernels.multiply(*operands, case.bits) is None
    assert machine.driver.calls.count("cuModuleLoadData") == 0


def test_more_rows_and_operands_out_of_line_are_left_to_a_matrix() -> None:
    case = Case(4, HALF, None, (21, 576))
    with simulate(TENSOR) as machine:
        weight, scale = make_operands(case)
        assert machine.kernels.multiply(make_input(case, 65), weight, scale, 4) is None
        input = make_input(case, 9)
        moved = torch.cat([input.new_zeros(1), input.flatten()])[1:].view_as(input)
        assert machine.kernels.multiply(moved, weight, scale, 4) is None
    assert machine.driver.launches == []


def test_tensor_cores_have_a_module_of_their_own() -> None:
    case = Case(4, HALF, None, (21, 576))
    with simulate(TENSOR) as machine:
        assert_multiplies(machine.kernels, case, 1)
        assert len(machine.driver.images) == 1
        assert b"mma.sync" not in machine.driver.images[0]
        assert_multiplies(machine.kernels, case, 9)
    assert b"mma.sync" in machine.driver.images[1]


# GPUs without tensor cores


@pytest.fixture(scope="module")
def old_nvrtc() -> Any:
    """Return an NVRTC of CUDA 12, which knows such GPUs: pip's nvidia-cuda-nvrtc-cu12."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.glob("lib/libnvrtc.so.12")]
    if not files:
        pytest.skip("the package nvidia-cuda-nvrtc-cu12 is not installed")
    for builtins in files[0].parent.glob("libnvrtc-builtins*.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(files[0]))


@few_cases
def test_a_gpu_without_tensor_cores_multiplies_as_ever(case: Case, old_nvrtc: Any) -> None:
    """No NVRTC knows sm_65, which so gets the PTX of the newest before it, sm_62."""
    with simulate(65, nvrtc=old_nvrtc) as machine:
        assert_multiplies(machine.kernels, case, 8)
        assert_dequantizes(machine.kernels, case)
        operands = make_input(case, 9), *make_operands(case)
        assert machine.kernels.multiply(*operands, case.bits) is None
    assert names(machine) == ["multiply_4x2", "dequantize_wide"]
    assert re.search(rb"\.target sm_62", machine.driver.images[0])


@pytest.mark.parametrize("architecture", [60, 70])
def test_both_modules_compile_for_gpus_without_tensor_cores(
    architecture: int, old_nvrtc: Any
) -> None:
    for name, source in SOURCES.items():
        options = Variant(4, architecture == 60, architecture == 70).list_options()
        code = compile_source(old_nvrtc, source, architecture, options)
        assert code.startswith(b"\x7fELF")
        assert (b"multiply_1x4" in code) == (name == "products")
        assert b"tensor_16" not in code
