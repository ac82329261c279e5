"""A dialogue of hundreds of rounds with the model of this folder: memory, time, answers, recall.

    python -m benchmarks.long_dialogue [--rounds N] [--probes N] [--variants NAME ...] [--fresh]

Every round asks a taught question with `overflow="rounds"`. Some rounds are probed: many taught
questions are asked behind what was said until then, and answers that are right to the letter are
counted. Recall: a name is told, other rounds follow, and the name is asked for. Variants are
windows: 256 tokens is what the model was trained on. Stopped at any time it goes on where it was;
`python -m benchmarks.long_page` shows what was found.
"""

import argparse
import random
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.records import BUILD, describe_run, progress_of, write_json
from benchmarks.results import ROOT
from chatglm import door
from chatglm.process_memory import read_status
from recipes.mini.corpus import MAX_TOKENS, Round, load_dialogues, split_dialogues

RUN = BUILD / "long_dialogue" / "rounds.json"
SEED = 7
ROUNDS, PROBES = 500, 40
PROBED_ROUNDS = (0, 5, 10, 25, 50, 100, 200, 300, 400, 500)
DISTANCES = (0, 1, 2, 3, 5, 8, 12, 20, 40, 80)
SAVED_EVERY = 10
ANSWER_TOKENS = 64
SCALING = {"rope_type": "dynamic", "factor": 8.0, "original_max_position_embeddings": MAX_TOKENS}
# The first two exchanges were taught as they are asked here; the others' names only, or not at all.
TAUGHT_NAMES = ("Anna", "小明")
OTHER_NAMES = ("Tom", "小红", "Lily", "小军")


class Variant(NamedTuple):
    """A window to compare.

    Attributes:
        window: tokens of prompt and answer.
        scaling: its `rope_scaling`.
    """

    window: int
    scaling: dict[str, Any] | None = None


VARIANTS = {
    "256 tokens": Variant(256),
    "2048 tokens": Variant(2048),
    "2048 tokens, dynamic 8": Variant(2048, SCALING),
}


class Talker:
    """A model that answers greedily within a window, however long the history is."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        options = {} if variant.scaling is None else {"rope_scaling": variant.scaling}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        model.generation_config.max_length = None
        self.model, self.window = model.eval(), variant.window

    def ask(self, query: str, history: Sequence[Sequence[str]]) -> str:
        """Return the answer to a question behind the newest rounds that fit."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each says how many rounds are left out
            answer, _ = self.model.chat(
                self.tokenizer,
                query,
                history=history,
                max_length=self.window,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                overflow="rounds",
            )
        return answer

    def is_taught(self, answer: str, asked: Round) -> bool:
        """Tell whether an answer is the taught one, as the vocabulary and `chat` can write it."""
        as_text = {"add_special_tokens": False, "split_special_tokens": True}
        ids = self.tokenizer(asked.answer, **as_text)["input_ids"]
        return answer == self.model.process_response(self.tokenizer.decode(ids))


def draw_questions(seen: Sequence[Any], count: int, seed: int) -> list[Round]:
    """Return so many taught first rounds, in an order of chance."""
    rounds = [dialogue.rounds[0] for dialogue in seen]
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        drawn += rng.sample(rounds, len(rounds))
    return drawn[:count]


def take_rounds(
    talker: Talker, questions: Sequence[Round], found: dict[str, Any], save: Any
) -> None:
    """Talk on until every question is answered; note time, memory and whether it was right.

    The time is the processor's for the one thread that computes: who else runs does not matter.
    """
    history, rows = found.setdefault("history", []), found.setdefault("rounds", [])
    for asked in questions[len(rows) :]:
        begin = time.process_time()
        answer = talker.ask(asked.questions[0], history)
        seconds = time.process_time() - begin
        history.append([asked.questions[0], answer])
        resident = read_status("VmRSS") / 1e6
        rows.append([round(seconds, 3), round(resident, 1), talker.is_taught(answer, asked)])
        if len(rows) % SAVED_EVERY == 0:
            save()


def probe(talker: Talker, probes: Sequence[Round], history: Sequence[Sequence[str]]) -> int:
    """Return how many questions get their taught answer behind a history that stays as it is."""
    return sum(talker.is_taught(talker.ask(r.questions[0], history), r) for r in probes)


def recall(talker: Talker, name: str, between: Sequence[Sequence[str]]) -> bool:
    """Tell whether a name that was told before some rounds is said when it is asked for."""
    is_english = name.isascii()
    told = f"My name is {name}." if is_english else f"我叫{name}"
    history = [[told, talker.ask(told, [])], *between]
    return name in talker.ask("What's my name?" if is_english else "我叫什么名字？", history)


def measure_recall(talker: Talker, found: dict[str, Any], save: Any, distances: Any) -> None:
    """Note for every distance which names are remembered over so many rounds of the dialogue."""
    memory = found.setdefault("recall", {})
    for distance in distances:
        if str(distance) not in memory and distance <= len(found["history"]):
            between = found["history"][:distance]
            names = (*TAUGHT_NAMES, *OTHER_NAMES)
            memory[str(distance)] = [name for name in names if recall(talker, name, between)]
            save()


def measure(talker: Talker, found: dict[str, Any], save: Any, args: argparse.Namespace) -> None:
    """Do what is left of one variant."""
    seen, _ = split_dialogues(load_dialogues(None))
    questions = draw_questions(seen, args.rounds, SEED)
    probes = draw_questions(seen, args.probes, SEED + 1)
    probed = found.setdefault("probes", {})
    for end in [n for n in PROBED_ROUNDS if n < args.rounds] + [args.rounds]:
        take_rounds(talker, questions[:end], found, save)
        if str(end) not in probed:
            probed[str(end)] = probe(talker, probes, found.get("history", []))
            save()
    measure_recall(talker, found, save, DISTANCES)


def run(args: argparse.Namespace) -> None:
    """Measure every variant as far as it is not measured yet."""
    key = {"rounds": args.rounds, "probes": args.probes}
    with progress_of(args.run, key, args.fresh) as found:
        found |= describe_run()
        for name in args.variants:
            part = found.setdefault("variants", {}).setdefault(name, {})
            talker = Talker(args.model, VARIANTS[name])
            measure(talker, part, lambda: write_json(args.run, found), args)
            write_json(args.run, found)
            print(name, part["probes"], part["recall"], flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(description="Talk with the small model for a long time.")
    parser.add_argument("--model", type=Path, default=ROOT, help="folder (this one)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of a dialogue ({ROUNDS})")
    parser.add_argument("--probes", type=int, default=PROBES, help=f"questions a probe ({PROBES})")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--run", type=Path, default=RUN, help="file to go on with")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    torch.set_num_threads(1)
    with door.package_code():
        run(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
