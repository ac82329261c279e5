"""Decoding with every kind of cache gives what the whole sequence gives in one forward pass."""

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from chatglm_6b.masking_chatglm import build_geometry
from conftest import build_model
from packaging import version
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    QuantizedCache,
    QuantizedLayer,
    StaticCache,
)

PAD, MASK, GMASK, SOP = 3, 300, 301, 304
PROMPTS = {
    "gmask": [5, 197, 86, 97, GMASK, SOP],
    "mask": [115, 98, MASK, 242, 131, SOP],
    "both": [7, MASK, 43, GMASK, SOP, 12, 13],
}
# An answer may hold anything, the tokens that shape a prompt included.
ANSWER = [179, GMASK, 51, SOP, 86, MASK, 20, 21]
WINDOW = 24  # columns of a static cache
HAS_FP8 = version.parse(transformers.__version__) >= version.parse("5.20")


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"{difference:.3e}"


def full_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits


def decode(model: Any, prompt: list[int], cache: Cache | None, chunk: int = 1) -> torch.Tensor:
    """Return the logits of a prompt and an answer, fed `chunk` tokens a step, without positions."""
    with torch.no_grad():
        outputs = model(torch.tensor([prompt]), past_key_values=cache)
        logits = [outputs.logits]
        for new_ids in torch.tensor([ANSWER]).split(chunk, dim=1):
            outputs = model(new_ids, past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("kind", ["none given", "dynamic", "static"])
def test_steps_by_hand_equal_the_whole(
    tiny_model: Any, kind: str, prompt: list[int], chunk: int
) -> None:
    caches: dict[str, Callable[[], Cache | None]] = {
        "none given": lambda: None,
        "dynamic": lambda: DynamicCache(config=tiny_model.config),
        "static": lambda: StaticCache(config=tiny_model.config, max_cache_len=WINDOW),
    }
    logits = decode(tiny_model, prompt, caches[kind](), chunk)
    assert_near(logits, full_logits(tiny_model, prompt + ANSWER))


def test_one_axis_models_hold_the_blank_in_steps() -> None:
    """Their whole pass counts on instead; the golden data have both."""
    model = build_model(position_encoding_2d=False)
    prompt = PROMPTS["mask"]
    logits = decode(model, prompt, None)[:, : len(prompt) + 1]
    assert_near(logits, full_logits(model, prompt + ANSWER[:1]))
    gmask = PROMPTS["gmask"]
    step = decode(model, gmask, None)[:, : len(gmask) + 1]
    assert not torch.allclose(step, full_logits(model, gmask + ANSWER[:1]), atol=1e-3)


def test_a_prefix_stays_out_of_the_cache() -> None:
    model = build_model(pre_seq_len=5)
    prompt = PROMPTS["gmask"]
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=WINDOW)):
        assert_near(decode(model, prompt, cache), full_logits(model, prompt + ANSWER))
        assert int(cache.get_seq_length()) == len(prompt + ANSWER)


@pytest.mark.parametrize("masks", ["2-D", "none"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padded_rows_decode_as_they_do_alone(tiny_model: Any, kind: str, masks: str) -> None:
    rows = [PROMPTS["gmask"], PROMPTS["mask"][2:]]
    ids = torch.tensor([rows[0], [PAD] * 2 + rows[1]])
    mask = (ids != PAD).long()
    if masks == "none":
        ids, mask = torch.tensor([rows[0]] * 2), None
        rows = [rows[0]] * 2
    cache = StaticCache(config=tiny_model.config, max_cache_len=WINDOW)
    cache = DynamicCache() if kind == "dynamic" else cache
    for length in range(len(ANSWER)):
        with torch.no_grad():
            logits = tiny_model(ids, attention_mask=mask, past_key_values=cache).logits
        for i, row in enumerate(rows):
            alone = full_logits(tiny_model, row + ANSWER[:length])
            assert_near(logits[i, -1], alone[0, -1])
        ids = torch.tensor([[ANSWER[length]]] * 2)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)


def test_a_cropped_cache_forgets(tiny_model: Any) -> None:
    prompt = PROMPTS["gmask"]
    with torch.no_grad():
        cache = tiny_model(torch.tensor([[*prompt, *ANSWER]])).past_key_values
        cache.crop(2 - len(ANSWER))
        logits = tiny_model(torch.tensor([[9, 10]]), past_key_values=cache).logits
    assert_near(logits, full_logits(tiny_model, [*prompt, *ANSWER[:2], 9, 10])[:, -2:])


def test_a_static_cache_can_be_reset(tiny_model: Any) -> None:
    cache = StaticCache(config=tiny_model.config, max_cache_len=WINDOW)
    decode(tiny_model, PROMPTS["mask"], cache)
    cache.reset()
    prompt = PROMPTS["gmask"]
    assert_near(decode(tiny_model, prompt, cache), full_logits(tiny_model, prompt + ANSWER))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_of_generate_goes_on_by_hand(tiny_model: Any, kind: str) -> None:
    prompt = torch.tensor([PROMPTS["gmask"]])
    cache = StaticCache(config=tiny_model.config, max_cache_len=WINDOW)
    outputs = tiny_model.generate(
        prompt,
        max_new_tokens=10,
        do_sample=False,
        past_key_values=DynamicCache() if kind == "dynamic" else cache,
        return_dict_in_generate=True,
    )
    ids = outputs.sequences[0].tolist()
    cache = copy.deepcopy(outputs.past_key_values)
    cached = int(cache.get_seq_length())
    with torch.no_grad():
        logits = tiny_model(torch.tensor([ids[cached:]]), past_key_values=cache).logits
    assert_near(logits[0, -1], full_logits(tiny_model, ids)[0, -1])


def test_a_prompt_with_the_original_inputs_goes_on_by_hand(tiny_model: Any) -> None:
    """What the caller says of the prompt's places does not hide its ids from the next step."""
    prompt = torch.tensor([PROMPTS["mask"]])
    geometry = build_geometry(prompt, None, tiny_model.transformer.special_ids)
    with torch.no_grad():
        cache = tiny_model(prompt, **geometry._asdict()).past_key_values
        logits = tiny_model(torch.tensor([ANSWER]), past_key_values=cache).logits
    assert_near(logits, full_logits(tiny_model, PROMPTS["mask"] + ANSWER)[:, -len(ANSWER) :])


def test_rows_that_do_not_fit_the_cache(tiny_model: Any) -> None:
    cache = tiny_model(torch.tensor([PROMPTS["gmask"]])).past_key_values
    with pytest.raises(ValueError, match="holds 1 rows but the new tokens have 2"):
        tiny_model(torch.tensor([[5], [6]]), past_key_values=cache)


def test_rows_that_were_copied_need_places_of_ones_own(tiny_model: Any) -> None:
    ids = torch.tensor([[*PROMPTS["gmask"], 9]])
    geometry = build_geometry(ids, None, tiny_model.transformer.special_ids, past_length=6)
    cache = tiny_model(ids[:, :6]).past_key_values
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        step = {name: torch.cat((tensor, tensor)) for name, tensor in geometry._asdict().items()}
        logits = tiny_model(ids[:, 6:].repeat(2, 1), past_key_values=cache, **step).logits
    assert_near(logits, full_logits(tiny_model, ids[0].tolist())[:, -1:].repeat(2, 1, 1))
    with pytest.raises(ValueError, match="or position_ids and attention_mask of your own"):
        tiny_model(ids[:, 6:].repeat(2, 1), past_key_values=cache)


class RoundingLayer(QuantizedLayer):
    """A quantized cache layer that needs no library: 8 bits a number, a scale a tensor."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return q_tensor[0] * q_tensor[1]


@pytest.mark.parametrize("residual_length", [4, 64])
def test_a_quantized_cache(tiny_model: Any, residual_length: int) -> None:
    layers = [RoundingLayer(residual_length=residual_length) for _ in tiny_model.transformer.layers]
    prompt = PROMPTS["gmask"]
    logits = decode(tiny_model, prompt, Cache(layers=layers))
    assert_near(logits, full_logits(tiny_model, prompt + ANSWER), 0.1)


@pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
def test_quantized_caches_of_transformers(backend: str) -> None:
    package = {"quanto": "optimum-quanto", "hqq": "hqq"}.get(backend)
    if package is not None and not any(importlib.metadata.distributions(name=package)):
        pytest.skip(f"{package} is not installed")
    if backend == "fp8" and not HAS_FP8:
        pytest.skip("this transformers has no fp8 cache")
    model = build_model(spread=1)
    cache = QuantizedCache(backend=backend, config=model.config)
    prompt = PROMPTS["gmask"]
    assert_near(decode(model, prompt, cache), full_logits(model, prompt + ANSWER), 0.05)


@pytest.mark.parametrize("given", ["object", "name"])
def test_generate_with_a_static_cache(tiny_model: Any, given: str) -> None:
    ids = torch.tensor([PROMPTS["gmask"], [PAD] * 2 + PROMPTS["mask"][2:]])
    options = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 12, "do_sample": False}
    expected = tiny_model.generate(ids, **options)
    cache: dict[str, Any] = {"cache_implementation": "static"}
    if given == "object":
        cache = {"past_key_values": StaticCache(config=tiny_model.config, max_cache_len=WINDOW)}
    assert torch.equal(tiny_model.generate(ids, **options, **cache), expected)


@pytest.mark.slow
def test_one_graph_serves_every_compiled_step() -> None:
    """Behind a static cache nothing in a step grows, and nothing leaves the graph."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build_model(num_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=WINDOW)
    step = torch.compile(model.forward, fullgraph=True, backend=count)
    ids, logits = [*PROMPTS["gmask"]], []
    with torch.no_grad():
        for i, new_id in enumerate([None, *ANSWER]):
            ids += [] if new_id is None else [new_id]
            inputs = model.prepare_inputs_for_generation(
                torch.tensor([ids]),
                past_key_values=cache,
                cache_position=torch.arange(len(ids))[0 if i == 0 else -1 :],
            )
            logits.append((model if i == 0 else step)(**inputs).logits)
    assert_near(torch.cat(logits, dim=1), full_logits(model, ids))
    assert len(graphs) == 1
