"""The geometry, against the original's own masks and against a slow twin written token by token."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b.masking_chatglm import (
    SpecialIds,
    accept_hidden_mask,
    align_token_columns,
    build_geometry,
    fold_attention_mask,
    locate_new_tokens,
    move_padding_left,
)
from golden_model import find_golden, load_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

LATE = find_golden("model_late")
IDS = SpecialIds(bos=304, mask=300, gmask=301)
MASK, GMASK, SOP, PAD = 300, 301, 304, 3


def slow_geometry(row: list[int], keep: list[int]) -> tuple[list[list[int]], list[list[bool]]]:
    """Write out the rules of the module for one row of one prompt."""
    real = [i for i, k in enumerate(keep) if k]
    tokens = [row[i] for i in real]
    border = tokens.index(SOP) if SOP in tokens else len(tokens)
    positions, blocks = [0] * len(row), [0] * len(row)
    hidden = [[True] * len(row) for _ in row]
    for rank, i in enumerate(real):
        known = tokens[: rank + 1]
        blank = max(border - 1, 0)
        blank = known.index(MASK) if MASK in known else blank
        blank = known.index(GMASK) if GMASK in known else blank
        positions[i] = rank if rank < border else blank
        blocks[i] = max(rank - border + 1, 0)
        for other_rank, j in enumerate(real):
            hidden[i][j] = not (other_rank < border or other_rank <= rank)
    return [positions, blocks], hidden


TOKENS = st.sampled_from([5, 6, 7, MASK, GMASK, SOP, PAD])
ROWS = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.tuples(TOKENS, st.integers(0, 1)), min_size=n, max_size=n)
)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_any_row_equals_the_slow_twin(cells: list[tuple[int, int]]) -> None:
    row, keep = [list(column) for column in zip(*cells)]
    geometry = build_geometry(torch.tensor([row]), torch.tensor([keep]), IDS)
    positions, hidden = slow_geometry(row, keep)
    assert geometry.attention_mask.shape == (1, 1, len(row), len(row))
    assert geometry.attention_mask[0, 0].tolist() == hidden
    for i in (i for i, k in enumerate(keep) if k):
        assert geometry.position_ids[0, :, i].tolist() == [axis[i] for axis in positions]


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 8))
def test_decoding_continues_the_prompt(cells: list[tuple[int, int]], past: int) -> None:
    row, keep = [list(column) for column in zip(*cells)]
    row = [GMASK, SOP, *row] if past < 2 else [5] * (past - 1) + [GMASK, SOP, *row]
    past = row.index(SOP) + 1
    ids, mask = torch.tensor([row]), torch.tensor([[1] * past + keep])
    whole = build_geometry(ids, mask, IDS)
    step = build_geometry(ids, mask, IDS, past_length=past)
    is_real = mask[0, past:] != 0
    assert torch.equal(
        step.position_ids[..., is_real], whole.position_ids[..., past:][..., is_real]
    )
    assert torch.equal(step.attention_mask, whole.attention_mask[:, :, past:])


@pytest.mark.parametrize("name", ["tiny2d", "tiny1d"])
def test_masks_and_positions_equal_the_original(name: str) -> None:
    if not (LATE / f"{name}.npz").exists():
        pytest.skip("needs ../shared/golden")
    arrays = load_arrays(LATE, name)
    num_positions = 1 if name == "tiny1d" else 2
    prompts = json.loads((LATE / f"{name}.json").read_text())["prompts"]
    for prompt, ids in prompts.items():
        geometry = build_geometry(torch.tensor([ids]), None, IDS, num_positions=num_positions)
        expected = arrays[f"{prompt}/prep_position_ids"].view(geometry.position_ids.shape)
        assert torch.equal(geometry.position_ids, expected), prompt
        assert torch.equal(geometry.attention_mask, arrays[f"{prompt}/prep_attention_mask"]), prompt


@pytest.mark.parametrize(
    "rows",
    [
        [[PAD, PAD, 5, GMASK, SOP, 6], [5, 6, 7, GMASK, SOP, 6]],
        [[5, GMASK, SOP, 6, PAD, PAD]],
        [[PAD, 5, GMASK, SOP, 6, PAD]],
    ],
)
def test_padding_does_not_move_a_token(rows: list[list[int]]) -> None:
    ids = torch.tensor(rows)
    geometry = build_geometry(ids, (ids != PAD).long(), IDS)
    for row, positions in zip(rows, geometry.position_ids):
        tokens = [token for token in row if token != PAD]
        alone = build_geometry(torch.tensor([tokens]), None, IDS)
        places = [i for i, token in enumerate(row) if token != PAD]
        assert torch.equal(positions[:, places], alone.position_ids[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_two_dimensional_masks_of_any_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([[PAD, 5, GMASK, SOP]])
    expected = build_geometry(ids, torch.tensor([[0, 1, 1, 1]]), IDS)
    actual = build_geometry(ids, torch.tensor([[0, 1, 1, 1]]).to(dtype), IDS)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("row", [[5, 6], [SOP], [GMASK], [SOP, GMASK, SOP], [PAD]])
@pytest.mark.parametrize("keep", [0, 1])
def test_no_input_is_refused(row: list[int], keep: int) -> None:
    mask = torch.full((1, len(row)), keep)
    geometry = build_geometry(torch.tensor([row]), mask, IDS)
    assert geometry.position_ids.min() >= 0
    assert bool(geometry.attention_mask.all()) is (keep == 0)


def test_a_mask_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) but the tokens so far have \(1, 2\)"):
        build_geometry(torch.tensor([[5, SOP]]), torch.ones(1, 3), IDS)


def test_reserved_columns_are_hidden() -> None:
    ids = torch.tensor([[5, GMASK, SOP]])
    mask = build_geometry(ids, None, IDS, key_length=6).attention_mask
    assert mask.shape == (1, 1, 3, 6)
    assert mask[..., 3:].all()
    assert torch.equal(mask[..., :3], build_geometry(ids, None, IDS).attention_mask)


def test_new_tokens_of_one_step_do_not_see_ahead() -> None:
    """Without <sop> all is context, but drafted tokens must see what one a step would see."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    step = build_geometry(ids, None, IDS, past_length=3)
    assert step.attention_mask[0, 0].tolist() == [[False] * 4 + [True], [False] * 5]


def test_a_blank_written_by_the_model_counts_from_there_on() -> None:
    ids = torch.tensor([[5, MASK, 6, SOP, 7, GMASK, 8]])
    positions = build_geometry(ids, None, IDS).position_ids[0, 0].tolist()
    assert positions == [0, 1, 2, 1, 1, 5, 5]


def test_one_axis_counts_on_in_prompts_and_holds_in_steps() -> None:
    ids = torch.tensor([[5, 6, GMASK, SOP, 7]])
    whole = build_geometry(ids, None, IDS, num_positions=1).position_ids
    step = build_geometry(ids, None, IDS, past_length=4, num_positions=1).position_ids
    assert (whole.tolist(), step.tolist()) == ([[[0, 1, 2, 3, 4]]], [[[2]]])


class FakeCache:
    """A cache as far as masking looks at it."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def test_a_cache_remembers_its_tokens() -> None:
    cache: Any = FakeCache(0)
    prompt, answer = torch.tensor([[5, GMASK, SOP]]), torch.tensor([[6, 7]])
    locate_new_tokens(prompt, None, cache, IDS)
    cache.length = 3
    step = locate_new_tokens(answer, None, cache, IDS)
    whole = build_geometry(torch.cat((prompt, answer), dim=1), None, IDS)
    assert torch.equal(step.position_ids, whole.position_ids[..., 3:])
    cache.length = 4  # cropped, as after a rejected draft
    again = locate_new_tokens(torch.tensor([[8]]), None, cache, IDS)
    assert again.position_ids.tolist() == [[[1], [3]]]
    assert cache.noted_tokens.tolist() == [[5, GMASK, SOP, 6, 8]]


@settings(max_examples=300, deadline=None)
@given(ROWS, st.booleans(), st.sampled_from([1, 2]), st.integers(0, 2))
def test_a_step_of_one_token_finds_what_any_step_would(
    cells: list[tuple[int, int]], has_mask: bool, axes: int, num_virtual: int
) -> None:
    """On a CPU such steps are worked out in plain numbers; None stands for a mask of no hidden."""
    row, keep = [list(column) for column in zip(*cells)]
    ids = torch.tensor([row, row[1:] + row[:1]])
    mask = torch.tensor([keep, [1] * len(keep)]) if has_mask else None
    past = len(row) - 1
    cache = SimpleNamespace(is_compileable=False, get_seq_length=lambda: past + num_virtual)
    cache.noted_tokens, cache.num_virtual_tokens = ids[:, :-1], num_virtual
    found = locate_new_tokens(ids[:, -1:], mask, cache, IDS, axes)
    expected = build_geometry(ids, mask, IDS, past, num_positions=axes)
    assert torch.equal(found.position_ids, expected.position_ids)
    hidden = found.attention_mask
    if hidden is None:
        assert not expected.attention_mask.any()
    else:
        assert not hidden[..., :num_virtual].any()
        assert torch.equal(hidden[..., num_virtual:], expected.attention_mask)


def test_a_step_that_sees_all_has_no_mask() -> None:
    ids = torch.tensor([[5, GMASK, SOP, 7], [PAD, GMASK, SOP, 7]])
    for rows, has_mask in (([0], False), ([0, 1], True)):
        cache = SimpleNamespace(is_compileable=False, get_seq_length=lambda: 3)
        cache.noted_tokens = ids[rows, :3]
        geometry = locate_new_tokens(ids[rows, 3:], (ids[rows] != PAD).long(), cache, IDS)
        assert (geometry.attention_mask is not None) is has_mask


def test_unknown_columns_of_a_cache_are_virtual_tokens() -> None:
    prompt = torch.tensor([[5, GMASK, SOP]])
    alone = build_geometry(prompt, None, IDS)
    for mask in (None, torch.ones(1, 3), torch.ones(1, 5)):
        behind = locate_new_tokens(prompt, mask, FakeCache(2), IDS)
        assert torch.equal(behind.position_ids, alone.position_ids)
        assert not behind.attention_mask[..., :2].any()
        assert torch.equal(behind.attention_mask[..., 2:], alone.attention_mask)


def test_a_cache_of_other_rows_is_refused() -> None:
    cache: Any = FakeCache(0)
    locate_new_tokens(torch.tensor([[5, SOP]]), None, cache, IDS)
    cache.length = 2
    with pytest.raises(ValueError, match="holds 1 rows but the new tokens have 2"):
        locate_new_tokens(torch.tensor([[6], [7]]), None, cache, IDS)


def test_folding_a_mask_finds_the_real_columns() -> None:
    ids = torch.tensor([[PAD, PAD, 5, GMASK, SOP, 6], [5, 6, 7, GMASK, SOP, 6]])
    keep = (ids != PAD).long()
    assert torch.equal(fold_attention_mask(build_geometry(ids, keep, IDS).attention_mask), keep)


def test_accepted_masks() -> None:
    hidden = torch.tensor([[[[False, True]]]])
    assert accept_hidden_mask(None) is None
    assert accept_hidden_mask(torch.ones(1, 2)) is None
    assert torch.equal(accept_hidden_mask(hidden), hidden)
    assert torch.equal(accept_hidden_mask(hidden[:, 0]), hidden)
    assert torch.equal(accept_hidden_mask(hidden * -1e4), hidden)
    with pytest.raises(ValueError, match=r"4-D attention_mask must be boolean .* torch\.int64"):
        accept_hidden_mask(hidden.long())


def test_padding_moves_left_and_the_order_stays() -> None:
    ids = torch.tensor([[PAD, 5, 6, PAD], [7, 8, PAD, PAD], [1, 2, 4, 5]])
    moved, mask = move_padding_left(ids, (ids != PAD).long())
    assert moved.tolist() == [[PAD, PAD, 5, 6], [PAD, PAD, 7, 8], [1, 2, 4, 5]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


def test_unknown_columns_are_filled_on_the_left() -> None:
    assert align_token_columns(torch.tensor([[5]]), 3).tolist() == [[-1, -1, 5]]
    assert align_token_columns(torch.tensor([[5, 6]]), 1).tolist() == [[5, 6]]
