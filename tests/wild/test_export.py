"""Exported, traced and compiled: one graph of a forward, which answers at any length as the model.

Lengths stand around those at which something else has a border: one token needs no mask, eight rows
are a kernel's block, and from 513 on compilers used to be told that there is an upper bound.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import build_model
from torch import Tensor
from torch.export import Dim

LENGTHS = (1, 2, 8, 9, 512, 513, 600)
GMASK, SOP = 301, 304
OPTIONS = {"use_cache": False, "return_dict": False}

pytestmark = [
    # Each comparison of a length is told of while it is traced; that none matters is tested here.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.trace_method.* is deprecated:DeprecationWarning"),
]
MODELS = pytest.mark.parametrize(
    "fields",
    [{}, {"position_encoding_2d": False}, {"pre_seq_len": 4}, {"attn_implementation": "eager"}],
    ids=["2-D", "1-D", "prefix", "eager"],
)
both_bits = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_ids(length: int, rows: int = 1) -> Tensor:
    """Return prompts that end in [gMASK] and <sop> where there is room, `(rows, length)`."""
    ids = torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(length))
    if length > 2:
        ids[0, -3], ids[0, -2] = GMASK, SOP
    return ids


def make_mask(ids: Tensor) -> Tensor:
    """Hide the first quarter of the first row."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 4] = 0
    return mask


def export(model: Any, dims: dict[int, Any], **inputs: Tensor) -> Any:
    shapes = dict.fromkeys(inputs, dims) | dict.fromkeys(OPTIONS)
    program = torch.export.export(model, (), {**inputs, **OPTIONS}, dynamic_shapes=shapes)
    return program.module()


def assert_same(graph: Any, model: Any, **inputs: Tensor) -> None:
    expected = model(**inputs, **OPTIONS)[0]
    torch.testing.assert_close(graph(**inputs, **OPTIONS)[0], expected, rtol=1e-4, atol=1e-4)


@MODELS
def test_an_exported_model_takes_any_length(fields: dict[str, Any]) -> None:
    model = build_model(**fields)
    graph = export(model, {1: Dim("length", min=1)}, input_ids=make_ids(16))
    for length in LENGTHS:
        assert_same(graph, model, input_ids=make_ids(length))


def test_an_exported_model_takes_any_batch_with_its_mask() -> None:
    model, ids = build_model(), make_ids(16, 2)
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    graph = export(model, dims, input_ids=ids, attention_mask=make_mask(ids))
    for rows, length in zip((2, 3, 5, 2, 3, 2, 4), LENGTHS):
        ids = make_ids(length, rows)
        assert_same(graph, model, input_ids=ids, attention_mask=make_mask(ids))


@both_bits
def test_an_exported_model_may_be_quantized(bits: int) -> None:
    """Products that round their input do so in the program too: they are the same kernels."""
    model = build_model().quantize(bits)
    graph = export(model, {1: Dim.DYNAMIC}, input_ids=make_ids(16))
    for length in LENGTHS:
        assert_same(graph, model, input_ids=make_ids(length))


def trace(model: Any, *inputs: Tensor) -> Any:
    """Trace with torch's own check, which runs the graph again beside the model."""
    model.config.update(OPTIONS)
    return torch.jit.trace(model, inputs, check_trace=True)


def assert_traced(model: Any, example: Tensor) -> None:
    graph = trace(model, example)
    for length in LENGTHS:
        ids = make_ids(length)
        torch.testing.assert_close(graph(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)


@MODELS
@pytest.mark.parametrize("example", [1, 2, 16])
def test_a_traced_model_takes_any_length(example: int, fields: dict[str, Any]) -> None:
    assert_traced(build_model(**fields), make_ids(example))


@both_bits
def test_a_traced_model_may_be_quantized(bits: int) -> None:
    """A traced graph holds torch's products, which round no inputs."""
    assert_traced(build_model().quantize(bits, activations="exact"), make_ids(16))


def test_a_traced_model_takes_any_batch_with_its_mask() -> None:
    model, ids = build_model(), make_ids(16, 2)
    graph = trace(model, ids, make_mask(ids))
    for rows, length in zip((1, 3, 5, 2, 3, 2, 4), LENGTHS):
        ids = make_ids(length, rows)
        expected = model(ids, make_mask(ids))[0]
        torch.testing.assert_close(graph(ids, make_mask(ids))[0], expected, rtol=1e-4, atol=1e-4)


@MODELS
def test_a_compiled_forward_is_one_graph_at_any_length(fields: dict[str, Any]) -> None:
    """One token is a graph of its own, as torch treats any size of 1; all other lengths share."""
    model, graphs = build_model(**fields), []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True, dynamic=True)
    for length in (*LENGTHS, *LENGTHS):
        assert_same(compiled, model, input_ids=make_ids(length))
    assert len(graphs) == 2
