"""Rows: a step of many is, for each, what the model alone computes behind the same tokens."""

import random
from typing import Any

import pytest
import torch
from chatglm_6b.cache_chatglm import ChatGLMCache
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.rows_chatglm import PromptReading, Row, decode_rows, read_prompt
from conftest import build_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

# peft asks models by a name that transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

MASK, GMASK, SOP, END = 300, 301, 304, 305
PROMPTS = [
    [5, 197, 86, GMASK, SOP],
    [5, 6, MASK, 8, 9, SOP],
    [5, 6, 7, 8],  # all context, until the model itself writes <sop>
    [5, GMASK, 7, MASK, 9, 10, 11, SOP, 40, 41],
    [9, 8, SOP],
]
SCALING = {"factor": 2.0, "original_max_position_embeddings": 6}
MODELS: dict[str, dict[str, Any]] = {
    "2-D": {},
    "prefix": {"pre_seq_len": 4},
    "1-D": {"position_encoding_2d": False},
    "dynamic": {"rope_scaling": SCALING | {"rope_type": "dynamic"}, "max_sequence_length": 12},
    "linear": {"rope_scaling": SCALING | {"rope_type": "linear"}, "max_sequence_length": 12},
}


@torch.no_grad()
def compute_alone(model: Any, ids: list[int], cache: Any, **options: Any) -> Tensor:
    """The logits `(S, V)` of new tokens behind a cache, by the model as anyone calls it."""
    return model(torch.tensor([ids]), past_key_values=cache, **options).logits[0]


def take_step(model: Any, rows: list[Row], caches: list[Any]) -> None:
    """Decode, and compare with the model alone."""
    pending = [row.pending for row in rows]
    for found, ids, cache in zip(decode_rows(model, rows), pending, caches):
        expected = compute_alone(model, ids, cache)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_kernels", [True, False])
def test_rows_that_join_and_leave_say_what_they_say_alone(name: str, with_kernels: bool) -> None:
    model, draw = build_model(**MODELS[name]), random.Random(7)
    rows: list[Row] = []
    caches: list[Any] = []
    special = [MASK, GMASK, SOP, END]
    for number in range(14):
        if number % 2 == 0 and len(rows) < 5:
            row, logits = read_prompt(model, PROMPTS[number // 2 % len(PROMPTS)])
            caches.append(ChatGLMCache())
            expected = compute_alone(model, row.input_ids, caches[-1], logits_to_keep=1)
            assert torch.equal(logits, expected)
            rows.append(row)
        elif number % 5 == 4:
            gone = draw.randrange(len(rows))
            del rows[gone], caches[gone]
        for row in rows:
            ids = [
                draw.choice([*special, draw.randrange(20, 290)])
                for _ in range(draw.choice((1, 1, 3)))
            ]
            row.append(*ids)
        if with_kernels:
            take_step(model, rows, caches)
        else:
            with kernels_off():
                take_step(model, rows, caches)


@pytest.mark.parametrize("axes", [1, 2])
def test_places_are_kept_token_by_token(axes: int) -> None:
    model = build_model(position_encoding_2d=axes == 2)
    row, _ = read_prompt(model, [5, 6, MASK, 8, SOP, 9])
    places = []
    for token in (20, GMASK, 21):
        row.append(token)
        places.append((row.position, row.block_position))
    blocks = (3, 4, 5) if axes == 2 else (0, 0, 0)
    assert places == list(zip((2, 7, 7), blocks))  # a [gMASK] of the model's own moves the blank
    row.crop(7)
    row.append(22)
    assert (row.position, row.block_position) == (2, 4 if axes == 2 else 0)


def test_a_draft_that_is_not_taken_leaves_nothing_behind() -> None:
    model = build_model()
    row, other = (read_prompt(model, PROMPTS[0])[0] for _ in range(2))
    row.append(30, 31, GMASK, 33)
    decode_rows(model, [row])
    row.crop(len(PROMPTS[0]) + 1)
    other.append(30)
    decode_rows(model, [other])
    for same in (row, other):
        same.append(40)
    found, expected = decode_rows(model, [row]), decode_rows(model, [other])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_read_block_by_block_between_steps(name: str) -> None:
    model = build_model(**MODELS[name])
    row, _ = read_prompt(model, PROMPTS[1])
    reading, advances = PromptReading(model, PROMPTS[3]), 1
    while not reading.advance():
        advances += 1
        row.append(20 + advances)
        decode_rows(model, [row])
    assert advances == model.config.num_layers and reading.advance()
    expected = compute_alone(model, PROMPTS[3], ChatGLMCache(), logits_to_keep=1)
    assert torch.equal(reading.logits, expected)


def test_a_watched_model_is_read_by_passes_of_its_own() -> None:
    model, passes = build_model(), []
    model.transformer.register_forward_hook(lambda *_: passes.append(1))
    reading = PromptReading(model, PROMPTS[0])
    assert reading.advance()
    reading.row.append(7)
    decode_rows(model, [reading.row])
    assert len(passes) == 2


@pytest.mark.parametrize("make", [lambda: ChatGLMCache(bits=8), DynamicCache])
def test_other_caches_that_grow_are_rows_too(make: Any) -> None:
    model = build_model()
    (row, _), alone = read_prompt(model, PROMPTS[0], make()), make()
    compute_alone(model, PROMPTS[0], alone)
    beside, _ = read_prompt(model, PROMPTS[3])
    for token in (7, 8):
        row.append(token)
        beside.append(token)
        expected = compute_alone(model, [token], alone)
        found = decode_rows(model, [beside, row])[1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_row_s_cache_says_which_tokens_it_holds() -> None:
    model = build_model()
    for cache in (None, ChatGLMCache()):
        row, _ = read_prompt(model, PROMPTS[0], cache)
        row.append(7, 8)
        decode_rows(model, [row])
        found = row.cache if cache is None else cache
        assert found.noted_tokens.tolist() == [[*PROMPTS[0], 7, 8]]


def test_adapters_of_layers_act_and_others_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = build_model()
    config = peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    (row, _), cache = read_prompt(adapted, PROMPTS[0]), ChatGLMCache()
    compute_alone(adapted, PROMPTS[0], cache)
    take_after = compute_alone(adapted, [7], cache)
    row.append(7)
    torch.testing.assert_close(decode_rows(adapted, [row])[0], take_after, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        row.append(7)
        plain = decode_rows(adapted, [row])[0]
    assert (plain - compute_alone(adapted, [7], cache)).abs().max() > 1e-2
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"adapter of .*PROMPT_TUNING.*use chat or generate"):
        read_prompt(peft.get_peft_model(build_model(), config), PROMPTS[0])


def test_pads_before_a_prompt_are_left_out() -> None:
    model = build_model()
    row, logits = read_prompt(model, [3, 3, *PROMPTS[0]])
    assert row.input_ids == PROMPTS[0] and row.prompt_length == len(PROMPTS[0])
    assert torch.equal(logits, read_prompt(model, PROMPTS[0])[1])


def test_what_cannot_be_a_step_is_refused() -> None:
    model = build_model()
    row, _ = read_prompt(model, PROMPTS[0])
    with pytest.raises(ValueError, match="Row 0 has no pending token: append one"):
        decode_rows(model, [row])
    row.append(7)
    with pytest.raises(ValueError, match="takes each row once"):
        decode_rows(model, [row, row])
    with pytest.raises(ValueError, match="Row 0 is of another model"):
        decode_rows(build_model(), [row])
    with pytest.raises(ValueError, match="has not been read: use read_prompt"):
        decode_rows(model, [PromptReading(model, PROMPTS[0]).row])
    with pytest.raises(ValueError, match="cannot be cut to 3"):
        row.crop(3)
    with pytest.raises(ValueError, match="needs a token, got 2, all of them pads"):
        read_prompt(model, [3, 3])
    with pytest.raises(ValueError, match="must be empty, got one of 5 columns"):
        read_prompt(model, PROMPTS[0], row.cache)
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="StaticCache, which has a fixed size"):
        read_prompt(model, PROMPTS[0], static)
    assert decode_rows(model, []) == []
    decode_rows(model, [row])  # and none of that has changed the row


def test_a_prompt_is_shared_with_rows_that_have_it_unread() -> None:
    model = build_model()
    row, _ = read_prompt(model, [5, 6, 301, 304])
    other = Row(model, [5, 6, 301, 304])
    other.share_prompt(row)
    for one in (row, other):
        one.append(9)
    apart = [decode_rows(model, [one])[0] for one in (row, other)]
    assert torch.equal(*apart) and other.num_cached == 5
    for wrong in (row, Row(model, [5, 7, 301, 304])):
        with pytest.raises(ValueError, match="needs the same prompt and a row that has read"):
            wrong.share_prompt(read_prompt(model, [5, 6, 301, 304])[0])
