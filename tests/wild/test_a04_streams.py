"""A4: what a stream has yielded is never withdrawn, and its end is what `chat` answers.

`stop=[" well."]` showed "I am doing well" and then "I am doing"; `[[训练时` was shown and
replaced; a comma became a wide one after it was yielded.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b.answer_text_chatglm import finish_answer, settle_answer
from chatglm_6b.conversation_chatglm import ChatMixin
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
from test_a03_stop_texts import TEXTS
from transformers import PreTrainedTokenizerBase

STOPS = st.lists(TEXTS.filter(bool), max_size=2)


def check_growth(stream: list[str], answer: str) -> None:
    """Each text begins with the one before it, and the last one is the answer."""
    assert stream[-1] == answer
    for earlier, later in itertools.pairwise(stream):
        assert later.startswith(earlier)


def check_streams(model: Any, tokenizer: Any, **options: Any) -> None:
    answer, history = model.chat(tokenizer, "hi", [("a", "b")], **options)
    pairs = list(model.stream_chat(tokenizer, "hi", [("a", "b")], **options))
    check_growth([text for text, _ in pairs], answer)
    assert [rounds for _, rounds in pairs] == [[("a", "b"), ("hi", text)] for text, _ in pairs]
    parts = list(model.stream_chat(tokenizer, "hi", [("a", "b")], deltas=True, **options))
    assert "".join(part for part, _ in parts) == answer
    assert parts[-1][1] == history
    assert all(part for part, _ in parts) or len(parts) == 1


@settings(max_examples=200, deadline=None)
@given(TEXTS, STOPS, st.sampled_from(GENERATIONS), st.integers(1, 3))
@example("I am doing well.", [" well."], "chatglm-6b", 1)
@example("[[训练时间]]", [], "chatglm-6b-v0", 1)
@example("", [], "chatglm-6b", 1)
def test_texts_only_grow(text: str, stops: list[str], generation: str, step: int) -> None:
    tokenizer = load_tokenizer(generation)
    ids = encode(tokenizer, text) or [tokenizer.eop_token_id]
    check_streams(ScriptedModel(tokenizer, ids, step), tokenizer, stop=stops)


@settings(max_examples=200, deadline=None)
@given(st.data(), STOPS, st.sampled_from(GENERATIONS), st.integers(1, 3))
def test_any_ids_only_grow(data: Any, stops: list[str], generation: str, step: int) -> None:
    """Image ids, control tokens, halves of characters, and pieces that no text has side by side."""
    tokenizer = load_tokenizer(generation)
    first = tokenizer.num_image_tokens
    bytes_of_text = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]
    marks = [i for c in " .,!?:;'[]\n" for i in encode(tokenizer, c)]
    choices = st.one_of(
        st.integers(first, first + len(tokenizer) - 1),
        st.sampled_from(bytes_of_text),
        st.sampled_from(marks),
        st.integers(0, first + 20),
    )
    ids = data.draw(st.lists(choices, min_size=1, max_size=16))
    check_streams(ScriptedModel(tokenizer, ids, step), tokenizer, stop=stops)


@pytest.mark.parametrize("alphabet", [" '.nt", " 'se,", " 'rv?", "好, '!", "a:[好 "])
@pytest.mark.parametrize("cleans", [True, False])
def test_every_short_text_only_grows(alphabet: str, cleans: bool) -> None:
    """All texts of six characters, whatever spaces the tokenizer then drops."""
    clean: Any = PreTrainedTokenizerBase.clean_up_tokenization
    clean = (lambda text, clean=clean: clean(SimpleNamespace(), text)) if takes_self() else clean
    grown = {"": ""}
    for text in map("".join, itertools.product(alphabet, repeat=6)):
        for end in range(1, 7):
            raw = text[:end]
            if raw not in grown:
                decoded = (clean(raw) if cleans else raw).lstrip(" ")
                grown[raw] = settle_answer(decoded, [])
                assert grown[raw].startswith(grown[raw[:-1]])
                assert finish_answer(decoded, []).startswith(grown[raw])


def takes_self() -> bool:
    """Whether transformers' clean-up is a method, as since 5, or a function."""
    return not isinstance(PreTrainedTokenizerBase.__dict__["clean_up_tokenization"], staticmethod)


@pytest.mark.parametrize("seed", range(6))
def test_real_answers_only_grow(seed: int) -> None:
    model, tokenizer = embedded_model(), embedded_tokenizer()
    question = ("你好", "What is water?", "你能做什么？")[seed % 3]
    stop = [None, ["，", "."], [" the", "的"]][seed % 3]
    options: dict[str, Any] = {"max_new_tokens": 30, "stop": stop}

    def stream(**more: Any) -> list[str]:
        torch.manual_seed(seed)
        talk = model.stream_chat(tokenizer, question, **options, **more)
        return [text for text, _ in talk]

    torch.manual_seed(seed)
    answer = model.chat(tokenizer, question, **options)[0]
    texts = stream()
    check_growth(texts, answer)
    assert "".join(stream(deltas=True)) == answer
    assert len(answer) < 8 or len(set(texts)) > 3  # it does come bit by bit


def test_little_is_held_back() -> None:
    """A letter is shown at once, and so is a space once something stands behind it."""
    shown = [settle_answer("Say yes, or no!"[:n], [" never"]) for n in range(1, 16)]
    assert shown == [
        *("S", "Sa", "Say", "Say", "Say y", "Say ye", "Say yes", "Say yes"),
        *("Say yes", "Say yes, o", "Say yes, or", "Say yes, or", "Say yes, or", "Say yes, or no"),
        "Say yes, or no",
    ]


def test_a_stream_that_is_closed_keeps_what_it_yielded() -> None:
    tokenizer = load_tokenizer("chatglm-6b")
    model = ScriptedModel(tokenizer, encode(tokenizer, "one two three"))
    stream = model.stream_chat(tokenizer, "hi", deltas=True)
    assert next(stream) == ("one", [("hi", "one")])
    stream.close()
    assert model.said == 1


def test_tidying_is_one_rule() -> None:
    assert ChatMixin.process_response(" a,好 ") == finish_answer(" a,好 ", [])
