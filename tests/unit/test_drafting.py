"""Drafts change no answer, and stop where they do not pay."""

import random
from typing import Any

import pytest
import torch
from chatglm_6b import decoding_chatglm
from chatglm_6b.decoding_chatglm import RowDecoder, stream_answer
from chatglm_6b.drafting_chatglm import PromptLookup
from conftest import build_model
from transformers import LogitsProcessor, LogitsProcessorList

PROMPT = [5, 197, 86, 97, 5, 197, 11, 5, 197, 86, 97, 301, 304]
NEW = 40
OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "top_k": 3, "repetition_penalty": 1.1},
    {"eos_token_id": [11, 305]},
    {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}},
]


class Passes(list[int]):
    """How many tokens each step of rows read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decode = decoding_chatglm.decode_rows

        def note(model: Any, rows: Any) -> Any:
            self.append(sum(len(row.pending) for row in rows))
            return decode(model, rows)

        monkeypatch.setattr(decoding_chatglm, "decode_rows", note)
        # A clock by which every step takes as long as another.
        ticks = iter(range(10**6))
        monkeypatch.setattr(decoding_chatglm.time, "perf_counter", lambda: float(next(ticks)))


def answer(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return [*stream_answer(model, PROMPT, {"max_new_tokens": NEW, **options})][-1]


@pytest.mark.parametrize("fields", [{}, {"position_encoding_2d": False}], ids=["2-D", "1-D"])
@pytest.mark.parametrize("spread", [1.0, 5.0], ids=["echo", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drafts_change_no_answer(
    options: dict[str, Any],
    spread: float,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_model(spread=spread, **fields)
    plain, state = answer(model, **options), torch.get_rng_state()
    passes = Passes(monkeypatch)
    drafted = answer(model, prompt_lookup_num_tokens=6, **options)
    assert drafted.answer_ids == plain.answer_ids
    assert drafted.finish_reason == plain.finish_reason
    assert torch.equal(torch.get_rng_state(), state)  # as many draws
    assert len(drafted.row.input_ids) == drafted.num_ids
    assert drafted.row.num_cached < drafted.num_ids
    if spread == 1.0 and not options:
        assert max(passes) > 4 and len(passes) < NEW / 3


def test_a_processor_is_asked_of_the_answer_alone() -> None:
    """Not of drafts that were not taken: a grammar moves on with what it is asked about."""

    class Note(LogitsProcessor):
        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.asked.append(input_ids[0].tolist())
            return scores

    model, plain, drafted = build_model(spread=2), Note(), Note()
    answer(model, logits_processor=LogitsProcessorList([plain]))
    answer(model, logits_processor=LogitsProcessorList([drafted]), prompt_lookup_num_tokens=5)
    assert drafted.asked == plain.asked


def test_drafts_end_with_the_room() -> None:
    """The last step asks for no more tokens than there may be."""
    model = build_model(spread=1)
    for limit in range(1, 12):
        drafted = answer(model, prompt_lookup_num_tokens=8, max_new_tokens=limit)
        assert len(drafted.answer_ids) == limit and drafted.finish_reason == "length"


def test_rows_in_company_are_not_held_up_by_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(spread=1)
    passes = Passes(monkeypatch)
    decoder = RowDecoder(model)
    both = [decoder.add(PROMPT, max_new_tokens=n, prompt_lookup_num_tokens=6) for n in (12, 30)]
    while any(one.reading is not None for one in both):
        decoder.step()
    while len(decoder.answers) == 2:
        passes.clear()
        decoder.step()
        assert passes == [2]
    while decoder.answers:
        decoder.step()
    alone = [answer(model, max_new_tokens=n).answer_ids for n in (12, 30)]
    assert [drafted.answer_ids for drafted in both] == alone
    assert max(passes) > 2


def simulate(text: list[int], cost: float, begun: int = 20, most: int = 10) -> float:
    """How many times as fast a text is said, if each token more adds `cost` to a step of 1."""
    lookup, known, seconds = PromptLookup(most), text[:begun], 0.0
    while len(known) < len(text):
        drafts = lookup.propose(known, len(text) - len(known) - 1)
        following = text[len(known) :]
        taken = 0
        while taken < len(drafts) and drafts[taken] == following[taken]:
            taken += 1
        step = 1 + cost * len(drafts)
        lookup.learn(len(drafts), taken, step)
        known = known + following[: taken + 1]
        seconds += step
    assert known == text
    return (len(text) - begun) / seconds


def repeat(length: int, share: float, seed: int = 0) -> list[int]:
    """A text in which pieces of what was said come again, with a `share` of tokens changed."""
    source = random.Random(seed)
    text = [source.randrange(5000) for _ in range(60)]
    while len(text) < length:
        start = source.randrange(len(text) - 30)
        piece = text[start : start + 30]
        text += [source.randrange(5000) if source.random() < share else token for token in piece]
    return text


@pytest.mark.parametrize("cost", [0.02, 0.07, 0.2])
def test_text_that_repeats_is_said_sooner(cost: float) -> None:
    gains = {share: simulate(repeat(400, share), cost, begun=60) for share in (0.0, 0.05)}
    assert gains[0.0] > 1.8 and gains[0.05] > 1.5, gains


@pytest.mark.parametrize("cost", [0.07, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["new", "few words", "torn"])
def test_other_text_is_hardly_later(kind: str, cost: float) -> None:
    """Text without repeats, of few words in any order, and of repeats that break off at once."""
    source = random.Random(1)
    text = {
        "new": [source.randrange(10**6) for _ in range(400)],
        "few words": [source.randrange(12) for _ in range(400)],
        "torn": [token for n in range(100) for token in (1, 2, 3, 10 + n)],
    }[kind]
    assert simulate(text, cost) > 0.97


def test_the_longest_match_decides() -> None:
    lookup = PromptLookup(3)
    lookup.learn(0, 0, 1.0)
    #       behind 1 2 3 came 4, behind 9 2 3 the last time 8
    assert lookup.propose([1, 2, 3, 4, 5, 9, 2, 3, 8, 6, 1, 2, 3], 9) == []  # no savings yet
    for _ in range(60):
        lookup.learn(0, 0, 1.0)
    lookup.num_seen, lookup.places = 0, {}
    assert lookup.propose([1, 2, 3, 4, 5, 9, 2, 3, 8, 6, 1, 2, 3], 9) == [4, 5, 9]
    assert lookup.propose([1, 2, 3, 4, 5, 9, 2, 3, 8, 6, 1, 2, 3, 7], 9) == []
