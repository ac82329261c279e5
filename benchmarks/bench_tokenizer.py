"""Speed of the tokenizer: text to ids and back, beside the bare SentencePiece of its vocabulary.

    python -m benchmarks.bench_tokenizer [--vocabulary FILE ...] [--rounds N] [--repeat N] [--write]

Encodes and decodes Chinese, English and code, one text at a time and as a batch, in turns with the
vocabulary's own processor, which knows nothing of blanks, line breaks or special tokens: the floor.
Batches of texts of 200 and of 2,000 characters have their offsets taken too.
The texts are the files of this repository. Without `--vocabulary` that of this folder is used.
`--write` appends to benchmarks/results.csv.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from transformers import AutoTokenizer

from benchmarks.full_size import ROOT, copy_code
from benchmarks.results import RESULTS, Case, Recorder
from benchmarks.workers import Spread

SOURCES = {"Chinese": "README_zh.md", "English": "README.md", "code": "modeling_chatglm.py"}
OWN = ROOT / "ice_text.model"
PIECE = 500  # characters of a text
SIZES = (200, 2000)  # characters of a text in the batches that our aim is set for
FLOOR = "sentencepiece"
OURS = "our tokenizer"
Side = tuple[Callable[[], object], int]  # what is done, and of how many tokens


def read_texts(name: str, size: int = PIECE) -> list[str]:
    """Return a file of this repository in pieces of so many characters."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [text[start : start + size] for start in range(0, len(text), size)]


def load_tokenizer(vocabulary: Path, folder: Path) -> Any:
    """Return our tokenizer with a vocabulary file, from a folder that is made for it."""
    copy_code(folder)
    shutil.copy(vocabulary, folder / "ice_text.model")
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(ROOT / name, folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def list_tasks(
    tokenizer: Any, processor: Any, texts: list[str], repeat: int
) -> dict[str, dict[str, Side]]:
    """Return what each side does, and the tokens of it, by case."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    plain = [processor.encode(text) for text in texts]
    ours, bare = repeat * sum(map(len, ids)), repeat * sum(map(len, plain))
    times = range(repeat)
    return {
        "encode": {
            OURS: (lambda: [tokenizer.encode(t) for _ in times for t in texts], ours),
            FLOOR: (lambda: [processor.encode(t) for _ in times for t in texts], bare),
        },
        "encode a batch": {
            OURS: (lambda: [tokenizer(texts) for _ in times], ours),
            FLOOR: (lambda: [processor.encode(texts) for _ in times], bare),
        },
        "decode": {
            OURS: (lambda: [tokenizer.decode(row) for _ in times for row in ids], ours),
            FLOOR: (lambda: [processor.decode(row) for _ in times for row in plain], bare),
        },
        "decode a batch": {
            OURS: (lambda: [tokenizer.batch_decode(ids) for _ in times], ours),
            FLOOR: (lambda: [processor.decode(plain) for _ in times], bare),
        },
    }


def list_batches(
    tokenizer: Any, processor: Any, name: str, repeat: int
) -> dict[str, dict[str, Side]]:
    """Return what each side does with batches of texts of one size, on the same threads."""
    tasks: dict[str, dict[str, Side]] = {}
    threads, times = torch.get_num_threads(), range(repeat)
    for size in SIZES:
        texts = read_texts(name, size)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        plain = processor.encode(texts)
        run = partial(processor.encode, texts, num_threads=threads)
        place = partial(run, out_type="offset_mapping")
        unite = partial(processor.decode, plain, num_threads=threads)
        spans = partial(tokenizer, texts, return_offsets_mapping=True)
        for task, our_call, bare_call in (
            ("encode texts", partial(tokenizer, texts), run),
            ("offsets of texts", spans, place),
            ("decode texts", partial(tokenizer.batch_decode, ids), unite),
        ):
            tasks[f"{task} of {size}"] = {
                OURS: (lambda call=our_call: [call() for _ in times], repeat * sum(map(len, ids))),
                FLOOR: (
                    lambda call=bare_call: [call() for _ in times],
                    repeat * sum(map(len, plain)),
                ),
            }
    return tasks


def time_rounds(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every side in every round, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):  # the first one warms up
        for name, (task, _) in sides.items():
            began = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - began)
    return {name: measured[1:] for name, measured in seconds.items()}


def measure_vocabulary(vocabulary: Path, recorder: Recorder, rounds: int, repeat: int) -> None:
    """Measure all texts with one vocabulary."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    versions = f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}"
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as folder:
        tokenizer = load_tokenizer(vocabulary, Path(folder))
        for kind, source in SOURCES.items():
            tasks = list_tasks(tokenizer, processor, read_texts(source), repeat)
            tasks |= list_batches(tokenizer, processor, source, repeat)
            for name, sides in tasks.items():
                # The size tells one vocabulary from another.
                case = Case(
                    OURS, f"{name}, {kind}", versions, processor.get_piece_size(), rounds=rounds
                )
                record_sides(recorder, case, sides, time_rounds(sides, rounds))


def record_sides(
    recorder: Recorder, case: Case, sides: Mapping[str, Side], seconds: Mapping[str, list[float]]
) -> None:
    """Record the tokens a second of both sides, and the ratio of ours to the floor."""
    pairs = list(zip(seconds[FLOOR], seconds[OURS]))
    ratio = Spread.of([floor / ours for floor, ours in pairs])
    for name, (_, tokens) in sides.items():
        rates = Spread.of([tokens / spent for spent in seconds[name]])
        is_ours = name == OURS
        place = case._replace(contender=name)
        recorder.add(place, rates, "tokens/s", ratio if is_ours else None, FLOOR if is_ours else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; return the exit code."""
    parser = argparse.ArgumentParser(description="Speed of the tokenizer.")
    add = parser.add_argument
    add("--vocabulary", type=Path, nargs="+", default=[OWN], metavar="FILE")
    add("--rounds", type=int, default=7, help="of each figure (7)")
    add("--repeat", type=int, default=5, help="times that the texts are gone through (5)")
    add("--write", action="store_true", help="append to benchmarks/results.csv")
    args = parser.parse_args(argv)
    for vocabulary in args.vocabulary:
        if not vocabulary.is_file():
            print(f"bench_tokenizer: {vocabulary} is no vocabulary file", file=sys.stderr)
            return 2
    transformers.logging.set_verbosity_error()
    recorder = Recorder("bench_tokenizer", 0, 1, RESULTS if args.write else None)
    for vocabulary in args.vocabulary:
        measure_vocabulary(vocabulary, recorder, args.rounds, args.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
