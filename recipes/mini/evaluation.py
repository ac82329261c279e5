"""Measures the small model: how well it foretells answers, and what it answers by itself.

Owns which questions are asked, taught ones and others, and the numbers taken from the answers. How
they are shown is the business of `report`. Answers are greedy throughout: no chance, no picking.
"""

import random
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from statistics import mean
from typing import Any, NamedTuple

import torch

from recipes.mini.corpus import (
    IGNORED_LABEL,
    MAX_TOKENS,
    SOURCES,
    Dialogue,
    Example,
    Sampler,
    collate,
    spell_question,
)
from recipes.mini.extractors import ARITHMETIC, sum_en, sum_zh
from recipes.mini.ngram import Baseline
from recipes.mini.train import answer_loss

SEED = 20261122
BATCH_SIZE = 32
TAUGHT_ROUNDS = 200  # of each source, for comparison with what was not taught
MAX_NEW_TOKENS = 128
NEAR = 0.9
NEW_SUMS = 100
GREEDY = {"do_sample": False, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS}


class Question(NamedTuple):
    """A round to be answered, and the answer that was taught, or would have been."""

    dialogue: str
    source: str
    language: str
    query: str
    history: list[tuple[str, str]]
    answer: str


class Answer(NamedTuple):
    """What the model said, whether it ended with `<eop>`, and whether it is the taught answer."""

    text: str
    has_stopped: bool
    is_exact: bool


Pair = tuple[Question, Answer]


def language_of(dialogue: Dialogue) -> str:
    """Return "zh" or "en": every id is of the form name-language-number."""
    return dialogue.id.split("-")[1]


def iter_questions(dialogue: Dialogue) -> Iterator[Question]:
    """Yield every round of a dialogue, in its last wording and behind the rounds before it."""
    history: list[tuple[str, str]] = []
    for round_ in dialogue.rounds:
        query, name = round_.questions[-1], language_of(dialogue)
        yield Question(dialogue.id, dialogue.source, name, query, list(history), round_.answer)
        history.append((query, round_.answer))


def pick_untaught(seen: Sequence[Dialogue], held_out: Sequence[Dialogue]) -> list[Question]:
    """Return the held-out rounds that did not find their way into the training all the same.

    A held-out wording of a seed may be a wording of another seed, and a held-out fact is often a
    round of a second dialogue.
    """
    rounds = [round_ for dialogue in seen for round_ in dialogue.rounds]
    answers = {round_.answer for round_ in rounds}
    wordings = {spell_question(q, True, True) for round_ in rounds for q in round_.questions}

    def is_taught(question: Question) -> bool:
        if question.source == "seeds":
            return spell_question(question.query, True, True) in wordings
        return question.answer in answers

    asked = [question for dialogue in held_out for question in iter_questions(dialogue)]
    return [question for question in asked if not is_taught(question)]


def pick_taught(seen: Sequence[Dialogue]) -> list[Question]:
    """Draw up to `TAUGHT_ROUNDS` rounds of each source from what was trained on."""
    rng = random.Random(SEED)
    asked = [question for dialogue in seen for question in iter_questions(dialogue)]
    pools = [[question for question in asked if question.source == source] for source in SOURCES]
    return [q for pool in pools for q in rng.sample(pool, min(TAUGHT_ROUNDS, len(pool)))]


def encode_questions(questions: Iterable[Question], sampler: Sampler) -> list[Example]:
    """Turn questions into ids; those longer than any trained on are left out."""
    examples = [sampler.encode(q.query, q.history, q.answer) for q in questions]
    return [example for example in examples if sum(map(len, example)) <= MAX_TOKENS]


def iter_batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Yield the places of examples of about the same length."""
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))
    for start in range(0, len(order), BATCH_SIZE):
        yield order[start : start + BATCH_SIZE]


@torch.no_grad()
def sum_losses(model: Any, examples: Sequence[Example], pad_id: int) -> float:
    """Return the summed loss of the answers' tokens in nats."""
    total = 0.0
    for places in iter_batches(examples):
        batch = collate([examples[place] for place in places], pad_id)
        num_targets = int((batch[2] != IGNORED_LABEL).sum())
        total += answer_loss(model, batch).item() * num_targets
    return total


def measure_losses(
    model: Any, baseline: Baseline, questions: Sequence[Question], sampler: Sampler
) -> dict[str, dict[str, Any]]:
    """Return the summed losses of the model and of the baseline by source, with the counts."""
    measured = {}
    for source in SOURCES:
        examples = encode_questions((q for q in questions if q.source == source), sampler)
        if examples:
            measured[source] = {
                "rounds": len(examples),
                "tokens": sum(len(example.answer_ids) for example in examples),
                "model": sum_losses(model, examples, sampler.tokenizer.pad_token_id),
                "baseline": baseline.losses(examples),
            }
    return measured


@torch.no_grad()
def answer_questions(model: Any, questions: Sequence[Question], sampler: Sampler) -> list[Pair]:
    """Let the model answer greedily, in batches; the order is that of the questions."""
    examples = [sampler.encode(q.query, q.history, q.answer) for q in questions]
    answers: dict[int, Answer] = {}
    for places in iter_batches(examples):
        prompts = {"input_ids": [examples[place].prompt_ids for place in places]}
        inputs = sampler.tokenizer.pad(prompts, return_tensors="pt")
        outputs = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        for place, ids in zip(places, outputs.tolist()):
            answers[place] = read_answer(model, ids, examples[place], sampler)
    return [(question, answers[place]) for place, question in enumerate(questions)]


def read_answer(model: Any, ids: list[int], example: Example, sampler: Sampler) -> Answer:
    """Cut a row of new ids behind its `<eop>` and compare it with what was taught."""
    has_stopped = sampler.end_id in ids
    said = ids[: ids.index(sampler.end_id) + 1] if has_stopped else ids
    text = model.process_response(sampler.tokenizer.decode(said))
    return Answer(text, has_stopped, said == example.answer_ids)


def character_f1(said: str, taught: str) -> float:
    """Return the F1 of the characters that two texts have in common, in order."""
    return SequenceMatcher(None, said, taught, autojunk=False).ratio()


def score_wordings(pairs: Sequence[Pair]) -> dict[str, float]:
    """Compare answers with the taught ones; `chance` is the F1 with the next question's."""
    taught = [question.answer for question, _ in pairs]
    said = [answer.text for _, answer in pairs]
    likeness = [*map(character_f1, said, taught)]
    chance = [*map(character_f1, said, [*taught[1:], *taught[:1]])]
    is_exact = [answer.is_exact for _, answer in pairs]
    return {
        "asked": len(pairs),
        "exact": sum(is_exact),
        "near": sum(same or f1 >= NEAR for same, f1 in zip(is_exact, likeness)),
        "f1": mean(likeness),
        "chance": mean(chance),
    }


def count_right(pairs: Sequence[Pair]) -> dict[str, int]:
    """Count the answers that are the taught ones to the letter."""
    return {"asked": len(pairs), "right": sum(answer.is_exact for _, answer in pairs)}


def numbers_of(answer: str) -> tuple[str, ...]:
    """Return the numbers of a sum, which are the same in both languages."""
    return tuple(re.findall(r"\d+", answer))


def draw_new_sums(known: Container[tuple[str, ...]]) -> list[Question]:
    """Draw sums of numbers as large as the taught ones, but taught in neither language."""
    _, first, second = ARITHMETIC["plus"]
    pairs = [(a, b) for a in range(first + 1) for b in range(second + 1)]
    new = [(a, b) for a, b in pairs if tuple(map(str, (a, b, a + b))) not in known]
    questions = []
    for a, b in random.Random(SEED).sample(new, NEW_SUMS):
        for language, build in (("zh", sum_zh), ("en", sum_en)):
            asked, answer = build(a, b, "plus", a + b, 0).rounds[0]
            questions.append(Question("", "arithmetic", language, asked[0], [], answer))
    return questions


def measure_answers(
    model: Any, seen: Sequence[Dialogue], untaught: Sequence[Question], sampler: Sampler
) -> dict[str, Any]:
    """Let the model answer what was not taught, and sums of all kinds, and count what is right."""
    pairs = answer_questions(model, untaught, sampler)
    sums = [pair for pair in pairs if pair[0].source == "arithmetic"]
    taught_sums = [q for q in pick_taught(seen) if q.source == "arithmetic"]
    known = {numbers_of(r.answer) for d in seen if d.source == "arithmetic" for r in d.rounds}
    return {
        "wordings": {
            name: score_wordings([p for p in pairs if p[0][1:3] == ("seeds", name)])
            for name in ("zh", "en")
        },
        "stops": {"asked": len(pairs), "stopped": sum(a.has_stopped for _, a in pairs)},
        "arithmetic": {
            "taught": count_right(answer_questions(model, taught_sums, sampler)),
            "taught in the other language": count_right(
                [pair for pair in sums if numbers_of(pair[0].answer) in known]
            ),
            "taught in neither": count_right(
                answer_questions(model, draw_new_sums(known), sampler)
            ),
        },
    }
