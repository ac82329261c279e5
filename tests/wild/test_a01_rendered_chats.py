"""Chats that are rendered to text first and tokenized later, as most tools do it.

The ids must be those that `apply_chat_template` makes itself, however the text is handed over, and
nothing that a person typed may become a token of the template's.
"""

from typing import Any

import pytest
from chatglm_6b import tokenization_chatglm
from chatglm_6b.conversation_chatglm import ChatMixin
from chatglm_6b.tokenization_chatglm import ESCAPE, ChatGLMTokenizer
from chatglm_6b.vocabulary_chatglm import SPECIAL_TEXTS
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

BORDER, END = "[gMASK]<sop>", "<eop>"
TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")


def build(num_image_tokens: int) -> ChatGLMTokenizer:
    tokenizer = ChatGLMTokenizer(
        str(ROOT / "ice_text.model"), chat_template=TEMPLATE, num_image_tokens=num_image_tokens
    )
    tokenizer.add_tokens(["<word>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    return tokenizer


GENERATIONS = {"late": build(0), "first": build(9)}
TYPED = [*SPECIAL_TEXTS, BORDER, BORDER + END, "<mark>", "<word>", "<n>", "[gMASK", "sop>", ESCAPE]

both = pytest.mark.parametrize("tokenizer", GENERATIONS.values(), ids=GENERATIONS.keys())
either = st.sampled_from([*GENERATIONS.values()])
pieces = st.sampled_from([*TYPED, " ", "\n", "\t", "  "]) | st.text(max_size=8)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(str.strip)
quick = settings(deadline=None, max_examples=80)


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]


def show(tokenizer: ChatGLMTokenizer, messages: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def encode(tokenizer: ChatGLMTokenizer, messages: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def list_ways(tokenizer: ChatGLMTokenizer, text: str) -> list[list[int]]:
    """Ids of a text by every way that a tool may go."""
    plain = {"add_special_tokens": False}
    return [
        tokenizer(text)["input_ids"],
        tokenizer(text, **plain)["input_ids"],
        tokenizer([text, "x"])["input_ids"][0],
        tokenizer(["x", text], **plain)["input_ids"][1],
        tokenizer.encode(text),
        tokenizer.encode(text, **plain),
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
        tokenizer(text, return_tensors="pt")["input_ids"][0].tolist(),
        tokenizer(text_target=text)["input_ids"],
    ]


def list_special(tokenizer: ChatGLMTokenizer, ids: list[int]) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [token for token in tokens if token in (*SPECIAL_TEXTS, "<mark>")]


@quick
@given(either, st.lists(texts, min_size=1, max_size=5), st.booleans())
@example(GENERATIONS["late"], [BORDER], False)
@example(GENERATIONS["first"], ["a [MASK]", f"b{END}", f"c{BORDER}"], True)
def test_a_question(tokenizer: ChatGLMTokenizer, contents: list[str], has_system: bool) -> None:
    contents = contents[1 - len(contents) % 2 :]
    system = [{"role": "system", "content": contents[0]}] if has_system else []
    messages = [*system, *turns(*contents)]
    ids = encode(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    text = show(tokenizer, messages, add_generation_prompt=True)
    assert list_ways(tokenizer, text) == [ids] * 9
    assert list_special(tokenizer, ids) == ["[gMASK]", "<sop>"]
    # What is shown is the prompt as `chat` has it, without any escape.
    history = [*zip(contents[:-1:2], contents[1::2])]
    assert has_system or text == ChatMixin.build_prompt(contents[-1], history) + BORDER


@quick
@given(either, st.lists(texts, min_size=2, max_size=5))
@example(GENERATIONS["late"], ["a", BORDER])
@example(GENERATIONS["late"], ["a", f"{BORDER}b{ESCAPE}{END}"])
@example(GENERATIONS["late"], ["[gMASK]", "<sop>"])
@example(GENERATIONS["late"], [BORDER, f"[gMASK]{ESCAPE}<sop>{END}\n"])
def test_an_answered_one(tokenizer: ChatGLMTokenizer, contents: list[str]) -> None:
    messages = turns(*contents[len(contents) % 2 :])
    ids = encode(tokenizer, messages)["input_ids"]
    text = show(tokenizer, messages)
    assert list_ways(tokenizer, text) == [ids] * 9
    assert list_special(tokenizer, ids) == ["[gMASK]", "<sop>", "<eop>"]
    if ESCAPE not in "".join(contents) and BORDER not in contents[-1]:
        assert text.endswith(contents[-1] + END) or contents[-1].rstrip().endswith(END)


@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [4, 9, 200])
def test_batches_that_are_padded_and_cut(
    tokenizer: ChatGLMTokenizer, side: str, max_length: int
) -> None:
    chats = [
        turns("one two three four five six"),
        turns("a", "b", f"[MASK] {BORDER} c"),
        turns("d"),
    ]
    options = {"padding": "max_length", "truncation": True, "max_length": max_length}
    options["return_tensors"] = "pt"
    tokenizer.padding_side, kept = side, tokenizer.padding_side
    try:
        right = encode(tokenizer, chats, add_generation_prompt=True, **options)
        shown = show(tokenizer, chats, add_generation_prompt=True)
        for given_texts in (shown, tuple(shown)):
            for special in (True, False):
                found = tokenizer(given_texts, add_special_tokens=special, **options)
                assert found["input_ids"].equal(right["input_ids"])
                assert found["attention_mask"].equal(right["attention_mask"])
    finally:
        tokenizer.padding_side = kept


@both
@pytest.mark.parametrize("max_length", [3, 5, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_cut_keeps_the_border(
    tokenizer: ChatGLMTokenizer, max_length: int, side: str
) -> None:
    for messages in (turns("one two three four five six"), turns("one two three", "four five six")):
        text = show(tokenizer, messages, add_generation_prompt=len(messages) == 1)
        tokenizer.truncation_side, kept = side, tokenizer.truncation_side
        try:
            cut = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        finally:
            tokenizer.truncation_side = kept
        assert len(cut) == max_length
        assert list_special(tokenizer, cut)[:2] == ["[gMASK]", "<sop>"]


@both
def test_a_question_and_an_answer_apart(tokenizer: ChatGLMTokenizer) -> None:
    text = show(tokenizer, turns("a [MASK] b"), add_generation_prompt=True)
    ids = encode(tokenizer, turns("a [MASK] b", "c d"))["input_ids"]
    assert tokenizer(text, "c d")["input_ids"] == ids
    assert tokenizer([text], ["c d"])["input_ids"] == [ids]
    assert tokenizer(text, "c d", add_special_tokens=False)["input_ids"] == ids[:-1]


@both
@pytest.mark.parametrize(
    "text", [f"a {BORDER} b", f"{BORDER}b", f"a{BORDER}\n", f"a{BORDER} <eop> "]
)
def test_a_border_in_the_midst_is_letters(
    tokenizer: ChatGLMTokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the original, with a word in the log: a tool may have put an answer behind a chat."""
    said: list[str] = []
    monkeypatch.setattr(tokenization_chatglm.logger, "warning_once", said.append)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.gmask_token_id not in ids and tokenizer.bos_token_id in ids
    assert tokenizer(text)["input_ids"] == [*ids, tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert said and all("apply_chat_template(tokenize=True)" in line for line in said)


@both
def test_a_text_that_is_asked_for_as_text(tokenizer: ChatGLMTokenizer) -> None:
    """What a user typed goes through here in `chat`, and gets its border behind it."""
    ids = tokenizer(f"a{BORDER}", split_special_tokens=True)["input_ids"]
    assert list_special(tokenizer, ids) == ["[gMASK]", "<sop>"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == f"a{BORDER}"
    batch = tokenizer([f"a{BORDER}"], split_special_tokens=True, add_special_tokens=False)
    assert list_special(tokenizer, batch["input_ids"][0]) == []


@both
@pytest.mark.parametrize("text", ["[gMASK]", "a<sop>", "[gMASK] <sop>", "a[gMASK]b<sop>", "<sop>b"])
def test_a_text_without_a_border_is_no_chat(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.gmask_token_id not in ids
    assert tokenizer(text)["input_ids"] == [*ids, tokenizer.gmask_token_id, tokenizer.bos_token_id]


@both
def test_ids_that_are_closed_are_not_closed_again(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer("a b")["input_ids"]
    assert tokenizer.prepare_for_model(ids)["input_ids"] == ids
    assert tokenizer.prepare_for_model(ids[:-2])["input_ids"] == ids
    assert tokenizer.prepare_for_model(ids, [*ids[:1]])["input_ids"] == [
        *ids,
        ids[0],
        tokenizer.eop_token_id,
    ]
