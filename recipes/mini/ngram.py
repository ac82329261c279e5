"""The small model's baseline: an n-gram model over the same token ids and dialogues.

Owns interpolated Kneser-Ney smoothing and the windows it counts. Where dialogues come from, and
which are held out, is the business of `corpus`.

A window is `N` ids, a token behind the `N - 1` ids before it. Only answers are scored, as only
they are in the model's loss; the end of the prompt is their context. `[gMASK]` stands before every
`<sop>` and tells nothing, so it is left out: the baseline sees one more token of the question.

Shapes: `W` windows, `N` the order.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.mini.corpus import Dialogue, Example, Round, Sampler, spell_question

ORDER = 4
USUAL_DISCOUNT = 0.75  # where no n-gram occurs just once, from which it is estimated otherwise

Ids = NDArray[np.int64]
Probabilities = NDArray[np.float64]


class Level(NamedTuple):
    """Counts of the n-grams of one length, and of the contexts they stand in; both sorted."""

    grams: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    kinds: Ids  # how many different tokens follow each context
    discount: float


def build_level(grams: Ids, counts: Ids, vocab_size: int) -> Level:
    """Sum up sorted n-grams, packed to one number each, by context."""
    contexts, starts, kinds = np.unique(grams // vocab_size, return_index=True, return_counts=True)
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    discount = once / (once + 2 * twice) if once else USUAL_DISCOUNT
    return Level(grams, counts, contexts, np.add.reduceat(counts, starts), kinds, float(discount))


def look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """Return the value of each wanted key, 0 for those that are not in the sorted keys."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


class KneserNey:
    """Interpolated Kneser-Ney: what follows a context, backed by what follows shorter ones.

    The longest n-grams count how often they occur, shorter ones in how many different longer ones
    they end; every count is lowered by a discount, which the shorter context hands out. The
    shortest is backed by the uniform distribution, so no token is impossible.

    Args:
        windows: `(W, N)`, what to learn from.
        vocab_size: ids are below it.

    Raises:
        ValueError: if there are no windows, or one does not fit in a 64-bit number.
    """

    def __init__(self, windows: Ids, vocab_size: int) -> None:
        number, order = windows.shape
        if number == 0 or vocab_size**order >= 2**63:
            raise ValueError(
                f"an n-gram model needs windows of a length that fits in 63 bits, got {number} "
                f"windows of {order} ids below {vocab_size}: use a lower order"
            )
        self.vocab_size = vocab_size
        self.levels: list[Level] = []
        grams, counts = np.unique(self._pack(windows), return_counts=True)
        for length in range(order, 0, -1):
            self.levels.insert(0, build_level(grams, counts, vocab_size))
            grams, counts = np.unique(grams % vocab_size ** (length - 1), return_counts=True)

    def _pack(self, windows: Ids) -> Ids:
        """Write each row `(W, N)` as one number `(W,)`: the last id is its last digit."""
        digits = self.vocab_size ** np.arange(windows.shape[1] - 1, -1, -1, dtype=np.int64)
        return windows @ digits

    def probabilities(self, windows: Ids) -> Probabilities:
        """Return the probability of the last id of each row of `(W, N)` behind the others."""
        packed = self._pack(windows)
        result = np.full(len(packed), 1 / self.vocab_size)
        for length, level in enumerate(self.levels, start=1):
            grams = packed % self.vocab_size**length
            counts = look_up(level.grams, level.counts, grams)
            totals = look_up(level.contexts, level.totals, grams // self.vocab_size)
            kinds = look_up(level.contexts, level.kinds, grams // self.vocab_size)
            kept = np.maximum(counts - level.discount, 0) + level.discount * kinds * result
            result = np.where(totals > 0, kept / np.maximum(totals, 1), result)
        return result


class Baseline:
    """The n-gram model, trained on every wording of every dialogue, in three ways of counting.

    Each n-gram of a round's answer once, which smooths best; as often as the round has wordings,
    which remembers best; or with the questions counted too. See `losses`.

    Args:
        dialogues: what the model is trained on.
        sampler: turns rounds into ids as the model sees them.
    """

    def __init__(self, dialogues: Sequence[Dialogue], sampler: Sampler) -> None:
        tokenizer = sampler.tokenizer
        self.mask_id, self.pad_id = tokenizer.gmask_token_id, tokenizer.pad_token_id
        counted: dict[str, list[Ids]] = {}
        for round_ in (round_ for dialogue in dialogues for round_ in dialogue.rounds):
            for name, windows in self._count_round(round_, sampler).items():
                counted.setdefault(name, []).append(windows)
        size = len(tokenizer)
        self.models = {name: KneserNey(np.concatenate(w), size) for name, w in counted.items()}

    def _count_round(self, round_: Round, sampler: Sampler) -> dict[str, Ids]:
        """Return the windows of a round, each `(W, N)`, for every way of counting."""
        examples = [*iter_spellings(round_, sampler)]
        texts = np.concatenate([self._cut(example) for example in examples])
        answers = np.concatenate([self._cut_answer(example) for example in examples])
        return {
            "answers once": np.unique(answers, axis=0),
            "answers per wording": answers,
            "questions too": np.unique(texts, axis=0),
        }

    def _cut(self, example: Example) -> Ids:
        """Return the window of every token of prompt and answer, `(W, N)`."""
        ids = [*[self.pad_id] * (ORDER - 1), *example.prompt_ids, *example.answer_ids]
        kept = np.array([token_id for token_id in ids if token_id != self.mask_id])
        return np.lib.stride_tricks.sliding_window_view(kept, ORDER)

    def _cut_answer(self, example: Example) -> Ids:
        """Return the windows of an answer's tokens."""
        return self._cut(example)[-len(example.answer_ids) :]

    def losses(self, examples: Sequence[Example]) -> dict[str, float]:
        """Return, for every way of counting, the summed loss of the answers' tokens in nats."""
        windows = np.concatenate([self._cut_answer(example) for example in examples])
        return {
            name: float(-np.log(model.probabilities(windows)).sum())
            for name, model in self.models.items()
        }


def iter_spellings(round_: Round, sampler: Sampler) -> Iterator[Example]:
    """Yield a round in every way its question may be written, and once behind another round.

    A window does not reach further back than that, so this is all the model sees, and more.
    """
    for question in round_.questions:
        ways = product((False, True), repeat=2)
        for spelled in sorted({spell_question(question, *way) for way in ways}):
            yield sampler.encode(spelled, [], round_.answer)
    yield sampler.encode(round_.questions[0], [("?", "!")], round_.answer)
