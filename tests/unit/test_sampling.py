"""Which tokens may be drawn: the same as transformers says, found another way."""

import functools
from typing import Any

import pytest
import torch
from chatglm_6b import drawing_chatglm, generation_chatglm
from chatglm_6b.drawing_chatglm import draw_token
from chatglm_6b.generation_chatglm import (
    HighestLogitsWarper,
    InvalidScoreLogitsProcessor,
    NucleusLogitsWarper,
    replace_warpers,
)
from conftest import build_model
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GMASK, SOP = 301, 304
NO_IDS = torch.zeros(1, 1, dtype=torch.long)
NO_NUMBER = {"nan": float("nan"), "inf": float("inf")}
KINDS = ("random", "flat", "peaked", "equal", "tied", "bfloat16", "forbidden", "nan", "inf")


def draw_rows(kind: str, size: int, generator: torch.Generator) -> Tensor:
    """Return three rows of scores of a kind."""
    rows = torch.randn(3, size, generator=generator) * 3
    if kind == "flat":
        rows /= 100
    elif kind == "peaked":
        rows[:, size // 2] += 20
    elif kind == "equal":
        rows = torch.ones_like(rows)
    elif kind == "tied":
        rows = rows.round()
    elif kind == "bfloat16":
        rows = rows.bfloat16().float()
    elif kind == "forbidden":
        rows[:, size // 2 + 1 :] = float("-inf")
        rows[1, 1:] = float("-inf")
        rows[2] = float("-inf")
    elif kind in NO_NUMBER:
        rows[1, size // 2] = NO_NUMBER[kind]
    return rows


def assert_same(scores: Tensor, top_p: float, **options: Any) -> Tensor:
    """Hold our answer against that of transformers, which may not change the scores either."""
    given = scores.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
        expected = TopPLogitsWarper(top_p, **options)(NO_IDS, given)
    actual = NucleusLogitsWarper(top_p, **options)(NO_IDS, scores)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert torch.equal(scores.nan_to_num(), given.nan_to_num())
    return actual


@pytest.mark.parametrize("size", [1, 2, 17, 320, 5003])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nucleus_is_that_of_transformers(kind: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = draw_rows(kind, size, generator)
    for top_p in (0.0, 1e-6, 0.3, 0.7, 0.95, 0.999999, 1.0):
        for min_tokens_to_keep in {1, min(2, size), min(300, size)}:
            for scores in (rows, rows[1:2]):
                assert_same(scores, top_p, min_tokens_to_keep=min_tokens_to_keep)


@pytest.mark.parametrize("size", [1, 2, 17, 320, 5003])
@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_are_those_of_transformers(kind: str, size: int) -> None:
    rows = draw_rows(kind, size, torch.Generator().manual_seed(size))
    for top_k in (1, 2, 50, 6000):
        for scores in (rows, rows[1:2]):
            given = scores.clone()
            expected = TopKLogitsWarper(top_k, filter_value=-9.0)(NO_IDS, given)
            actual = HighestLogitsWarper(top_k, filter_value=-9.0)(NO_IDS, scores)
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
            assert torch.equal(scores.nan_to_num(), given.nan_to_num())


@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "tied", "forbidden"])
def test_tokens_are_drawn_as_torch_draws_them(kind: str) -> None:
    """And the next draw too: the generator is left where torch leaves it."""
    source, ours, torchs = (torch.Generator().manual_seed(seed) for seed in (1, 2, 2))
    for size in (1, 5, 320, 9001):
        for row in draw_rows(kind, size, source)[:2].split(1):
            shares = row.softmax(dim=-1)
            for _ in range(20):
                wanted = int(torch.multinomial(shares, 1, generator=torchs))
                assert draw_token(shares, ours) == wanted
    assert torch.equal(ours.get_state(), torchs.get_state())
    torch.manual_seed(3)
    wanted = int(torch.multinomial(shares, 1))
    torch.manual_seed(3)
    assert draw_token(shares) == wanted


@pytest.mark.parametrize("kind", ["nan", "zeros"])
def test_shares_that_are_none_are_refused_as_torch_refuses_them(kind: str) -> None:
    shares = torch.zeros(1, 9) if kind == "zeros" else torch.full((1, 9), float("nan"))
    with pytest.raises(RuntimeError, match="prob"):
        draw_token(shares)


def test_another_torch_draws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_chatglm, "is_draw_known", lambda: False)
    monkeypatch.setattr(drawing_chatglm, "_draw_first", lambda *args: 99)
    assert draw_token(torch.tensor([[0.0, 1.0, 0.0]])) == 1


def test_what_is_cut_gets_the_given_value() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0]])
    assert assert_same(scores, 0.5, filter_value=-7.0).tolist() == [[-7.0, 5.0, -7.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_are_left_to_transformers(dtype: torch.dtype) -> None:
    rows = draw_rows("random", 320, torch.Generator().manual_seed(1)).to(dtype)
    assert assert_same(rows, 0.7).dtype == dtype


@pytest.mark.parametrize("kind", ["random", "equal", "tied"])
def test_nothing_is_sorted_with_its_columns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw_rows(kind, 5003, torch.Generator().manual_seed(2))
    expected = assert_same(rows, 0.7)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("sorted with columns")

    monkeypatch.setattr(torch, "sort", refuse)
    assert torch.equal(NucleusLogitsWarper(0.7)(NO_IDS, rows), expected)


def test_only_transformers_own_warper_is_replaced() -> None:
    class Other(TopPLogitsWarper):
        """Somebody's own."""

    given = LogitsProcessorList(
        [
            MinPLogitsWarper(0.5),
            TopPLogitsWarper(0.3, -9.0, 2),
            Other(0.5),
            TopKLogitsWarper(5, -8.0),
        ]
    )
    quick = replace_warpers(given)
    assert (quick[0], quick[2]) == (given[0], given[2])
    assert type(quick[1]) is NucleusLogitsWarper and type(quick[3]) is HighestLogitsWarper
    assert vars(quick[3]) == vars(given[3])
    assert vars(quick[1]) == vars(given[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 9, "temperature": 1.7},
        {"num_return_sequences": 3},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_a_seed_draws_the_tokens_it_drew(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(spread=5)
    prompt = torch.tensor([[5, 197, 86, 5, GMASK, SOP, 5]])
    calls = []
    cut = NucleusLogitsWarper._cut
    monkeypatch.setattr(NucleusLogitsWarper, "_cut", lambda *a: calls.append(1) or cut(*a))
    sampling = {"do_sample": True, "top_p": 0.8, "top_k": 0, "max_new_tokens": 12}
    outputs = []
    for replace in (replace_warpers, lambda processors: processors):
        monkeypatch.setattr(generation_chatglm, "replace_warpers", replace)
        torch.manual_seed(3)
        outputs.append(model.generate(prompt, **{**sampling, **options}).tolist())
        monkeypatch.setattr(NucleusLogitsWarper, "_cut", cut)
    assert calls
    assert outputs[0] == outputs[1]


# --- scores that are no numbers


def test_broken_rows_say_a_space_and_others_stay() -> None:
    scores = torch.tensor(
        [
            [1.0, 2.0, 3.0, 4.0],
            [1.0, float("nan"), 3.0, 4.0],
            [1.0, float("inf"), 3.0, 4.0],
            [float("-inf")] * 4,
            [1.0, float("-inf"), 3.0, 4.0],  # how other processors forbid a token
        ]
    )
    given = scores.clone()
    mended = InvalidScoreLogitsProcessor(2)(torch.zeros(5, 1), scores)
    assert mended[[0, 4]].tolist() == given[[0, 4]].tolist()
    assert mended[1:4].tolist() == [[0.0, 0.0, 5e4, 0.0]] * 3
    assert torch.equal(scores.nan_to_num(), given.nan_to_num())
    whole = InvalidScoreLogitsProcessor(2)(torch.zeros(2, 1), scores[[0, 4]])
    assert whole.tolist() == given[[0, 4]].tolist()


def test_a_broken_row_of_a_batch_ends_alone() -> None:
    model = build_model(spread=5)
    rows = torch.tensor([[5, 6, GMASK, SOP], [7, 8, GMASK, SOP]])
    embeddings = model.get_input_embeddings()(rows)
    embeddings[1] = float("nan")
    processors = LogitsProcessorList([InvalidScoreLogitsProcessor(11)])
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(rows[:1], **greedy)
    for sampling in ({}, {"do_sample": True, "top_k": 1}):
        options = {**greedy, **sampling, "logits_processor": processors}
        outputs = model.generate(rows, inputs_embeds=embeddings, **options)
        assert outputs[1, 4:].tolist() == [11] * 8
        assert torch.equal(outputs[:1], expected)


def test_where_many_tokens_may_be_drawn_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_chatglm, "_draw_first", lambda *args: 99)
    shares = torch.full((1, 10), 0.1)
    assert draw_token(shares) in range(10)
    shares[:, 2:] = 0
    assert draw_token(shares) == 99
