"""Inputs, masks, caches, positions of any shape: kernels do as the modules do, or leave it to them.

A kernel walks through memory by the sizes that it is told: one that does not fit would be read out
of bounds. So whatever shapes come, there is the modules' result or the modules' error.
"""

from typing import Any

import pytest
import torch
from chatglm_6b.cache_chatglm import ChatGLMCache, KeyValues
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.modeling_chatglm import attend
from chatglm_6b.quantization import QuantizedLinear
from conftest import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatglm.cpu import attention, fast_products, find_kernels

pytest.importorskip("llvmlite")

PAST, HEADS, HEAD_DIM = 6, 4, 16


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model()


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A result, or the kind of error in its place."""
    try:
        with torch.no_grad():
            return function(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError) as error:
        return type(error)


def assert_alike(actual: Any, expected: Any) -> None:
    if isinstance(expected, type):
        assert actual is expected or issubclass(actual, (RuntimeError, IndexError, ValueError))
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)


def decode(model: Any, hidden: Tensor, mask: Any, positions: Tensor, cache: Any) -> Any:
    """All blocks, for new tokens behind a cache."""
    network = model.transformer
    angles = network.rotary_emb(positions, hidden.dtype)
    prefixes = [None] * len(network.layers)
    return network.layers(hidden, mask, angles, prefixes, cache)[0]


def fill(batch: int, heads: int, head_dim: int, lengths: list[int], seed: int) -> ChatGLMCache:
    generator, cache = torch.Generator().manual_seed(seed), ChatGLMCache()
    for layer, length in enumerate(lengths):
        states = torch.randn(2, batch, heads, length, head_dim, generator=generator)
        cache.update(*states, layer)
    return cache


sizes = st.sampled_from([1, 1, 1, 2, 3])


@settings(max_examples=150, deadline=None)
@given(
    batch=st.sampled_from([1, 2]),
    tokens=st.sampled_from([1, 2]),
    mask_sizes=st.one_of(st.none(), st.lists(sizes, min_size=1, max_size=4)),
    shift=st.sampled_from([0, 0, 0, -3, -1, 1, 5]),
    cache_batch=st.sampled_from([0, 0, 0, 1]),
    heads=st.sampled_from([HEADS, HEADS, HEADS, 2, 1]),
    head_dim=st.sampled_from([HEAD_DIM, HEAD_DIM, HEAD_DIM, 8, 32]),
    uneven=st.booleans(),
    position_batch=st.sampled_from([None, None, 1]),
    seed=st.integers(0, 9),
)
def test_steps_of_any_shape_are_the_modules(
    model: Any,
    batch: int,
    tokens: int,
    mask_sizes: list[int] | None,
    shift: int,
    cache_batch: int,
    heads: int,
    head_dim: int,
    uneven: bool,
    position_batch: int | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, model.config.hidden_size, generator=generator)
    mask = None
    if mask_sizes is not None:
        shape = [*mask_sizes, PAST + tokens + shift][-4:]
        mask = torch.randn(shape, generator=generator)
    positions = torch.randint(0, 5, (position_batch or batch, 2, tokens), generator=generator)
    lengths = [PAST, PAST + uneven, PAST]

    def again() -> ChatGLMCache:
        return fill(batch + cache_batch, heads, head_dim, lengths, seed)

    actual = run(decode, model, hidden, mask, positions, again())
    with kernels_off():
        expected = run(decode, model, hidden, mask, positions, again())
    assert_alike(actual, expected)


@settings(max_examples=150, deadline=None)
@given(
    query=st.tuples(sizes, sizes, sizes, st.sampled_from([8, 16])),
    key=st.tuples(sizes, sizes, st.sampled_from([1, 4, 5]), st.sampled_from([8, 16])),
    mask=st.one_of(st.none(), st.lists(st.sampled_from([1, 2, 4, 5]), min_size=1, max_size=4)),
    seed=st.integers(0, 9),
)
def test_attention_of_any_shape_is_torch_s(
    model: Any, query: Any, key: Any, mask: list[int] | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = model.transformer.layers[0].attention
    states = [torch.randn(shape, generator=generator) for shape in (query, key, key)]
    bias = None if mask is None else torch.randn(mask, generator=generator)

    def compute() -> Any:
        return attend(module, states[0], KeyValues(*states[1:]), bias, False)[0]

    actual = run(compute)
    with kernels_off():
        expected = run(compute)
    assert_alike(actual, expected)


@pytest.mark.parametrize("shape", [(2, HEADS, 5), (1, 2, 5), (1, HEADS, 4), (1, HEADS, 6)])
def test_values_that_do_not_fit_the_keys_never_reach_the_kernel(
    model: Any, shape: tuple[int, int, int]
) -> None:
    """What torch makes of some of them is no error, and not the same twice."""
    module = model.transformer.layers[0].attention
    query, key = torch.randn(1, HEADS, 1, HEAD_DIM), torch.randn(1, HEADS, 5, HEAD_DIM)
    fits = attention.attend(module, query, KeyValues(key, key), None, False)
    assert fits is not None
    value = torch.randn(*shape, HEAD_DIM)
    assert attention.attend(module, query, KeyValues(key, value), None, False) is None


def test_integers_with_scales_of_another_shape_are_left_alone(model: Any) -> None:
    query = torch.randn(1, HEADS, 1, HEAD_DIM)
    key = torch.randint(-9, 9, (1, HEADS, 5, HEAD_DIM), dtype=torch.int8)
    module = model.transformer.layers[0].attention
    scale = torch.rand(1, HEADS, 5)
    right = attend(module, query, KeyValues(key, key, scale, scale), None, False)[0]
    assert right.isfinite().all()
    with pytest.raises(RuntimeError):  # torch's own, of shapes that do not go together
        attend(module, query, KeyValues(key, key, scale[:, :, :3], scale), None, False)


@pytest.mark.parametrize("columns", [32, 128])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_products_of_other_columns_are_torch_s_error(tokens: int, columns: int) -> None:
    """A kernel would read weights that are another row's, or nobody's."""
    plain = torch.nn.Linear(64, 48)
    layers = [plain, *(QuantizedLinear.from_linear(plain, bits).eval() for bits in (4, 8))]
    for layer in layers:
        with torch.no_grad(), fast_products():
            assert layer(torch.randn(tokens, 64)).isfinite().all()
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(torch.randn(tokens, columns))


def test_scales_of_other_rows_never_reach_a_kernel() -> None:
    layer, kernels = QuantizedLinear(64, 48, 8), find_kernels()
    assert kernels is not None
    states, scale = torch.randn(1, 64), layer.weight_scale
    assert kernels.multiply(states, layer.weight, scale, 8) is not None
    assert kernels.multiply(states, layer.weight, scale[:24], 8) is None
