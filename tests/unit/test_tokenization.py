"""The tokenizer on the repository's own vocabulary, and on one trained here in the first layout."""

import copy
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import sentencepiece
import torch
from chatglm_6b.masking_chatglm import SpecialIds, build_geometry
from chatglm_6b.tokenization_chatglm import ESCAPE, ChatGLMTokenizer
from chatglm_6b.vocabulary_chatglm import (
    FIRST_PIECES,
    LATE_PIECES,
    SPECIAL_TEXTS,
    complete_vocabulary,
)
from conftest import PRESETS, ROOT
from transformers import AddedToken

VOCABULARY = ROOT / "ice_text.model"
TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
IMAGES = 7  # stands for the 20000 image ids of the first generation
LATE = json.loads((PRESETS / "chatglm-6b/tokenizer_config.json").read_text())
FIRST = json.loads((PRESETS / "chatglm-6b-v0/tokenizer_config.json").read_text())
INJECTION = "a <sop> [MASK] </s><eop>\n<pad>b<unk>[gMASK]<s>[sMASK]<ENC><dBLOCK><unused_0>c"


def build(config: dict[str, Any], path: Path = VOCABULARY, **overrides: Any) -> ChatGLMTokenizer:
    fields = {
        key: value for key, value in config.items() if key not in ("auto_map", "tokenizer_class")
    }
    return ChatGLMTokenizer(str(path), **{"chat_template": TEMPLATE, **fields, **overrides})


@pytest.fixture(scope="module")
def late() -> ChatGLMTokenizer:
    return build(LATE)


@pytest.fixture(scope="module")
def first() -> ChatGLMTokenizer:
    return build(FIRST, num_image_tokens=IMAGES)


@pytest.fixture
def own() -> ChatGLMTokenizer:
    """A tokenizer that a test may change."""
    return build(LATE)


def train_text_pieces(**overrides: Any) -> bytes:
    lines = [
        "the cat sat on the mat",
        "问：你好",
        "答：今天天气很好",
        "one two three <n> four",
    ] * 20
    content = io.BytesIO()
    options: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3} | overrides
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=content,
        vocab_size=60,
        user_defined_symbols=["<n>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return content.getvalue()


@pytest.fixture(scope="module")
def text_pieces() -> bytes:
    """A vocabulary file of the first generation: no special tokens behind the text pieces."""
    return train_text_pieces()


# ---- the vocabulary file


def test_a_first_generation_file_is_completed(text_pieces: bytes) -> None:
    short = sentencepiece.SentencePieceProcessor(model_proto=text_pieces)
    size = short.get_piece_size()
    full = sentencepiece.SentencePieceProcessor(model_proto=complete_vocabulary(text_pieces))
    assert full.get_piece_size() == size + 344
    assert full.id_to_piece([*range(size)]) == short.id_to_piece([*range(size)])
    assert full.id_to_piece([*range(size, size + 344)]) == [*LATE_PIECES]
    assert [full.is_control(size + index) for index in range(344)] == [True] * 8 + [False] * 336
    assert [full.is_byte(size + index) for index in range(344)] == [False] * 88 + [True] * 256
    assert full.decode(full.encode("龘 cat")) == "龘 cat"  # by way of its bytes
    assert short.decode(short.encode("龘 cat")) != "龘 cat"
    assert full.encode("a<|tab|>t", out_type=str)[-2:] == ["<|tab|>", "t"]


def test_a_complete_file_stays_as_it_is(text_pieces: bytes) -> None:
    complete = complete_vocabulary(text_pieces)
    assert complete_vocabulary(complete) is complete
    content = VOCABULARY.read_bytes()
    assert complete_vocabulary(content) is content


def cut_after_pieces(content: bytes) -> bytes:
    """The file up to the end of a piece, where every entry that is left is whole."""
    position = 0
    while position < len(content) // 2:
        position += 2 + content[position + 1]
    return content[:position]


BROKEN = {
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\nsize 2706249\n", "git lfs"),
    "empty": (lambda _: b"", "empty"),
    "text": (lambda _: b'{"model": 1}', "no SentencePiece model"),
    "cut in a piece": (lambda content: cut_after_pieces(content) + b"\x0a", "truncated"),
    "an endless length": (lambda _: b"\x0a" + b"\xff" * 10**6, "truncated"),
    "cut between pieces": (cut_after_pieces, "truncated"),
    "cut in the settings": (lambda content: content[:-1], "truncated"),
    "another model": (lambda _: train_text_pieces(pad_id=-1), "another model"),
    "half complete": (
        lambda content: content + cut_after_pieces(complete_vocabulary(content)[len(content) :]),
        "all or none",
    ),
    "a pad that is text": (
        lambda content: content.replace(b"<pad>\x15\0\0\0\0\x18\x03", b"<pad>\x15\0\0\0\0\x18\x04"),
        "right types",
    ),
    "one wrong byte": (lambda content: b"\x0a\x02\xff\xff" + content, "another model"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind: str, text_pieces: bytes, tmp_path: Path) -> None:
    damage, message = BROKEN[kind]
    path = tmp_path / "ice_text.model"
    path.write_bytes(damage(text_pieces))
    with pytest.raises(ValueError, match=message) as caught:
        build(LATE, path)
    assert str(path) in str(caught.value)


def test_every_cut_is_noticed(text_pieces: bytes) -> None:
    complete = complete_vocabulary(text_pieces)
    for end in range(0, len(text_pieces), 97):
        with pytest.raises(ValueError, match=r"truncated|empty"):
            complete_vocabulary(complete[:end])


def test_damage_that_only_sentencepiece_sees(text_pieces: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ice_text.model"
    path.write_bytes(text_pieces + b"\x12\x01\xff")  # settings that do not parse
    with pytest.raises(ValueError, match=r"ice_text\.model"):
        build(LATE, path)


@pytest.mark.parametrize("path", [None, "nowhere/ice_text.model"])
def test_no_file(path: str | None) -> None:
    with pytest.raises(ValueError, match=r"no vocabulary file .*ice_text\.model; take the one"):
        ChatGLMTokenizer(path)  # pyright: ignore[reportArgumentType]


def test_the_error_survives_loading(own: ChatGLMTokenizer, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    (tmp_path / "ice_text.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    (tmp_path / "ice_text.model").unlink()
    with pytest.raises(ValueError, match=r"no vocabulary file ice_text\.model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_other_import_errors_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr(ChatGLMTokenizer, "_from_pretrained", fail)
    build(LATE).save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="no such package"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_image_tokens": -1}, "num_image_tokens must be 0 or more, got -1"),
        ({"num_image_tokens": ""}, "num_image_tokens must be 0 or more, got ''"),
        ({"gmask_token": "[xMASK]"}, r"gmask_token '\[xMASK\]' is no piece"),
        ({"eop_token": "<end>"}, "eop_token '<end>' is no piece"),
    ],
)
def test_wrong_values_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(LATE, **overrides)


# ---- ids


def test_ids_come_from_the_file(text_pieces: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ice_text.model"
    path.write_bytes(text_pieces)
    size = sentencepiece.SentencePieceProcessor(model_proto=text_pieces).get_piece_size()
    tokenizer = build(LATE, path, num_image_tokens=10)
    assert tokenizer.vocab_size == len(tokenizer) == size + 354
    assert [tokenizer.convert_tokens_to_ids(piece) for piece in FIRST_PIECES] == [*range(10, 15)]
    assert (tokenizer.mask_token_id, tokenizer.gmask_token_id) == (size + 10, size + 11)
    assert (tokenizer.bos_token_id, tokenizer.eop_token_id) == (size + 14, size + 15)
    assert tokenizer.convert_tokens_to_ids("<0xFF>") == size + 353
    assert tokenizer.convert_ids_to_tokens([9, 10]) == ["<image_9>", "<unk>"]
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == [*range(size + 354)]


def test_generations_differ_by_their_image_ids(
    late: ChatGLMTokenizer, first: ChatGLMTokenizer
) -> None:
    for text in ("你好，world!\n\t  x", "a [MASK] b", "👋"):
        shifted = [index + IMAGES for index in late(text, add_special_tokens=False)["input_ids"]]
        assert first(text, add_special_tokens=False)["input_ids"] == shifted
    assert first.eos_token == "</s>" and first.eos_token_id == first.end_token_id == 2 + IMAGES
    assert late.eos_token == "<eop>" and late.eos_token_id == late.eop_token_id
    assert (late.padding_side, first.padding_side) == ("left", "right")


def test_defaults_belong_to_the_number_of_image_ids() -> None:
    assert ChatGLMTokenizer(str(VOCABULARY)).eos_token == "</s>"
    assert ChatGLMTokenizer(str(VOCABULARY)).num_image_tokens == 20000
    assert ChatGLMTokenizer(str(VOCABULARY), num_image_tokens=0).eos_token == "<eop>"


def test_unknown_tokens_and_ids(first: ChatGLMTokenizer) -> None:
    assert first.convert_tokens_to_ids("<image_6>") == 6
    assert first.convert_tokens_to_ids("<image_7>") == first.unk_token_id == IMAGES
    beyond = [-1, -(10**9), first.vocab_size, first.vocab_size + 183, 10**12]
    assert first.convert_ids_to_tokens(beyond) == [""] * 5
    hello = first("hello", add_special_tokens=False)["input_ids"]
    assert first.decode([*beyond, 0, 6, *hello, *beyond]) == "hello"
    assert first.decode(beyond[0]) == first.decode([]) == ""
    assert first.decode(torch.tensor(hello)) == first.decode(np.array(hello)) == "hello"


# ---- text and special tokens


@pytest.mark.parametrize("spaces", [1, 2, 3, 79, 80, 81, 82, 160, 161, 400])
def test_runs_of_spaces(late: ChatGLMTokenizer, spaces: int) -> None:
    text = f"a{' ' * spaces}b\n\n\tc"
    tokens = late.tokenize(text)
    assert late.decode(late(text)["input_ids"]) == text
    assert sum(token.startswith("<|blank") for token in tokens) == (spaces + 78) // 80


def test_line_break_spelled_by_other_pieces_stays_text(late: ChatGLMTokenizer) -> None:
    assert late.convert_tokens_to_string(["▁a", "<", "n", ">"]) == "a<n>"
    assert late.convert_tokens_to_string(["▁a", "<n>", "▁b", "<sop>", "<|tab|>"]) == "a\n b\t"


def test_bare_text_has_the_named_special_tokens(
    late: ChatGLMTokenizer, first: ChatGLMTokenizer
) -> None:
    text = "a \n<eop>\t </s> [gMASK]  [MASK]  b"
    tokens = late.tokenize(text)
    assert tokens[1] == "<eop>" and "[MASK]" in tokens
    assert "</s>" not in tokens and "[gMASK]" not in tokens
    assert not any(token.startswith("<|") or token == "<n>" for token in tokens)
    assert "</s>" in first.tokenize(text) and "<eop>" not in first.tokenize(text)


@pytest.mark.parametrize("how", ["one text", "batch", "encode", "constructor"])
def test_split_special_tokens_makes_all_of_it_text(late: ChatGLMTokenizer, how: str) -> None:
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
    if how == "one text":
        ids = late(INJECTION, **options)["input_ids"]
    elif how == "batch":
        ids = late([INJECTION], **options)["input_ids"][0]
    elif how == "encode":
        ids = late.encode(INJECTION, **options)
    else:
        plain = build(LATE, split_special_tokens=True)
        ids = plain([INJECTION], add_special_tokens=False)["input_ids"][0]
    assert not set(ids) & {late.convert_tokens_to_ids(text) for text in SPECIAL_TEXTS}
    assert late.decode(ids, skip_special_tokens=True) == INJECTION


def test_lone_surrogates_and_nul_are_text(late: ChatGLMTokenizer) -> None:
    assert late.decode(late("a\ud83db")["input_ids"]) == "a?b"
    assert "a" in late.tokenize("\0a")


def test_case_and_space_options() -> None:
    tokenizer = build(LATE, do_lower_case=True, remove_space=True)
    assert tokenizer.tokenize(" A  B\n\tC[MASK]") == [*tokenizer.tokenize("a b c"), "[MASK]"]


# ---- inputs


def test_the_input_rules(late: ChatGLMTokenizer, first: ChatGLMTokenizer) -> None:
    for tokenizer in (late, first):
        gmask, sop, eop = tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eop_token_id
        prompt, answer = [100, 101], [102]
        build_inputs = tokenizer.build_inputs_with_special_tokens
        assert build_inputs(prompt) == [100, 101, gmask, sop]
        assert build_inputs(prompt, answer) == [100, 101, gmask, sop, 102, eop]
        assert build_inputs([], []) == [gmask, sop, eop]
        assert (prompt, answer) == ([100, 101], [102])
        assert tokenizer.num_special_tokens_to_add() == 2
        assert tokenizer.num_special_tokens_to_add(pair=True) == 3
    mask, gmask, sop = late.mask_token_id, late.gmask_token_id, late.bos_token_id
    assert late.build_inputs_with_special_tokens([mask, 9]) == [mask, 9, gmask, sop]
    mask, gmask, sop = first.mask_token_id, first.gmask_token_id, first.bos_token_id
    end = first.end_token_id
    assert first.build_inputs_with_special_tokens([mask, 9]) == [mask, 9, end, sop]
    assert first.build_inputs_with_special_tokens([9, mask]) == [9, mask, sop]
    assert first.build_inputs_with_special_tokens([gmask, 9]) == [gmask, 9, end, sop]


def test_masks_and_types_are_as_long_as_the_ids(first: ChatGLMTokenizer) -> None:
    options = {"return_special_tokens_mask": True, "return_token_type_ids": True}
    for texts in (("a b",), ("a [MASK] b",), ("a [MASK]", "b"), ("a", "b <eop>")):
        encoding = first(*texts, **options)
        ids = encoding["input_ids"]
        special = {first.convert_tokens_to_ids(text) for text in SPECIAL_TEXTS}
        assert encoding["special_tokens_mask"] == [int(index in special) for index in ids]
        assert encoding["token_type_ids"] == [0] * len(ids)
        assert encoding["attention_mask"] == [1] * len(ids)
        again = first.get_special_tokens_mask(ids, already_has_special_tokens=True)
        assert again == encoding["special_tokens_mask"]
    with pytest.raises(ValueError, match="token_ids_1=None"):
        first.get_special_tokens_mask([1], [2], already_has_special_tokens=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(late: ChatGLMTokenizer, side: str) -> None:
    texts = ["hi", "a longer text 你好", ""]
    alone = [late(text)["input_ids"] for text in texts]
    batch = late(texts, padding=True, padding_side=side, pad_to_multiple_of=8, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape and ids.shape[1] % 8 == 0
    for row, keep, single in zip(ids, mask, alone):
        assert row[keep.bool()].tolist() == single
        assert row[~keep.bool()].eq(late.pad_token_id).all()
        real = keep.tolist()
        assert real == sorted(real, reverse=side == "right")
    padded = late.pad({"input_ids": alone}, padding_side=side)
    assert [len(row) for row in padded["attention_mask"]] == [max(map(len, alone))] * 3


@pytest.mark.parametrize("max_length", [3, 5, 8])
def test_truncation_keeps_the_end_of_the_input(late: ChatGLMTokenizer, max_length: int) -> None:
    text = "one two three four five six seven eight nine ten"
    ids = late(text, truncation=True, max_length=max_length)["input_ids"]
    whole = late(text)["input_ids"]
    assert ids == [*whole[: max_length - 2], late.gmask_token_id, late.bos_token_id]
    pair = late(text, text, truncation=True, max_length=max_length)["input_ids"]
    assert len(pair) == max_length and pair[-1] == late.eop_token_id


def test_legacy_inputs(late: ChatGLMTokenizer) -> None:
    encoding = late(["你好", "a b c d e", "x [MASK] y"], padding=True)
    kept = copy.deepcopy(dict(encoding))
    legacy = late.build_legacy_inputs(encoding)
    ids, keep = (torch.tensor(encoding[name]) for name in ("input_ids", "attention_mask"))
    special_ids = SpecialIds(late.bos_token_id, late.mask_token_id, late.gmask_token_id)
    geometry = build_geometry(ids, keep, special_ids)
    assert torch.equal(legacy["input_ids"], ids)
    assert torch.equal(legacy["attention_mask"], geometry.attention_mask)
    assert torch.equal(legacy["position_ids"], geometry.position_ids)
    assert legacy["attention_mask"].dtype == torch.bool
    assert legacy["position_ids"].shape == (3, 2, ids.shape[1])
    assert dict(encoding) == kept
    unpadded = late.build_legacy_inputs(late(["你好", "a b c d e", "x [MASK] y"]))
    assert torch.equal(unpadded["attention_mask"], legacy["attention_mask"])


# ---- files, copies, added tokens


def test_save_and_reload(own: ChatGLMTokenizer, first: ChatGLMTokenizer, tmp_path: Path) -> None:
    for name, tokenizer in (("late", own), ("first", first)):
        tokenizer.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "ice_text.model").read_bytes() == VOCABULARY.read_bytes()
        again = ChatGLMTokenizer.from_pretrained(tmp_path / name)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        for field in ("gmask_token_id", "end_token_id", "eop_token_id", "padding_side"):
            assert getattr(again, field) == getattr(tokenizer, field)
        assert again.clean_up_tokenization_spaces == tokenizer.clean_up_tokenization_spaces
        for text in ("你好 a , b", INJECTION, "a[MASK]"):
            ids = tokenizer(text)["input_ids"]
            assert again(text)["input_ids"] == ids
            assert again.decode(ids) == tokenizer.decode(ids)
        chat = [{"role": "user", "content": "hi"}]
        assert again.apply_chat_template(chat, tokenize=False) == "hi"


def test_own_tokens_may_be_chosen_on_loading(own: ChatGLMTokenizer, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path, gmask_token="[sMASK]", padding_side="right")
    assert again.gmask_token_id == own.convert_tokens_to_ids("[sMASK]")
    assert again("a")["input_ids"][-2] == again.gmask_token_id
    again.save_pretrained(tmp_path / "again")
    third = ChatGLMTokenizer.from_pretrained(tmp_path / "again")
    assert (third.gmask_token, third.padding_side) == ("[sMASK]", "right")


def test_save_vocabulary_is_verbatim(text_pieces: bytes, tmp_path: Path) -> None:
    source = tmp_path / "ice_text.model"
    source.write_bytes(text_pieces)
    tokenizer = build(LATE, source)
    source.unlink()
    (path,) = tokenizer.save_vocabulary(str(tmp_path / "new" / "folder"), filename_prefix="my")
    assert Path(path) == tmp_path / "new" / "folder" / "my-ice_text.model"
    assert Path(path).read_bytes() == text_pieces


def test_added_tokens(own: ChatGLMTokenizer, tmp_path: Path) -> None:
    size = own.vocab_size
    assert own.add_tokens(["<new>", "你好吗"]) == 2
    assert own.add_special_tokens({"additional_special_tokens": ["<tool>"]}) == 1
    assert len(own) == size + 3 and own.vocab_size == size
    for text in (
        "a<new>b",
        "x <new> y",
        "天气<tool>你好吗",
        "<new><new>",
        "a\n<tool>\n b",
        "1<new>",
    ):
        ids = own(text, add_special_tokens=False)["input_ids"]
        assert {*ids} & {size, size + 1, size + 2}
        assert own.decode(ids) == text
        assert own.tokenize(text) == own.convert_ids_to_tokens(ids)
    ids = own("a<tool>b<new>", add_special_tokens=False)["input_ids"]
    assert own.decode(ids, skip_special_tokens=True) == "ab<new>"
    plain = own("a<tool>b<new>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert size + 2 not in plain and size in plain
    assert own.decode(plain) == "a<tool>b<new>"
    own.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert len(again) == size + 3
    assert again("a<tool>b<new>", add_special_tokens=False)["input_ids"] == ids
    assert again.decode(ids, skip_special_tokens=True) == "ab<new>"
    assert "[gMASK]" not in again.tokenize("[gMASK]")


def test_added_tokens_may_strip_their_sides(own: ChatGLMTokenizer) -> None:
    own.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    ids = own("a  <l>  b  <r>  c", add_special_tokens=False)["input_ids"]
    assert own.decode(ids) == "a<l>  b  <r>c"


def test_copies_are_equal(own: ChatGLMTokenizer) -> None:
    own.add_tokens(["<new>"])
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        text = "你好<new> a\n[MASK]"
        assert again(text)["input_ids"] == own(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == own.decode(own(text)["input_ids"])
        assert again.gmask_token_id == own.gmask_token_id
        again.add_tokens(["<other>"])
        assert len(again) == len(own) + 1


# ---- chat


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]


def render(tokenizer: ChatGLMTokenizer, messages: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def encode(tokenizer: ChatGLMTokenizer, messages: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_template_rounds(late: ChatGLMTokenizer) -> None:
    assert render(late, turns(" hi\n")) == " hi\n"
    assert render(late, turns("hi"), add_generation_prompt=True) == "hi[gMASK]<sop>"
    assert render(late, turns("a", "b")) == "a[gMASK]<sop>b<eop>"
    three = "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：d\n[Round 2]\n问：e\n答："
    assert render(late, turns("a", "b", "c", "d", "e")) == three
    assert render(late, turns("a", "b", "c", "d", "e", "f\n")) == f"{three}[gMASK]<sop>f\n<eop>"
    assert render(late, turns("a", "", "c")) == "[Round 0]\n问：a\n答：\n[Round 1]\n问：c\n答："


def test_template_puts_a_system_message_before_the_first_question(late: ChatGLMTokenizer) -> None:
    system = {"role": "system", "content": "be kind"}
    assert render(late, [system, *turns("hi")]) == "be kind\n\nhi"
    two = "[Round 0]\n问：be kind\n\na\n答：b\n[Round 1]\n问：c\n答："
    assert render(late, [system, *turns("a", "b", "c")]) == two


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([{"role": "system", "content": "x"}], {}, "at least one"),
        (turns("a", "b", "c")[1:], {}, "got role 'assistant' where 'user' was due"),
        (turns("a") * 2, {}, "got role 'user' where 'assistant' was due"),
        ([*turns("a"), {"role": "tool", "content": "x"}], {}, "got role 'tool'"),
        ([*turns("a", "b"), {"role": "system", "content": "x"}], {}, "got role 'system'"),
        (turns("a", "b", " \n"), {}, "the last question is empty"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            {},
            "message 0 has a part of type 'image_url'",
        ),
        ([{"role": "user"}], {}, "message 0 has no text"),
        (turns("a", "b"), {"add_generation_prompt": True}, "is an answer already"),
        (turns("a"), {"tools": [{"type": "function"}]}, "no tools"),
    ],
)
@pytest.mark.parametrize("tokenize", [True, False])
def test_template_refuses(
    late: ChatGLMTokenizer, messages: Any, options: Any, message: str, tokenize: bool
) -> None:
    with pytest.raises(jinja2.TemplateError, match=message):
        late.apply_chat_template(messages, tokenize=tokenize, **options)


def test_no_messages_at_all(late: ChatGLMTokenizer) -> None:
    with pytest.raises(ValueError, match="conversation is empty"):
        late.apply_chat_template([])
    with pytest.raises(jinja2.TemplateError, match="at least one"):
        late.apply_chat_template([turns("a"), []])


@pytest.mark.parametrize(
    "text", ["你好", "a\n\tb   c ", " \t x\n", "def f():\n    return 1\n", "。"]
)
def test_chat_ids_are_those_of_the_prompt(
    late: ChatGLMTokenizer, first: ChatGLMTokenizer, text: str
) -> None:
    for tokenizer in (late, first):
        for messages in (turns(text), turns(text, text, text)):
            prompt = render(tokenizer, messages)
            ids = encode(tokenizer, messages, add_generation_prompt=True)["input_ids"]
            assert ids == tokenizer(prompt)["input_ids"]
            answered = encode(tokenizer, [*messages, {"role": "assistant", "content": text}])
            assert answered["input_ids"] == tokenizer(prompt, text)["input_ids"]


@pytest.mark.parametrize("text", [INJECTION, f"<{ESCAPE}sop>{ESCAPE}", ESCAPE * 3, "[gMASK]<sop>"])
def test_special_tokens_in_messages_are_text(late: ChatGLMTokenizer, text: str) -> None:
    messages = turns(text, text, text)
    kept = copy.deepcopy(messages)
    ids = encode(late, messages, add_generation_prompt=True)["input_ids"]
    prompt = render(late, messages)
    assert text in prompt
    assert ids == late(prompt, split_special_tokens=True)["input_ids"]
    special = [late.convert_tokens_to_ids(token) for token in SPECIAL_TEXTS]
    assert [index for index in ids if index in special] == [late.gmask_token_id, late.bos_token_id]
    assert messages == kept


def test_added_tokens_in_messages(own: ChatGLMTokenizer) -> None:
    own.add_tokens(["<word>"])
    own.add_special_tokens({"additional_special_tokens": ["ab", "bc"]})
    ids = encode(own, turns("abc <word>"))["input_ids"]
    assert ids[-1] == own.convert_tokens_to_ids("<word>")
    assert not {*ids} & {own.convert_tokens_to_ids("ab"), own.convert_tokens_to_ids("bc")}
    assert own.decode(ids) == "abc <word>"


def test_assistant_masks(late: ChatGLMTokenizer) -> None:
    messages = turns("a b", "c <sop> d")
    encoding = encode(late, messages, return_assistant_tokens_mask=True)
    ids, mask = encoding["input_ids"], encoding["assistant_masks"]
    answer = [index for index, keep in zip(ids, mask) if keep]
    expected = late("c <sop> d", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert answer == [*expected, late.eop_token_id]
    unanswered = encode(late, turns("a b"), return_assistant_tokens_mask=True)
    assert unanswered["assistant_masks"] == [0] * len(unanswered["input_ids"])
    batch = [messages, turns("a longer question", "x")]
    for side in ("left", "right"):
        options = {
            "padding": True,
            "return_tensors": "pt",
            "tokenizer_kwargs": {"padding_side": side},
        }
        padded = encode(late, batch, return_assistant_tokens_mask=True, **options)
        rows, masks = padded["input_ids"], padded["assistant_masks"]
        assert masks.shape == rows.shape
        assert rows[0][masks[0].bool()].tolist() == answer
        short = late("x", add_special_tokens=False)["input_ids"]
        assert rows[1][masks[1].bool()].tolist() == [*short, late.eop_token_id]


def test_assistant_masks_need_a_dictionary(late: ChatGLMTokenizer) -> None:
    with pytest.raises(ValueError, match="return_dict=True"):
        late.apply_chat_template(
            turns("a", "b"), return_dict=False, return_assistant_tokens_mask=True
        )


def test_chat_batches_and_tensors(late: ChatGLMTokenizer) -> None:
    batch = [turns("a b c"), turns("d")]
    encoding = encode(late, batch, add_generation_prompt=True, padding=True, return_tensors="pt")
    assert encoding["input_ids"].shape == encoding["attention_mask"].shape
    assert encoding["input_ids"][:, -1].tolist() == [late.bos_token_id] * 2
    ids = late.apply_chat_template(batch, add_generation_prompt=True, return_dict=False)
    assert ids[1] == late("d")["input_ids"]
    assert encoding["input_ids"][1][encoding["attention_mask"][1].bool()].tolist() == ids[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_chat_truncation_keeps_the_border(own: ChatGLMTokenizer, side: str) -> None:
    own.truncation_side = side
    prompt = own("one two three four", add_special_tokens=False)["input_ids"]
    border = [own.gmask_token_id, own.bos_token_id]
    options = {"add_generation_prompt": True, "truncation": True}
    ids = encode(own, turns("one two three four"), max_length=4, **options)["input_ids"]
    assert ids == (prompt[-2:] if side == "left" else prompt[:2]) + border
    ids = encode(own, turns("one two three four"), max_length=1, **options)["input_ids"]
    assert ids == border
    answered = encode(own, turns("one two", "a b c d"), max_length=4, truncation=True)["input_ids"]
    assert answered == border + own("a b c d", add_special_tokens=False)["input_ids"][:2]


def test_continue_final_message(late: ChatGLMTokenizer) -> None:
    messages = turns("a", "once <eop> upon")
    assert render(late, messages, continue_final_message=True) == "a[gMASK]<sop>once <eop> upon"
    ids = encode(late, messages, continue_final_message=True)["input_ids"]
    answer = late("once <eop> upon", add_special_tokens=False, split_special_tokens=True)
    assert ids == [*late("a")["input_ids"], *answer["input_ids"]]


# ---- decoding and speed


def test_decoding_does_not_change_what_was_shown(late: ChatGLMTokenizer) -> None:
    text = "👋 你好\n\n1. a  b\tc 龘龘 don't , x <n> ."
    ids = late(text, add_special_tokens=False)["input_ids"]
    whole = late.decode(ids, clean_up_tokenization_spaces=False)
    for end in range(len(ids)):
        shown = late.decode(ids[:end], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        assert whole.startswith(shown)


def test_clean_up_is_the_later_generation_s(
    late: ChatGLMTokenizer, first: ChatGLMTokenizer
) -> None:
    for tokenizer, text in ((late, "a, b"), (first, "a , b")):
        assert tokenizer.decode(tokenizer("a , b")["input_ids"]) == text
        ids = tokenizer("a , b")["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "a , b"
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "a, b"


def test_unknown_sign(late: ChatGLMTokenizer, first: ChatGLMTokenizer) -> None:
    for tokenizer, skipped in ((late, "x"), (first, " ⁇  x")):
        ids = tokenizer("<unk>x")["input_ids"]
        assert tokenizer.decode(ids) == " ⁇  x"
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped


LENGTH = 250_000
LONG_TEXTS = {
    "mixed": "The quick fox. 今天天气很好,去公园。\n" * (LENGTH // 26),
    "no space": "a" * LENGTH,
    "spaces": " " * LENGTH,
    "marks": "<eop>" * (LENGTH // 5),
    "marks among spaces": (" " * 995 + "<eop>") * (LENGTH // 1000),
    "openers": "<" * LENGTH,
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_long_texts_take_linear_time(late: ChatGLMTokenizer, kind: str) -> None:
    text = LONG_TEXTS[kind]
    start = time.process_time()
    ids = late(text, add_special_tokens=False)["input_ids"]
    late(text, split_special_tokens=True)
    encode(late, turns(f"x{text}"))
    shown = late.decode(ids, clean_up_tokenization_spaces=False)
    assert shown == ("" if "marks" in kind else text)
    assert time.process_time() - start < 10  # one second; what is quadratic takes minutes
