"""Owns the scoring of answers by a finished reward model: pairs, or answers that are ranked.

    chatglm train score out/reward --eval_data pairs.jsonl --output out/scored_pairs
    chatglm train score out/reward --task answers --eval_data sampled.jsonl --output out/best

A score is that of an answer's `<eop>` behind its question, as PPO takes it. `scores.jsonl` has a
line for each pair or answer, in the order of the data, with its place there. Of pairs `pairs.json`
has the figures that the stage `reward` writes; of answers `answers.json` has others, and
`best.jsonl` the best one of every question that has several, as rows of `sft`. Nothing is trained.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatglm.data.dialects import read_answers, read_pairs
from chatglm.data.files import open_records
from chatglm.data.records import Columns, Record, RowProblem
from chatglm.evaluating.pairs import share_of_wins, summarize_pairs, write_pairs
from chatglm.evaluating.scoring import iter_batches
from chatglm.evaluating.settings import ScoreSettings
from chatglm.loading import choose_device, choose_dtype
from chatglm.training.data.batches import Examples
from chatglm.training.data.rendering import Example, Renderer
from chatglm.training.json_lines import write_lines
from chatglm.training.models import list_packing, load_tokenizer, read_format
from chatglm.training.ppo.rewards import (
    RewardFolder,
    RewardModel,
    Sampled,
    find_reward_model,
    load_found,
)
from chatglm.training.processes import require_one_process
from chatglm.training.resuming import open_output
from chatglm.training.stage import Stage

SCORES_FILE = "scores.jsonl"
ANSWERS_FILE = "answers.json"
BEST_FILE = "best.jsonl"


@dataclass
class ScoreArguments:
    """No keys of a library: all are in `ScoreSettings`."""


class Scorer:
    """A reward model that scores rendered answers.

    Args:
        settings: how it is loaded, with the folder of its base as `model`.
        found: where it is.

    Raises:
        ValueError: for a device, a number format or a folder that does not fit.
    """

    def __init__(self, settings: ScoreSettings, found: RewardFolder) -> None:
        self.settings, self.found = settings, found
        self.device = choose_device(settings.device or None)
        self.renderer = Renderer(
            read_format(settings), load_tokenizer(settings), settings.max_length, settings.long_rows
        )
        self.batch_size = settings.per_device_eval_batch_size

    @cached_property
    def model(self) -> RewardModel:
        """The model itself, loaded when it is first asked: rows are rendered before.

        Raises:
            ValueError: if it cannot be loaded as the settings say.
        """
        dtype = choose_dtype(self.settings.dtype or None, self.device)
        scorer = load_found(self.found, dtype, **list_packing(self.settings))
        return RewardModel(scorer.to(self.device), self.batch_size)

    def score(self, examples: Examples, unit: str) -> np.ndarray:
        """Return the scores `(N, A)` of rows that have A answers each, as the data have them.

        Raises:
            ValueError: if one is no number.
        """
        rows: list[np.ndarray] = [np.empty(0)] * len(examples)
        for batch in iter_batches(examples.lengths, self.batch_size, unit):
            answers = [list_answers(examples[i]) for i in batch]
            flat = [answer for several in answers for answer in several]
            ids = [answer.prompt_ids for answer in flat], [answer.answer_ids for answer in flat]
            scores = self.model(Sampled(*ids, [], [], [])).numpy().astype(np.float64)
            for i, scored in zip(batch, scores.reshape(len(batch), -1)):
                rows[i] = scored
        return np.stack(rows)


def list_answers(made: Example | tuple[Example, Example]) -> Sequence[Example]:
    """Return what was rendered of a row as a list: one answer, or the two of a pair."""
    return [made] if isinstance(made, Example) else list(made)


class Pairs:
    """How often a reward model prefers the better answer of a pair.

    Args:
        settings: of the scoring.

    Raises:
        ValueError: for files or rows that cannot be used.
    """

    def __init__(self, settings: ScoreSettings) -> None:
        self.records = open_records(settings.eval_data, read_pairs, settings)

    def measure(self, scorer: Scorer, folder: Path) -> dict[str, Any]:
        """Write `scores.jsonl` and `pairs.json`, and return the figures.

        Raises:
            ValueError: for rows that are too long, or scores that are no numbers.
        """
        examples = Examples(self.records, scorer.renderer.render_pair)
        scores = scorer.score(examples, "pairs")
        records = (self.records[i] for i in examples.kept)
        write_lines(map(describe_pair, records, scores), folder / SCORES_FILE)
        lengths = [[len(a.answer_ids) for a in examples[i]] for i in range(len(examples))]
        kinds = [self.records[i].kind for i in examples.kept]
        skipped = self.records.num_skipped + examples.num_skipped
        figures = summarize_pairs(scores, np.array(lengths), kinds) | {"skipped": skipped}
        write_pairs(figures, folder)
        return figures


def describe_pair(record: Record, scores: np.ndarray) -> dict[str, Any]:
    """Return what is written of a pair with the scores `(2,)`."""
    better, worse = scores.tolist()
    kind = {"kind": record.kind} if record.kind else {}
    return {"row": record.source, **kind, "chosen": better, "rejected": worse}


def read_candidates(row: dict[str, Any], columns: Columns) -> Iterator[Record]:
    """Yield a record for every answer of a row: all of its `answers`, or what `sft` would learn.

    Args:
        row: whose `answers`, if it has them, are texts, or the fork's with scores or without.
        columns: of rows with other names.

    Raises:
        RowProblem: if there is no answer in it.
    """
    answers = row.get("answers")
    if answers is None:
        yield from read_answers(row, columns)
        return
    if not isinstance(answers, list) or not answers:
        raise RowProblem(f"answers is no list of answers: {answers!r:.60}")
    for answer in answers:
        text = answer.get("answer") if isinstance(answer, dict) else answer
        alone = {**row, "answers": [{"answer": text, "score": 0}]}
        yield from read_answers(alone, columns)


class Scored(NamedTuple):
    """An answer with its score.

    Attributes:
        record: the question and the answer.
        score: of the answer.
        tokens: of it, `<eop>` included.
    """

    record: Record
    score: float
    tokens: int


class Answers:
    """The scores of answers, and the best one of those of one question.

    Args:
        settings: of the scoring.

    Raises:
        ValueError: for files or rows that cannot be used.
    """

    def __init__(self, settings: ScoreSettings) -> None:
        self.records = open_records(settings.eval_data, read_candidates, settings)

    def measure(self, scorer: Scorer, folder: Path) -> dict[str, Any]:
        """Write `scores.jsonl`, `best.jsonl` and `answers.json`, and return the figures.

        Raises:
            ValueError: for rows that are too long, or scores that are no numbers.
        """
        examples = Examples(self.records, scorer.renderer.render)
        scores = scorer.score(examples, "answers")[:, 0].tolist()
        tokens = [len(examples[i].answer_ids) for i in range(len(examples))]
        answers = list(map(Scored, (self.records[i] for i in examples.kept), scores, tokens))
        questions = group_by_question(answers)
        lines = (line for question in questions for line in describe_answers(question))
        write_lines(lines, folder / SCORES_FILE)
        several = [question for question in questions if len(question) > 1]
        write_lines(map(describe_best, several), folder / BEST_FILE)
        skipped = self.records.num_skipped + examples.num_skipped
        figures = summarize_answers(questions) | {"skipped": skipped}
        text = json.dumps(figures, ensure_ascii=False, indent=2)
        (folder / ANSWERS_FILE).write_text(text + "\n", encoding="utf-8")
        return figures


def group_by_question(answers: Iterable[Scored]) -> list[list[Scored]]:
    """Return answers in their order, those of one question of one row together."""
    groups: list[list[Scored]] = []
    for answer in answers:
        asked = answer.record._replace(answer="")
        if groups and groups[-1][0].record._replace(answer="") == asked:
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return groups


def rank(question: Sequence[Scored]) -> list[int]:
    """Return the place of each answer of a question, 1 the best; equal scores share the better."""
    return [1 + sum(other.score > answer.score for other in question) for answer in question]


def describe_answers(question: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """Yield what is written of each answer of a question."""
    for number, (answer, place) in enumerate(zip(question, rank(question))):
        record = answer.record
        several = {"answer_number": number, "rank": place} if len(question) > 1 else {}
        texts = {"prompt": record.query, "answer": record.answer}
        yield {"row": record.source, **several, "score": answer.score, **texts}


def describe_best(question: Sequence[Scored]) -> dict[str, Any]:
    """Return the best answer of a question as a row that `sft` reads, the first of equal ones."""
    best = max(question, key=lambda answer: answer.score)
    record = best.record
    optional = {"history": record.history, "system": record.system}
    lead = {key: value for key, value in optional.items() if value}
    texts = {"prompt": record.query, "response": record.answer}
    return {**lead, **texts, "score": best.score, "row": record.source}


def summarize_answers(questions: Sequence[Sequence[Scored]]) -> dict[str, Any]:
    """Return the figures of answers, and of questions that have several.

    Returns:
        Of all `answers` the `mean`, `deviation`, `lowest` and `highest` score. Of the questions
        `with_several` answers, if there are any, `best_of`: for n = 1, 2, 4 ... up to the most that
        all of these have, what the best of n answers gets, and `longer_wins`: how often the longer
        one of two answers has the higher score, by pairs.
    """
    scores = np.array([answer.score for question in questions for answer in question])
    several = [question for question in questions if len(question) > 1]
    figures: dict[str, Any] = {
        "answers": len(scores),
        "questions": len(questions),
        "mean": float(scores.mean()),
        "deviation": float(scores.std()),
        "lowest": float(scores.min()),
        "highest": float(scores.max()),
        "with_several": len(several),
    }
    if several:
        figures["best_of"] = expect_best(several)
        figures["longer_wins"] = compare_lengths(several)
    return figures


def expect_best(questions: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """Return the mean over questions of the score of the best of n answers, for growing n.

    What is expected of n that are drawn from all k without repeating: the i-th lowest is the best
    of C(i - 1, n - 1) of the C(k, n) draws.
    """
    most = min(map(len, questions))
    numbers = [2**power for power in range(most.bit_length())]
    found: dict[str, float] = {}
    for n in [*numbers, most] if most not in numbers else numbers:
        means = []
        for question in questions:
            ranked, draws = sorted(answer.score for answer in question), math.comb(len(question), n)
            means.append(sum(s * math.comb(i, n - 1) / draws for i, s in enumerate(ranked)))
        found[str(n)] = float(np.mean(means))
    return found


def compare_lengths(questions: Sequence[Sequence[Scored]]) -> float | None:
    """Return how often the longer of two answers of a question has the higher score.

    None if all have one length.
    """
    pairs = [
        (longer.score, shorter.score)
        for question in questions
        for longer in question
        for shorter in question
        if longer.tokens > shorter.tokens
    ]
    return share_of_wins(np.array(pairs)) if pairs else None


MEASURES = {"pairs": Pairs, "answers": Answers}


def main(settings: ScoreSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Score, write what was found, and return the figures.

    Args:
        settings: ours.
        given: nothing.

    Raises:
        ValueError: for settings, data, a model or a folder that cannot be used.
    """
    require_one_process("score")
    found = find_reward_model(settings.model, "".join(settings.adapter), settings.any_base)
    task = MEASURES[settings.task](settings)
    adapter = [str(found.adapter)] if found.adapter else []
    settings = dataclasses.replace(settings, model=str(found.base), adapter=adapter)
    with open_output(settings, given):
        figures = task.measure(Scorer(settings, found), Path(settings.output))
        return {"task": settings.task, **figures}


STAGE = Stage("score", ScoreSettings, ScoreArguments, main)


__all__ = ["STAGE", "ScoreArguments", "main", "read_candidates"]
