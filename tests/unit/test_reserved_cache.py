"""Room behind the columns changes no bit of what transformers computes; rounding, little."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from chatglm_6b import cache_chatglm
from chatglm_6b.cache_chatglm import (
    ChatGLMCache,
    KeyValues,
    QuantizedReservedLayer,
    ReservedLayer,
    append_columns,
    extend_cache,
    quantize_columns,
    reserve_columns,
)
from conftest import build_model, import_from_package
from transformers.cache_utils import DynamicCache, DynamicLayer

PAD, GMASK, SOP = 3, 301, 304
PROMPT = [5, 197, 86, 97, 197, 86, GMASK, SOP]
ROWS, HEADS, DIM = 2, 3, 16
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NEW_TOKENS = 24
SHORT = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "repetition_penalty": 1.5}
LIVELY = {"seed": 4, "spread": 3}  # of a model that does not say one token for ever
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "drafts": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


def randn(columns: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, HEADS, columns, DIM).to(dtype)


def fill(layer: Any, columns: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Any:
    layer.update(randn(columns, rows, dtype), randn(columns, rows, dtype))
    return layer


def equal(layer: Any, other: Any) -> bool:
    return torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make caches grow every few tokens."""
    monkeypatch.setattr(cache_chatglm, "ROOM_STEP", 4)


OPERATIONS: dict[str, Callable[[Any, int], None]] = {
    "crop": lambda layer, i: layer.crop(-1 - i % 3),
    "reorder": lambda layer, i: layer.reorder_cache(torch.arange(layer.keys.shape[0]).flip(0)),
    "repeat": lambda layer, i: layer.batch_repeat_interleave(2),
    "select": lambda layer, i: layer.batch_select_indices(torch.tensor([0, -1])),
    "offload": lambda layer, i: (layer.offload(), layer.prefetch()),
    "assign": lambda layer, i: setattr(layer, "keys", layer.keys * 2),
    "copy": lambda layer, i: layer.__setstate__(copy.deepcopy(layer.__dict__)),
    "nothing": lambda layer, i: None,
}


class Layer(ReservedLayer):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Twin(DynamicLayer):
    __setstate__ = Layer.__setstate__


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_of_operations_equals_concatenation(
    little_room: None, dtype: torch.dtype
) -> None:
    order = torch.randint(len(OPERATIONS), (120,)).tolist()
    layer, twin = Layer(), Twin()
    for i, choice in enumerate(order):
        rows = ROWS if i == 0 else layer.keys.shape[0]
        new = [randn(1 + i % 5, rows, dtype) for _ in range(2)]
        outputs = layer.update(*new)
        assert all(map(torch.equal, outputs, twin.update(*new)))
        assert equal(layer, twin) and layer.keys.dtype == dtype
        name = "select" if rows > 8 else list(OPERATIONS)[choice]
        for each in (layer, twin):
            OPERATIONS[name](each, i)
        assert layer.get_seq_length() == twin.get_seq_length()


def test_columns_are_written_in_place() -> None:
    layer = fill(ReservedLayer(), 5)
    capacity = reserve_columns(5)
    places = set()
    for _ in range(5, capacity):
        fill(layer, 1)
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1
    strides = (HEADS * capacity * DIM, capacity * DIM, DIM, 1)
    assert layer.keys.stride() == layer.values.stride() == strides
    fill(layer, 1)
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) not in places


def test_room_is_an_eighth_and_little_of_it_for_few_columns() -> None:
    for length in (0, 1, 63, 64, 512, 2048, 8192, 100_000):
        capacity = reserve_columns(length)
        assert length + 64 <= capacity <= length * 9 / 8 + 128 and capacity % 64 == 0
        assert capacity >= length * 9 // 8


def test_a_cropped_layer_uses_its_room_again() -> None:
    layer = fill(ReservedLayer(), 20)
    place = layer.keys.data_ptr()
    for _ in range(30):
        fill(layer, 4)
        layer.crop(-3)
    assert layer.keys.data_ptr() == layer.update(randn(1), randn(1))[0].data_ptr() == place


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_columns_that_someone_holds_are_not_overwritten(mode: Callable[[], Any]) -> None:
    with mode():
        layer = fill(ReservedLayer(), 10)
        for _ in range(3):
            held, expected = layer.keys[:, 1:], layer.keys[:, 1:].clone()
            layer.crop(-4)
            fill(layer, 6)
            assert torch.equal(held, expected)
            assert not torch.equal(layer.keys[:, 1:, :10], expected)


def test_branches_from_a_snapshot() -> None:
    """Old tensors put back, as searches do, and the branch that was left stays whole."""
    layer = fill(ReservedLayer(), 10)
    root = (layer.keys, layer.values)
    fill(layer, 5)
    left, expected = (layer.keys, layer.values), (layer.keys.clone(), layer.values.clone())
    layer.keys, layer.values = root
    fill(layer, 5)
    right = (layer.keys.clone(), layer.values.clone())
    assert all(map(torch.equal, left, expected))
    layer.keys, layer.values = left
    fill(layer, 1)
    assert torch.equal(layer.keys[:, :, :15], expected[0])
    assert torch.equal(root[0], right[0][:, :, :10])


def test_memory_of_others_is_no_room() -> None:
    theirs = torch.zeros(ROWS, HEADS, 64, DIM)
    layer = fill(ReservedLayer(), 3)
    layer.keys, layer.values = theirs[:, :, :3], theirs.clone()
    layer.values = layer.values[:, :, :3]
    fill(layer, 2)
    assert theirs.count_nonzero() == 0
    tight = randn(8)
    layer.keys, layer.values, expected = tight, tight.clone(), tight.clone()
    layer.crop(-5)
    fill(layer, 2)
    assert torch.equal(tight, expected)


@pytest.mark.parametrize("kind", [copy.deepcopy, copy.copy, "saved"])
@pytest.mark.parametrize("layer_type", [ReservedLayer, QuantizedReservedLayer])
def test_a_copied_layer_goes_its_own_way(layer_type: type, kind: Any) -> None:
    layer = fill(layer_type(), 10)
    if kind == "saved":
        stream = io.BytesIO()
        torch.save(layer, stream)
        twin = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    else:
        twin = kind(layer)
    before = (layer.keys.clone(), layer.values.clone())
    expected = DynamicLayer(), DynamicLayer()
    for each in expected:
        each.update(*before)
    for each, plain in zip((twin, layer, twin, layer), expected[::-1] * 2):
        if layer_type is QuantizedReservedLayer and kind is copy.copy and each is layer:
            continue  # its parts are shared, as the layers of a shallow copy of a cache are
        new = fill(layer_type(), 3)
        for cached in (each, plain):
            cached.crop(-2)
            cached.update(new.keys, new.values)
        assert torch.allclose(each.keys, plain.keys, atol=1e-6)
        assert torch.allclose(each.values, plain.values, atol=1e-6)


def test_a_deep_copy_has_memory_and_room_of_its_own() -> None:
    layer = fill(ReservedLayer(), 10)
    twin = copy.deepcopy(layer)
    place = twin.keys.data_ptr()
    assert place != layer.keys.data_ptr()
    fill(twin, 1)
    assert twin.keys.data_ptr() == place


def test_without_a_count_of_users_everything_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_chatglm, "_count_users", None)
    layer, twin = fill(ReservedLayer(), 10), DynamicLayer()
    twin.update(layer.keys, layer.values)
    place, new = layer.keys.data_ptr(), (randn(1), randn(1))
    layer.update(*new)
    twin.update(*new)
    assert equal(layer, twin) and layer.keys.data_ptr() != place


def test_replaced_columns_leave_nothing_behind() -> None:
    layer = fill(ReservedLayer(), 10)
    layer.batch_repeat_interleave(3)
    fill(layer, 1, ROWS * 3)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_cache_of_inference_goes_on_outside() -> None:
    layer, twin = ReservedLayer(), DynamicLayer()
    new = [(randn(4), randn(4)) for _ in range(3)]
    for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
        with mode():
            layer.update(*new[i])
            twin.update(*new[i])
    assert equal(layer, twin)


def test_what_does_not_fit_is_treated_as_transformers_does() -> None:
    layer, twin = fill(ReservedLayer(), 4), DynamicLayer()
    twin.update(layer.keys, layer.values)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(randn(1, rows=1), randn(1, rows=1))
    new = (randn(2).double(), randn(2).bfloat16())
    layer.update(*new)
    twin.update(*new)
    assert equal(layer, twin) and layer.keys.dtype == torch.float64


def test_parameters_are_left_alone() -> None:
    weight = torch.nn.Parameter(randn(2))
    layer = ReservedLayer()
    with torch.no_grad():
        layer.update(weight, weight)
        fill(layer, 3)
    assert layer.keys.shape[2] == 5 and not layer.keys.requires_grad


@pytest.mark.parametrize("is_cut", [False, True])
def test_gradients_flow_through_steps(is_cut: bool) -> None:
    """As much with room, which a prompt without gradients may have made."""
    gradients = []
    for cache in (DynamicCache(), ChatGLMCache()):
        model = build_model(num_layers=2)
        with torch.set_grad_enabled(not is_cut):
            model(torch.tensor([PROMPT]), past_key_values=cache)
        steps = [model(torch.tensor([[i]]), past_key_values=cache).logits for i in (9, 10, 11)]
        with torch.no_grad():
            model(torch.tensor([[12]]), past_key_values=cache)
        torch.cat(steps).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert gradients[0][1].abs().max() > 0


def test_compiled_steps_concatenate() -> None:
    new = (randn(3), randn(3))

    @torch.compile(backend="eager", fullgraph=True)
    def step(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        layer = ReservedLayer()
        layer.update(keys, values)
        return layer.update(keys, values)[0]

    with torch.no_grad():
        assert torch.equal(step(*new), torch.cat((new[0], new[0]), dim=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_generation_is_the_same(
    little_room: None, without_kernels: None, method: str, dtype: torch.dtype
) -> None:
    model = build_model(**LIVELY).to(dtype)
    ids = torch.tensor([PROMPT, [PAD] * 3 + PROMPT[3:]])
    ids = ids[:1] if method == "drafts" else ids
    options = {"attention_mask": (ids != PAD).long(), "output_scores": True, **METHODS[method]}
    results = []
    for cache in (DynamicCache(), ChatGLMCache()):
        torch.manual_seed(1)
        results.append(
            model.generate(
                ids, past_key_values=cache, return_dict_in_generate=True, **SHORT, **options
            )
        )
        assert results[-1].past_key_values is cache
    plain, reserved = results
    assert torch.equal(plain.sequences, reserved.sequences)
    assert all(map(torch.equal, plain.scores, reserved.scores))
    assert all(map(equal, plain.past_key_values.layers, reserved.past_key_values.layers))


STEPS = ([PROMPT], [[9]], [[10, 11, 12, 13]], [[14]], [[15, 16]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hand_steps_and_crops_give_the_same_logits(
    little_room: None, without_kernels: None, implementation: str
) -> None:
    model = build_model()
    model.set_attn_implementation(implementation)
    caches = [DynamicCache(config=model.config), ChatGLMCache(config=model.config)]
    for i, new in enumerate(STEPS):
        with torch.no_grad():
            logits = [model(torch.tensor(new), past_key_values=c).logits for c in caches]
        assert torch.equal(*logits)
        if i % 2:
            caches = [copy.deepcopy(cache) for cache in caches]
        for cache in caches:
            cache.crop(-1)


def test_kernels_leave_a_held_cache_alone(little_room: None) -> None:
    """Whoever writes the new columns, those that someone holds stay, and the rest is right."""
    model = build_model()
    caches = [DynamicCache(), ChatGLMCache()]
    for new in STEPS:
        held = [tensor for layer in caches[1].layers for tensor in (layer.keys, layer.values)]
        expected = [tensor.clone() for tensor in held]
        for cache in caches:
            cache.crop(-1)
        with torch.no_grad():
            logits = [model(torch.tensor(new), past_key_values=c).logits for c in caches]
        assert torch.allclose(*logits, atol=1e-5)
        assert all(map(torch.equal, held, expected))


@pytest.mark.parametrize("bits", [None, 8])
def test_what_transformers_asks_of_a_cache(bits: int | None) -> None:
    model = build_model()
    cache = ChatGLMCache(bits=bits)
    assert isinstance(cache, DynamicCache) and not cache.is_compileable and len(cache) == 0
    assert len(ChatGLMCache(config=model.config, bits=bits)) == model.config.num_layers
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT]), past_key_values=cache).logits
        assert cache.get_seq_length() == len(PROMPT) and len(cache) == model.config.num_layers
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(torch.tensor([PROMPT]), past_key_values=cache).logits
    assert torch.allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_gathered_cache_is_built_from_what_it_yields(bits: int | None) -> None:
    """As DataParallel does with the caches of its replicas."""
    replicas = [ChatGLMCache(bits=bits), ChatGLMCache(bits=bits)]
    for cache in replicas:
        for i in range(2):
            cache.update(randn(4), randn(4), i)
    pairs = [tuple(map(torch.cat, zip(*(e[:2] for e in entry)))) for entry in zip(*replicas)]
    gathered = ChatGLMCache(pairs, bits=bits)
    for i, layer in enumerate(gathered.layers):
        assert torch.allclose(layer.keys[ROWS:], replicas[1].layers[i].keys, atol=1e-6)
        assert torch.allclose(layer.values[:ROWS], replicas[0].layers[i].values, atol=1e-6)
    assert not hasattr(DynamicCache, "from_legacy_cache") or equal(
        ChatGLMCache.from_legacy_cache(tuple(pairs)).layers[0], ChatGLMCache(pairs).layers[0]
    )


def test_a_number_of_bits_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="bits must be 8, or None for no rounding, got 4"):
        ChatGLMCache(bits=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1, 1e4])
def test_rounding_is_off_by_half_a_scale_at_most(size: float, dtype: torch.dtype) -> None:
    states = (torch.randn(4, 5, 6, 32, dtype=torch.float64) * size).to(dtype)
    integers, scales = quantize_columns(states)
    assert integers.dtype == torch.int8 and scales.dtype == torch.float32
    peaks = states.abs().amax(dim=-1, keepdim=True)
    assert torch.equal(scales, peaks.float() / 127)
    is_peak = (states.abs() == peaks) & (scales > 0)
    assert (integers[is_peak].abs() == 127).all() and (integers.int().abs() <= 127).all()
    error = (integers.double() * scales.double() - states.double()).abs()
    assert (error <= scales.double() / 2 * (1 + 1e-5)).all()


def test_rounding_of_halves_zeros_and_what_is_no_number() -> None:
    states = torch.tensor(
        [
            [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5],
            [0.0] * 8,
            [torch.inf, 1, 2, 3, 4, 5, 6, 7],
            [-torch.inf, torch.inf, 0, 0, 0, 0, 0, 0],
            [torch.nan, 1, 2, 3, 4, 5, 6, 7],
            [1e-45, 3e-45, 0, 0, 0, 0, 0, 0],
            [4.2e-43, 0, 0, 0, 0, 0, 0, 0],  # 300 steps of float32, with a scale of 2
        ]
    )[None, None]
    integers, scales = quantize_columns(states)
    assert integers[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -126, 126]
    assert integers[0, 0, 1].tolist() == [0] * 8 and scales[0, 0, 1] == 0
    restored = integers * scales
    assert restored[0, 0, 2:5].isnan().all() and integers[0, 0, 6, 0] == 127
    assert (restored[0, 0, 5] - states[0, 0, 5]).abs().max() <= 1e-44


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_columns_do_not_depend_on_the_pieces(little_room: None, dtype: torch.dtype) -> None:
    keys, values = randn(23, dtype=dtype), randn(23, dtype=dtype)
    whole, pieces = QuantizedReservedLayer(), QuantizedReservedLayer()
    outputs = whole.update(keys, values)
    for part in zip(keys.split(3, dim=2), values.split(3, dim=2)):
        last = pieces.update(*part)
    assert all(map(torch.equal, outputs, last)) and last[0].dtype == last[1].dtype == dtype
    for name, states in (("key", keys), ("value", values)):
        integers, scales = quantize_columns(states)
        assert torch.equal(getattr(pieces, f"{name}_integers"), integers)
        assert torch.equal(getattr(pieces, f"{name}_scales"), scales.squeeze(-1))


def test_integers_and_scales_lie_head_by_head_in_place() -> None:
    layer = fill(QuantizedReservedLayer(), 20)
    capacity = reserve_columns(20)
    tensors = ("key_integers", "key_scales", "value_integers", "value_scales")
    places = [getattr(layer, name).data_ptr() for name in tensors]
    fill(layer, 3)
    layer.crop(-2)
    layer.append(randn(1), randn(1))
    assert [getattr(layer, name).data_ptr() for name in tensors] == places
    for integers, scales in (tensors[:2], tensors[2:]):
        shape = (HEADS * capacity * DIM, capacity * DIM, DIM, 1)
        assert getattr(layer, integers).stride() == shape
        assert getattr(layer, scales).stride() == (HEADS * capacity, capacity, 1)
        assert getattr(layer, scales).shape == (ROWS, HEADS, 22)


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"assign", "copy"}))
def test_operations_on_rounded_columns(little_room: None, name: str) -> None:
    layer, twin = QuantizedReservedLayer(), DynamicLayer()
    twin.update(*layer.update(randn(9), randn(9)))
    for i in range(4):
        for each in (layer, twin):
            OPERATIONS[name](each, i)
        assert equal(layer, twin) and layer.get_seq_length() == twin.get_seq_length()
        new = fill(QuantizedReservedLayer(), 1 + i, layer.keys.shape[0])
        layer.append(new.keys, new.values)
        twin.update(new.keys, new.values)
        assert torch.allclose(layer.keys, twin.keys, atol=1e-6)
        twin.keys, twin.values = layer.keys, layer.values


def test_a_rounded_layer_takes_what_is_assigned() -> None:
    layer = fill(QuantizedReservedLayer(), 5)
    snapshot = (layer.keys, layer.values)
    fill(layer, 3)
    layer.keys, layer.values = snapshot[0].requires_grad_(), snapshot[1]
    assert layer.get_seq_length() == 5 and not layer.keys.requires_grad
    assert torch.allclose(layer.keys, snapshot[0], atol=1e-6)
    assert torch.allclose(layer.values, snapshot[1], atol=1e-6)


def test_autocast_may_give_two_types() -> None:
    layer = QuantizedReservedLayer()
    keys, values = layer.update(randn(3), randn(3, dtype=torch.bfloat16))
    assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16)


def test_rounding_refuses_gradients() -> None:
    model = build_model(num_layers=1)
    with pytest.raises(ValueError, match=r"passes no gradients on.*torch\.no_grad"):
        model(torch.tensor([PROMPT]), past_key_values=ChatGLMCache(bits=8))


def test_rounded_caches_take_half_the_memory() -> None:
    layer = QuantizedReservedLayer()
    keys = torch.randn(1, 2, 64, 128).bfloat16()
    layer.append(keys, keys)
    held = layer.key_integers.nbytes + layer.key_scales.nbytes
    assert held == keys.nbytes * (128 + 4) // 256


@pytest.mark.parametrize("chunk", [1, 3])
def test_logits_behind_a_rounded_cache_are_near(chunk: int) -> None:
    model = build_model(spread=1)
    ids = torch.tensor([[*PROMPT, *range(20, 32)]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        outputs = model(ids[:, : len(PROMPT)], past_key_values=ChatGLMCache(bits=8))
        logits = [outputs.logits]
        for new in ids[:, len(PROMPT) :].split(chunk, dim=1):
            outputs = model(new, past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
    difference = (torch.cat(logits, dim=1) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("method", ["beams", "drafts"])
def test_generation_with_a_rounded_cache(little_room: None, method: str) -> None:
    """Beams are exact over the integers' own numbers, and drafts give what single steps give."""
    model = build_model(**LIVELY)
    ids = torch.tensor([PROMPT])

    class Rounding(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            rounded = [torch.mul(*quantize_columns(x)) for x in (key_states, value_states)]
            return super().update(*rounded, *args, **kwargs)

    twin = DynamicCache()
    twin.layer_class_to_replicate = Rounding
    expected = model.generate(ids, past_key_values=twin, **SHORT, **METHODS[method])
    cache = ChatGLMCache(bits=8)
    answer = model.generate(ids, past_key_values=cache, **SHORT, **METHODS[method])
    assert torch.equal(answer, expected)
    if method == "drafts":
        steps = {"past_key_values": ChatGLMCache(bits=8), **METHODS["greedy"]}
        length = ids.shape[1] + NEW_TOKENS  # transformers 4.56 drafts one token too many
        assert torch.equal(answer[:, :length], model.generate(ids, **SHORT, **steps))
        assert len(set(answer[0].tolist())) > len(set(PROMPT)) + 4


@pytest.mark.parametrize("bits", [None, 8])
def test_no_step_of_a_model_moves_the_cache(bits: int | None) -> None:
    """Nothing in a forward pass, nor in drafts, holds on to what a step has read."""
    model = build_model(**LIVELY)
    cache = ChatGLMCache(bits=bits)
    with torch.no_grad():
        model(torch.tensor([PROMPT]), past_key_values=cache)

    def places() -> list[int]:
        names = ("key_integers", "key_scales") if bits else ("keys", "values")
        return [getattr(layer, name).data_ptr() for layer in cache.layers for name in names]

    before = places()
    ids = torch.tensor([[*PROMPT, 9]])
    ids = model.generate(ids, past_key_values=cache, **SHORT, **METHODS["drafts"])
    assert places() == before and cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("bits", [None, 8])
def test_extended_caches_give_what_they_hold(bits: int | None) -> None:
    cache = ChatGLMCache(bits=bits)
    for _ in range(2):
        past = extend_cache(cache, 1, KeyValues(randn(3), randn(3)))
    assert len(cache) == 2 and cache.layers[0].get_seq_length() == 0
    assert past.key.dtype == (torch.float32 if bits is None else torch.int8) == past.value.dtype
    keys, values = past.as_floats(torch.float32)
    assert torch.equal(keys, cache.layers[1].keys) and torch.equal(values, cache.layers[1].values)


def test_columns_that_the_caller_writes() -> None:
    layer, twin = fill(ReservedLayer(), 5), DynamicLayer()
    twin.update(layer.keys, layer.values)
    place = layer.keys.data_ptr()
    for count in (1, 2, reserve_columns(5)):
        new = (randn(count), randn(count))
        for tensor, columns in zip(layer.extend(count), new):
            tensor[:, :, -count:] = columns
        twin.update(*new)
        assert equal(layer, twin)
        assert (layer.keys.data_ptr() == place) == (layer.keys.shape[2] <= reserve_columns(5))


def test_only_layers_with_room_and_columns_are_decoded_in_one_call() -> None:
    list_reserved_layers = import_from_package("chatglm.cpu.decoding_step").list_reserved_layers
    cache = ChatGLMCache()
    assert list_reserved_layers(None, 1) is None and list_reserved_layers(cache, 1) is None
    cache.update(randn(1), randn(1), 1)
    assert list_reserved_layers(cache, 2) is None  # the first has no columns
    cache.update(randn(1), randn(1), 0)
    assert list_reserved_layers(cache, 2) == cache.layers
    assert list_reserved_layers(cache, 3) is None
    cache.reset()
    assert list_reserved_layers(cache, 1) is None
    rounded, plain = ChatGLMCache(bits=8), DynamicCache()
    for other in (rounded, plain):
        other.update(randn(1), randn(1), 0)
    assert list_reserved_layers(rounded, 1) == rounded.layers
    assert list_reserved_layers(plain, 1) is None
    cache.update(randn(1), randn(1), 0)
    cache.layers = [cache.layers[0], rounded.layers[0]]
    assert list_reserved_layers(cache, 2) is None  # a row has one kind


def test_append_columns_keeps_both() -> None:
    past, new = randn(3), randn(2)
    assert torch.equal(append_columns(past, new), torch.cat((past, new), dim=2))
