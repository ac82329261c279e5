"""Products with packed weights in graphs: compiled and exported, they are one operation of ours.

It computes by the same kernels as without a graph, so the numbers are equal, bit for bit.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b import quantization
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.quantization import QuantizedLinear
from conftest import ROOT, build_model
from torch import Tensor, nn
from torch.export import Dim

from chatglm.cpu import linear
from chatglm.cpu.linear import CpuKernels

pytest.importorskip("llvmlite")

OPERATION = "chatglm.packed_linear"
COLUMNS, ROWS = 64, 48
LENGTHS = (1, 2, 8, 9, 513)
OPTIONS = {"use_cache": False, "return_dict": False}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated"),
    # torch's own tracer makes an object of its Function class, which torch itself deprecates.
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
]
formats = pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(4, None, "int8"), (8, None, "exact"), (4, 32, "exact"), (8, 64, "int8")],
)


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product that a kernel has computed."""
    rows: list[int] = []
    multiply = CpuKernels.multiply

    def note(self: CpuKernels, input: Tensor, *args: Any) -> Tensor | None:
        product = multiply(self, input, *args)
        if product is not None:
            rows.append(input.numel() // input.shape[-1])
        return product

    monkeypatch.setattr(CpuKernels, "multiply", note)
    return rows


def make_layer(
    bits: int = 4, group_size: int | None = None, activations: str = "int8"
) -> QuantizedLinear:
    torch.manual_seed(1)
    plain = nn.Linear(COLUMNS, ROWS)
    layer = QuantizedLinear.from_linear(plain, bits, group_size=group_size).eval()
    layer.activations = activations
    return layer


def make_ids(length: int) -> Tensor:
    return torch.randint(5, 300, (1, length), generator=torch.Generator().manual_seed(length))


def list_operations(graph: Any) -> set[str]:
    """Name what a graph calls, in the graphs inside of it too."""
    nodes = [node for module in graph.modules() for node in getattr(module, "graph", graph).nodes]
    return {str(n.target).removesuffix(".default") for n in nodes if n.op == "call_function"}


def compile_one(module: Any, **options: Any) -> tuple[Any, list[set[str]]]:
    """Return a compiled module, and the operations of each of its graphs once it has some."""
    graphs: list[set[str]] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(list_operations(graph))
        return graph.forward

    return torch.compile(module, fullgraph=True, backend=keep, **options), graphs


# What graphs hold


@formats
def test_a_compiled_layer_multiplies_by_its_kernel(
    bits: int, group_size: int | None, activations: str, products: list[int]
) -> None:
    layer = make_layer(bits, group_size, activations)
    compiled, graphs = compile_one(layer, dynamic=True)
    with torch.no_grad():
        for length in LENGTHS:
            states = torch.randn(length, COLUMNS)
            expected = layer(states)
            taken = products.copy()
            products.clear()
            assert torch.equal(compiled(states), expected)
            assert products == taken
            products.clear()
    assert len(graphs) == 2  # torch makes one of its own for a size of 1
    assert all(graph == {OPERATION, "<built-in function add>"} for graph in graphs)


def test_a_compiled_model_multiplies_by_its_kernels() -> None:
    model: Any = build_model().quantize(4, embeddings=True)
    compiled, graphs = compile_one(model, dynamic=True)
    with torch.no_grad():
        for length in LENGTHS:
            ids = make_ids(length)
            assert torch.equal(compiled(ids, **OPTIONS)[0], model(ids, **OPTIONS)[0])
    assert len(graphs) == 2  # torch makes one of its own for a size of 1
    assert all(OPERATION in graph for graph in graphs)


@pytest.mark.parametrize("strict", [False, True])
@formats
def test_an_exported_layer_multiplies_by_its_kernel(
    bits: int, group_size: int | None, activations: str, strict: bool
) -> None:
    layer, states = make_layer(bits, group_size, activations), torch.randn(3, COLUMNS)
    shapes = ({0: Dim("length", min=1)},)
    with torch.no_grad():
        program = torch.export.export(layer, (states,), dynamic_shapes=shapes, strict=strict)
        assert list_operations(program.graph_module) == {OPERATION, "aten.add.Tensor"}
        for length in LENGTHS:
            states = torch.randn(length, COLUMNS)
            assert torch.equal(program.module()(states), layer(states))


def test_an_exported_program_runs_where_the_package_is(tmp_path: Path) -> None:
    """A process that has imported nothing but what the documents say computes the same."""
    layer, states = make_layer(), torch.randn(3, COLUMNS)
    with torch.no_grad():
        program = torch.export.export(layer, (states,), dynamic_shapes=({0: Dim.DYNAMIC},))
        torch.export.save(program, tmp_path / "layer.pt2")
        torch.save([states[:2], layer(states[:2])], tmp_path / "expected.pt")
    code = """
import sys, torch
import chatglm.model.quantization
program = torch.export.load(sys.argv[1] + "/layer.pt2").module()
states, expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(program(states), expected)
print("equal")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.stdout == "equal\n", ended.stderr


def test_a_compiled_layer_s_gradient_is_the_layer_s(products: list[int]) -> None:
    layer = make_layer()
    compiled, graphs = compile_one(layer)
    results = []
    for function in (layer, compiled):
        states = torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).requires_grad_(True)
        output = function(states)
        output.pow(2).sum().backward()
        results.append((output.detach(), states.grad))
    assert products == [3, 3] and OPERATION in graphs[0]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_what_lowers_graphs_keeps_it(products: list[int]) -> None:
    layer, states = make_layer(), torch.randn(2, 3, COLUMNS)
    with torch.no_grad():
        expected = layer(states)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(states), expected)
    assert products == [6, 6]


# What torch asks of an operation


def make_states(dtype: torch.dtype, form: str) -> Tensor:
    states = torch.randn(2, 3, COLUMNS)
    forms: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: states,
        "one row": lambda: states[0, 0],
        "turned": lambda: states.transpose(0, 1),
        "columns apart": lambda: torch.randn(3, 2 * COLUMNS)[:, ::2],
        "columns first": lambda: torch.randn(COLUMNS, 9).T,
    }
    return forms[form]().to(dtype)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.float32, "contiguous"),
        (torch.float16, "turned"),
        (torch.bfloat16, "columns apart"),
        (torch.float64, "columns first"),
        (torch.float32, "one row"),
    ],
)
def test_the_operation_is_as_it_says(dtype: torch.dtype, form: str) -> None:
    """torch's own checks: nothing is changed or shared, and compilers are told the right shapes."""
    layer, states = make_layer(), make_states(dtype, form)
    for activations in ("int8", "exact"):
        arguments = (states, layer.weight, layer.weight_scale, 4, activations)
        found = torch.library.opcheck(torch.ops.chatglm.packed_linear, arguments)
        assert set(found.values()) == {"SUCCESS"}


def test_an_input_of_other_columns_is_refused_when_the_graph_is_made() -> None:
    compiled, _ = compile_one(make_layer())
    with torch.no_grad(), pytest.raises(Exception, match="packed_linear"):
        compiled(torch.randn(3, COLUMNS // 2))


def make_copy(name: str) -> Any:
    """Import the model's files once more, as transformers does with those of a folder."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[name] = module_from_spec(spec)
    return importlib.import_module(f"{name}.quantization")


def test_copies_of_the_files_share_the_operation(products: list[int]) -> None:
    try:
        copied = make_copy("chatglm_copied")
        assert copied.QuantizedLinear is not QuantizedLinear
        layer = copied.QuantizedLinear.from_linear(nn.Linear(COLUMNS, ROWS), 4).eval()
        compiled, graphs = compile_one(layer)
        states = torch.randn(2, COLUMNS)
        with torch.no_grad():
            assert torch.equal(compiled(states), layer(states))
        assert OPERATION in graphs[0] and products == [2, 2]
    finally:
        for name in [name for name in sys.modules if name.startswith("chatglm_copied")]:
            del sys.modules[name]


# Graphs without it


def assert_plain(compile_or_export: Callable[[Any, Tensor], set[str]]) -> None:
    layer, states = make_layer(), torch.randn(3, COLUMNS)
    with torch.no_grad():
        operations = compile_or_export(layer, states)
    assert operations and not any("chatglm" in operation for operation in operations)


def compile_layer(layer: Any, states: Tensor) -> set[str]:
    compiled, graphs = compile_one(layer)
    compiled(states)
    return graphs[0]


def export_layer(layer: Any, states: Tensor) -> set[str]:
    return list_operations(torch.export.export(layer, (states,)).graph_module)


def trace_layer(layer: Any, states: Tensor) -> set[str]:
    graph = torch.jit.trace(layer, (states,)).inlined_graph
    return {node.kind() for node in graph.nodes()}


both_graphs = pytest.mark.parametrize("make_graph", [compile_layer, export_layer])


@both_graphs
@pytest.mark.usefixtures("without_kernels")
def test_kernels_that_are_off_are_in_no_graph(make_graph: Any) -> None:
    assert_plain(make_graph)


@both_graphs
def test_what_torch_casts_is_torch_s(make_graph: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_plain(make_graph)


@both_graphs
def test_without_the_engine_graphs_are_torch_s(
    make_graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_engine", lambda: None)
    assert_plain(make_graph)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace_method.* is deprecated:DeprecationWarning")
def test_traced_layers_need_nothing_of_ours() -> None:
    assert_plain(trace_layer)


def test_plain_layers_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of plain models need nothing of ours, and no kernel computes for their graphs."""
    model, ids = build_model(), make_ids(2)
    compiled, graphs = compile_one(model)
    with torch.no_grad():
        expected = model(ids, **OPTIONS)[0]
        monkeypatch.setattr(linear, "plan_product", None)  # which every product of ours asks
        torch.testing.assert_close(compiled(ids, **OPTIONS)[0], expected)
    assert not any("chatglm" in operation for operation in graphs[0])


def test_the_switch_makes_another_graph_and_comes_back() -> None:
    compiled, graphs = compile_one(make_layer())
    states = torch.randn(3, COLUMNS)
    with torch.no_grad():
        kept = compiled(states)
        with kernels_off():
            plain = compiled(states)
        assert torch.equal(compiled(states), kept) and not torch.equal(plain, kept)
    assert [OPERATION in graph for graph in graphs] == [True, False]


def test_the_process_s_switch_rules_programs_that_were_exported_before(
    monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    layer, states = make_layer(), torch.randn(3, COLUMNS)
    with torch.no_grad():
        program = torch.export.export(layer, (states,)).module()
        monkeypatch.setenv("CHATGLM_KERNELS", "off")
        assert torch.equal(program(states), layer(states)) and products == []
