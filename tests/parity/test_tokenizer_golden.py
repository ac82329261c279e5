"""The tokenizer against the original's output, for the real vocabularies of both generations.

The vocabularies belong to ChatGLM's authors and lie beside the repository or not at all. What the
original got wrong is named at the place where it is left out.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from chatglm_6b.vocabulary_chatglm import WHITESPACE
from conftest import ROOT, SHARED

GOLDEN = SHARED / "golden" / "tokenizer"
TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
# Name of the golden data: the vocabulary it was made with, and the original's arguments.
GENERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "late130528": (
        "ice_text.v1.1.model",
        {
            "bos_token": "<sop>",
            "eos_token": "<eop>",
            "end_token": "</s>",
            "mask_token": "[MASK]",
            "gmask_token": "[gMASK]",
            "padding_side": "left",
            "num_image_tokens": 0,
        },
    ),
    "fork150528": ("ice_text.v0.model", {"padding_side": "right"}),
}
MARKS = ("[MASK]", "[gMASK]", "<sop>", "<eop>", "</s>", "<s>", "<pad>", "<unk>")

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"needs the golden data and vocabularies in {SHARED}"
)


class Golden:
    """One generation: its name, its tokenizer, and the original's answers."""

    def __init__(self, name: str) -> None:
        vocabulary, arguments = GENERATIONS[name]
        self.name = name
        self.is_fork = name.startswith("fork")
        self.path = SHARED / "tokenizers" / vocabulary
        self.tokenizer = ChatGLMTokenizer(str(self.path), chat_template=TEMPLATE, **arguments)

    def read(self, part: str) -> Any:
        return json.loads((GOLDEN / f"{self.name}_{part}.json").read_text(encoding="utf-8"))

    def special_ids(self) -> set[int]:
        return {self.tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}


@pytest.fixture(scope="module", params=GENERATIONS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def as_lists(value: Any) -> Any:
    """Plain lists from a tensor, an array, or an array as the golden data have it."""
    if isinstance(value, dict):
        return value["data"]
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def assert_all(differences: list[Any]) -> None:
    assert not differences, f"{len(differences)} differ, the first are {differences[:5]}"


def differing(rows: list[Any], field: str, answer: Any, found: Any) -> list[Any]:
    """Rows whose golden `field` is not what `answer(row)` gives."""
    return [
        (found(row), answer(row), row[field])
        for row in rows
        if field in row and not isinstance(row[field], dict) and answer(row) != row[field]
    ]


def test_loading_is_fast(golden: Golden) -> None:
    start = time.process_time()
    ChatGLMTokenizer(str(golden.path))
    assert time.process_time() - start < 5  # half a second on one quiet core


def test_vocabulary(golden: Golden) -> None:
    tokenizer, info = golden.tokenizer, golden.read("api")["info"]
    vocabulary = tokenizer.get_vocab()
    pairs = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    digest = hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()
    assert digest == info["get_vocab_sha256_of_sorted_json"]
    assert (len(vocabulary), tokenizer.vocab_size) == (info["get_vocab_len"], info["vocab_size"])
    assert len(tokenizer) == info["len"]
    for token, index in info["token_to_id"].items():
        # The original gave <image_k> the id k even with no image ids at all.
        if golden.is_fork or not token.startswith("<image_"):
            assert tokenizer.convert_tokens_to_ids(token) == index


def test_names(golden: Golden) -> None:
    tokenizer, info = golden.tokenizer, golden.read("api")["info"]
    fields = ("all_special_tokens", "all_special_ids", "special_tokens_map", "padding_side")
    assert {name: getattr(tokenizer, name) for name in fields} == {
        name: info[name] for name in fields
    }
    known = {name: value for name, value in info["attrs"].items() if not isinstance(value, dict)}
    assert len(known) > 14
    assert {name: getattr(tokenizer, name) for name in known} == known


def has_typed_white_space(text: str) -> bool:
    """Whether SentencePiece alone makes white space of letters, which ours keeps as text."""
    return "\u2581" in text or any(piece in text for piece in WHITESPACE)


def test_texts(golden: Golden) -> None:
    tokenizer, rows = golden.tokenizer, golden.read("texts")["rows"]
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    answers = {
        "ids": lambda row: tokenizer(row["text"])["input_ids"],
        "ids_nospecial": lambda row: tokenizer(row["text"], add_special_tokens=False)["input_ids"],
        "tokenize": lambda row: tokenizer.tokenize(row["text"]),
        "tokens": lambda row: tokenizer.convert_ids_to_tokens(row["ids"]),
        "decode_skip": lambda row: tokenizer.decode(row["ids"], skip_special_tokens=True),
        "sp_encode": lambda row: tokenizer(row["text"], **plain)["input_ids"],
    }
    assert len(rows) > 300
    typed = [row for row in rows if has_typed_white_space(row["text"])]
    assert 10 < len(typed) < 40
    for field, answer in answers.items():
        asked = [row for row in rows if field != "sp_encode" or row not in typed]
        assert_all(differing(asked, field, answer, lambda row: row["text"][:60]))


def test_batch_of_all_texts(golden: Golden) -> None:
    rows = golden.read("texts")["rows"]
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    rows = [row for row in rows if "sp_encode" in row and not has_typed_white_space(row["text"])]
    encoded = golden.tokenizer([row["text"] for row in rows], **plain)["input_ids"]
    assert encoded == [row["sp_encode"] for row in rows]


@pytest.mark.parametrize("part", ["texts", "random_decode"])
def test_decoding(golden: Golden, part: str) -> None:
    # The fork's plain decode showed raw pieces; only its other one gave text.
    tokenizer, rows = golden.tokenizer, golden.read(part)["rows"]
    field = "decode_skip" if golden.is_fork else "decode"
    rows = [row for row in rows if row["ids"] or not golden.is_fork]  # [] raised an IndexError
    answers = {
        field: lambda row: tokenizer.decode(row["ids"]),
        "decode_skip": lambda row: tokenizer.decode(row["ids"], skip_special_tokens=True),
        "decode_nocleanup": lambda row: tokenizer.decode(
            row["ids"], clean_up_tokenization_spaces=False
        ),
        "tokens": lambda row: tokenizer.convert_ids_to_tokens(row["ids"]),
        "tokens_skip": lambda row: tokenizer.convert_ids_to_tokens(
            row["ids"], skip_special_tokens=True
        ),
    }
    for name, answer in answers.items():
        assert_all(differing(rows, name, answer, lambda row: row["ids"][:20]))


def test_ids_out_of_range_decode_to_nothing(golden: Golden) -> None:
    tokenizer = golden.tokenizer
    rows = [row for row in golden.read("random_decode")["rows"] if isinstance(row["decode"], dict)]
    assert len(rows) > 10  # the original raised an IndexError for each of them
    for row in rows:
        known = [index for index in row["ids"] if index < tokenizer.vocab_size]
        assert tokenizer.decode(row["ids"]) == tokenizer.decode(known)
    for index in (*range(tokenizer.vocab_size, tokenizer.vocab_size + 184), -1, 10**15):
        assert tokenizer.decode([index]) == ""


def test_batches(golden: Golden) -> None:
    api = golden.read("api")
    assert len(api["batches"]) == 69
    for case in api["batches"] + api["single"]:
        # The late class could not pad on the right, and nothing then read a keyword for the side.
        options = {key: value for key, value in case["kwargs"].items() if key != "padding_side"}
        encoding = golden.tokenizer(case.get("texts", case.get("text")), **options)
        assert as_lists(encoding["input_ids"]) == as_lists(case["out"]["input_ids"]), case["kwargs"]
    for case in api["batch_pairs"]:
        encoding = golden.tokenizer(case["a"], case["b"], padding=True)
        assert encoding["input_ids"] == as_lists(case["out"]["input_ids"])


def test_pairs_and_build(golden: Golden) -> None:
    api, tokenizer = golden.read("api"), golden.tokenizer
    for case in api["pairs"]:
        assert tokenizer(case["a"], case["b"])["input_ids"] == case["enc"]["input_ids"]
    calls = api["api"]
    prompt, answer = list(calls["encode_nospecial"]), [calls["encode_nospecial"][1]]
    assert tokenizer.build_inputs_with_special_tokens(prompt) == calls["build_single"]
    assert tokenizer.build_inputs_with_special_tokens(prompt, answer) == calls["build_pair"]
    assert prompt == calls["encode_nospecial"]  # the fork's own list grew
    pair = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
    assert pair == calls["num_special_tokens_to_add"]
    for name in ("pad_call", "pad_call_with_response"):
        rows = as_lists(calls[name]["input_ids"])
        unpadded = [[index for index in row if index != tokenizer.pad_token_id] for row in rows]
        assert tokenizer.pad({"input_ids": unpadded})["input_ids"] == rows


def test_case_and_space_options(golden: Golden) -> None:
    vocabulary, arguments = GENERATIONS[golden.name]
    path, calls = str(SHARED / "tokenizers" / vocabulary), golden.read("api")["api"]
    lower = ChatGLMTokenizer(path, do_lower_case=True, **arguments)
    assert lower("Hello World")["input_ids"] == calls["lower"]
    spaces = ChatGLMTokenizer(path, remove_space=True, **arguments)
    assert spaces("  Hello   World \n x ")["input_ids"] == calls["remove_space"]


def test_legacy_inputs() -> None:
    late = Golden("late130528")
    cases = [
        case
        for case in late.read("api")["batches"]
        # With a second mark in a text the original's tokenizer and model disagreed; ours agree.
        if "position_ids" in case["out"] and not any(mark in str(case["texts"]) for mark in MARKS)
    ]
    assert len(cases) > 20
    for case in cases:
        rows = as_lists(case["out"]["input_ids"])
        if len({len(row) for row in rows}) > 1:
            continue
        ids = torch.tensor(rows)
        encoding = {"input_ids": ids, "attention_mask": (ids != late.tokenizer.pad_token_id).long()}
        legacy = late.tokenizer.build_legacy_inputs(encoding)
        masks = np.array(as_lists(case["out"]["attention_mask"]), dtype=bool)
        assert np.array_equal(legacy["attention_mask"].numpy(), masks), case["kwargs"]
        assert as_lists(legacy["position_ids"]) == as_lists(case["out"]["position_ids"])


def to_messages(case: dict[str, Any]) -> list[dict[str, str]]:
    messages = []
    for question, answer in case["history"]:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": case["query"]}]


def test_chat_prompts(golden: Golden) -> None:
    tokenizer = golden.tokenizer
    cases = [case for case in golden.read("chat")["chat"] if case["query"]]  # "" is refused
    assert len(cases) > 10
    for case in cases:
        (prompt,), messages = case["prompt"], to_messages(case)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt
        encoding = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        as_text = tokenizer([prompt], split_special_tokens=True)
        assert as_text["input_ids"] == [encoding["input_ids"]]
        original = as_lists(case["encoded"]["input_ids"])
        assert tokenizer([prompt])["input_ids"] == original
        if not any(mark in prompt for mark in MARKS):
            assert as_text["input_ids"] == original
        else:  # a question with [MASK] in it reached the original as that token
            border = {tokenizer.gmask_token_id, tokenizer.bos_token_id}
            assert set(encoding["input_ids"]) & golden.special_ids() == border


def test_answers(golden: Golden) -> None:
    for case in golden.read("chat")["chat"]:
        text = golden.tokenizer.decode(case["generated_ids"]).strip()
        if not golden.is_fork and "2023" not in case["response"]:
            folded = case["response"].translate(str.maketrans("，！：；？", ",!:;?"))
            assert text == folded
        assert "<eop>" not in text and "\u2581" not in text


def test_saved_vocabulary_is_the_file(golden: Golden, tmp_path: Path) -> None:
    (path,) = golden.tokenizer.save_vocabulary(str(tmp_path))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert digest == golden.read("api")["api"]["saved_vocab_sha256"]
