"""The n-gram baseline against the textbook formula, computed slowly."""

import math
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT

from recipes.mini.corpus import Dialogue, Round, Sampler, spell_question
from recipes.mini.ngram import ORDER, USUAL_DISCOUNT, Baseline, KneserNey, iter_spellings

VOCABULARY = 5
Gram = tuple[int, ...]


def draw_windows(number: int, order: int) -> list[Gram]:
    """Ids that repeat in patterns, so that all counts from 0 up occur."""
    rng = random.Random(3)
    text = [rng.choice((0, 0, 0, 1, 1, 2, 3)) for _ in range(number + order - 1)]
    return [tuple(text[i : i + order]) for i in range(number)]


class SlowKneserNey:
    """Dictionaries and recursion: p(w | c) = (n(cw) - d) / n(c) + d kinds(c) / n(c) p(w | c')."""

    def __init__(self, windows: list[Gram]) -> None:
        self.counts = {len(windows[0]): Counter(windows)}
        for length in range(len(windows[0]) - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])

    def discount(self, length: int) -> float:
        once, twice = (sum(c == k for c in self.counts[length].values()) for k in (1, 2))
        return once / (once + 2 * twice) if once else USUAL_DISCOUNT

    def probability(self, gram: Gram) -> float:
        if not gram:
            return 1 / VOCABULARY
        counts, lower = self.counts[len(gram)], self.probability(gram[1:])
        following = [n for other, n in counts.items() if other[:-1] == gram[:-1]]
        if not following:
            return lower
        discount = self.discount(len(gram))
        kept = max(counts[gram] - discount, 0)
        return (kept + discount * len(following) * lower) / sum(following)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_equal_the_slow_formula(order: int) -> None:
    windows = draw_windows(60, order)
    asked = [*product(range(VOCABULARY), repeat=order)]
    slow = SlowKneserNey(windows)
    found = KneserNey(np.array(windows), VOCABULARY).probabilities(np.array(asked))
    np.testing.assert_allclose(found, [slow.probability(gram) for gram in asked], rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_probabilities_of_every_context_sum_to_one(order: int) -> None:
    asked = np.array([*product(range(VOCABULARY), repeat=order)])
    model = KneserNey(np.array(draw_windows(40, order)), VOCABULARY)
    found = model.probabilities(asked)
    assert found.min() > 0  # the id that never occurs too
    np.testing.assert_allclose(found.reshape(-1, VOCABULARY).sum(axis=1), 1, rtol=1e-12)


def test_an_unknown_context_is_left_to_shorter_ones() -> None:
    model = KneserNey(np.array(draw_windows(60, 3)), VOCABULARY)
    unknown, shorter = np.array([[4, 0, 1]]), np.array([[0, 1]])
    backed = KneserNey(np.array(draw_windows(60, 3)), VOCABULARY)
    backed.levels.pop()
    assert model.probabilities(unknown) == backed.probabilities(shorter)


@pytest.mark.parametrize(("number", "vocab_size"), [(0, 5), (2, 2**16)])
def test_windows_that_cannot_be_counted_are_refused(number: int, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"got {number} windows of 4 ids below {vocab_size}"):
        KneserNey(np.zeros((number, 4), dtype=np.int64), vocab_size)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    tokenizer = ChatGLMTokenizer.from_pretrained(ROOT)
    return Sampler([], tokenizer, ChatGLMForConditionalGeneration.build_prompt)


DIALOGUES = [
    Dialogue("seeds-en-1", "seeds", [Round(["Hello!", "Good day."], "Hello, my friend!")]),
    Dialogue("seeds-en-2", "seeds", [Round(["Bye"], "See you."), Round(["When?"], "Soon.")]),
]


def test_a_round_is_enumerated_in_every_spelling_and_behind_another(sampler: Sampler) -> None:
    examples = [*iter_spellings(DIALOGUES[0].rounds[0], sampler)]
    prompts = {tuple(example.prompt_ids) for example in examples}
    wordings = ("Hello!", "hello!", "Hello", "hello", "Good day.", "good day.", "Good day")
    alone = {tuple(sampler.encode(text, [], "x").prompt_ids) for text in (*wordings, "good day")}
    assert len(alone) == 8 and alone < prompts and len(prompts) == 9
    assert {tuple(example.answer_ids) for example in examples} == {
        tuple(sampler.encode("x", [], "Hello, my friend!").answer_ids)
    }


def test_losses_are_those_of_the_answers_tokens_behind_the_end_of_the_prompt(
    sampler: Sampler,
) -> None:
    baseline = Baseline(DIALOGUES, sampler)
    example = sampler.encode("Hello?", [], "Hello, you.")
    prompt = [token_id for token_id in example.prompt_ids if token_id != baseline.mask_id]
    ids = [baseline.pad_id] * (ORDER - 1) + prompt + example.answer_ids
    starts = range(len(prompt), len(ids) - ORDER + 1)
    windows = np.array([ids[start : start + ORDER] for start in starts])
    assert len(windows) == len(example.answer_ids)
    losses = baseline.losses([example, example])
    assert set(losses) == {"answers once", "answers per wording", "questions too"}
    for name, model in baseline.models.items():
        expected = -2 * sum(math.log(p) for p in model.probabilities(windows))
        assert losses[name] == pytest.approx(expected)


def test_wordings_count_as_often_as_they_are_or_once(sampler: Sampler) -> None:
    round_ = Round(["a", "b", "c"], "Hello, my friend!")
    baseline = Baseline([Dialogue("seeds-en-1", "seeds", [round_])], sampler)
    once, often, texts = (model.levels[-1] for model in baseline.models.values())
    spellings = {
        spell_question(q, *way) for q in round_.questions for way in product((0, 1), repeat=2)
    }
    assert often.counts.max() == len(spellings) + 1 == 4
    assert once.counts.max() == texts.counts.max() == 1
    assert set(once.grams) == set(often.grams) < set(texts.grams)


def test_what_was_trained_on_is_likelier_than_what_was_not(sampler: Sampler) -> None:
    baseline = Baseline(DIALOGUES, sampler)
    taught = sampler.encode("Bye", [], "See you.")
    other = sampler.encode("Bye", [], "you See.")
    for name, loss in baseline.losses([taught]).items():
        assert loss < 0.7 * baseline.losses([other])[name]
