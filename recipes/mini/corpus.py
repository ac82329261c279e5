"""The small model's training examples: dialogues in, token ids and labels out.

Owns the mix of sources, the split into seen and held out, and the sampling of examples. The
prompt format is the model's own `build_prompt`; ids are the tokenizer's.

A dialogue is a list of rounds, each with several wordings of one question and one answer. An
example takes one wording for each round up to a chosen one, sometimes behind rounds of another
dialogue, and asks for the chosen round's answer.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[2]
SEEDS = Path(__file__).resolve().parent / "seeds"

IGNORED_LABEL = -100
MAX_TOKENS = 256
BATCH_TOKENS = 24576
BATCHES_IN_POOL = 8


class Phase(NamedTuple):
    """What is drawn from `first_step` on.

    Attributes:
        shares: each source's share of the examples.
        basics_weight: how many times as often as another a seed about the basics is drawn.
        gap_share: share of the questions in which words go missing.
    """

    first_step: int
    shares: dict[str, float]
    basics_weight: int = 1
    gap_share: float = 0.0


PHASES = (
    # A broad mix, for fluency and for facts, with gaps in the questions: the other words must do.
    Phase(
        0,
        {
            "seeds": 0.38,
            "health": 0.08,
            "countries": 0.08,
            "wordnet": 0.14,
            "arithmetic": 0.14,
            "idioms": 0.09,
            "chitchat": 0.05,
            "django": 0.03,
            "chatterbot": 0.01,
        },
        gap_share=0.2,
    ),
    # Mostly our own dialogues, and enough of the others not to forget them.
    Phase(
        5600,
        {
            "seeds": 0.66,
            "health": 0.05,
            "countries": 0.05,
            "wordnet": 0.07,
            "arithmetic": 0.08,
            "idioms": 0.05,
            "chitchat": 0.02,
            "django": 0.01,
            "chatterbot": 0.01,
        },
        basics_weight=3,
        gap_share=0.35,
    ),
)
SOURCES = tuple(PHASES[0].shares)
# The talk seeds begin with greetings, what the model is and can do, thanks and good-byes.
BASICS = re.compile(r"talk-(en|zh)-0[0-7]\d")
# A Chinese character, or a word, with the space before it.
WORD = re.compile(r"\s*(?:[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+)")
GAP_RATE = 0.15  # of a question's words, where any go missing

OTHER_TOPIC_SHARE = 0.3  # examples whose history begins with another dialogue
LOWER_CASE_SHARE = 0.25
BARE_SHARE = 0.3  # questions without their final punctuation
HELD_OUT_SHARE = 0.03  # dialogues of each fetched source that are never trained on
HELD_OUT_WORDINGS = 5  # seeds with so many first wordings keep one for the test


class Round(NamedTuple):
    """One question in several wordings, and its answer."""

    questions: list[str]
    answer: str


class Dialogue(NamedTuple):
    """A conversation and the source it is from."""

    id: str
    source: str
    rounds: list[Round]


class Drawn(NamedTuple):
    """A round of a dialogue to be answered, in one wording.

    Attributes:
        dialogue: the round is of.
        last: the round's number.
        history: what was said before, in another dialogue too.
        query: the question as it is asked.
    """

    dialogue: Dialogue
    last: int
    history: list[tuple[str, str]]
    query: str

    @property
    def answer(self) -> str:
        """The answer that is taught."""
        return self.dialogue.rounds[self.last].answer


class Example(NamedTuple):
    """Token ids of a prompt, `[gMASK] <sop>` included, and of an answer with its `<eop>`."""

    prompt_ids: list[int]
    answer_ids: list[int]


def load_dialogues(data: Path | None) -> list[Dialogue]:
    """Read our own seeds, and the fetched sources of a folder if given, in a fixed order."""
    files = [("seeds", path) for path in sorted(SEEDS.glob("*.jsonl"))]
    if data is not None:
        fetched = sorted(data.glob("*.jsonl"))
        files += [(path.stem, path) for path in fetched if path.stem in SOURCES]
    return [dialogue for source, path in files for dialogue in _read_dialogues(source, path)]


def _read_dialogues(source: str, path: Path) -> Iterator[Dialogue]:
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        rounds = [Round(r["q"], r["a"]) for r in fields["rounds"]]
        yield Dialogue(fields["id"], source, rounds)


def _draw(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    return zlib.crc32(key.encode()) / 2**32


def split_dialogues(dialogues: Sequence[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """Split into what is trained on and what is held out.

    Seeds hold out one wording of a first question, so that the test asks what was taught in words
    that were not; other sources hold out whole dialogues.
    """
    seen, held_out = [], []
    for dialogue in dialogues:
        first = dialogue.rounds[0]
        if dialogue.source == "seeds":
            if len(first.questions) >= HELD_OUT_WORDINGS:
                kept, asked = first.questions[:-1], first.questions[-1:]
                held_out.append(dialogue._replace(rounds=[first._replace(questions=asked)]))
                first = first._replace(questions=kept)
            seen.append(dialogue._replace(rounds=[first, *dialogue.rounds[1:]]))
        elif _draw(dialogue.id) < HELD_OUT_SHARE:
            held_out.append(dialogue)
        else:
            seen.append(dialogue)
    return seen, held_out


def spell_question(question: str, is_lower: bool, is_bare: bool) -> str:
    """Write a question in lower case, and without its final punctuation, if asked to."""
    question = question.lower() if is_lower else question
    return (question.rstrip("?.!。？！") or question) if is_bare else question


def vary_question(question: str, rng: random.Random) -> str:
    """Write a question as carelessly as people do, now and then."""
    is_lower, is_bare = rng.random() < LOWER_CASE_SHARE, rng.random() < BARE_SHARE
    return spell_question(question, is_lower, is_bare)


def open_gaps(question: str, rng: random.Random) -> str:
    """Leave out some words of a question of at least four."""
    words = WORD.findall(question)
    kept = [word for word in words if rng.random() >= GAP_RATE]
    return "".join(kept).lstrip() if 3 <= len(kept) < len(words) else question


def pool_dialogues(dialogues: Sequence[Dialogue], phase: Phase) -> dict[str, list[Dialogue]]:
    """Return, by source, what a phase draws from; a dialogue stands there as often as it weighs."""
    pools: dict[str, list[Dialogue]] = {source: [] for source in phase.shares}
    for dialogue in dialogues:
        weight = phase.basics_weight if BASICS.match(dialogue.id) else 1
        pools.get(dialogue.source, []).extend([dialogue] * weight)
    return {source: pool for source, pool in pools.items() if pool}


class Sampler:
    """Draws examples and batches; the same seed and step give the same batch.

    Args:
        dialogues: what to draw from.
        tokenizer: the model's tokenizer.
        build_prompt: the model's prompt format, `(query, history) -> str`.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        tokenizer: Any,
        build_prompt: Callable[[str, list[tuple[str, str]]], str],
    ) -> None:
        self.tokenizer = tokenizer
        self.build_prompt = build_prompt
        self.pools = [pool_dialogues(dialogues, phase) for phase in PHASES]
        self.end_id = tokenizer.convert_tokens_to_ids("<eop>")

    def encode(self, query: str, history: list[tuple[str, str]], answer: str) -> Example:
        """Turn a round into ids exactly as `chat` does."""
        prompt = self.build_prompt(query, history)
        prompt_ids = self.tokenizer(prompt, split_special_tokens=True)["input_ids"]
        answer_ids = self.tokenizer(answer, split_special_tokens=True, add_special_tokens=False)[
            "input_ids"
        ]
        return Example(prompt_ids, [*answer_ids, self.end_id])

    def draw_round(self, rng: random.Random, step: int = 0) -> Drawn:
        """Draw what one example of a step's phase is made of."""
        phase = max(i for i, phase in enumerate(PHASES) if phase.first_step <= step)
        dialogue = self._draw_dialogue(rng, phase)
        last = rng.randrange(len(dialogue.rounds))
        history = self._draw_other_topic(rng) if rng.random() < OTHER_TOPIC_SHARE else []
        history += self._draw_rounds(dialogue.rounds[:last], rng)
        query = vary_question(rng.choice(dialogue.rounds[last].questions), rng)
        if PHASES[phase].gap_share and rng.random() < PHASES[phase].gap_share:
            query = open_gaps(query, rng)
        return Drawn(dialogue, last, history, query)

    def draw_example(self, rng: random.Random, step: int = 0) -> Example:
        """Draw one example of a step's phase; too long a history is forgotten."""
        drawn = self.draw_round(rng, step)
        example = self.encode(drawn.query, drawn.history, drawn.answer)
        if sum(map(len, example)) > MAX_TOKENS:
            own_rounds = drawn.history[-drawn.last :] if drawn.last else []
            example = self.encode(drawn.query, own_rounds, drawn.answer)
        return example

    def _draw_dialogue(self, rng: random.Random, phase: int) -> Dialogue:
        pools = self.pools[phase]
        shares = [PHASES[phase].shares[source] for source in pools]
        (source,) = rng.choices(list(pools), shares)
        return rng.choice(pools[source])

    def _draw_rounds(self, rounds: Sequence[Round], rng: random.Random) -> list[tuple[str, str]]:
        return [(vary_question(rng.choice(r.questions), rng), r.answer) for r in rounds]

    def _draw_other_topic(self, rng: random.Random) -> list[tuple[str, str]]:
        rounds = self._draw_dialogue(rng, 0).rounds
        return self._draw_rounds(rounds[: rng.randrange(1, 3)], rng)

    def iter_batches(
        self, seed: int, first_step: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `(input_ids, attention_mask, labels)`, each `(B, S)`, from a step on, for ever.

        Args:
            seed: of the draws.
            first_step: the batch to begin with.
            workers: processes that draw ahead; the batches are the same with any number.
        """
        first_pool, skipped = divmod(first_step, BATCHES_IN_POOL)
        pools = DataLoader(
            Pools(self, seed),
            batch_size=None,
            sampler=count(first_pool),  # type: ignore[arg-type]
            num_workers=workers,
        )
        return islice(chain.from_iterable(pools), skipped, None)

    def draw_batches(self, seed: int, pool: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the batches of one pool."""
        return self._draw_pool(random.Random(f"{seed}/{pool}"), pool * BATCHES_IN_POOL)

    def _draw_pool(self, rng: random.Random, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Draw some batches' worth of examples and group them by length, which saves padding."""
        examples, budget = [], BATCHES_IN_POOL * BATCH_TOKENS
        while budget > 0:
            example = self.draw_example(rng, step)
            if sum(map(len, example)) <= MAX_TOKENS:
                examples.append(example)
                budget -= sum(map(len, example))
        examples.sort(key=lambda example: sum(map(len, example)))
        batches = self._cut_evenly(examples)
        rng.shuffle(batches)
        return [collate(batch, self.tokenizer.pad_token_id) for batch in batches]

    def _cut_evenly(self, examples: list[Example]) -> list[list[Example]]:
        """Cut a pool into `BATCHES_IN_POOL` runs of about the same number of tokens."""
        total = sum(len(ids) for example in examples for ids in example)
        batches: list[list[Example]] = [[] for _ in range(BATCHES_IN_POOL)]
        done = 0
        for example in examples:
            batches[min(done * BATCHES_IN_POOL // total, BATCHES_IN_POOL - 1)].append(example)
            done += sum(map(len, example))
        return batches


class Pools(Dataset):
    """The pools of a sampler and a seed, by number."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def __getitem__(self, pool: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return a pool's batches."""
        return self.sampler.draw_batches(self.seed, pool)


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad examples on the right; only answers carry labels."""
    length = max(sum(map(len, example)) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt_ids, answer_ids) in enumerate(examples):
        start, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
        input_ids[row, :end] = torch.tensor(prompt_ids + answer_ids)
        labels[row, start:end] = input_ids[row, start:end]
        attention_mask[row, :end] = 1
    return input_ids, attention_mask, labels
