"""What holds for any text and any ids, on the repository's own vocabulary."""

from typing import Any

from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from chatglm_6b.vocabulary_chatglm import SPECIAL_TEXTS, complete_vocabulary
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

VOCABULARY = ROOT / "ice_text.model"
TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
NEW_WORD, NEW_MARK = "<word>", "<mark>"


def build(**arguments: Any) -> ChatGLMTokenizer:
    tokenizer = ChatGLMTokenizer(str(VOCABULARY), chat_template=TEMPLATE, **arguments)
    tokenizer.add_tokens([NEW_WORD])
    tokenizer.add_special_tokens({"additional_special_tokens": [NEW_MARK]})
    return tokenizer


LATE, FIRST = build(num_image_tokens=0), build(num_image_tokens=9)
SPECIAL_IDS = {LATE.convert_tokens_to_ids(text) for text in (*SPECIAL_TEXTS, NEW_MARK)}

marks = st.sampled_from([*SPECIAL_TEXTS, NEW_MARK, NEW_WORD, "<n>", "<|tab|>", "<0x41>", "\ufdd0"])
pieces = st.one_of(st.text(max_size=12), marks, st.sampled_from([" ", "\n", "\t", " " * 81]))
texts = st.lists(pieces, max_size=8).map("".join)
words = st.text(alphabet="abcXYZ019你好天气。the", min_size=1, max_size=6)
gaps = st.sampled_from([" ", "  ", "\n", "\t", "\n\n ", " \n", NEW_WORD, f" {NEW_WORD}", " " * 97])
any_piece = st.integers(0, LATE.vocab_size - 1)
byte_piece = st.integers(LATE.vocab_size - 256, LATE.vocab_size - 1)
either = st.sampled_from([LATE, FIRST])

quick = settings(deadline=None, max_examples=60)


@quick
@given(texts)
def test_text_asked_for_as_text_has_no_special_ids(text: str) -> None:
    for encoding in (
        LATE(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        LATE([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0],
    ):
        assert not SPECIAL_IDS.intersection(encoding)


@quick
@given(either, texts)
def test_decoding_and_encoding_again_changes_nothing_more(
    tokenizer: ChatGLMTokenizer, text: str
) -> None:
    def once(content: str) -> str:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids = tokenizer(content, **options)["input_ids"]
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    twice = once(once(text))
    assert once(twice) == twice


@quick
@given(either, st.lists(st.tuples(words, gaps), max_size=6), words)
def test_white_space_and_added_words_come_back(
    tokenizer: ChatGLMTokenizer, parts: list[tuple[str, str]], last: str
) -> None:
    text = "".join(word + gap for word, gap in parts) + last
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@quick
@given(either, texts, texts)
@example(LATE, "", "<sop>")
def test_ids_are_built_from_parts(tokenizer: ChatGLMTokenizer, prompt: str, answer: str) -> None:
    options = {"add_special_tokens": False}
    ids = [tokenizer(text, **options)["input_ids"] for text in (prompt, answer)]
    assert all(0 <= index < len(tokenizer) for row in ids for index in row)
    assert tokenizer(prompt, answer)["input_ids"] == tokenizer.build_inputs_with_special_tokens(
        *ids
    )
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(prompt)) == ids[0]


@quick
@given(either, st.lists(texts, min_size=1, max_size=5).filter(lambda turns: turns[-1].strip()))
def test_a_chat_is_its_prompt_as_text(tokenizer: ChatGLMTokenizer, contents: list[str]) -> None:
    roles = ("user", "assistant")
    if len(contents) % 2 == 0:
        contents = contents[1:]
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    encoding = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert encoding["input_ids"] == tokenizer(prompt, split_special_tokens=True)["input_ids"]
    answered = [*messages, {"role": "assistant", "content": contents[0]}]
    encoding = tokenizer.apply_chat_template(
        answered, return_dict=True, return_assistant_tokens_mask=True
    )
    pair = tokenizer(prompt, contents[0], split_special_tokens=True)["input_ids"]
    assert encoding["input_ids"] == pair
    length = len(tokenizer(contents[0], split_special_tokens=True)["input_ids"]) - 1  # <eop> stays
    assert encoding["assistant_masks"] == [0] * (len(pair) - length) + [1] * length


@quick
@given(either, st.lists(st.integers(-5, LATE.vocab_size + 300) | st.integers(), max_size=30))
def test_any_ids_decode(tokenizer: ChatGLMTokenizer, ids: list[int]) -> None:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) == len(ids) and all(isinstance(token, str) for token in tokens)
    known = [index for index in ids if tokenizer.num_image_tokens <= index < len(tokenizer)]
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer.decode(
            known, skip_special_tokens=skip
        )


@quick
@given(st.lists(any_piece | byte_piece, max_size=25))
def test_growing_ids_never_take_text_back(ids: list[int]) -> None:
    whole = LATE.decode(ids, clean_up_tokenization_spaces=False)
    for end in range(len(ids)):
        shown = LATE.decode(ids[:end], clean_up_tokenization_spaces=False)
        assert whole.startswith(shown.rstrip("\ufffd"))


@quick
@given(
    either,
    st.lists(texts, min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.sampled_from([None, 4, 8]),
)
def test_a_padded_row_is_the_row_alone(
    tokenizer: ChatGLMTokenizer, batch: list[str], side: str, multiple: int | None
) -> None:
    encoding = tokenizer(batch, padding=True, padding_side=side, pad_to_multiple_of=multiple)
    for text, ids, mask in zip(batch, encoding["input_ids"], encoding["attention_mask"]):
        alone = tokenizer(text)["input_ids"]
        pads = [tokenizer.pad_token_id] * (len(ids) - len(alone))
        assert ids == (pads + alone if side == "left" else alone + pads)
        hidden, seen = [0] * len(pads), [1] * len(alone)
        assert mask == (hidden + seen if side == "left" else seen + hidden)


@quick
@given(texts, st.integers(3, 12))
def test_truncation_keeps_the_end(text: str, max_length: int) -> None:
    ids = LATE(text, truncation=True, max_length=max_length)["input_ids"]
    whole = LATE(text)["input_ids"]
    assert ids == [*whole[:-2][: max_length - 2], *whole[-2:]]


@quick
@given(st.binary(max_size=60), st.integers(0, 2**20), st.integers(0, 2**20))
def test_damaged_files_are_refused_or_complete(junk: bytes, start: int, end: int) -> None:
    content = VOCABULARY.read_bytes()
    start, end = start % len(content), end % len(content)
    for damaged in (junk, content[:start] + junk, content[:end], b"\x0a" + junk):
        try:
            complete = complete_vocabulary(damaged)
        except ValueError as error:
            assert "download" in str(error) or "all or none" in str(error)
        else:
            assert complete.startswith(damaged)
