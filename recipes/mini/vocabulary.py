"""Makes the small model's `ice_text.model`: SentencePiece pieces in the official layout.

The text pieces are learned here as the first release's file has them (`<unk> <s> </s> <pad> <n>`,
then unigram pieces); the special, blank and byte pieces behind them are added by the tokenizer's
own `complete_vocabulary`, so their layout has one home.

    python -m recipes.mini.vocabulary --data DIR --out ice_text.model
"""

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import sentencepiece

from recipes.mini.corpus import ROOT, load_dialogues

# With the 344 pieces that follow they make 8192 rows.
NUM_TEXT_PIECES = 7848


def load_flat_module(name: str) -> ModuleType:
    """Import one of the repository's flat files, which use relative imports, by its name."""
    package = ModuleSpec("chatglm_flat", None, is_package=True)
    package.submodule_search_locations = [str(ROOT)]
    sys.modules.setdefault("chatglm_flat", importlib.util.module_from_spec(package))
    return importlib.import_module(f"chatglm_flat.{name}")


def iter_lines(data: Path) -> Iterator[str]:
    """Yield every question and answer as the tokenizer hands it to SentencePiece."""
    for dialogue in load_dialogues(data):
        for round_ in dialogue.rounds:
            yield from (question.replace("\n", "<n>") for question in round_.questions)
            yield round_.answer.replace("\n", "<n>")


def train_text_pieces(data: Path) -> bytes:
    """Learn the text pieces and return the model file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "text")
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter_lines(data),
            model_prefix=prefix,
            model_type="unigram",
            vocab_size=NUM_TEXT_PIECES,
            character_coverage=0.9998,
            normalization_rule_name="nmt_nfkc",
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            user_defined_symbols=["<n>"],
            num_threads=1,  # more threads change the result from run to run
            minloglevel=1,
        )
        return Path(f"{prefix}.model").read_bytes()


def main() -> None:
    """Write the vocabulary file."""
    parser = argparse.ArgumentParser(description="Make the small model's vocabulary file.")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.sources")
    parser.add_argument("--out", type=Path, default=ROOT / "ice_text.model")
    args = parser.parse_args()
    complete = load_flat_module("tokenization_chatglm").complete_vocabulary
    temporary = args.out.with_suffix(".part")
    temporary.write_bytes(complete(train_text_pieces(args.data)))
    temporary.replace(args.out)


if __name__ == "__main__":
    main()
