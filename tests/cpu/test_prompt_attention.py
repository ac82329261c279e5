"""Prompts attend by a kernel as exactly as torch does, and know nothing of their company."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b.cache_chatglm import KeyValues
from chatglm_6b.modeling_chatglm import attend as model_attend
from conftest import build_model, pad_rows

from chatglm.cpu import prompt_attention
from chatglm.cpu.amx import ask_for_tiles
from chatglm.cpu.compiler import find_compiler
from chatglm.cpu.prompt_attention import attend

PAD, MASK, GMASK, SOP = 3, 300, 301, 304
HALVES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
SDPA: Any = SimpleNamespace(_attn_implementation="sdpa")

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs llvmlite")


def make_module(head_dim: int) -> Any:
    return SimpleNamespace(config=SDPA, scaling=head_dim**-0.5, layer_idx=0)


def draw_states(
    *shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 2
) -> tuple[torch.Tensor, KeyValues]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    return query * spread, KeyValues(key, value)


def attend_exactly(module: Any, query: torch.Tensor, past: KeyValues, mask: Any) -> torch.Tensor:
    """Return `(B, S, N, D)` in float64."""
    scores = query.double() @ past.key.double().transpose(-1, -2) * module.scaling
    scores = scores if mask is None else scores + mask.double()
    return (scores.softmax(dim=-1) @ past.value.double()).transpose(1, 2)


def build_bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def measure_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def play_tiles(monkeypatch: pytest.MonkeyPatch, has_tiles: bool) -> None:
    """Multiply with tile registers or without, where the processor has them."""
    if has_tiles and not has_tile_registers():
        pytest.skip("needs tile registers of halves")
    monkeypatch.setattr(prompt_attention, "ask_for_tiles", lambda: has_tiles)


def has_tile_registers() -> bool:
    compiler = find_compiler()
    assert compiler is not None
    return "+amx-bf16" in compiler.processor.features.split(",") and ask_for_tiles()


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("dtype", list(HALVES))
@pytest.mark.parametrize("length", [1, 9, 31, 129, 300])
def test_errors_are_no_larger_than_torchs(
    length: int, dtype: torch.dtype, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_tiles(monkeypatch, has_tiles)
    module = make_module(64)
    query, past = draw_states(2, 3, length, 64, dtype=dtype)
    hidden = torch.zeros(length, length, dtype=torch.bool)
    hidden[: length // 2] = torch.ones_like(hidden).triu(1)[: length // 2]
    bias = build_bias(hidden, dtype)[None, None]
    found = attend(module, query, past, bias, False)
    assert found is not None
    exact = attend_exactly(module, query, past, bias)
    torchs = torch.nn.functional.scaled_dot_product_attention(query, *past[:2], attn_mask=bias)
    limit = {torch.float32: 3e-6, torch.float16: 2.5e-4, torch.bfloat16: 2.2e-3}[dtype]
    assert found[0].dtype == dtype and found[0].shape == (2, length, 3, 64)
    error = measure_error(found[0], exact)
    assert error < limit
    if dtype != torch.float32:  # float32 sums of another order differ by their last bits
        assert error <= 1.05 * measure_error(torchs.transpose(1, 2), exact)


@pytest.mark.parametrize("dtype", list(HALVES))
def test_hidden_keys_count_for_nothing(dtype: torch.dtype) -> None:
    module, length = make_module(32), 200
    query, past = draw_states(1, 2, length, 32, dtype=dtype)
    hidden = torch.rand(length, length, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden.fill_diagonal_(False)
    bias = build_bias(hidden[None, None], dtype)
    found = attend(module, query, past, bias, False)
    assert found is not None
    exact = attend_exactly(module, query, past, bias)
    assert measure_error(found[0], exact) < 3e-3
    past.key[:, :, -1], hidden[:-1, -1] = 50.0, True  # what nobody else sees may be anything
    changed = attend(module, query, past, build_bias(hidden[None, None], dtype), False)
    exact = attend_exactly(module, query, past, build_bias(hidden[None, None], dtype))
    assert changed is not None and measure_error(changed[0][:, :-1], exact[:, :-1]) < 3e-3


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("dtype", list(HALVES))
def test_a_row_is_the_same_bits_wherever_its_pads_are(
    dtype: torch.dtype, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_tiles(monkeypatch, has_tiles)
    module = make_module(32)
    draw = random.Random(0)
    for seed in range(12):
        length, room = draw.randint(1, 150), draw.choice([0, 1, 7, 60, 140])
        query, past = draw_states(1, 2, length, 32, dtype=dtype, seed=seed)
        hidden = torch.zeros(length, length, dtype=torch.bool)
        hidden[:-1, -1] = True
        alone = attend(module, query, past, build_bias(hidden[None, None], dtype), False)
        total = length + room
        places = sorted(draw.sample(range(total), length))
        if seed % 3:  # pads on the left, mostly
            places = list(range(room, total))
        wide = torch.full((2, 2, total, 32), 7.0, dtype=dtype)
        padded = [
            wide.clone().index_copy(2, torch.tensor(places), torch.cat((x, x)))
            for x in (query, past.key, past.value)
        ]
        outer = torch.ones(2, 1, total, total, dtype=torch.bool)
        outer[:, 0, torch.tensor(places)[:, None], torch.tensor(places)] = hidden
        found = attend(module, padded[0], KeyValues(*padded[1:]), build_bias(outer, dtype), False)
        assert alone is not None and found is not None
        assert torch.equal(found[0][1, places], alone[0][0]), (length, room)
        assert found[0].isfinite().all()


def test_pads_see_all_alike_as_in_the_original() -> None:
    module, total = make_module(32), 40
    query, past = draw_states(1, 2, total, 32, dtype=torch.float32)
    hidden = torch.zeros(1, 1, total, total, dtype=torch.bool)
    hidden[..., :5], hidden[:, :, :5] = True, True
    found = attend(module, query, past, build_bias(hidden, torch.float32), False)
    mean = past.value.mean(dim=2)[0]  # (N, D)
    assert found is not None
    torch.testing.assert_close(found[0][0, :5], mean.expand(5, 2, 32))


def test_threads_change_nothing() -> None:
    module = make_module(128)
    query, past = draw_states(1, 4, 300, 128, dtype=torch.float16)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(attend(module, query, past, None, False))
    torch.set_num_threads(threads)
    assert all(x is not None and torch.equal(x[0], found[0][0]) for x in found)


def test_what_torch_has_to_see_is_left_to_it() -> None:
    module = make_module(32)
    query, past = draw_states(1, 2, 20, 32, dtype=torch.float32)
    assert attend(module, query, past, None, False) is not None
    assert attend(module, query, past, None, True) is None
    assert attend(module, query.requires_grad_(), past, None, False) is None
    query = query.detach()
    assert attend(module, query.double(), past, None, False) is None
    odd, odd_past = draw_states(1, 2, 20, 20, dtype=torch.float32)
    assert attend(make_module(20), odd, odd_past, None, False) is None
    eager = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"), scaling=1.0)
    assert attend(eager, query, past, None, False) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(module, query, past, None, False) is None


def test_a_changed_mask_is_looked_at_again() -> None:
    module = make_module(32)
    query, past = draw_states(1, 2, 20, 32, dtype=torch.float32)
    bias = torch.zeros(1, 1, 20, 20)
    before = attend(module, query, past, bias, False)
    bias[..., :-1, -1] = torch.finfo(torch.float32).min
    after = attend(module, query, past, bias, False)
    exact = attend_exactly(module, query, past, bias)
    assert before is not None and after is not None
    assert measure_error(after[0], exact) < 1e-6 < measure_error(before[0], exact)


def draw_prompt(draw: random.Random) -> list[int]:
    words = [draw.randint(5, 290) for _ in range(draw.randint(1, 60))]
    answer = [draw.randint(5, 290) for _ in range(draw.randint(0, 4))]
    return [*words, draw.choice([MASK, GMASK]), SOP, *answer]


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_prompt_in_a_padded_batch_is_a_prompt_alone(bits: int) -> None:
    model, draw = build_model().quantize(bits), random.Random(bits)
    for _ in range(6):
        rows = [draw_prompt(draw) for _ in range(draw.randint(2, 5))]
        padded = torch.tensor(pad_rows(rows, "left"))
        with torch.no_grad():
            together = model(padded, attention_mask=(padded != PAD).long()).logits
            for row, found in zip(rows, together):
                alone = model(torch.tensor([row])).logits[0]
                difference = (found[-len(row) :] - alone).abs().max() / alone.abs().max()
                assert difference <= 1e-5


def test_the_model_asks_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    kernel = prompt_attention._run
    monkeypatch.setattr(prompt_attention, "_run", lambda *x: [asked.append(1), kernel(*x)][1])
    query, past = draw_states(1, 2, 20, 32, dtype=torch.float32)
    model_attend(make_module(32), query, past, None, False)
    assert asked == [1]
