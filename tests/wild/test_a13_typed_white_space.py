"""Letters that SentencePiece alone makes white space of: where text is asked for they stay text.

`<n>`, `<|tab|>` and `<|blank_2|>` to `<|blank_80|>` are pieces of the vocabulary, and U+2581 is its
sign of a space. Its normalizer also makes them of wide, raised and invisible characters.
"""

import unicodedata
from typing import Any

import pytest
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from chatglm_6b.vocabulary_chatglm import WHITESPACE
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
LATE, FIRST = (
    ChatGLMTokenizer(str(ROOT / "ice_text.model"), num_image_tokens=images, chat_template=TEMPLATE)
    for images in (0, 9)
)
both = pytest.mark.parametrize("tokenizer", [LATE, FIRST], ids=["late", "first"])
either = st.sampled_from([LATE, FIRST])
quick = settings(deadline=None, max_examples=100)

SIGN = "\u2581"
NEAR = ["<n", "n>", "<|blank_1|>", "<|blank_81|>", "<|tab|", "|>", "<", ">", "<0x41>", "</n>"]
typed = st.sampled_from([*WHITESPACE, *NEAR, SIGN, "\n", "\t", " x", "  ", "a", "你好"])
# SentencePiece drops a space in front of a text, here as in the original.
texts = st.lists(typed, max_size=8).map("".join).filter(lambda text: not text.startswith(" x"))
# One character for each of those that are written, as SentencePiece reads it.
LIKENESS = {"<": "＜﹤", ">": "＞﹥", "n": "ｎⁿ𝐧", "|": "｜", "t": "ｔ𝓽", "3": "３③³", "_": "＿"}
HIDDEN = "\x01\x02\x08\x0b\x1f\x7f\x9f"


def encode(tokenizer: ChatGLMTokenizer, text: str, way: str) -> list[int]:
    """Ids of a user's text, without what closes an input."""
    if way == "option":
        options: dict[str, Any] = {"split_special_tokens": True, "add_special_tokens": False}
        return tokenizer(text, **options)["input_ids"]
    messages = [{"role": "user", "content": text}]
    options = {"add_generation_prompt": True}
    if way == "template":
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"][
            :-2
        ]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(shown)["input_ids"][:-2]


def list_white_space(tokenizer: ChatGLMTokenizer, ids: list[int]) -> list[str]:
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in WHITESPACE]


ways = pytest.mark.parametrize("way", ["option", "template", "shown"])


@both
@ways
@pytest.mark.parametrize("frame", ["{}", "a{}b", "what is {} ?", "a\n{}\n\tb", "{0}{0}", "<{}>"])
def test_what_is_typed_is_shown(tokenizer: ChatGLMTokenizer, way: str, frame: str) -> None:
    for piece in (*WHITESPACE, SIGN, "<0x41>", "<0xE4><0xBD><0xA0>"):
        text = frame.format(piece)
        ids = encode(tokenizer, text, way)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        white = {"\n": ["<n>"], "\t": ["<|tab|>"]}
        assert list_white_space(tokenizer, ids) == [n for sign in text for n in white.get(sign, [])]


@quick
@given(either, texts.filter(str.strip), st.sampled_from(["option", "template", "shown"]))
@example(LATE, "<n> x", "option")
@example(LATE, "a  <|blank_2|>  b", "shown")
@example(LATE, f"{SIGN}\n{SIGN}", "option")
def test_any_mixture(tokenizer: ChatGLMTokenizer, text: str, way: str) -> None:
    ids = encode(tokenizer, text, way)
    shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert shown == text
    assert encode(tokenizer, shown, way) == ids


@both
@pytest.mark.parametrize("way", ["option", "template"])
def test_look_alikes(tokenizer: ChatGLMTokenizer, way: str) -> None:
    """Wide and raised letters become plain ones, as in any text, and no white space."""
    for piece in ("<n>", "<|tab|>", "<|blank_3|>"):
        for place, letter in enumerate(piece):
            for other in LIKENESS.get(letter, "") + HIDDEN:
                text = piece[:place] + other + piece[place + (other not in HIDDEN) :]
                ids = encode(tokenizer, f"a {text} b", way)
                assert list_white_space(tokenizer, ids) == [], text
                plain = unicodedata.normalize("NFKC", text)
                plain = "".join(filter(str.isprintable, plain))
                assert tokenizer.decode(ids) == f"a {plain} b"


def test_no_character_of_all_is_overlooked() -> None:
    """Whatever SentencePiece reads as one of the signs around a piece, or as nothing."""
    for frame in ("{}n>", "<{}n>", "<n{}", "<n{}>", "<{}>"):
        for start in range(0, 0x30000, 0x1000):
            signs = [chr(code) for code in range(start, start + 0x1000)]
            signs = [s for s in signs if s not in "\n\t" and not "\ud800" <= s <= "\udfff"]
            kept = [frame.format(sign) for sign in signs]
            raw = LATE._processor.encode(kept, out_type=str)
            suspects = [text for text, pieces in zip(kept, raw) if "<n>" in pieces]
            for text in suspects:
                assert "<n>" not in LATE.tokenize(text, split_special_tokens=True), ascii(text)


@both
def test_other_tags_are_tokens_as_before(tokenizer: ChatGLMTokenizer) -> None:
    """Only what would be white space is parted; a text beside it is not."""
    beside = "<div> a < b </n> x > y <|blank_81|>"
    parted = encode(tokenizer, f"{beside} <n>", "option")
    alone = tokenizer(beside, add_special_tokens=False)["input_ids"]
    assert parted[: len(alone)] == alone


@both
def test_a_bare_text_is_read_as_the_original_read_it(tokenizer: ChatGLMTokenizer) -> None:
    for text, shown in (("a<n>b", "a\nb"), ("a<|tab|>b", "a\tb"), ("x<|blank_3|>y", "x   y")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == shown
    ids = tokenizer("a\u2581b", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "a b"


def test_an_added_token_beside_it() -> None:
    tokenizer = ChatGLMTokenizer(str(ROOT / "ice_text.model"), num_image_tokens=0)
    tokenizer.add_tokens(["<word>", f"{SIGN}zzq"])
    ids = tokenizer(f"<n><word>{SIGN}zzq{SIGN}", split_special_tokens=True)["input_ids"][:-2]
    assert {*tokenizer.get_added_vocab().values()} >= {ids[-4], ids[-5]}
    assert tokenizer.decode(ids) == f"<n><word>{SIGN}zzq{SIGN}"
