"""A3: a stop text that an answer shows cuts it there, however the text came about.

Stop texts were compared with what the tokenizer decodes, before punctuation is widened beside
Chinese characters and the training time is filled in: `stop=["，"]` never matched.
"""

from typing import Any

import pytest
import torch
from chatglm_6b.answer_text_chatglm import finish_answer, has_settled_stop
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_model import (
    GENERATIONS,
    ScriptedModel,
    embedded_model,
    embedded_tokenizer,
    encode,
    load_tokenizer,
)

PIECES = (
    *(
        "好",
        "的",
        "年",
        "a",
        "n",
        "B",
        "7",
        ",",
        "!",
        "?",
        ":",
        ";",
        "，",
        "。",
        "'",
        ".",
        "\n",
        "\t",
    ),
    *(" ", "  ", "[", "]", "[[训练时间]]", "[[训练", "n't", "'s", "'ve", "𠀀", "é", "👋"),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
NARROW = tuple(",!?:;")


def talk(model: Any, tokenizer: Any, **options: Any) -> tuple[str, list[str]]:
    """What `chat` says, and what a stream yields on its way there."""
    answer = model.chat(tokenizer, "hi", **options)[0]
    return answer, [text for text, _ in model.stream_chat(tokenizer, "hi", **options)]


def expected_cuts(shown: str, decoded: str, stop: str) -> set[str]:
    """Where the answer may end: at the stop text as shown, or before that as it was written."""
    cuts = {shown[: shown.index(stop)].strip()}
    if stop in decoded:  # counts too, and so it always did
        cuts.add(finish_answer(decoded[: decoded.index(stop)], []))
    return cuts


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("好,的。", "，", "好"),
        ("好,的。", ",", "好"),
        ("问:什么", "问：", ""),
        ("对吗?是", "？", "对吗"),
        ("a,的", "，", "a"),
        ("a,的", "的", "a，"),
        ("于[[训练时间]]训练", "2023年", "于"),
        ("于[[训练时间]]训练", "23", "于20"),
        ("于[[训练时间]]训练", "训练时间", "于[["),
        ("好,的。", "，的", "好"),
        ("好,的。", ",的", "好"),
        ("I am doing well.", " well.", "I am doing"),
    ],
)
def test_what_is_shown_stops(generation: str, text: str, stop: str, expected: str) -> None:
    tokenizer = load_tokenizer(generation)
    model = ScriptedModel(tokenizer, encode(tokenizer, text) * 3)
    answer, stream = talk(model, tokenizer, stop=[stop])
    assert (answer, stream[-1]) == (expected, expected)
    assert model.said <= len(model.ids) // 3 + 2


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.data(), st.sampled_from(GENERATIONS), st.integers(1, 4))
@example("好,的 , 好", None, "chatglm-6b", 1)
def test_any_part_of_a_shown_answer_stops(text: str, data: Any, generation: str, step: int) -> None:
    tokenizer = load_tokenizer(generation)
    model = ScriptedModel(tokenizer, encode(tokenizer, text) or [tokenizer.eop_token_id], step)
    shown = model.chat(tokenizer, "hi")[0]
    decoded = tokenizer.decode(model.ids)
    ranges = [(i, j) for i in range(len(shown)) for j in range(i + 1, len(shown) + 1)]
    if data is not None and len(ranges) > 12:
        ranges = data.draw(st.lists(st.sampled_from(ranges), max_size=12))
    for i, j in ranges:
        stop = shown[i:j]
        answer, stream = talk(model, tokenizer, stop=stop)
        assert answer in expected_cuts(shown, decoded, stop)
        assert stream[-1] == answer


@pytest.mark.parametrize("seed", range(4))
def test_every_part_of_real_answers_stops(seed: int) -> None:
    model, tokenizer = embedded_model(), embedded_tokenizer()
    question = ("你好", "What is water?", "你能做什么？", "Say hello, please!")[seed]

    def ask(**options: Any) -> tuple[str, list[str]]:
        torch.manual_seed(seed)
        answer = model.chat(tokenizer, question, max_new_tokens=24, **options)[0]
        torch.manual_seed(seed)
        stream = model.stream_chat(tokenizer, question, max_new_tokens=24, **options)
        return answer, [text for text, _ in stream]

    shown = ask()[0]
    assert len(shown) > 10
    places = torch.randint(len(shown), (8, 2), generator=torch.Generator().manual_seed(seed))
    for i, j in places.sort(dim=1).values.tolist():
        stop = shown[i : j + 1]
        answer, stream = ask(stop=[stop])
        assert answer == stream[-1]
        assert answer in expected_cuts(shown, shown, stop)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS.filter(bool), st.sampled_from(GENERATIONS), st.integers(1, 3))
def test_generation_ends_where_the_stream_knows_of_the_stop(
    text: str, stop: str, generation: str, step: int
) -> None:
    """The criterion reads the end of the answer only, and sees all that the whole one shows."""
    tokenizer = load_tokenizer(generation)
    model = ScriptedModel(tokenizer, encode(tokenizer, text * 2 + "end"), step)
    model.chat(tokenizer, "hi", stop=stop)
    ends = [*range(step, len(model.ids), step), len(model.ids)]
    known = [has_settled_stop(tokenizer.decode(model.ids[:end]), [stop]) for end in ends]
    assert model.said == ends[known.index(True) if True in known else -1]
