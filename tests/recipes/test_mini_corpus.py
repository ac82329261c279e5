"""The recipe's examples: what is held out, what is drawn, and what carries labels."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT

from recipes.mini.corpus import (
    BATCHES_IN_POOL,
    HELD_OUT_WORDINGS,
    IGNORED_LABEL,
    MAX_TOKENS,
    PHASES,
    SOURCES,
    WORD,
    Dialogue,
    Phase,
    Round,
    Sampler,
    collate,
    load_dialogues,
    open_gaps,
    pool_dialogues,
    spell_question,
    split_dialogues,
)
from recipes.mini.evaluation import pick_untaught

build_prompt = ChatGLMForConditionalGeneration.build_prompt


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two fetched sources, and a file of no source."""
    folder = tmp_path_factory.mktemp("data")
    for source, number in (("wordnet", 1200), ("chitchat", 200), ("foreign", 1)):
        rows = [
            {
                "id": f"{source}-en-{k:05d}",
                "rounds": [
                    {"q": [f"What is a {source} {k}?"], "a": f"It is {k}."},
                    {"q": ["Any more?"], "a": f"No, just {source} {k}."},
                ],
            }
            for k in range(number)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{source}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def parts(data: Path) -> tuple[list[Dialogue], list[Dialogue]]:
    return split_dialogues(load_dialogues(data))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make drawing quick: batches of some thirty examples."""
    monkeypatch.setattr("recipes.mini.corpus.BATCH_TOKENS", 2048)


def test_sources_come_whole_and_in_a_fixed_order(data: Path) -> None:
    dialogues = load_dialogues(data)
    counts = {source: sum(d.source == source for d in dialogues) for source in SOURCES}
    assert (counts["seeds"], counts["wordnet"], counts["chitchat"]) == (900, 1200, 200)
    assert sum(counts.values()) == len(dialogues)
    assert dialogues == load_dialogues(data)


def test_a_seed_keeps_one_wording_of_its_first_question_for_the_test(
    data: Path, parts: tuple[list[Dialogue], list[Dialogue]]
) -> None:
    seen, held_out = parts
    whole = {d.id: d for d in load_dialogues(data)}
    trained = {d.id: d for d in seen}
    seeds = [d for d in held_out if d.source == "seeds"]
    assert len(seeds) == 900
    for dialogue in seeds:
        (asked,) = dialogue.rounds
        first, *others = whole[dialogue.id].rounds
        assert len(first.questions) >= HELD_OUT_WORDINGS
        assert trained[dialogue.id].rounds[0].questions + asked.questions == first.questions
        assert trained[dialogue.id].rounds[1:] == others
        assert asked.questions[0] not in trained[dialogue.id].rounds[0].questions


def test_fetched_sources_hold_out_whole_dialogues(
    parts: tuple[list[Dialogue], list[Dialogue]],
) -> None:
    seen, held_out = ({d.id for d in part if d.source == "wordnet"} for part in parts)
    assert not seen & held_out
    assert len(seen | held_out) == 1200
    assert 0.01 < len(held_out) / 1200 < 0.06


def test_no_untaught_wording_is_ever_drawn_for_training(
    parts: tuple[list[Dialogue], list[Dialogue]], tokenizer: ChatGLMTokenizer
) -> None:
    seen, held_out = parts
    untaught = pick_untaught(seen, held_out)
    questions = {spell_question(q.query, True, True) for q in untaught if q.source == "seeds"}
    assert len(questions) > 890
    answers = {q.answer for q in untaught if q.source != "seeds"}
    assert len(answers) > 60
    drawn: list[str] = []

    def note_prompt(query: str, history: list[tuple[str, str]]) -> str:
        drawn.extend([query, *(text for pair in history for text in pair)])
        return "?"

    sampler, rng = Sampler(seen, tokenizer, note_prompt), random.Random(0)
    targets = [tokenizer.decode(sampler.draw_example(rng).answer_ids) for _ in range(800)]
    assert not questions & {spell_question(text, True, True) for text in drawn}
    assert not answers & {*drawn, *targets}


def test_untaught_questions_are_all_but_those_taught_elsewhere() -> None:
    def dialogue(name: str, question: str, answer: str) -> Dialogue:
        return Dialogue(name, name.split("-")[0], [Round([question], answer)])

    seen = [dialogue("seeds-en-1", "Hello!", "Hi."), dialogue("health-en-1", "Asthma?", "Cough.")]
    held_out = [
        dialogue("seeds-en-2", "hello", "Good day."),
        dialogue("seeds-en-3", "Hallo?", "Hi."),
        dialogue("health-en-2", "What of asthma?", "Cough."),
        dialogue("health-en-3", "asthma", "Wheeze."),
    ]
    asked = [q.query for q in pick_untaught(seen, held_out)]
    assert asked == ["Hallo?", "asthma"]


@pytest.mark.parametrize(
    ("is_lower", "is_bare", "expected"),
    [
        (False, False, "Is it 2 a.m.?!"),
        (True, False, "is it 2 a.m.?!"),
        (False, True, "Is it 2 a.m"),
        (True, True, "is it 2 a.m"),
    ],
)
def test_spellings(is_lower: bool, is_bare: bool, expected: str) -> None:
    assert spell_question("Is it 2 a.m.?!", is_lower, is_bare) == expected
    assert spell_question("？。", is_lower, is_bare) == "？。"


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("step", [1, 9])
def test_batches_depend_on_seed_and_step_alone(
    parts: tuple[list[Dialogue], list[Dialogue]], tokenizer: ChatGLMTokenizer, step: int
) -> None:
    sampler = Sampler(parts[0], tokenizer, build_prompt)
    from_start = [*islice(sampler.iter_batches(7, 0), step, step + 2)]
    from_step = [*islice(sampler.iter_batches(7, step), 2)]
    for expected, found in zip(from_start, from_step):
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
    drawn_ahead = next(sampler.iter_batches(7, step, workers=1))
    assert all(torch.equal(a, b) for a, b in zip(from_start[0], drawn_ahead))
    other = next(sampler.iter_batches(8, step))[0]
    assert other.shape != from_step[0][0].shape or not torch.equal(other, from_step[0][0])


@pytest.mark.usefixtures("small_batches")
def test_each_phase_draws_its_own_mix_from_its_step_on(
    data: Path, tokenizer: ChatGLMTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = (Phase(0, {"wordnet": 1.0}), Phase(BATCHES_IN_POOL, {"chitchat": 1.0}))
    monkeypatch.setattr("recipes.mini.corpus.PHASES", phases)
    dialogues = [d for d in load_dialogues(data) if d.source != "seeds"]
    sampler = Sampler(dialogues, tokenizer, lambda query, history: query)
    batches = islice(sampler.iter_batches(7, 0), 2 * BATCHES_IN_POOL)
    texts = ["".join(map(tokenizer.decode, input_ids.tolist())) for input_ids, *_ in batches]
    before, after = ["".join(texts[i : i + BATCHES_IN_POOL]) for i in (0, BATCHES_IN_POOL)]
    assert "wordnet" in before and "chitchat" not in before
    assert "chitchat" in after and "wordnet" not in after


def test_the_shares_of_every_phase_sum_to_one_and_phases_begin_with_a_pool() -> None:
    for phase in PHASES:
        assert sum(phase.shares.values()) == pytest.approx(1)
        assert set(phase.shares) <= set(SOURCES)
        assert phase.first_step % BATCHES_IN_POOL == 0
    assert [phase.first_step for phase in PHASES] == sorted({p.first_step for p in PHASES})


def test_a_pool_repeats_the_basics() -> None:
    rounds = [Round(["?"], "!")]
    ids = ["talk-en-007", "talk-zh-080", "sum-1", "sum-2", "health-en-001"]
    sources = ["seeds", "seeds", *["arithmetic"] * 2, "health"]
    dialogues = [Dialogue(id, source, rounds) for id, source in zip(ids, sources)]
    phase = Phase(0, {"seeds": 0.5, "arithmetic": 0.5}, basics_weight=3)
    pools = pool_dialogues(dialogues, phase)
    assert {source: [d.id for d in pool] for source, pool in pools.items()} == {
        "seeds": ["talk-en-007"] * 3 + ["talk-zh-080"],
        "arithmetic": ["sum-1", "sum-2"],
    }


@pytest.mark.parametrize("question", ["What is the best way to fall asleep?", "晚上睡不着怎么办"])
def test_gaps_leave_some_words_in_their_order(question: str) -> None:
    rng = random.Random(1)
    found = {open_gaps(question, rng) for _ in range(200)}
    assert len(found) > 20 and question in found
    for gappy in found:
        letters = iter(question)
        assert all(letter in letters for letter in gappy), gappy
        assert len(WORD.findall(gappy)) >= 3


@pytest.mark.parametrize("question", ["hello", "who are you", ""])
def test_short_questions_get_no_gaps(question: str) -> None:
    rng = random.Random(1)
    assert {open_gaps(question, rng) for _ in range(50)} == {question}


def test_only_answers_and_their_end_carry_labels(
    parts: tuple[list[Dialogue], list[Dialogue]], tokenizer: ChatGLMTokenizer
) -> None:
    sampler = Sampler(parts[0], tokenizer, build_prompt)
    input_ids, attention_mask, labels = next(sampler.iter_batches(7, 0))
    assert input_ids.shape[1] <= MAX_TOKENS
    for ids, is_real, targets in zip(input_ids.tolist(), attention_mask.tolist(), labels.tolist()):
        length = sum(is_real)
        assert is_real == [1] * length + [0] * (len(ids) - length)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[length - 1] == tokenizer.eop_token_id
        start = ids.index(tokenizer.bos_token_id) + 1
        assert ids[start - 2] == tokenizer.gmask_token_id
        unlabelled = [IGNORED_LABEL] * start, [IGNORED_LABEL] * (len(ids) - length)
        assert targets == [*unlabelled[0], *ids[start:length], *unlabelled[1]]
        assert set(ids[length:]) <= {tokenizer.pad_token_id}


def test_too_long_a_history_of_another_topic_is_forgotten(tokenizer: ChatGLMTokenizer) -> None:
    rounds = [Round([f"{k} " * 40], "ok " * 40) for k in (1, 2)]
    sampler = Sampler([Dialogue("seeds-en-1", "seeds", rounds)], tokenizer, build_prompt)
    rng = random.Random(0)
    examples = [sampler.draw_example(rng) for _ in range(60)]
    # Alone, one round, or two of the same dialogue, is what a prompt may hold.
    prompts = {tokenizer.decode(example.prompt_ids).count("问") for example in examples}
    assert prompts == {0, 2}


@pytest.mark.parametrize(
    ("query", "history"),
    [
        ("你好", []),
        ("What is <sop> and [gMASK]?\n  Tell  me</s>", []),
        ("再见", [("你好<eop>", "你好！\n有什么想聊的吗？"), ("a", "b")]),
    ],
)
def test_prompts_are_what_chat_feeds_the_model(
    tokenizer: ChatGLMTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    history: list[tuple[str, str]],
) -> None:
    fields = json.loads((ROOT / "config.json").read_text())
    fields |= {"num_layers": 1, "hidden_size": 16, "inner_hidden_size": 16}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**fields))
    fed: list[torch.Tensor] = []

    def note_ids(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        fed.append(input_ids)
        return input_ids

    monkeypatch.setattr(model, "generate", note_ids)
    model.chat(tokenizer, query, history)
    example = Sampler([], tokenizer, model.build_prompt).encode(query, history, "好 <eop>\n！")
    assert example.prompt_ids == fed[0][0].tolist()
    assert example.answer_ids.count(tokenizer.eop_token_id) == 1
    assert tokenizer.decode(example.answer_ids) == "好 <eop>\n!"


def test_rows_of_a_batch_are_padded_on_the_right(tokenizer: ChatGLMTokenizer) -> None:
    sampler = Sampler([], tokenizer, build_prompt)
    examples = [sampler.encode("1", [], "2"), sampler.encode("one two three", [], "four five")]
    input_ids, attention_mask, labels = collate(examples, 3)
    lengths = [sum(map(len, example)) for example in examples]
    assert attention_mask.sum(dim=1).tolist() == lengths
    assert input_ids[0, : lengths[0]].tolist() == examples[0].prompt_ids + examples[0].answer_ids
    assert (labels != IGNORED_LABEL).sum(dim=1).tolist() == [len(e.answer_ids) for e in examples]
