"""The CPU kernels for products, on every kind of processor that this one can play, against float64.

Inputs that 8 bits hold are multiplied exactly, which tells every weight and every column; others
stay within what rounding them may cost.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from chatglm_6b.configuration_chatglm import ACTIVATIONS
from chatglm_6b.quantization import (
    QuantizedLinear,
    TorchKernels,
    dequantize_weight,
    freeze,
    quantized_linear,
)
from conftest import ROOT, forget_kernels
from torch import Tensor, nn

from chatglm.cpu import (
    attention,
    fast_products,
    float_linear,
    float_products,
    linear,
    packed_products,
    packed_tiles,
    products,
    rounding,
)
from chatglm.cpu import compiler as compiling
from chatglm.cpu import runtime as running
from chatglm.cpu.compiler import Compiler
from chatglm.cpu.writer import KernelWriter, Processor

pytest.importorskip("llvmlite")

LANES = {dot: lanes for dot, _, lanes in compiling.DOTS}
HOST = Compiler().processor
CPU = torch.device("cpu")
HALF, SINGLE = torch.float16, torch.float32


class Case(NamedTuple):
    """A product: how the weights are stored, and its sizes."""

    bits: int
    group_size: int | None
    scale_dtype: torch.dtype
    tokens: int
    columns: int
    rows: int

    def __str__(self) -> str:
        scales = f"{self.group_size or 'rows'}-{str(self.scale_dtype).removeprefix('torch.')}"
        return f"{self.bits}-{scales}-{self.tokens}x{self.columns}x{self.rows}"


# Every pair of bits or scale dtype with a size of groups, and every way that tiles can end. The
# processors that this one only plays get those with a star.
FEW_TOKENS = {
    Case(4, None, HALF, 1, 1002, 33): "*",
    Case(8, None, SINGLE, 1, 517, 7): "",
    Case(4, 32, HALF, 7, 96, 41): "",
    Case(8, 32, SINGLE, 3, 160, 5): "*",
    Case(4, 64, SINGLE, 2, 192, 9): "*",
    Case(8, 64, HALF, 1, 320, 6): "",
    Case(4, 128, HALF, 1, 384, 6): "",
    Case(8, 128, SINGLE, 5, 128, 3): "",
    Case(4, None, SINGLE, 4, 2, 1): "",
    Case(8, None, HALF, 2, 31, 4): "*",
}
INT8_CASES = FEW_TOKENS | {
    Case(4, None, HALF, 1, 16384, 5): "",  # several such rows are multiplied at once
    Case(8, 64, HALF, 33, 320, 6): "",
    Case(4, None, HALF, 8, 514, 70): "*",
    Case(8, None, SINGLE, 33, 1003, 33): "",
    Case(4, None, SINGLE, 9, 2, 1): "",
    Case(8, None, HALF, 9, 1536, 65): "",
}


@functools.cache
def find_tools(dot: str) -> tuple[Compiler, Any]:
    """Return a compiler for one way of multiplying bytes, and the memory of its kernels."""
    processor = HOST._replace(dot=dot, lanes=LANES[dot])
    if dot == "avx2":
        processor = processor._replace(name="haswell", features="")  # no AVX-512 anywhere
    if dot == "generic" and HOST.dot != "neon":
        processor = processor._replace(name="x86-64", features="")
    return Compiler(processor), functools.cache(compiling.find_kernel.__wrapped__)


def can_run(dot: str) -> bool:
    found = Compiler().binding.get_host_cpu_features()
    if dot == "avx-vnni" and found.get("avx512vnni"):
        return True  # the same instruction under another encoding
    (needed,) = [needed for name, needed, _ in compiling.DOTS if name == dot]
    return all(found.get(feature) for feature in needed)


def on_each_processor(cases: dict[Case, str]) -> Any:
    """Pair cases with this processor and with those that it can play."""
    pairs = []
    for dot in LANES:
        if can_run(dot):
            picked = [case for case, mark in cases.items() if mark or dot == HOST.dot]
            pairs += [pytest.param(dot, case, id=f"{dot}-{case}") for case in picked]
        else:
            skipped = pytest.mark.skip(reason=f"this CPU cannot run {dot}")
            pairs.append(pytest.param(dot, next(iter(cases)), id=dot, marks=skipped))
    return pytest.mark.parametrize(("dot", "case"), pairs)


@pytest.fixture
def played(dot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be those of a processor with this way of multiplying bytes."""
    compiler, find_kernel = find_tools(dot)
    forget_kernels(monkeypatch)
    for module in (compiling, linear, float_linear):
        monkeypatch.setattr(module, "find_compiler", lambda: compiler)
        monkeypatch.setattr(module, "find_kernel", find_kernel)


def multiply(
    states: Tensor, weight: Tensor, scale: Tensor, bits: int, activations: str = "int8"
) -> Tensor:
    """Multiply by a kernel of ours, and no other way."""
    kernels = linear.find_kernels()
    assert isinstance(kernels, linear.CpuKernels)
    product = kernels.multiply(states, weight, scale, bits, activations)
    assert product is not None
    return product


def make_weights(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return stored weights, scales (zeros and denormals among them) and the matrix in float64."""
    torch.manual_seed(sum(case[3:]))
    weight = torch.randint(-128, 128, (case.rows, case.columns * case.bits // 8), dtype=torch.int8)
    groups = () if case.group_size is None else (case.columns // case.group_size,)
    scale = torch.rand(case.rows, *groups).to(case.scale_dtype)
    smallest = 2.0**-24 if case.scale_dtype == HALF else 1e-41
    scale.view(-1)[1::7] = 0
    scale.view(-1)[2::7] = smallest
    return weight, scale, dequantize_weight(weight, scale, case.bits, torch.float64)


def make_levels(case: Case) -> Tensor:
    """Return inputs that 8 bits hold: integers times a power of two, a 127 in every span."""
    levels = torch.randint(-127, 128, (case.tokens, case.columns)).float()
    levels[:, :: rounding.HALF] = (
        127.0 * torch.randint(0, 2, levels[:, :: rounding.HALF].shape).sub(0.5) * 2
    )
    powers = torch.randint(-6, 7, levels[:, :: rounding.HALF].shape).float().exp2()
    return levels * powers.repeat_interleave(rounding.HALF, dim=1)[:, : case.columns]


def rounding_error(states: Tensor, matrix: Tensor, span: int) -> Tensor:
    """Return how far each product may be off: half a step of every span times its weights."""
    padding = -states.shape[1] % span
    spans = nn.functional.pad(states.double(), (0, padding)).unflatten(1, (-1, span))
    weights = nn.functional.pad(matrix.abs(), (0, padding)).unflatten(1, (-1, span)).sum(-1)
    steps = spans.abs().amax(-1) / 127
    return (steps / 2) @ weights.T


def assert_near(output: Tensor, states: Tensor, matrix: Tensor, tolerance: float = 2e-6) -> None:
    """Compare with the true product, relative to the norms of a row and a column."""
    norms = states.double().norm(dim=1, keepdim=True) * matrix.norm(dim=1)
    assert output.dtype == SINGLE and output.shape == norms.shape
    error = (output - states.double() @ matrix.T).abs()
    assert (error <= tolerance * norms + 1e-38).all(), (error / norms).max()


def place_before_a_wall(tensor: Tensor) -> Tensor:
    """Copy a tensor to where the first byte behind it cannot be read."""
    if sys.platform != "linux":
        return tensor
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    wall = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(wall, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


# What is computed


@on_each_processor(INT8_CASES)
@pytest.mark.usefixtures("played")
def test_inputs_that_8_bits_hold_are_multiplied_exactly(case: Case) -> None:
    weight, scale, matrix = make_weights(case)
    states = make_levels(case)
    places = map(place_before_a_wall, (states, weight, scale))
    assert_near(multiply(*places, case.bits), states, matrix)


@on_each_processor(INT8_CASES)
@pytest.mark.usefixtures("played")
def test_rounding_costs_what_it_may(case: Case) -> None:
    weight, scale, matrix = make_weights(case)
    states = torch.randn(case.tokens, case.columns) * torch.logspace(-3, 3, case.columns)
    error = (multiply(states, weight, scale, case.bits) - states.double() @ matrix.T).abs()
    summing = 1e-5 * (states.double().abs() @ matrix.abs().T)
    assert (error <= rounding_error(states, matrix, rounding.HALF) + summing + 1e-38).all()
    assert error.max() > 0 or not matrix.any()


@on_each_processor(FEW_TOKENS)
@pytest.mark.usefixtures("played")
def test_exact_products_are_exact(case: Case) -> None:
    weight, scale, matrix = make_weights(case)
    states = torch.randn(case.tokens, case.columns) * torch.logspace(-3, 3, case.columns)
    places = map(place_before_a_wall, (states, weight, scale))
    assert_near(multiply(*places, case.bits, "exact"), states, matrix)


@pytest.mark.parametrize(("tokens", "limit"), [(1, 7e-3), (33, 1e-2)])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_costs_less_than_a_hundredth_of_the_product(
    bits: int, tokens: int, limit: float
) -> None:
    case = Case(bits, None, HALF, tokens, 2048, 64)
    weight, _, _ = make_weights(case)
    scale = torch.full((64,), 0.01, dtype=HALF)
    states = torch.randn(tokens, 2048)
    expected = states @ dequantize_weight(weight, scale, bits, SINGLE).T
    error = multiply(states, weight, scale, bits) - expected
    assert 1e-3 < error.norm() / expected.norm() < limit


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_in_every_column(bits: int, activations: str) -> None:
    every_byte = torch.arange(-128, 128, dtype=torch.int8)
    weight = torch.stack([every_byte.roll(shift) for shift in range(0, 256, 37)])
    columns = 256 * 8 // bits
    scale = torch.ones(len(weight), dtype=HALF)
    output = [
        multiply(states, weight, scale, bits, activations) for states in torch.eye(columns).split(7)
    ]
    matrix = dequantize_weight(weight, scale, bits, SINGLE)
    torch.testing.assert_close(torch.cat(output).T, matrix, rtol=1e-6, atol=0)
    if activations == "int8":
        panels = multiply(torch.eye(columns), weight, scale, bits)
        torch.testing.assert_close(panels.T, matrix, rtol=1e-6, atol=0)


# Numbers at the edges

COLUMNS, ROWS = 96, 40
SHAPES = [(None, 3), (32, 3), (None, 9)]  # groups, tokens: each kind of kernel

each_kind = pytest.mark.parametrize(("group_size", "tokens"), SHAPES)
both_treatments = pytest.mark.parametrize("activations", ACTIVATIONS)


def make_operands(group_size: int | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, weights and scales of 4 bits, none of them special."""
    case = Case(4, group_size, HALF, tokens, COLUMNS, ROWS)
    weight, scale, _ = make_weights(case)
    return torch.randn(tokens, COLUMNS), weight, torch.rand_like(scale) + 0.5


def compute(states: Tensor, weight: Tensor, scale: Tensor, activations: str) -> Tensor:
    """Multiply as a layer does: what no kernel takes is torch's."""
    with torch.no_grad():
        return quantized_linear(states, weight, scale, 4, None, activations)


@both_treatments
@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(
    value: float, group_size: int | None, tokens: int, activations: str
) -> None:
    states, weight, scale = make_operands(group_size, tokens)
    before = compute(states, weight, scale, activations)
    broken = states.clone()
    broken[1, 70] = value
    after = compute(broken, weight, scale, activations)
    assert not after[1].isfinite().any()
    others = [row for row in range(tokens) if row != 1]
    assert torch.equal(after[others], before[others])


@both_treatments
@each_kind
def test_zeros_and_the_smallest_and_largest_numbers(
    group_size: int | None, tokens: int, activations: str
) -> None:
    ones, weight, scale = make_operands(group_size, tokens)
    matrix = dequantize_weight(weight, scale, 4, torch.float64)
    assert compute(torch.zeros_like(ones), weight, scale, activations).eq(0).all()
    for size in (1e-45, 1e-40, 1.1e-36, 0.9e-36, 1e-30, 1e36):
        states = ones.sign() * size
        output = compute(states, weight, scale, activations)
        bound = (
            rounding_error(states, matrix, rounding.HALF)
            + 1e-5 * states.double().norm() * matrix.norm()
        )
        bound += 1e-36 * matrix.abs().sum(1)  # smaller numbers may become zeros
        assert ((output - states.double() @ matrix.T).abs() <= bound).all(), size
        if activations == "int8" and size < rounding.SMALLEST:
            assert output.eq(0).all(), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("extra", [0, 1, 9])
def test_a_long_prompt_is_multiplied_part_by_part(extra: int, dtype: torch.dtype) -> None:
    size = products.PART_TOKENS
    few, weight, scale = make_operands(None, 64)
    states = few.repeat(2 * size // 64 + 1, 1)[: 2 * size + extra].to(dtype)
    states *= torch.linspace(0.5, 2, len(states), dtype=dtype).unsqueeze(1)
    whole = compute(states, weight, scale, "int8")
    parts = [compute(part, weight, scale, "int8") for part in states.split(size)]
    assert torch.equal(whole, torch.cat(parts))


def test_half_inputs_give_the_nearest_halves() -> None:
    for group_size, tokens in SHAPES:
        states, weight, scale = make_operands(group_size, tokens)
        for dtype in (torch.float16, torch.bfloat16):
            narrow = states.to(dtype)
            for activations in ACTIVATIONS:
                output = multiply(narrow, weight, scale, 4, activations)
                expected = multiply(narrow.float(), weight, scale, 4, activations)
                assert output.dtype == dtype
                assert torch.equal(output, expected.to(dtype))


# Memory


def misalign(tensor: Tensor) -> Tensor:
    """Copy a tensor to an odd address."""
    memory = bytearray(tensor.nbytes + 64)
    place = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    offset = 1 + place % 2
    assert (place + offset) % 2
    memory[offset : offset + tensor.nbytes] = bytes(tensor.contiguous().view(torch.uint8).numpy())
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape)


@both_treatments
@each_kind
def test_operands_may_stand_anywhere(group_size: int | None, tokens: int, activations: str) -> None:
    operands = make_operands(group_size, tokens)
    expected = multiply(*operands, 4, activations)
    assert torch.equal(multiply(*map(misalign, operands), 4, activations), expected)
    states, weight, scale = operands
    wide = torch.stack((states, states), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(multiply(wide, weight, scale, 4, activations), expected)
    turned = states.T.contiguous().T
    assert torch.equal(multiply(turned, weight, scale, 4, activations), expected)
    same = states[:1].expand(tokens, -1)
    output = multiply(same, weight, scale, 4, activations)
    assert torch.equal(output, output[:1].expand(tokens, -1))
    shaped = multiply(states.view(1, tokens, 1, COLUMNS), weight, scale, 4, activations)
    assert torch.equal(shaped, expected.view(1, tokens, 1, ROWS))


def test_what_kernels_cannot_read_is_torch_s() -> None:
    states, weight, scale = make_operands(None, 3)
    kernels = linear.find_kernels()
    turned = weight.T.contiguous().T
    for operands in (
        (states.double(), weight, scale),
        (states, weight, scale.double()),
        (states, weight, scale.bfloat16()),
        (states, turned, scale),
        (states.to("meta"), weight, scale),
        (nn.Parameter(states), weight, scale),
        (states[:0], weight, scale),
    ):
        assert kernels.multiply(*operands, 4, "int8") is None
        assert kernels.multiply(*operands, 4, "exact") is None
    matrix = dequantize_weight(weight, scale, 4, torch.float64)
    assert torch.equal(compute(states.double(), weight, scale, "int8"), states.double() @ matrix.T)
    assert torch.equal(compute(states, turned, scale, "int8"), states @ matrix.float().T)
    assert compute(states[:0], weight, scale, "int8").shape == (0, ROWS)
    assert compute(states.to("meta"), weight.to("meta"), scale.to("meta"), "int8").is_meta


def test_torch_s_defaults_do_not_matter() -> None:
    operands = make_operands(None, 3)
    many = make_operands(None, 9)
    expected = [multiply(*operands, 4), multiply(*operands, 4, "exact"), multiply(*many, 4)]
    plain = float_linear.multiply_plain(operands[0][:1], operands[0])
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            actual = [multiply(*operands, 4), multiply(*operands, 4, "exact"), multiply(*many, 4)]
            plain_too = float_linear.multiply_plain(operands[0][:1], operands[0])
    finally:
        torch.set_default_dtype(SINGLE)
    assert all(map(torch.equal, actual, expected))
    assert torch.equal(plain_too, plain)


# The same bits


def digest() -> str:
    """Hash the products of every kind of kernel, each large enough for eight threads."""
    torch.manual_seed(0)
    hashed = hashlib.sha256()
    for bits, group_size, tokens, activations in (
        (4, 64, 3, "int8"),
        (8, None, 1, "int8"),
        (4, None, 9, "int8"),
        (4, None, 2, "exact"),
    ):
        case = Case(bits, group_size, HALF, tokens, 320, 4100)
        weight, scale, _ = make_weights(case)
        output = multiply(torch.randn(tokens, 320), weight, scale, bits, activations)
        hashed.update(output.numpy().tobytes())
    plain = float_linear.multiply_plain(torch.randn(1, 320), torch.randn(4100, 320))
    assert plain is not None
    hashed.update(plain.numpy().tobytes())
    return hashed.hexdigest()


def test_threads_runs_and_processes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: set[int] = set()
    run = running.run_on_threads

    def note(address: int, argument: int, threads: int) -> None:
        woken.add(threads)
        run(address, argument, threads)

    monkeypatch.setattr(running, "run_on_threads", note)
    before = torch.get_num_threads()
    try:
        digests = []
        for threads in (1, 1, 2, 3, 4, 5, 6, 7, 8):
            torch.set_num_threads(threads)
            digests.append(digest())
    finally:
        torch.set_num_threads(before)
    assert woken >= set(range(1, 9))
    folders = [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "cpu")]
    script = (
        f"import sys; sys.path[:0] = {folders}; import conftest, test_linear as tests; "
        "print(tests.digest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {*digests, other.stdout.strip()} == {digests[0]}


COMPANIES = {
    Case(4, None, HALF, 40, 1002, 50): "*",
    Case(8, None, SINGLE, 40, 517, 33): "*",
    Case(4, 32, HALF, 40, 288, 41): "*",
    Case(8, 64, SINGLE, 24, 320, 19): "",
    Case(4, 96, SINGLE, 24, 288, 17): "",
    Case(8, 128, HALF, 24, 384, 40): "",
    Case(4, 256, HALF, 24, 768, 7): "*",
}


@on_each_processor(COMPANIES)
@pytest.mark.usefixtures("played")
def test_a_token_does_not_know_its_company(case: Case) -> None:
    weight, scale, _ = make_weights(case)
    states = torch.randn(case.tokens, case.columns) * torch.logspace(-2, 2, case.columns)
    alone = torch.cat([multiply(token, weight, scale, case.bits) for token in states.split(1)])
    generator = torch.Generator().manual_seed(case.columns)
    for count in (2, 3, 5, 8, 9, 15, 17, case.tokens):
        picked = torch.randperm(case.tokens, generator=generator)[:count]
        assert torch.equal(multiply(states[picked], weight, scale, case.bits), alone[picked]), count


@pytest.mark.parametrize("tokens", [9, 16, 33, 64])
@pytest.mark.parametrize("case", [case for case in COMPANIES if case.group_size not in (32, 96)])
def test_tiles_change_no_bit(case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed_tiles.has_tiles(HOST):
        pytest.skip("this CPU has no tiles, or the system keeps them")
    weight, scale, _ = make_weights(case)
    states = torch.randn(tokens, case.columns)
    tiled = multiply(states, weight, scale, case.bits)
    forget_kernels(monkeypatch)
    monkeypatch.setattr(linear, "has_tiles", lambda processor: False)
    assert torch.equal(multiply(states, weight, scale, case.bits), tiled)


# Layers


def make_layer(bits: int, group_size: int | None = None) -> QuantizedLinear:
    torch.manual_seed(1)
    return QuantizedLinear.from_linear(nn.Linear(COLUMNS, ROWS), bits, group_size=group_size)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_leave_the_official_weights_as_they_are(bits: int, group_size: int | None) -> None:
    layer = make_layer(bits, group_size)
    place = layer.weight.data_ptr()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for tokens in (1, 2, 7, 9):
        for layer.activations in ACTIVATIONS:
            layer(torch.randn(tokens, COLUMNS))
    after = layer.state_dict()
    assert list(after) == list(before) == ["weight", "weight_scale", "bias"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert layer.weight.data_ptr() == place


def test_new_weights_are_used_at_once() -> None:
    """Nothing of a weight may be remembered: it can be loaded, moved or freed."""
    states = torch.randn(1, COLUMNS)
    layer, other = make_layer(4), make_layer(4)
    layer(states)
    other.weight.data.neg_()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(states), other(states))
    layer.weight = freeze(make_layer(4).weight.clone())
    assert torch.equal(layer(states), make_layer(4)(states))


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_differentiated_is_the_exact_product(bits: int, tokens: int) -> None:
    layer = make_layer(bits)
    states = torch.randn(tokens, COLUMNS)
    results = []
    for layer.activations in ACTIVATIONS:
        leaf = states.clone().requires_grad_(True)
        output = layer(leaf)
        output.pow(2).sum().backward()
        results.append((output.detach(), leaf.grad))
    assert all(map(torch.equal, *results))
    matrix = dequantize_weight(layer.weight, layer.weight_scale, bits, torch.float64)
    exact = states.double() @ matrix.T + layer.bias
    torch.testing.assert_close(results[0][1], (2 * exact @ matrix).float(), rtol=1e-4, atol=1e-4)
    layer.activations = "int8"
    with torch.no_grad():
        rounded = layer.eval()(states.requires_grad_(True))
    assert not torch.equal(rounded, results[0][0])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_torch_casts_never_reaches_a_kernel(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = make_layer(4), nn.Linear(COLUMNS, ROWS, bias=False)
    packed.bias = None
    states = torch.randn(2, COLUMNS)
    matrix = dequantize_weight(packed.weight, packed.weight_scale, 4, SINGLE)
    expected = [nn.functional.linear(states, weight) for weight in (matrix, plain.weight)]
    monkeypatch.setattr(running, "run_on_threads", refuse)
    for layer, product in zip((packed, plain), expected):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), fast_products():
            if is_compiled:
                layer = torch.compile(layer, fullgraph=True, backend="eager")
            output = layer(states)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), product, rtol=0.05, atol=0.05)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a kernel was run")


# Other machines


def list_kernels(processor: Processor) -> list[tuple[Any, Any]]:
    """Return one kernel of every kind, with what it is compiled for on a processor."""
    few = packed_products.PackedTile(rounding.Layout(processor, 8, 4), 1, "f16", 32, True)
    many = packed_products.PackedTile(rounding.Layout(processor, 4), 512, "f16")
    return [
        (rounding.ROUNDING, few.layout),
        (packed_products.TURNED, few),
        (packed_products.PANELS, many),
        (float_products.FLOATS, float_products.FloatTile("f16", 1, 1)),
        (float_products.FLOATS, float_products.FloatTile("f16", 2, 4, is_widened=True)),
        (attention.STEP_ATTENTION, attention.HeadShape(64, "f16", True, 2)),
        (attention.STEP_ATTENTION, attention.HeadShape(64, "i8", True, 2)),
    ]


def assemble(compiler: Compiler, source: Any, parameters: Any) -> str:
    writer = KernelWriter(compiler, "kernel", source.slots)
    source.write(writer, parameters)
    return compiler.machine.emit_assembly(compiler.optimize(writer.finish()))


@pytest.mark.parametrize(
    ("name", "triple"),
    [("cortex-a76", "aarch64-unknown-linux-gnu"), ("apple-m1", "arm64-apple-darwin")],
)
def test_arm_gets_its_dot_products_and_no_calls(name: str, triple: str) -> None:
    processor = Processor(name, "", "neon", LANES["neon"], triple)
    compiler = Compiler(processor)
    for source, parameters in list_kernels(processor):
        text = assemble(compiler, source, parameters)
        assert not re.search(r"^\s+(bl|blr)\s", text, re.MULTILINE), parameters
        has_dots = source in (packed_products.TURNED, packed_products.PANELS)
        assert bool(re.search(r"^\s+sdot", text, re.MULTILINE)) == has_dots, parameters


@pytest.mark.parametrize(
    ("dot", "name", "instruction"),
    [
        ("vnni", "cascadelake", "vpdpbusd"),
        ("avx-vnni", "alderlake", "vpdpbusd"),
        ("avx2", "haswell", "vpmaddubsw"),
        ("generic", "x86-64", "mul"),
    ],
)
def test_a_pc_s_kernels_call_nothing_that_may_be_absent(
    dot: str, name: str, instruction: str
) -> None:
    """A library function that the process does not hold would be a jump to nowhere."""
    processor = Processor(name, "", dot, LANES[dot], "x86_64-unknown-linux-gnu")
    compiler = Compiler(processor)
    for source, parameters in list_kernels(processor):
        text = assemble(compiler, source, parameters)
        called = set(re.findall(r"(?:call\w*\s+|movabsq\s+\$)([a-z_]\w*)", text))
        assert called <= ({"rintf"} if dot == "generic" else set()), parameters
        if source in (packed_products.TURNED, packed_products.PANELS):
            assert instruction in text
        assert "zmm" not in text or dot == "vnni"


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_has_a_product_of_its_own_for_bfloat16(bits: int) -> None:
    weight = torch.randint(-128, 128, (64, 64 * bits // 8), dtype=torch.int8)
    scale = torch.rand(64) * 0.01
    states = torch.randn(2, 3, 64).bfloat16()
    kernels = TorchKernels()
    actual = kernels.multiply(states, weight, scale, bits, "int8")
    assert actual is not None and actual.dtype == torch.bfloat16
    expected = states.float() @ dequantize_weight(weight, scale, bits, torch.float32).T
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < 2**-7  # bfloat16 keeps 8 bits, and sums and results are rounded to it
    assert kernels.multiply(states, weight, scale, bits, "exact") is None
    assert kernels.multiply(states.float(), weight, scale, bits, "int8") is None
