"""Strings of any kind through the tokenizer, as both generations of the vocabulary write ids.

A case is a batch of strings: no exception, every id within the vocabulary, a batch gives what each
string gives alone, text asked for as text has no special ids, and what was encoded and decoded once
comes back the same from then on.
"""

import random
from typing import Any

from transformers import AutoTokenizer

from benchmarks.endurance.campaign import Campaign, Case, Finding
from benchmarks.results import ROOT

BATCH = 50
IMAGE_TOKENS = {"v1.1": 0, "v0": 20000}
SPECIAL = ("[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>", "</s>", "<s>")
WRITTEN = ("<n>", "<|tab|>", "<|blank_3|>", "<|blank_81|>", "<0x0A>", "<image_7>", "▁", "\u2582")
WORDS = (
    "hello",
    "世界",
    "a",
    "不",
    "1+1=2",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "שלום",
    "ﷺ",
    "\U0001f1fa",
    "Ⅷ",
    "～",
)
SPACES = (
    " ",
    "  ",
    " " * 81,
    "\n",
    "\t",
    "\r\n",
    "\u3000",
    "\xa0",
    "\u200b",
    "\ufeff",
    "\0",
    "\x85",
)
RANGES = ((0, 128), (0x80, 0x800), (0x4E00, 0x9FFF), (0xD7, 0xD7FF), (0xE000, 0x110000))


def draw_piece(rng: random.Random) -> str:
    """Return some characters."""
    kind = rng.randrange(6)
    if kind < 4:
        return rng.choice((SPECIAL, WRITTEN, WORDS, SPACES)[kind])
    begin, end = rng.choice(RANGES)
    return "".join(chr(rng.randrange(begin, end)) for _ in range(rng.randrange(1, 5)))


def draw_text(rng: random.Random) -> str:
    """Return a string; one in a hundred is long."""
    longest = 300 if rng.random() < 0.01 else 12
    return "".join(draw_piece(rng) for _ in range(rng.randrange(longest)))


def check_texts(tokenizer: Any, texts: list[str], special_ids: set[int]) -> None:
    """Raise `Finding` for the first string that is not treated as it should be."""
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    together, marked = tokenizer(texts, **as_text)["input_ids"], tokenizer(texts)["input_ids"]
    for text, ids, with_marks in zip(texts, together, marked):
        alone = tokenizer(text, **as_text)["input_ids"]
        if alone != ids or tokenizer(text)["input_ids"] != with_marks:
            raise Finding(f"{text!r}: another encoding in a batch than alone")
        if not all(0 <= token < len(tokenizer) for token in with_marks):
            raise Finding(f"{text!r}: ids outside of the vocabulary, {with_marks}")
        if special_ids.intersection(ids):
            raise Finding(f"{text!r}: text became special tokens, {ids}")
        once = tokenizer.decode(ids)
        twice = tokenizer.decode(tokenizer(once, **as_text)["input_ids"])
        if tokenizer.decode(tokenizer(twice, **as_text)["input_ids"]) != twice:
            raise Finding(f"{text!r}: {once!r}, then {twice!r}, then another")


def prepare() -> Case:
    """Load the vocabulary as either generation has it."""
    tokenizers = [
        AutoTokenizer.from_pretrained(ROOT, num_image_tokens=n) for n in IMAGE_TOKENS.values()
    ]
    special = [{t.convert_tokens_to_ids(text) for text in SPECIAL} for t in tokenizers]
    special = [ids - {t.unk_token_id} for ids, t in zip(special, tokenizers)]

    def case(rng: random.Random) -> str:
        place = rng.randrange(len(tokenizers))
        check_texts(tokenizers[place], [draw_text(rng) for _ in range(BATCH)], special[place])
        return "right"

    return case


CAMPAIGN = Campaign(
    "strings",
    "Strings through the tokenizer, both vocabularies",
    "strings",
    1_000_000,
    BATCH,
    prepare,
)
