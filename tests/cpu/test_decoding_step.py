"""Decoding steps on a CPU: attention kernels and programs against the model's own modules."""

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b import cache_chatglm, modeling_chatglm
from chatglm_6b.cache_chatglm import ChatGLMCache, KeyValues
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from conftest import TINY
from torch import Tensor

import chatglm.cpu
from chatglm.cpu import attention, decoding_step

pytest.importorskip("llvmlite")

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# The modules round to the model's type after every operation, a program only at the end.
MODEL_BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}
STEPS = ([[7], [8]], [[9], [10]], [[11, 12, 13], [14, 15, 16]], [[17], [18]])


def make_model(bits: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small model whose biases and norms are not those of a new one."""
    torch.manual_seed(0)
    config = ChatGLMConfig(**{**TINY, "hidden_size": 64, "inner_hidden_size": 256, **changes})
    model = modeling_chatglm.ChatGLMForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.to(dtype)
    return model.quantize(bits) if bits else model


def read_prompt(model: Any) -> tuple[Tensor, Tensor]:
    """Ids of two rows, the first of them padded on the left, and their mask."""
    ids = torch.randint(20, 200, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[:, -2], ids[:, -1] = model.config.gmask_token_id, model.config.bos_token_id
    attention_mask = torch.ones_like(ids)
    ids[0, :4], attention_mask[0, :4] = model.config.pad_token_id, 0
    return ids, attention_mask


@torch.no_grad()
def decode(model: Any, cache: Any = None) -> Tensor:
    """The logits of some steps behind a prompt, or the states of a model without a head."""
    ids, attention_mask = read_prompt(model)
    cache = ChatGLMCache() if cache is None else cache
    model(input_ids=ids, attention_mask=attention_mask, past_key_values=cache)
    logits = []
    for step in STEPS:
        ids = torch.tensor(step)
        attention_mask = torch.cat((attention_mask, torch.ones_like(ids)), dim=1)
        output = model(input_ids=ids, attention_mask=attention_mask, past_key_values=cache)
        logits.append(output[0])
    return torch.cat(logits, dim=1)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that have been run."""
    found: list[Any] = []
    run = decoding_step.StepProgram.run

    def note(self: Any, *args: Any) -> Tensor:
        found.append(self)
        return run(self, *args)

    monkeypatch.setattr(decoding_step.StepProgram, "run", note)
    return found


@pytest.fixture
def without_program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Decoding by the modules, with or without the attention kernel of a step."""

    def decode_plainly(model: Any, cache: Any = None, with_kernel: bool = False) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(chatglm.cpu, "decode_step", leave)
            if not with_kernel:
                patch.setattr(chatglm.cpu, "attend", leave)
            return decode(model, cache)

    return decode_plainly


def leave(*args: Any, **kwargs: Any) -> None:
    """Answer as the engine does for operands that it does not take."""


def attend(query: Tensor, past: KeyValues, mask: Tensor | None, scaling: float) -> Tensor | None:
    """What the kernel makes of a layer's states, or None."""
    config = SimpleNamespace(_attn_implementation="sdpa")
    module = SimpleNamespace(config=config, scaling=scaling)
    found = attention.attend(module, query, past, mask, False)
    return None if found is None else found[0]


def attend_in_float64(
    query: Tensor, past: KeyValues, mask: Tensor | None, scaling: float
) -> Tensor:
    """The formula."""
    key, value = (states.double() for states in past.as_floats(torch.float32))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    scores = scores if mask is None else scores + mask.double()
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("rows", "heads", "tokens", "keys", "head_dim"),
    [(1, 4, 1, 1, 8), (2, 3, 5, 37, 16), (1, 2, 1, 300, 128), (2, 2, 8, 65, 24), (1, 1, 1, 16, 10)],
)
def test_attention_is_the_formula(
    dtype: torch.dtype, rows: int, heads: int, tokens: int, keys: int, head_dim: int
) -> None:
    query = torch.randn(rows, heads, tokens, head_dim).to(dtype)
    room = torch.randn(2, rows, heads, keys + 9, head_dim).to(dtype)
    past = KeyValues(room[0, :, :, :keys], room[1, :, :, :keys])
    hidden = torch.rand(rows, 1, tokens, keys) < 0.3
    for mask in (None, torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min)):
        actual = attend(query, past, mask, 0.3)
        assert actual is not None
        expected = attend_in_float64(query, past, mask, 0.3)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=BOUNDS[dtype])


def test_integers_are_attended_to_without_being_unpacked() -> None:
    layer = cache_chatglm.QuantizedReservedLayer()
    layer.update(*torch.randn(2, 2, 3, 40, 16))
    past = KeyValues(layer.key_integers, layer.value_integers, layer.key_scales, layer.value_scales)
    query = torch.randn(2, 3, 1, 16)
    actual = attend(query, past, None, 0.25)
    assert actual is not None
    expected = attend_in_float64(query, past, None, 0.25)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


def test_scores_of_any_size_and_no_number_are_kept() -> None:
    keys = torch.full((1, 1, 3, 16), 40.0)
    keys[0, 0, 1] = -40.0
    query, past = torch.full((1, 1, 1, 16), 40.0), KeyValues(keys, torch.randn(1, 1, 3, 16))
    actual = attend(query, past, None, 1.0)
    assert actual is not None
    torch.testing.assert_close(actual.double(), attend_in_float64(query, past, None, 1.0))
    keys[0, 0, 2, 5] = torch.nan
    broken = attend(query, past, None, 1.0)
    assert broken is not None and broken.isnan().all()


def test_a_row_that_sees_nothing_attends_evenly() -> None:
    past = KeyValues(*torch.randn(2, 1, 2, 5, 16))
    mask = torch.full((1, 1, 1, 5), torch.finfo(torch.float32).min)
    actual = attend(torch.randn(1, 2, 1, 16), past, mask, 0.25)
    assert actual is not None
    torch.testing.assert_close(actual[0, 0], past.value[0].mean(dim=1))


def test_attention_is_left_to_torch_where_it_is_differentiated_or_long() -> None:
    past = KeyValues(*torch.randn(2, 1, 2, 5, 16))
    assert attend(torch.randn(1, 2, 1, 16, requires_grad=True), past, None, 1.0) is None
    assert attend(torch.randn(1, 2, 9, 16), past, None, 1.0) is None
    assert attend(torch.randn(1, 2, 1, 16).double(), past, None, 1.0) is None


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("position_encoding_2d", [True, False])
def test_a_program_computes_what_the_modules_do(
    bits: int,
    dtype: torch.dtype,
    position_encoding_2d: bool,
    runs: list[Any],
    without_program: Callable[..., Tensor],
) -> None:
    model = make_model(bits, dtype, position_encoding_2d=position_encoding_2d)
    actual = decode(model)
    assert len(runs) == len(STEPS)
    expected = without_program(model)
    assert len(runs) == len(STEPS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=MODEL_BOUNDS[dtype])
    stepwise = without_program(model, with_kernel=True)
    torch.testing.assert_close(stepwise, expected, rtol=0, atol=MODEL_BOUNDS[dtype])


def test_exact_and_grouped_products_have_programs(
    runs: list[Any], without_program: Callable[..., Tensor]
) -> None:
    for options in ({"activations": "exact"}, {"group_size": 32}):
        model = make_model().quantize(4, **options)
        torch.testing.assert_close(decode(model), without_program(model), rtol=0, atol=2e-6)
    assert len(runs) == 2 * len(STEPS)


def test_threads_do_not_change_a_bit() -> None:
    """What the head adds is torch's own product, whose bits threads do change on some CPUs."""
    model, before = make_model(4).transformer, torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 8):
            torch.set_num_threads(threads)
            results.append(decode(model))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_defaults_of_torch_do_not_change_a_program(runs: list[Any]) -> None:
    model = make_model(4)
    expected = decode(model)
    torch.set_default_dtype(torch.float64)
    try:
        twin = copy.deepcopy(model)
        assert torch.equal(decode(twin), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(runs) == 2 * len(STEPS)


def test_a_training_layer_never_rounds_its_input() -> None:
    layer = make_model(4).transformer.layers[0].mlp.dense_h_to_4h
    states = torch.randn(3, layer.in_features)
    exact = torch.nn.functional.linear(states, layer.unpack(torch.float32), layer.bias)
    torch.testing.assert_close(layer.train()(states), exact, rtol=0, atol=1e-5)
    assert (layer.eval()(states) - exact).abs().max() > 1e-4


def test_programs_of_two_threads_keep_apart(runs: list[Any]) -> None:
    model = make_model(4)
    expected, results = decode(model), []
    workers = [threading.Thread(target=lambda: results.append(decode(model))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and len(runs) == 5 * len(STEPS)
    assert all(torch.equal(result, expected) for result in results)


def test_a_changed_model_gets_a_new_program(runs: list[Any]) -> None:
    model = make_model()
    before = decode(model)
    with torch.no_grad():
        model.transformer.layers[0].mlp.dense_4h_to_h.bias.add_(1.0)  # the same memory
    changed = decode(model)
    assert not torch.allclose(before, changed)
    assert runs[0] is runs[4]
    model.quantize(8)
    quantized = decode(model)
    assert len({id(run) for run in runs}) > len({id(run) for run in runs[:8]})
    assert 0 < (quantized - changed).abs().max() < 0.1
    model.quantize(8, activations="exact")
    assert not torch.equal(decode(model), quantized)
    model.transformer.layers[1].attention.dense.bias = torch.nn.Parameter(torch.ones(64))
    assert not torch.allclose(decode(model), quantized)


def test_a_copy_has_programs_of_its_own(runs: list[Any]) -> None:
    model = make_model(4)
    expected, twin = decode(model), copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.layers[0].mlp.dense_4h_to_h.bias.add_(1.0)
    assert torch.equal(decode(twin), expected)
    assert not torch.equal(decode(model), expected)


def watch(model: Any) -> None:
    model.transformer.layers[1].mlp.register_forward_hook(lambda *args: None)


def replace_forward(model: Any) -> None:
    mlp = model.transformer.layers[0].mlp
    mlp.forward = type(mlp).forward.__get__(mlp)


def subclass_linear(model: Any) -> None:
    class Adapter(torch.nn.Linear):
        pass

    model.transformer.layers[0].attention.dense.__class__ = Adapter


def ask_for_eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [watch, replace_forward, subclass_linear, ask_for_eager])
def test_what_looks_into_the_modules_is_not_bypassed(
    change: Callable[[Any], None], runs: list[Any]
) -> None:
    model = make_model()
    expected = decode(model)
    runs.clear()
    change(model)
    torch.testing.assert_close(decode(model), expected, rtol=0, atol=2e-6)
    assert not runs


def test_gradients_and_other_caches_are_left_to_the_modules(runs: list[Any]) -> None:
    from transformers import DynamicCache

    model = make_model()
    decode(model, DynamicCache())
    ids = torch.tensor([[50, 60, 130, 70]])
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
    model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.sum().backward()
    assert not runs
    assert model.transformer.layers[0].mlp.dense_4h_to_h.weight.grad.abs().sum() > 0


def test_generate_uses_programs_and_gives_the_ids_of_the_modules(
    runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    ids, attention_mask = read_prompt(model)
    for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}):
        inputs = {"attention_mask": attention_mask, "max_new_tokens": 12, **options}
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
        inputs["attention_mask"] = attention_mask[rows]
        results = []
        for step in (chatglm.cpu.decode_step, leave):
            monkeypatch.setattr(chatglm.cpu, "decode_step", step)
            torch.manual_seed(3)
            results.append(model.generate(ids[rows], **inputs))
        monkeypatch.setattr(chatglm.cpu, "decode_step", decoding_step.decode_step)
        assert torch.equal(*results), options
        assert runs, options
        runs.clear()


def test_attention_needs_heads_one_after_another() -> None:
    states = torch.randn(1, 5, 2, 16).transpose(1, 2)  # the columns of a head are apart
    assert attend(torch.randn(1, 2, 1, 16), KeyValues(states, states), None, 1.0) is None
    assert attention.MOST_TOKENS == 8
