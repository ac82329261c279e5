"""Where tokens stand in a text: spans of golden kinds, of fuzzed texts, of batches and pairs."""

import unicodedata
from typing import Any

import pytest
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

VOCABULARY = str(ROOT / "ice_text.model")
LATE = ChatGLMTokenizer(VOCABULARY, num_image_tokens=0)
FIRST = ChatGLMTokenizer(VOCABULARY, num_image_tokens=9)
LOWER = ChatGLMTokenizer(VOCABULARY, num_image_tokens=0, do_lower_case=True)
SPACED = ChatGLMTokenizer(VOCABULARY, num_image_tokens=0, remove_space=True)
SPACES = {"<n>": "\n", "<|tab|>": "\t", "\u2581": " "}
MARKS = ("[MASK]", "<sop>", "<eop>", "<n>", "\u2581", "\ufdd0", "\ud800", "[gMASK]<sop>", "\ufb01")
signs = st.sampled_from(
    [*MARKS, " ", "  ", "\n", "\t", " " * 83, "\u3000", "\u0130", "e\u0301", "１２"]
)
texts = st.lists(signs | st.text(max_size=6), max_size=8).map("".join)
quick = settings(deadline=None, max_examples=80)


def place(tokenizer: Any, text: str, **options: Any) -> list[tuple[str, str]]:
    """Tokens of a text, without those that close it, each with what it stands for."""
    options = {"add_special_tokens": False, **options}
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    return [(t, text[a:b]) for t, (a, b) in zip(tokens, encoding["offset_mapping"], strict=True)]


def fold(text: str) -> str:
    """A text as the vocabulary normalizes it, without white space and signs that it drops."""
    plain = unicodedata.normalize("NFKC", text)
    return "".join(sign for sign in plain if sign.isprintable() and not sign.isspace())


def test_white_space_bytes_and_marks_have_their_characters() -> None:
    text = "Ａb\n\t  x [MASK]\U00020000"
    placed = place(LATE, text)
    assert [(token, part) for token, part in placed if token in ("<n>", "<|tab|>", "[MASK]")] == [
        ("<n>", "\n"),
        ("<|tab|>", "\t"),
        ("[MASK]", "[MASK]"),
    ]
    assert ("<|blank_2|>", "  ") in placed
    assert [part for token, part in placed if token.startswith("<0x")] == ["\U00020000"] * 4


def test_typed_signs_are_theirs() -> None:
    placed = place(LATE, "a<n>\u2581", split_special_tokens=True)
    assert [part for _, part in placed] == [*"a<n>", *["\u2581"] * 3]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tokenizer", [LATE, FIRST, LOWER, SPACED], ids=["0", "9", "low", "space"])
@quick
@given(text=texts)
@example(text="[gMASK]\ufdd0<sop>a[gMASK]<sop>b[gMASK]\ufdd0<sop>c<\ufdd0eop><eop>")
@example(text="a \u0130 b")
@example(text="\u00bc\x9f")
def test_spans_are_in_order_and_keep_the_ids(
    tokenizer: ChatGLMTokenizer, plain: bool, text: str
) -> None:
    options = {"add_special_tokens": False, "split_special_tokens": plain}
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    assert encoding["input_ids"] == tokenizer(text, **options)["input_ids"]
    assert all(type(index) is int for index in encoding["input_ids"])
    previous = (0, 0)
    for start, end in encoding["offset_mapping"]:
        assert previous[0] <= start <= end <= len(text) and previous[1] <= end
        # Tokens share one character at most, or are the bytes of the same ones.
        assert start >= previous[1] - 1 or (start, end) == previous, (start, end, previous)
        previous = (start, end)


@quick
@given(
    st.lists(st.sampled_from(["你好", "the ", "x=1", "１２", "\ufb01n", "\n", "\t", "   ", "é"]))
)
def test_a_span_is_what_its_piece_says(parts: list[str]) -> None:
    text = "".join(parts)
    placed = place(LATE, text)
    for token, part in placed:
        if token in SPACES or token.startswith("<|blank_"):
            assert not part.strip() and (token == "\u2581" or part == SPACES.get(token, part))
        elif (
            not token.startswith("<0x") and "\ufb01" not in text
        ):  # the last of its pieces has a ligature
            assert fold(part) == fold(token.replace("\u2581", " "))
    encoding = LATE(text, return_offsets_mapping=True, add_special_tokens=False)
    covered = {place for span in encoding["offset_mapping"] for place in range(*span)}
    assert not fold("".join(sign for place, sign in enumerate(text) if place not in covered))


@quick
@given(texts, texts, st.integers(6, 12), st.sampled_from(["left", "right"]))
def test_batches_carry_spans_through_truncation_and_padding(
    first: str, second: str, length: int, side: str
) -> None:
    options = {"truncation": True, "max_length": length, "padding": "max_length"}
    batch = LATE([first, second], padding_side=side, return_offsets_mapping=True, **options)
    assert batch["input_ids"] == LATE([first, second], padding_side=side, **options)["input_ids"]
    for text, ids, spans in zip((first, second), batch["input_ids"], batch["offset_mapping"]):
        alone = LATE(text, return_offsets_mapping=True, truncation=True, max_length=length)
        kept = len(alone["input_ids"])
        left = 0 if side == "right" else len(ids) - kept
        assert spans[left : left + kept] == alone["offset_mapping"]
        assert set(spans[:left] + spans[left + kept :]) <= {(0, 0)}


def test_pairs_words_and_tensors() -> None:
    pair = LATE("ab", "cd", return_offsets_mapping=True)
    answer = LATE("cd", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert pair["offset_mapping"][-1 - len(answer) :] == [*answer, (0, 0)]
    words = LATE(["ab", "cd"], is_split_into_words=True, return_offsets_mapping=True)
    assert [words["offset_mapping"][0][0], words["offset_mapping"][-3][1]] == [0, 2]
    tensors = LATE(["ab"], return_offsets_mapping=True, return_tensors="pt")
    assert tensors["offset_mapping"].shape == (*tensors["input_ids"].shape, 2)


def test_what_has_no_offsets_is_refused() -> None:
    for inputs, options in (([[5, 6]], {}), ("ab", {"return_overflowing_tokens": True})):
        with pytest.raises(ValueError, match="return_offsets_mapping goes with texts"):
            LATE(inputs, return_offsets_mapping=True, **options)
    with pytest.raises(ValueError, match="tokenize=False"):
        LATE("ab", return_offsets_mapping=True, markup="all")
