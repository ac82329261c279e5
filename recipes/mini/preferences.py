"""The data of the alignment: what is fine-tuned on, compared, and practised.

    python -m recipes.mini.preferences --data DIR --work DIR

Writes JSONL as `chatglm train` reads it. There are no human preferences here: the better answer is
the one that was taught, the worse one is made from it or taken from another question, and says
under `kind` how. Questions that are held out are in no training file. Answers that the model gives
itself come later (`own.py`).
"""

import argparse
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.mini.corpus import (
    PHASES,
    Dialogue,
    Drawn,
    Sampler,
    load_dialogues,
    open_gaps,
    split_dialogues,
)
from recipes.mini.evaluation import Question, language_of, pick_untaught

SEED = 20261123
SFT_ROWS = 48_000
PAIRS = 16_000
PROMPTS = 16_000
# How often a worse answer is of a kind: other questions' are hard to tell, the rest is easy.
KINDS = {"mismatched": 0.5, "truncated": 0.25, "repeated": 0.25}
TRUNCATED_SHARE = 1 / 3
REPEATED_PARTS = 4
NUMBER = re.compile(r"\d+(?=\D*$)")  # the last one of a sum: its result


class Rejecter:
    """Makes worse answers.

    Args:
        dialogues: whose answers are other questions'.
    """

    def __init__(self, dialogues: Iterable[Dialogue]) -> None:
        self.answers: dict[tuple[str, str], list[str]] = {}
        for dialogue in dialogues:
            pool = self.answers.setdefault((dialogue.source, language_of(dialogue)), [])
            pool += [round_.answer for round_ in dialogue.rounds]

    def draw(self, source: str, language: str, answer: str, rng: random.Random) -> tuple[str, str]:
        """Return a kind and a worse answer of it."""
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        if kind == "truncated":
            return kind, truncate(answer)
        if kind == "repeated":
            return kind, repeat(answer, rng)
        return kind, self._mismatch(source, language, answer, rng)

    def _mismatch(self, source: str, language: str, answer: str, rng: random.Random) -> str:
        if source == "arithmetic" and NUMBER.search(answer):
            return miscount(answer, rng)
        pool = self.answers[source, language]
        other = answer
        for _ in range(100):
            other = rng.choice(pool)
            if other != answer:
                return other
        return truncate(answer)


def truncate(answer: str) -> str:
    """Return the beginning of an answer."""
    return answer[: max(1, int(len(answer) * TRUNCATED_SHARE))]


def repeat(answer: str, rng: random.Random) -> str:
    """Return an answer that does not get on, but says a part of itself again and again."""
    words = answer.split(" ") if " " in answer else list(answer)
    size = rng.randint(1, max(1, len(words) // 3))
    start = rng.randint(0, len(words) - size)
    joint = " " if " " in answer else ""
    return joint.join(words[: start + size] + words[start : start + size] * REPEATED_PARTS)


def miscount(answer: str, rng: random.Random) -> str:
    """Return a sum with another result near by."""

    def change(match: re.Match[str]) -> str:
        value = int(match.group())
        return str(rng.choice([v for v in range(value - 9, value + 10) if v != value and v >= 0]))

    return NUMBER.sub(change, answer, count=1)


def describe(drawn: Drawn) -> dict[str, Any]:
    """Return the columns of a drawn round's prompt."""
    return {"prompt": drawn.query, "history": [list(pair) for pair in drawn.history]}


def draw_answers(sampler: Sampler, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows with answers, of the last phase's mix."""
    rng = random.Random(f"{SEED}/sft")
    for _ in range(count):
        drawn = sampler.draw_round(rng, PHASES[-1].first_step)
        yield {**describe(drawn), "response": drawn.answer}


def draw_pairs(sampler: Sampler, rejecter: Rejecter, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows with a better and a worse answer."""
    rng = random.Random(f"{SEED}/pairs")
    for _ in range(count):
        drawn = sampler.draw_round(rng, PHASES[-1].first_step)
        dialogue = drawn.dialogue
        kind, rejected = rejecter.draw(dialogue.source, language_of(dialogue), drawn.answer, rng)
        if rejected != drawn.answer:
            yield {**describe(drawn), "chosen": drawn.answer, "rejected": rejected, "kind": kind}


def draw_prompts(sampler: Sampler, count: int) -> Iterator[dict[str, Any]]:
    """Yield questions to be practised: with gaps, which make the known ones hard again."""
    rng = random.Random(f"{SEED}/prompts")
    for _ in range(count):
        drawn = sampler.draw_round(rng, PHASES[-1].first_step)
        query = open_gaps(drawn.query, rng) if drawn.dialogue.source == "seeds" else drawn.query
        yield {**describe(drawn._replace(query=query)), "response": drawn.answer}


def ask(questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
    """Yield held-out questions as rows with answers."""
    for question in questions:
        history = [list(pair) for pair in question.history]
        yield {"prompt": question.query, "history": history, "response": question.answer}


def compare(questions: Iterable[Question], rejecter: Rejecter) -> Iterator[dict[str, Any]]:
    """Yield held-out questions as pairs."""
    rng = random.Random(f"{SEED}/held-out pairs")
    for question, row in ((q, next(ask([q]))) for q in questions):
        answer = row.pop("response")
        kind, rejected = rejecter.draw(question.source, question.language, answer, rng)
        if rejected != answer:
            yield {**row, "chosen": answer, "rejected": rejected, "kind": kind}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows under another name, then name the file; returns how many."""
    partial, number = path.with_suffix(".part"), 0
    with partial.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):  # noqa: B007 - counts
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return number


def write_all(
    dialogues: Sequence[Dialogue], tokenizer: Any, build_prompt: Callable[..., str], folder: Path
) -> dict[str, int]:
    """Write every file of the alignment; returns the rows of each."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, held_out = split_dialogues(dialogues)
    sampler, rejecter = Sampler(seen, tokenizer, build_prompt), Rejecter(seen)
    untaught = pick_untaught(seen, held_out)
    rows = {
        "sft": draw_answers(sampler, SFT_ROWS),
        "sft_eval": ask(untaught),
        "pairs": draw_pairs(sampler, rejecter, PAIRS),
        "pairs_eval": compare(untaught, rejecter),
        "prompts": draw_prompts(sampler, PROMPTS),
        "prompts_eval": ask(q for q in untaught if q.source == "seeds"),
    }
    return {name: write_rows(folder / f"{name}.jsonl", part) for name, part in rows.items()}


def main() -> None:
    """Write the files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.mini.corpus import ROOT

    parser = argparse.ArgumentParser(description="Write the data of the small model's alignment.")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.sources")
    parser.add_argument("--work", type=Path, required=True, help="folder of the JSONL files")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True)
    counts = write_all(load_dialogues(args.data), tokenizer, model.build_prompt, args.work)
    print(json.dumps(counts))  # noqa: T201 - the result of a command


if __name__ == "__main__":
    main()
