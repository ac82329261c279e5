"""What a forward pass gives, whatever the kernel, the number format, the padding, the inputs."""

import copy
from typing import Any

import pytest
import torch
from chatglm_6b.masking_chatglm import build_geometry
from conftest import build_model, pad_rows
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PAD, MASK, GMASK, SOP = 3, 300, 301, 304
ROWS = [
    [5, 197, 86, 97, 275, GMASK, SOP, 20, 21],
    [115, 98, MASK, 242, SOP, 31],
    [7, MASK, 43, GMASK, SOP],
    [301, 304],
]
STRANGE_ROWS = {
    "no mask token": [5, 6, 7, SOP, 8],
    "no <sop>": [5, 6, GMASK, 7],
    "neither": [5, 6, 7],
    "<sop> alone": [SOP],
    "two <sop>": [5, GMASK, SOP, 6, SOP, 7],
    "<sop> before [gMASK]": [5, SOP, 6, GMASK],
    "pads alone": [PAD, PAD, PAD],
}
DTYPES = [torch.int64, torch.bool, torch.float32]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    difference = (actual.float() - expected).abs()
    limit = tolerance * expected.abs().max()
    assert difference.max() <= limit, f"max {difference.max():.3e}, mean {difference.mean():.3e}"


def forward(model: Any, rows: list[list[int]], **inputs: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(rows), **inputs)


@pytest.mark.parametrize("pre_seq_len", [None, 4])
def test_kernels_agree(pre_seq_len: int | None) -> None:
    model = build_model(pre_seq_len=pre_seq_len)
    rows = pad_rows(ROWS, "both")
    mask = (torch.tensor(rows) != PAD).long()
    logits = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        logits[name] = forward(model, rows, attention_mask=mask).logits
    assert_near(logits["sdpa"], logits["eager"])


def test_the_fused_kernel_is_the_default(tiny_model: Any) -> None:
    assert tiny_model.config._attn_implementation == "sdpa"


def test_attention_weights_under_the_fused_kernel(tiny_model: Any) -> None:
    row = ROWS[0]
    outputs = forward(tiny_model, [row], output_attentions=True)
    hidden = build_geometry(torch.tensor([row]), None, tiny_model.transformer.special_ids)
    assert len(outputs.attentions) == tiny_model.config.num_layers
    for weights in outputs.attentions:
        assert weights.shape == (1, 4, len(row), len(row))
        assert torch.allclose(weights.sum(-1), torch.ones(1, 4, len(row)))
        assert weights.masked_select(hidden.attention_mask).max() == 0
    assert_near(outputs.logits, forward(tiny_model, [row]).logits)
    step = tiny_model(
        torch.tensor([[9]]), past_key_values=outputs.past_key_values, output_attentions=True
    )
    assert step.attentions[0].shape == (1, 4, 1, len(row) + 1)


def test_hidden_states_are_batch_first(tiny_model: Any) -> None:
    base = tiny_model.transformer
    outputs = forward(tiny_model, ROWS[:1] * 2, output_hidden_states=True)
    states = outputs.hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 9, 64)] * 4
    assert torch.equal(states[0], base.word_embeddings(torch.tensor(ROWS[:1] * 2)))
    assert torch.equal(states[-1], forward(base, ROWS[:1] * 2).last_hidden_state)
    assert_near(tiny_model.lm_head(states[-1]), outputs.logits)  # a graph's product is torch's
    assert not torch.allclose(states[-2], states[-1])


def test_nothing_is_kept_that_was_not_asked_for(tiny_model: Any) -> None:
    outputs = forward(tiny_model, ROWS[:1], use_cache=False)
    assert set(outputs.keys()) == {"logits"}
    logits, cache = forward(tiny_model, ROWS[:1], return_dict=False)
    assert_near(logits, outputs.logits)
    assert cache.get_seq_length() == len(ROWS[0])
    assert isinstance(forward(tiny_model.transformer, ROWS[:1], return_dict=False), tuple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_are_what_they_are_alone(tiny_model: Any, side: str, dtype: Any) -> None:
    rows = pad_rows(ROWS, side)
    mask = torch.tensor(rows) != PAD
    logits = forward(tiny_model, rows, attention_mask=mask.to(dtype)).logits
    for row, keep, batch_logits in zip(ROWS, mask, logits):
        assert_near(batch_logits[keep], forward(tiny_model, [row]).logits[0])
    assert logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_original_inputs_of_a_batch(tiny_model: Any, side: str) -> None:
    """A boolean mask for every query, True where hidden, and two positions a token."""
    rows = pad_rows(ROWS, side)
    ids, keep = torch.tensor(rows), torch.tensor(rows) != PAD
    geometry = build_geometry(ids, keep, tiny_model.transformer.special_ids)
    expected = forward(tiny_model, rows, attention_mask=keep).logits[keep]
    for given in (
        geometry._asdict(),
        {"attention_mask": geometry.attention_mask},
        {"attention_mask": geometry.attention_mask[:, 0]},
        {"attention_mask": geometry.attention_mask * -1e4},
        {"attention_mask": keep, "position_ids": geometry.position_ids},
    ):
        assert_near(forward(tiny_model, rows, **given).logits[keep], expected)


def test_the_original_positions_count(tiny_model: Any) -> None:
    """The caller's own positions are used as they are, not worked out again."""
    positions = torch.zeros(1, 2, len(ROWS[0]), dtype=torch.long)
    moved = forward(tiny_model, ROWS[:1], position_ids=positions).logits
    assert not torch.allclose(moved, forward(tiny_model, ROWS[:1]).logits, atol=1e-2)


def test_ranges_of_generic_trainers_do_not(tiny_model: Any) -> None:
    ranges = torch.arange(len(ROWS[0])).unsqueeze(0)
    logits = forward(tiny_model, ROWS[:1], position_ids=ranges).logits
    assert torch.equal(logits, forward(tiny_model, ROWS[:1]).logits)


def test_one_mask_for_all_rows(tiny_model: Any) -> None:
    rows = [ROWS[1], [200, *ROWS[1][1:]]]
    ids = torch.tensor(rows[:1])
    hidden = build_geometry(ids, None, tiny_model.transformer.special_ids).attention_mask
    logits = forward(tiny_model, rows, attention_mask=hidden).logits
    assert_near(logits, forward(tiny_model, rows).logits)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("row", STRANGE_ROWS.values(), ids=STRANGE_ROWS.keys())
def test_strange_rows_are_finite(tiny_model: Any, row: list[int], backend: str) -> None:
    tiny_model.set_attn_implementation(backend)
    rows = [row + [PAD] * (9 - len(row)), ROWS[0]]
    mask = (torch.tensor(rows) != PAD).long()
    batch = forward(tiny_model, rows, attention_mask=mask)
    assert batch.logits.isfinite().all()
    assert forward(tiny_model, [row]).logits.isfinite().all()
    assert_near(batch.logits[1:], forward(tiny_model, [ROWS[0]]).logits)
    if PAD not in row:
        assert_near(batch.logits[:1, : len(row)], forward(tiny_model, [row]).logits)


def test_embeddings_in_place_of_ids(tiny_model: Any) -> None:
    row = ROWS[1]
    embeddings = tiny_model.get_input_embeddings()(torch.tensor([row]))
    expected = forward(tiny_model, [row]).logits
    geometry = build_geometry(torch.tensor([row]), None, tiny_model.transformer.special_ids)
    with torch.no_grad():
        both = tiny_model(torch.tensor([row]), inputs_embeds=embeddings).logits
        placed = tiny_model(inputs_embeds=embeddings, position_ids=geometry.position_ids).logits
        alone = tiny_model(inputs_embeds=embeddings).logits
        other = tiny_model(torch.tensor([row]), inputs_embeds=embeddings * 0).logits
    assert_near(both, expected)
    assert_near(placed, expected)
    assert not torch.allclose(other, expected, atol=1e-2)  # the embeddings count, not the ids
    context = forward(tiny_model, [[5] * len(row)], inputs_embeds=embeddings).logits
    assert_near(alone, context)  # nothing says where an answer would begin


def test_embedded_prompts_go_on_with_ids(tiny_model: Any) -> None:
    row = ROWS[1]
    embeddings = tiny_model.get_input_embeddings()(torch.tensor([row]))
    geometry = build_geometry(torch.tensor([row]), None, tiny_model.transformer.special_ids)
    cache = tiny_model(inputs_embeds=embeddings, position_ids=geometry.position_ids).past_key_values
    expected = forward(tiny_model, [[*row, 9]]).logits[:, -1:]
    moved = geometry.position_ids[..., -1:] + torch.tensor([[[0], [1]]])
    step = forward(tiny_model, [[9]], past_key_values=cache, position_ids=moved).logits
    assert_near(step, expected)


def test_neither_ids_nor_embeddings(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="Pass input_ids or inputs_embeds"):
        tiny_model()


def test_masks_that_do_not_fit(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) but the tokens so far have \(1, 9\)"):
        forward(tiny_model, ROWS[:1], attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="must be boolean"):
        forward(tiny_model, ROWS[:1], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.long))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 8])], ids=str)
def test_some_of_the_logits(tiny_model: Any, kept: Any) -> None:
    logits = forward(tiny_model, ROWS[:1]).logits
    expected = logits[:, -kept:] if isinstance(kept, int) else logits[:, kept]
    assert_near(forward(tiny_model, ROWS[:1], logits_to_keep=kept).logits, expected)


def test_the_logits_of_places(tiny_model: Any) -> None:
    rows = pad_rows(ROWS, "right")
    logits = forward(tiny_model, rows).logits
    places = torch.rand(logits.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.4
    kept = forward(tiny_model, rows, logits_to_keep=places).logits
    assert kept.shape == (int(places.sum()), logits.shape[-1])
    assert_near(kept, logits[places])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near(dtype: torch.dtype, how: str, backend: str) -> None:
    model = build_model(spread=1)
    model.set_attn_implementation(backend)
    rows = pad_rows([*ROWS, [PAD]], "both")
    mask = torch.tensor(rows) != PAD
    expected = forward(model, rows, attention_mask=mask).logits
    if how == "cast":
        model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        logits = forward(model, rows, attention_mask=mask).logits
        step = model.generate(
            torch.tensor(rows), attention_mask=mask.long(), max_new_tokens=3, do_sample=False
        )
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert_near(logits[mask], expected[mask], tolerance)
    assert step.shape[1] == len(rows[0]) + 3


@pytest.mark.parametrize("autocast", [False, True])
def test_a_kernel_of_ones_own(tiny_model: Any, autocast: bool) -> None:
    """It gets finite masks, in whatever format autocast makes it compute."""
    seen = []

    def record(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(mask.to(value.dtype))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording", record)
    tiny_model.set_attn_implementation("recording")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        forward(tiny_model, pad_rows(ROWS, "both"), attention_mask=torch.ones(4, 11).tril())
    assert len(seen) == tiny_model.config.num_layers
    assert all(mask.isfinite().all() and mask.min() < -1e38 for mask in seen)


def test_a_copy_is_a_model_of_its_own(tiny_model: Any) -> None:
    twin = copy.deepcopy(tiny_model)
    expected = forward(tiny_model, ROWS[:1]).logits
    with torch.no_grad():
        tiny_model.transformer.word_embeddings.weight.zero_()
    assert torch.equal(forward(twin, ROWS[:1]).logits, expected)
    assert twin.lm_head.weight is twin.transformer.word_embeddings.weight


def cut(layer: Any, wide: str, narrow: str, rank: int) -> Any:
    """Return what one of two devices holds of a layer by the tensor-parallel plan."""
    part = copy.deepcopy(layer)
    for parameter in part.get_submodule(wide).parameters():
        parameter.data = parameter.data.chunk(2)[rank]
    columns = part.get_submodule(narrow)
    columns.weight.data = columns.weight.data.chunk(2, dim=1)[rank]
    columns.bias.data *= rank  # added once
    return part


def test_layers_can_be_cut_in_two(tiny_model: Any) -> None:
    """A layer counts its heads by what it holds, and the parts' outputs add up to the whole's."""
    block = tiny_model.transformer.layers[1]
    torch.nn.init.normal_(block.attention.dense.bias)
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    places = torch.arange(20).view(2, 2, 5)
    rotary = tiny_model.transformer.rotary_emb(places, torch.float32)
    with torch.no_grad():
        cuts = [cut(block.attention, "query_key_value", "dense", rank) for rank in (0, 1)]
        parts = [part(states, None, rotary)[0] for part in cuts]
        assert_near(sum(parts), block.attention(states, None, rotary)[0])
        cuts = [cut(block.mlp, "dense_h_to_4h", "dense_4h_to_h", rank) for rank in (0, 1)]
        assert_near(sum(part(states) for part in cuts), block.mlp(states))
