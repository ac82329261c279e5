"""Compares the tokenizer of this folder with an older one, on strings made to be difficult.

    python -m benchmarks.endurance.fuzz_tokenizer --oracle FOLDER --journal FILE [--vocabulary FILE]

`FOLDER` is a checkout with the older tokenization_chatglm.py. Ids (alone, in batches, as plain
text, of pairs), tokens and decoded texts of every batch are compared; the journal holds how many
batches agreed, so that a run that was stopped goes on from there. Exits with 1 at the first
difference and prints it.
"""

import argparse
import importlib
import importlib.util
import json
import random
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BATCH = 50  # strings
GENERATIONS: tuple[dict[str, Any], ...] = ({"num_image_tokens": 0}, {"num_image_tokens": 9})
MARKS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "</s>", "<s>", "<pad>", "<unk>", "<n>"),
    *(
        "<|tab|>",
        "<|blank_4|>",
        "<0x41>",
        "\ufdd0",
        "\u2581",
        "\ud800",
        "\ufe64n\ufe65",
        "\uff1cn>",
    ),
    *("[gMASK]<sop>", "<word>", "<mark>", "<image_5>", "\u00ad", "\u200b", "\x00", "\x1f"),
)
GAPS = (" ", "  ", "\n", "\t", "\r\n", " " * 4, " " * 81, " " * 163, "\u3000", "\n\n  ")
WORDS = (
    *(
        "你好",
        "天气。",
        "the",
        "The",
        "def f(x):",
        "=" * 36,
        "。" * 13,
        "---|---",
        "\ufb01",
        "１２",
        "e\u0301",
    ),
    *(
        "\u0130",
        "\U00020000",
        "\U0001f600",
        "\u00df",
        "好" * 9,
        "https://a.b/c?d=e",
        "ⅷ",
        "㍐",
        "…",
    ),
)
RANGES = ((32, 127), (0x80, 0x250), (0x4E00, 0x9FFF), (0, 0xFFFF), (0x10000, 0x10FFFF))


def load_tokenizer_class(folder: Path, package: str) -> Any:
    """Return the class of a folder's flat files, imported as a package of that name."""
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.tokenization_chatglm").ChatGLMTokenizer


def make_string(source: random.Random) -> str:
    """Return a string of marks, white space, words and signs of every range."""
    parts = []
    for _ in range(source.randrange(12)):
        kind = source.randrange(8)
        if kind < 5:
            parts.append(source.choice((MARKS, GAPS, WORDS, WORDS, GAPS)[kind]))
        else:
            first, last = source.choice(RANGES)
            parts.append("".join(chr(source.randrange(first, last)) for _ in range(kind)))
    return "".join(parts)


def list_answers(tokenizer: Any, texts: list[str], rows: list[list[int]]) -> dict[str, Any]:
    """Return what a tokenizer makes of a batch of texts, and of rows of random ids."""
    plain, pairs = {"split_special_tokens": True}, texts[::-1]
    cut = {"padding": True, "truncation": True, "max_length": 9}
    return {
        "ids": [tokenizer(text)["input_ids"] for text in texts[:5]],
        "batch": tokenizer(texts)["input_ids"],
        "plain": tokenizer(texts, add_special_tokens=False, **plain)["input_ids"],
        "pairs": dict(tokenizer(texts, pairs, return_special_tokens_mask=True)),
        "cut": dict(tokenizer(texts, padding_side="right", **cut, **plain)),
        "tokens": [tokenizer.tokenize(text) for text in texts],
        "texts": tokenizer.batch_decode(rows),
        "shown": tokenizer.batch_decode(rows, skip_special_tokens=True),
        "raw": tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False),
    }


def compare_batch(number: int, tokenizers: list[Any]) -> None:
    """Compare the tokenizers, old and new, on a batch that its number makes.

    Raises:
        ValueError: if they differ. The message says where.
    """
    source = random.Random(number)
    texts = [make_string(source) for _ in range(BATCH)]
    size = tokenizers[0].vocab_size
    rows = tokenizers[0](texts)["input_ids"][::2]
    rows += [[source.randrange(-3, size + 9) for _ in range(20)] for _ in range(BATCH // 4)]
    rows += [[source.randrange(size - 300, size) for _ in range(20)] for _ in range(BATCH // 4)]
    old, new = (list_answers(tokenizer, texts, rows) for tokenizer in tokenizers)
    for name, answer in old.items():
        if answer != new[name]:
            raise ValueError(f"batch {number}, {name} differ")


def main(argv: list[str] | None = None) -> int:
    """Compare until there are enough strings; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the tokenizer with an older one.")
    parser.add_argument("--oracle", type=Path, required=True, help="folder with the older files")
    parser.add_argument("--vocabulary", type=Path, default=ROOT / "ice_text.model")
    parser.add_argument("--journal", type=Path, required=True, help="where to note what agreed")
    parser.add_argument("--strings", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    done = json.loads(args.journal.read_text())["batches"] if args.journal.exists() else 0
    classes = [load_tokenizer_class(args.oracle, "older"), load_tokenizer_class(ROOT, "newer")]
    sides = [[build(str(args.vocabulary), **g) for build in classes] for g in GENERATIONS]
    for tokenizer in (tokenizer for side in sides for tokenizer in side):
        tokenizer.add_tokens(["<word>"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    while done * BATCH < args.strings:
        try:
            compare_batch(done, sides[done % len(sides)])
        except ValueError as error:
            print(f"fuzz_tokenizer: {error}", file=sys.stderr)
            return 1
        done += 1
        if done % 20 == 0 or done * BATCH >= args.strings:
            args.journal.write_text(
                json.dumps({"batches": done, "strings": done * BATCH, "at": time.ctime()}) + "\n"
            )
    print(f"{done * BATCH} strings agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
