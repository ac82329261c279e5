"""Measures prompt lookup: drafts that are looked up in the text so far, beside plain decoding.

Owns the turns and the comparison of the answers, which must be the same with drafts and without.
What model copies, corrects or ignores its prompt is in `copying`.
"""

import argparse
from typing import Any

from benchmarks.contenders import parse_recipe, start_ours
from benchmarks.copying import TEXTS
from benchmarks.results import Case, Recorder
from benchmarks.workers import Spread, Turn, Worker, compare_rounds, run_turns, start_probe

DRAFTS = 10  # tokens that are looked up at once
PLAIN, DRAFTED = "one token after the other", "prompt lookup"


class Asker:
    """Asks a copying model for an answer with drafts or without, and keeps what it said.

    Args:
        args: with the lengths.
        text: of the prompt.
    """

    def __init__(self, args: argparse.Namespace, text: str) -> None:
        sizes = {"context": args.lookup_prompt, "tokens": args.lookup_tokens}
        self.request: dict[str, Any] = {**sizes, "text": text}
        self.answers: dict[int, list[int]] = {}

    def ask(self, worker: Worker, drafts: int) -> float:
        """Return the seconds of the answer.

        Raises:
            ValueError: if drafts change the answer.
        """
        said = worker.ask("look_up", drafts=drafts, **self.request)
        self.answers[drafts] = said["ids"]
        if len({tuple(ids) for ids in self.answers.values()}) > 1:
            raise ValueError(
                f"{worker.name} says {self.answers} by drafts looked up at once: they must agree"
            )
        return said["seconds"]


def measure_lookup(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure answers that copy the prompt, that correct it, and that share nothing with it."""
    with start_probe(args.threads, args.probe_floats) as probe:
        for words in args.ours:
            recipe = parse_recipe(words)._replace(layers=args.layers)
            with start_ours(recipe, args.threads, copies=True) as worker:
                for text in TEXTS:
                    measure_text(worker, probe, recorder, args, text)


def measure_text(
    worker: Worker, probe: Worker, recorder: Recorder, args: argparse.Namespace, text: str
) -> None:
    """Measure one kind of text with drafts and without, in turns."""
    asker = Asker(args, text)
    turns = [
        Turn(PLAIN, worker, lambda asked: asker.ask(asked, 0)),
        Turn(DRAFTED, worker, lambda asked: asker.ask(asked, DRAFTS)),
    ]
    rounds = run_turns(turns, probe, args.rounds)
    load = max(round_.foreign_load for round_ in rounds)
    versions, size = worker.facts["versions"], args.lookup_prompt
    for name in (DRAFTED, PLAIN):
        place = (f"{worker.name}, {name}", f"lookup, {text}", versions, size)
        case = Case(*place, rounds=len(rounds), load=load)
        times = Spread.of([round_.seconds[name] / args.lookup_tokens for round_ in rounds])
        ratio = compare_rounds(rounds, name, PLAIN) if name == DRAFTED else None
        recorder.add(case, times.scaled(1000), "ms/token", ratio, PLAIN if ratio else "")
