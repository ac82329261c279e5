"""What fails in the CUDA kernels turns off itself and no more, and says so in one line."""

import ctypes
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chatglm_6b import quantization, quantization_cuda
from chatglm_6b.quantization import dequantize_weight, quantized_linear
from chatglm_6b.quantization_cuda import CudaKernels, find_kernels
from chatglm_6b.quantization_cuda_source import SOURCES
from ptx.cases import (
    HALF,
    SMALL_CASES,
    assert_dequantizes,
    assert_multiplies,
    make_input,
    make_operands,
    needs_nvcc,
    simulate,
)
from ptx.driver import INVALID_VALUE, STREAM, DeviceMemory, NvccAsNvrtc, SimulatedDriver

WRONG_SOURCE = "__global__ void error() { wrong(); }"


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, quantization_cuda.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


def assert_falls_back(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that layers answer as plain torch does, and that nothing is tried twice."""
    monkeypatch.setitem(quantization.KERNEL_FINDERS, "cpu", lambda device: machine.kernels)
    case = SMALL_CASES[0]
    weight, scale = make_operands(case)
    matrix = dequantize_weight(weight, scale, case.bits, case.dtype)
    calls = []
    for _ in range(2):
        for rows in (1, 9):
            input = make_input(case, rows)
            expected = torch.nn.functional.linear(input, matrix)
            assert torch.equal(quantized_linear(input, weight, scale, case.bits), expected)
        calls.append(len(machine.driver.calls))
    assert calls[0] == calls[1]
    assert machine.kernels.dequantize(weight, scale, case.bits, case.dtype) is None
    assert len(machine.driver.calls) == calls[1]


def say_off(*names: str) -> list[str]:
    """Return the lines of the log that tell of kernels, but for their reasons."""
    tail = "on cuda:0 (4 bits, float16) is off, and torch computes in its place: "
    return [f"The {name} {tail}" for name in names]


# In the order in which one row and nine ask for them.
MODULES_OFF = say_off("kernels of the module products", "kernels of the module tensor")
KERNELS_OFF = say_off("kernel multiply_1x2", "kernel dequantize_wide", "kernel tensor_16")
ALL_OFF = ["Quantized layers on cuda:0 compute in plain torch, which is slower: "]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("cuCtxPushCurrent_v2", ALL_OFF),
        ("cuModuleLoadData", MODULES_OFF),
        ("cuLaunchKernel", KERNELS_OFF),
    ],
)
def test_a_failing_driver_leaves_the_layer_to_torch(
    name: str,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[str]],
) -> None:
    with simulate() as machine:
        machine.driver.failures[name] = INVALID_VALUE
        assert_falls_back(machine, monkeypatch)
    assert messages() == [f"{line}{name} failed: CUDA_ERROR_INVALID_VALUE (1)." for line in lines]


def test_a_kernel_that_the_module_lacks_is_the_only_one_off(
    messages: Callable[[], list[str]],
) -> None:
    source = SOURCES["products"].replace("multiply_4x2", "multiply_other")
    with simulate(sources=SOURCES | {"products": source}) as machine:
        operands = make_input(HALF, 5), *make_operands(HALF)
        for _ in range(2):
            assert machine.kernels.multiply(*operands, 4) is None
            assert_multiplies(machine.kernels, HALF, 1)
        assert machine.driver.calls.count("cuModuleLoadData") == 1
    (line,) = say_off("kernel multiply_4x2")
    assert messages() == [f"{line}the module does not have it."]


@pytest.mark.parametrize("failing", ["multiply_1x4", "multiply_4x2", "tensor_16", "tensor_64"])
def test_one_failing_kernel_turns_off_no_other_one(
    failing: str, messages: Callable[[], list[str]]
) -> None:
    rows = {"multiply_1x4": 1, "multiply_4x2": 5, "tensor_16": 9, "tensor_64": 40}
    with simulate() as machine:
        weight, scale = make_operands(HALF)
        machine.driver.failing_kernels.add(failing)
        for _ in range(2):
            for name, count in rows.items():
                product = machine.kernels.multiply(make_input(HALF, count), weight, scale, 4)
                assert (product is None) == (name == failing)
            assert_dequantizes(machine.kernels, HALF)
        # Another variant of the same kernel has not failed.
        machine.driver.failing_kernels.clear()
        assert_multiplies(machine.kernels, HALF._replace(bits=8), rows[failing])
    assert machine.driver.calls.count("cuLaunchKernel") == 2 * 4 + 1 + 1
    (line,) = say_off(f"kernel {failing}")
    assert messages() == [f"{line}cuLaunchKernel failed: CUDA_ERROR_LAUNCH_FAILED (719)."]


def test_a_module_that_fails_turns_off_no_other_one(messages: Callable[[], list[str]]) -> None:
    with simulate(sources=SOURCES | {"tensor": WRONG_SOURCE}) as machine:
        operands = make_input(HALF, 9), *make_operands(HALF)
        for _ in range(2):
            assert machine.kernels.multiply(*operands, 4) is None
            assert_multiplies(machine.kernels, HALF, 1)
            assert_dequantizes(machine.kernels, HALF)
    (line,) = messages()
    assert line.startswith(say_off("kernels of the module tensor")[0])
    assert "wrong" in line


def test_a_failure_on_one_device_leaves_the_others(messages: Callable[[], list[str]]) -> None:
    for device, fails in ((0, True), (1, False)):
        with simulate(device=device) as machine:
            if fails:
                machine.driver.failures["cuLaunchKernel"] = INVALID_VALUE
            product = machine.kernels.multiply(make_input(HALF, 1), *make_operands(HALF), 4)
            assert (product is None) == fails
    assert len(messages()) == 1


@needs_nvcc
@pytest.mark.parametrize(
    ("options", "reason", "lines"),
    [
        ({"sources": dict.fromkeys(SOURCES, WRONG_SOURCE)}, "is undefined", 2),
        (
            {"capability": 60, "nvrtc": NvccAsNvrtc([75, 80])},
            "from sm_75 on, and this GPU is sm_60",
            2,
        ),
        ({"sources": dict.fromkeys(SOURCES, "")}, "the module does not have it", 3),
        ({"capability": 86}, "cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE", 2),
    ],
    ids=["compile error", "old GPU", "no kernel", "image that the driver refuses"],
)
def test_a_failing_compiler_leaves_the_layer_to_torch(
    options: Any,
    reason: str,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[str]],
) -> None:
    with simulate(**options) as machine:
        assert_falls_back(machine, monkeypatch)
    assert len(messages()) == lines
    assert all(reason in message for message in messages())
    assert machine.nvrtc.destroyed == len(machine.nvrtc.compiled)


def test_a_launch_that_fails_later_leaves_the_layer_to_torch(
    monkeypatch: pytest.MonkeyPatch, messages: Callable[[], list[str]]
) -> None:
    with simulate() as machine:
        assert_multiplies(machine.kernels, SMALL_CASES[0], 1)
        machine.driver.failures["cuLaunchKernel"] = 700
        assert_falls_back(machine, monkeypatch)
    assert messages() == [f"{line}cuLaunchKernel failed: unknown (700)." for line in KERNELS_OFF]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let torch report a GPU, with libraries that can be named by path or by name."""
    monkeypatch.setattr(quantization_cuda, "_found", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = types.SimpleNamespace(major=7, minor=6, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    stream = types.SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    libraries: dict[str, Any] = {}

    def open_library(name: str, mode: int = 0) -> Any:
        for part, library in libraries.items():
            if part in name:
                return library
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    return libraries


@needs_nvcc
def test_kernels_of_a_device_are_found_once(gpu: dict[str, Any]) -> None:
    memory = DeviceMemory()
    gpu |= {"cuda.": SimulatedDriver(memory, device=1), "nvrtc": NvccAsNvrtc()}
    kernels = find_kernels(torch.device("cuda", 1))
    assert isinstance(kernels, CudaKernels)
    assert find_kernels(torch.device("cuda", 1)) is kernels
    assert find_kernels(torch.device("cuda")) is kernels  # the current device
    with memory:
        assert_multiplies(kernels, SMALL_CASES[0], 1)
    assert gpu["cuda."].error is None


def test_other_devices_have_no_kernels(messages: Callable[[], list[str]]) -> None:
    assert find_kernels(torch.device("cpu")) is None
    assert find_kernels(torch.device("meta")) is None
    assert messages() == []


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("nvrtc", "there is no NVRTC of CUDA 13.0 that can be loaded"),
        ("driver", "libcuda.so.1: cannot open shared object file"),
        ("context", "cuDevicePrimaryCtxRetain failed: CUDA_ERROR_INVALID_VALUE (1)"),
        ("rocm", "this torch is built for ROCm, and the kernels for CUDA"),
        ("gpu", "torch finds no GPU"),
    ],
)
def test_what_a_machine_lacks_is_said_once(
    missing: str,
    reason: str,
    gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[str]],
) -> None:
    driver = SimulatedDriver(DeviceMemory())
    gpu |= {"cuda.": driver, "nvrtc": NvccAsNvrtc([75])}
    if missing == "context":
        driver.failures["cuDevicePrimaryCtxRetain"] = INVALID_VALUE
    elif missing == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    elif missing == "gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        del gpu["nvrtc" if missing == "nvrtc" else "cuda."]
    for _ in range(3):
        assert find_kernels(torch.device("cuda", 0)) is None
    assert messages() == [
        f"Quantized layers on cuda:0 compute in plain torch, which is slower: {reason}."
    ]
