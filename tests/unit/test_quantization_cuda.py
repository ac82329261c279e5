"""The CUDA kernels and their host code, run by a simulated driver: values, choices, failures.

The PTX is what the compiler makes of the shipped source, and the host code is the shipped one; see
tests/ptx for what stands in for the driver. None of it shows what a GPU's own compiler and hardware
do with the PTX: tests/gpu does, where there is one.
"""

import logging
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from chatglm_6b import quantization, quantization_cuda
from chatglm_6b.quantization import dequantize_weight, quantized_linear
from ptx.cases import (
    CASES,
    FEW_CASES,
    HALF,
    NEWER,
    ODD_CASES,
    SMALL_CASES,
    Case,
    assert_dequantizes,
    assert_multiplies,
    assert_product,
    make_input,
    make_operands,
    needs_nvcc,
    simulate,
)
from ptx.driver import NvccAsNvrtc
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

each_case = pytest.mark.parametrize("case", CASES, ids=str)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)


def unpack(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return dequantize_weight(weight, scale.double(), bits, torch.float64)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, quantization_cuda.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


# Values


@each_case
def test_matrices_are_unpacked_bit_for_bit(case: Case) -> None:
    with simulate() as machine:
        assert_dequantizes(machine.kernels, case)
    assert machine.driver.launches == [("dequantize_wide", (67, 2))]


@each_case
def test_products_of_one_row_and_of_several_are_exact(case: Case) -> None:
    with simulate() as machine:
        assert_multiplies(machine.kernels, case, 1)
        assert_multiplies(machine.kernels, case, 3)
    assert machine.driver.launches == [("multiply_1x4", (5, 1)), ("multiply_4x2", (9, 1))]


@few_cases
def test_products_of_every_other_kernel_are_exact(case: Case) -> None:
    with simulate(multiprocessors=2) as machine:
        assert_multiplies(machine.kernels, case, 1)
        assert_multiplies(machine.kernels, case, 2)
        assert_multiplies(machine.kernels, case, 8)
    assert machine.driver.launches == [
        ("multiply_1x2", (9, 1)),
        ("multiply_2x2", (9, 1)),
        ("multiply_4x2", (9, 2)),
    ]


@few_cases
def test_the_compilers_other_front_end_writes_the_same_kernels(case: Case) -> None:
    with simulate(NEWER) as machine:
        assert_multiplies(machine.kernels, case, 1)
        assert_multiplies(machine.kernels, case, 5)
        assert_dequantizes(machine.kernels, case)
    target = re.search(rb"\.target sm_(\d+)", machine.driver.images[0])
    assert target is not None and int(target[1]) >= 100


@pytest.mark.parametrize("case", [*SMALL_CASES, *ODD_CASES], ids=str)
def test_any_shape_is_computed(case: Case) -> None:
    with simulate() as machine:
        assert_dequantizes(machine.kernels, case)
        assert_multiplies(machine.kernels, case, 1)
        assert_multiplies(machine.kernels, case, 8)
    is_wide = case.shape[1] * case.bits // 8 % 16 == 0
    assert {name for name, _ in machine.driver.launches} == {
        "dequantize_wide" if case.shape[1] % 8 == 0 else "dequantize_any",
        *({"multiply_1x2", "multiply_4x2"} if is_wide else {"multiply_any"}),
    }


@few_cases
def test_operands_may_begin_anywhere(case: Case) -> None:
    weight, scale = make_operands(case)
    input = make_input(case, 2)
    with simulate() as machine:
        for shift_input, shift_weight in ((1, 0), (0, 1)):
            moved = [
                torch.cat([tensor.new_zeros(shift), tensor.flatten()])[shift:].view_as(tensor)
                for tensor, shift in ((input, shift_input), (weight, shift_weight))
            ]
            output = machine.kernels.multiply(*moved, scale.clone(), case.bits)
            assert_product(output, input, unpack(weight, scale, case.bits))
        matrix = machine.kernels.dequantize(moved[1], scale.clone(), case.bits, case.dtype)
        assert matrix is not None
        assert torch.equal(matrix, dequantize_weight(weight, scale, case.bits, case.dtype))
    assert [name for name, _ in machine.driver.launches] == [
        "multiply_any",
        "multiply_any",
        "dequantize_any",
    ]


def test_strides_and_leading_dimensions_do_not_matter() -> None:
    case = FEW_CASES[1]
    weight, scale = make_operands(case)
    input = make_input(case, 2, 3)
    with simulate() as machine:
        operands = [tensor.mT.contiguous().mT for tensor in (input, weight, scale.clone())]
        assert not any(tensor.is_contiguous() for tensor in operands)
        output = machine.kernels.multiply(operands[0], operands[1], operands[2], case.bits)
        matrix = machine.kernels.dequantize(operands[1], operands[2], case.bits, case.dtype)
    assert_product(output, input, unpack(weight, scale, case.bits))
    assert matrix is not None
    assert torch.equal(matrix, dequantize_weight(weight, scale, case.bits, case.dtype))


@few_cases
def test_nan_and_infinity_reach_their_rows_only(case: Case) -> None:
    with simulate() as machine:
        weight, scale = make_operands(case)
        input = make_input(case, 4)
        input[1, 5], input[2, 7] = torch.nan, torch.inf
        output = machine.kernels.multiply(input, weight, scale, case.bits)
    assert output is not None
    assert output[[0, 3]].isfinite().all()
    assert output[1].isnan().all()
    assert not output[2].isfinite().all(0).any()


def test_results_do_not_change_from_run_to_run() -> None:
    with simulate() as machine:
        operands = make_input(HALF, 1), *make_operands(HALF)
        first, second = (machine.kernels.multiply(*operands, 4) for _ in range(2))
    assert first is not None and second is not None
    assert torch.equal(first, second)


@few_cases
def test_a_layer_and_its_gradient_come_from_the_kernels(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulate() as machine:
        monkeypatch.setitem(quantization.KERNEL_FINDERS, "cpu", lambda device: machine.kernels)
        weight, scale = make_operands(case)
        bias = torch.randn(case.shape[0]).to(case.dtype)
        for rows, kernels in ((3, ["multiply_4x2"]), (65, ["dequantize_wide"])):
            machine.driver.launches.clear()
            input = make_input(case, rows).requires_grad_()
            output = quantized_linear(input, weight, scale, case.bits, bias)
            output.backward(torch.ones_like(output))
            names = [name for name, _ in machine.driver.launches]
            assert names == [*kernels, "dequantize_wide"]
            matrix = unpack(weight, scale, case.bits)
            tolerance = {"rtol": 0, "atol": matrix.abs().max().item() * 0.5}
            torch.testing.assert_close(
                output.double(), input.double() @ matrix.T + bias.double(), **tolerance
            )
            assert input.grad is not None
            gradient = matrix.sum(0).expand_as(input)
            torch.testing.assert_close(input.grad.double(), gradient, **tolerance)


# Graphs


class Product(nn.Module):
    """A product with a packed weight, as a module."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Return `input @ W.T`."""
        return quantized_linear(input, weight, scale, self.bits)


class InMemory(NamedTuple):
    """A machine's kernels, called from inside of an operation, where torch tells no mode."""

    machine: Any

    def multiply(self, *arguments: Any) -> Tensor | None:
        """Multiply."""
        with self.machine.memory:
            return self.machine.kernels.multiply(*arguments)

    def dequantize(self, *arguments: Any) -> Tensor | None:
        """Dequantize."""
        with self.machine.memory:
            return self.machine.kernels.dequantize(*arguments)


def use_kernels(monkeypatch: pytest.MonkeyPatch, device_type: str, kernels: Any) -> None:
    """Have kernels found in every copy of the files: the first one owns the operation."""
    for name, module in list(sys.modules.items()):
        if name.endswith(".quantization") and hasattr(module, "KERNEL_FINDERS"):
            monkeypatch.setitem(module.KERNEL_FINDERS, device_type, lambda device: kernels)


@few_cases
def test_an_exported_product_comes_from_the_kernels(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, "cpu", object())  # what a graph holds is asked of no kernel
    arguments = (make_input(case, 3), *make_operands(case))
    shapes = ({0: Dim.DYNAMIC}, None, None)
    program = torch.export.export(Product(case.bits), arguments, dynamic_shapes=shapes).module()
    with simulate() as machine:
        use_kernels(monkeypatch, "cpu", InMemory(machine))
        weight, scale = make_operands(case)
        for rows, name in ((1, "multiply_1x4"), (3, "multiply_4x2"), (65, "dequantize_wide")):
            input = make_input(case, rows)
            output = program(input, weight, scale)
            assert machine.driver.launches.pop()[0] == name and not machine.driver.launches
            if rows <= 8:
                assert_product(output, input, unpack(weight, scale, case.bits))
            else:
                assert torch.equal(output, quantized_linear(input, weight, scale, case.bits))
                machine.driver.launches.clear()


def make_fakes(case: Case) -> tuple[Any, ...]:
    """Return operands that torch takes for a GPU's, as compilers do where there is none."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        operands = (make_input(case, 3), *make_operands(case))
        return tuple(torch.empty_like(operand, device="cuda") for operand in operands)


@pytest.mark.parametrize("strict", [False, True])
@few_cases
def test_a_graph_for_a_gpu_holds_the_operation(
    case: Case, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, "cuda", object())
    arguments = make_fakes(case)
    with arguments[0].fake_mode:
        own = torch.ops.chatglm.packed_linear(*arguments, case.bits, "int8")
    shapes = ({0: Dim.DYNAMIC}, None, None)
    program = torch.export.export(
        Product(case.bits), arguments, dynamic_shapes=shapes, strict=strict
    )
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert node.target is torch.ops.chatglm.packed_linear.default
    for result in (own, node.meta["val"]):
        assert (result.device.type, result.dtype) == ("cuda", case.dtype)
        assert result.shape[1] == case.shape[0] and result.is_contiguous()


@few_cases
def test_a_product_launches_and_does_nothing_else_once_it_has_run(case: Case) -> None:
    """A stream that is being captured into a CUDA graph allows that, and not to load a module."""
    with simulate() as machine:
        weight, scale = make_operands(case)
        input = make_input(case, 1)
        for _ in range(2):
            machine.driver.calls.clear()
            machine.kernels.multiply(input, weight, scale, case.bits)
            machine.kernels.dequantize(weight, scale, case.bits, case.dtype)
    launch = ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert machine.driver.calls == launch * 2


def test_what_has_run_once_is_captured_and_what_has_not_is_left_to_torch(
    messages: Callable[[], list[str]],
) -> None:
    """All kernels of a module are loaded together, so that other numbers of rows have run too."""
    with simulate() as machine:
        operands = make_operands(HALF)
        assert_multiplies(machine.kernels, HALF, 1)
        machine.driver.is_capturing = True
        for rows in (2, 5):
            assert_multiplies(machine.kernels, HALF, rows)
        assert_dequantizes(machine.kernels, HALF)
        for _ in range(2):
            assert machine.kernels.multiply(make_input(HALF, 9), *operands, 4) is None
        assert machine.driver.calls.count("cuModuleLoadData") == 1
        machine.driver.is_capturing = False
        assert_multiplies(machine.kernels, HALF, 9)
        machine.driver.is_capturing = True
        assert_multiplies(machine.kernels, HALF, 12)
    (line,) = messages()
    assert line == (
        "A CUDA graph on cuda:0 is captured before the kernel tensor_16 has ever run, and holds "
        "torch's operations in its place, which are slower. Run the model with as many rows once "
        "before the capture."
    )


@few_cases
def test_torch_finds_no_fault_with_the_operation(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulate() as machine:
        use_kernels(monkeypatch, "cpu", InMemory(machine))
        for rows in (3, 9, 65):
            arguments = (make_input(case, rows), *make_operands(case), case.bits, "exact")
            torch.library.opcheck(
                torch.ops.chatglm.packed_linear.default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("rows", [1, 8, 12])
def test_a_captured_step_launches_each_layers_kernel_in_order_and_asks_for_no_more(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches that a CUDA graph of a model's step would record, after one step before it."""
    shapes = ((96, 64), (64, 64), (128, 64), (64, 128))  # as the four matrices of a block
    with simulate() as machine:
        monkeypatch.setitem(quantization.KERNEL_FINDERS, "cpu", lambda device: machine.kernels)
        layers = [HALF._replace(shape=shape) for shape in shapes] * 2
        operands = [make_operands(layer) for layer in layers]
        inputs = [make_input(layer, rows) for layer in layers]

        def step() -> list[Tensor]:
            products = zip(inputs, operands)
            return [quantized_linear(input, *operand, 4) for input, operand in products]

        first = step()
        machine.driver.calls.clear()
        machine.driver.launches.clear()
        machine.driver.is_capturing = True
        again = step()
    assert all(map(torch.equal, first, again))
    launch = ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert machine.driver.calls == launch * len(layers)
    name = {1: "multiply_1x", 8: "multiply_4x2", 12: "tensor_16"}[rows]
    assert all(kernel.startswith(name) for kernel, _ in machine.driver.launches)
    features = {1: 16, 8: 8, 12: 16}[rows]  # of a block
    grids = [grid[0] for _, grid in machine.driver.launches]
    assert grids == [-(-layer.shape[0] // features) for layer in layers]


# Choices


def count_calls(machine: Any) -> tuple[int, int, int]:
    calls = machine.driver.calls
    names = ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")
    return tuple(calls.count(name) for name in names)  # pyright: ignore[reportReturnType]


@needs_nvcc
def test_a_module_is_compiled_and_loaded_once() -> None:
    with simulate() as machine:
        assert machine.nvrtc.compiled == []
        for _ in range(3):
            assert_dequantizes(machine.kernels, SMALL_CASES[0])
            assert_multiplies(machine.kernels, SMALL_CASES[0], 1)
        assert count_calls(machine) == (1, 7, 6)
        assert_dequantizes(machine.kernels, ODD_CASES[0])
    assert count_calls(machine) == (2, 14, 7)
    assert [options[1:] for options in machine.nvrtc.compiled] == [
        ("-DBITS=4", "-DBFLOAT16=0", "-DGROUPED=0"),
        ("-DBITS=8", "-DBFLOAT16=0", "-DGROUPED=0"),
    ]
    assert machine.nvrtc.destroyed == 2


def test_kernels_run_in_the_context_of_their_own_device() -> None:
    with simulate(device=3) as machine:
        assert_multiplies(machine.kernels, SMALL_CASES[0], 1)
    assert machine.driver.calls[:2] == ["cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert machine.driver.calls.count("cuCtxPushCurrent_v2") == 1


@needs_nvcc
@pytest.mark.parametrize(
    ("capability", "known", "option", "magic"),
    [
        (86, [75, 80, 86, 90], "--gpu-architecture=sm_86", b"\x7fELF"),
        (89, [75, 80, 86, 90], "--gpu-architecture=compute_86", b"//"),
        (120, [75, 80, 86, 90], "--gpu-architecture=compute_90", b"//"),
    ],
)
def test_a_device_gets_machine_code_or_else_ptx_before_it(
    capability: int, known: list[int], option: str, magic: bytes
) -> None:
    nvcc = NvccAsNvrtc(known)
    with simulate(capability, nvrtc=nvcc) as machine:
        machine.kernels.dequantize(*make_operands(SMALL_CASES[0]), 4, torch.float16)
    assert nvcc.compiled[0][0] == option
    assert machine.driver.images[0].lstrip().startswith(magic)


def test_the_sources_of_all_variants_differ() -> None:
    with simulate() as machine:
        for case in CASES:
            machine.kernels.dequantize(*make_operands(case), case.bits, case.dtype)
    assert len(set(machine.driver.images)) == 8


@pytest.mark.parametrize("rows", [0, 65, 300])
def test_other_numbers_of_rows_are_declined(rows: int) -> None:
    with simulate() as machine:
        weight, scale = make_operands(HALF)
        assert machine.kernels.multiply(make_input(HALF, rows), weight, scale, 4) is None
    assert machine.driver.launches == []


def declined_operands() -> dict[str, tuple[Tensor, Tensor, Tensor, int]]:
    """Return operands of `multiply` that it leaves to torch, by what is uncommon about them."""
    weight, scale = make_operands(HALF)
    grouped = make_operands(HALF._replace(group=32))[1]
    input = make_input(HALF, 1)
    return {
        "float32": (input.float(), weight, scale, 4),
        "float32 scales": (input, weight, scale.float(), 4),
        "bfloat16 and half scales": (input.bfloat16(), weight, scale, 4),
        "bfloat16 scales": (input.bfloat16(), weight, scale.bfloat16(), 4),
        "16 columns a group": (input, weight, torch.cat([grouped, grouped], 1), 4),
        "no matrix of scales": (input, weight, grouped[None], 4),
        "scales of other rows": (input, weight, scale[1:], 4),
        "groups of other columns": (input, weight, grouped[:, 1:], 4),
        "2 bits": (input, weight, scale, 2),
        "uint8": (input, weight.view(torch.uint8), scale, 4),
        "a vector": (input, weight[0], scale, 4),
        "no rows": (input, weight[:0], scale[:0], 4),
        "input of other columns": (input[:, 1:], weight, scale, 4),
        "another device": (input.to("meta"), weight, scale, 4),
        "scales of another device": (input, weight, scale.to("meta"), 4),
    }


@pytest.mark.parametrize("name", declined_operands())
def test_what_the_kernels_do_not_compute_is_declined(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with simulate() as machine:
        input, weight, scale, bits = declined_operands()[name]
        assert machine.kernels.multiply(input, weight, scale, bits) is None
        if not name.endswith(("of other columns", "another device")) or "scales" in name:
            assert machine.kernels.dequantize(weight, scale, bits, input.dtype) is None
    assert machine.driver.launches == []
    has_other_dtypes = name.startswith(("float32", "bfloat16"))
    assert len(caplog.records) == has_other_dtypes  # a model's own, which its user can change
