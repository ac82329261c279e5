"""Rows answer as `generate` does, for every option that they know, and whoever is beside them."""

import threading
from typing import Any

import pytest
import torch
from chatglm_6b.decoding_chatglm import Answer, RowDecoder, stream_answer
from chatglm_6b.drawing_chatglm import NEUTRAL, find_foreign_options
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.rows_chatglm import PromptReading
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, build_model
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
)

PROMPT = [5, 197, 86, 97, 5, 197, 11, 301, 304]
OTHERS = [[9, 8, 301, 304], [7] * 20 + [301, 304], [197, 11, 301, 304]]
NEW = 14
SAMPLED: dict[str, Any] = {"do_sample": True}
# One or more for every setting of `NEUTRAL` that changes a draw.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "temperature": SAMPLED | {"temperature": 1.7},
    "temperature-greedy": {"temperature": 0.3},
    "top_k": SAMPLED | {"top_k": 3},
    "top_k-off": SAMPLED | {"top_k": None, "temperature": 2.0},
    "top_p": SAMPLED | {"top_k": 0, "top_p": 0.6},
    "chat": SAMPLED | {"top_p": 0.7, "temperature": 0.95},
    "min_p": SAMPLED | {"top_k": 0, "min_p": 0.2},
    "typical_p": SAMPLED | {"typical_p": 0.4, "top_k": 0},
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta_cutoff": SAMPLED | {"eta_cutoff": 0.05, "top_k": 0},
    "renormalize_logits": SAMPLED | {"renormalize_logits": True},
    "all-that-sample": SAMPLED
    | {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}
    | {"epsilon_cutoff": 0.001, "eta_cutoff": 0.001, "renormalize_logits": True},
    "sequence_bias": {"sequence_bias": {(7,): 6.0, (19, 104): -9.0}},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[19], [104, 20], [305]]},
    "min_length": {"min_length": len(PROMPT) + 9, "eos_token_id": [19, 104, 20, 236]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [19, 104, 20, 236]},
    "eos_token_id": {"eos_token_id": [236, 7]},
    "eos_token_id-none": {"eos_token_id": None, "forced_eos_token_id": 305},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [8, int(ids[-1])]},
    "forced_eos_token_id": {"forced_eos_token_id": 305},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.4)},
    "suppress_tokens": {"suppress_tokens": [19, 236]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [19, 62]},
    "use_cache": {"use_cache": True, "num_beams": 1, "num_return_sequences": 1},
    "int8-cache": {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}},
}


def answer(model: Any, prompt: list[int] = PROMPT, seed: int = 3, **options: Any) -> Answer:
    """The answer of a row that is alone."""
    torch.manual_seed(seed)
    return [*stream_answer(model, prompt, {"max_new_tokens": NEW, **options})][-1]


def generate(model: Any, seed: int = 3, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, **options}
    return model.generate(torch.tensor([PROMPT]), **options)[0].tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(spread=5)


@pytest.mark.filterwarnings("ignore:.*(sampling|do_sample).*")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_draws_what_generate_draws(model: Any, name: str) -> None:
    options = OPTIONS[name]
    assert find_foreign_options(model, options) == []
    for seed in (3, 4):
        wanted = generate(model, seed, **options)
        assert answer(model, seed=seed, **options).row.input_ids == wanted, seed


def test_every_setting_that_changes_a_draw_is_compared() -> None:
    elsewhere = {"max_length", "max_new_tokens", "max_time", "logits_processor"}
    elsewhere |= {"stopping_criteria", "prompt_lookup_num_tokens", "max_matching_ngram_size"}
    assert {name for options in OPTIONS.values() for name in options} >= set(NEUTRAL) - elsewhere


def test_options_change_answers(model: Any) -> None:
    """None of the comparisons above is one of an option that did nothing."""
    kinds = {"greedy": answer(model).answer_ids, "sampled": answer(model, **SAMPLED).answer_ids}
    same = {"temperature-greedy", "use_cache", "remove_invalid_values", "renormalize_logits"}
    same |= {"int8-cache", "epsilon_cutoff", "eta_cutoff", "greedy", "sampled"}
    for name, options in OPTIONS.items():
        plain = kinds["sampled" if options.get("do_sample") else "greedy"]
        if name not in same:
            found = [answer(model, seed=seed, **options).answer_ids for seed in (3, 4, 5)]
            assert any(ids != plain for ids in found), name


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True, "top_p": 0.5, "top_k": 0, "temperature": 1.5},
        {"repetition_penalty": 1.9, "eos_token_id": [2, 231], "suppress_tokens": [104]},
        {"do_sample": True},
    ],
    ids=["top_p", "penalty", "defaults"],
)
def test_what_a_model_s_own_configuration_says_counts(config: dict[str, Any]) -> None:
    model = build_model(spread=5)
    for name, value in config.items():
        setattr(model.generation_config, name, value)
    assert find_foreign_options(model, {}) == []
    assert answer(model).row.input_ids == generate(model)
    assert answer(model, top_k=2, do_sample=True).row.input_ids == generate(
        model, top_k=2, do_sample=True
    )


class Favour(LogitsProcessor):
    """Raises the score of a token, in place, and notes what it was asked with."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.asked.append(input_ids[0].tolist())
        scores[:, self.token] += 3.0
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_processors_of_the_caller_s_are_asked_as_generate_asks_them(model: Any) -> None:
    ours, theirs = (
        [Favour(197), Favour(11), MinPLogitsWarper(0.1), MinPLogitsWarper(0.3)] for _ in range(2)
    )
    options = {"repetition_penalty": 1.2, "do_sample": True, "min_p": 0.05}
    wanted = generate(model, logits_processor=LogitsProcessorList(theirs), **options)
    found = answer(model, logits_processor=LogitsProcessorList(ours), **options)
    assert found.row.input_ids == wanted
    assert ours[0].asked == theirs[0].asked  # pyright: ignore[reportAttributeAccessIssue]


def test_a_processor_of_the_caller_s_takes_the_place_of_the_same_kind(model: Any) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    options = {"no_repeat_ngram_size": 1}
    wanted = generate(
        model, logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(4)]), **options
    )
    given = LogitsProcessorList([NoRepeatNGramLogitsProcessor(4)])
    assert answer(model, logits_processor=given, **options).row.input_ids == wanted
    assert wanted != generate(model, **options)


def test_an_answer_says_why_it_ended(model: Any) -> None:
    assert answer(model).finish_reason == "length"
    ended = answer(model, eos_token_id=[236, 305])
    assert ended.finish_reason == "stop" and ended.answer_ids[-1] == 236
    criteria = StoppingCriteriaList([StopAt(len(PROMPT) + 3)])
    assert answer(model, stopping_criteria=criteria).finish_reason == "criteria"
    assert len(answer(model, stopping_criteria=criteria).answer_ids) == 3
    late = answer(model, max_time=0.0)
    assert late.finish_reason == "time" and len(late.answer_ids) == 1


FOREIGN: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "use_cache": False,
    "assistant_model": object(),
    "guidance_scale": 1.5,
    "output_scores": True,
    "return_dict_in_generate": True,
    "cache_implementation": "static",
    "streamer": object(),
    "encoder_repetition_penalty": 2.0,
    "watermarking_config": object(),
    "past_key_values": object(),
    "an_option_of_tomorrow": 1,
    "another_of_tomorrow": False,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_rows_do_not_know_is_named(model: Any, name: str) -> None:
    assert find_foreign_options(model, {name: FOREIGN[name]}) == [name]
    with pytest.raises(ValueError, match=rf"with {name}: leave it out, or call generate"):
        RowDecoder(model).add(PROMPT, max_new_tokens=4, **{name: FOREIGN[name]})


def test_who_replaces_generate_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    monkeypatch.setattr(model, "generate", lambda **options: None)
    assert find_foreign_options(model, {}) == ["generate"]


def test_settings_on_the_model_s_configuration_are_generate_s() -> None:
    """Which transformers 5 refuses, and 4 takes over with a warning."""
    model = build_model()
    model.config.temperature = 0.4
    assert find_foreign_options(model, {}) == ["config.temperature"]


def test_criteria_that_transformers_makes_itself_are_its_own(model: Any) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=12)])
    assert find_foreign_options(model, {"stopping_criteria": criteria}) == ["stopping_criteria"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give max_new_tokens or max_length"),
        ({"max_length": 9}, "9 tokens and the limit of prompt and answer is 9"),
        ({"max_new_tokens": 4, "prompt_lookup_num_tokens": 0}, "at least 1, got 0"),
        ({"max_new_tokens": 4, "prompt_lookup_num_tokens": "3"}, "at least 1, got '3'"),
    ],
)
def test_what_cannot_be_is_refused(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RowDecoder(model).add(PROMPT, **options)


def test_answers_join_and_leave_and_say_what_they_say_alone(model: Any) -> None:
    prompts = [PROMPT, *OTHERS]
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 9},
        {"max_new_tokens": 5, "do_sample": True},
        {"max_new_tokens": 12, "do_sample": True, "top_p": 0.7, "top_k": 0},
        {"max_new_tokens": 7, "repetition_penalty": 1.4, "do_sample": True},
    ]
    alone = []
    for seed, (prompt, own) in enumerate(zip(prompts, options)):
        torch.manual_seed(seed)
        alone.append([*stream_answer(model, prompt, own)][-1].answer_ids)
    decoder, together, finished = RowDecoder(model), [], []
    for seed, (prompt, own) in enumerate(zip(prompts, options)):
        generator = torch.Generator().manual_seed(seed)
        together.append(decoder.add(prompt, generator, **own))
        finished += decoder.step() + decoder.step()
    while decoder.answers:
        finished += decoder.step()
    assert [row.answer_ids for row in together] == alone
    assert len(finished) == 4 and set(finished) == set(together)


def test_an_answer_may_be_taken_out(model: Any) -> None:
    decoder = RowDecoder(model)
    gone, stays = (decoder.add(PROMPT, max_new_tokens=NEW) for _ in range(2))
    for _ in range(4):
        decoder.step()
    decoder.remove(gone)
    decoder.remove(gone)
    said = len(gone.answer_ids)
    while decoder.answers:
        decoder.step()
    assert len(gone.answer_ids) == said and gone.finish_reason is None
    assert stays.answer_ids == answer(model).answer_ids


class Breaks(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] >= len(PROMPT) + 2:
            raise KeyError("broken")
        return scores


def test_an_error_of_one_answer_is_its_own(model: Any) -> None:
    decoder = RowDecoder(model)
    broken = decoder.add(
        PROMPT, max_new_tokens=NEW, logits_processor=LogitsProcessorList([Breaks()])
    )
    whole = decoder.add(PROMPT, max_new_tokens=NEW)
    finished = []
    while decoder.answers:
        finished += decoder.step()
    assert finished == [broken, whole]
    assert broken.finish_reason == "error" and isinstance(broken.error, KeyError)
    assert len(broken.answer_ids) == 2
    assert whole.answer_ids == answer(model).answer_ids
    with pytest.raises(KeyError, match="broken"):
        answer(model, logits_processor=LogitsProcessorList([Breaks()]))


@pytest.fixture(scope="module")
def talking() -> tuple[Any, Any]:
    """The embedded model in float32, and its tokenizer."""
    model = ChatGLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    return model, ChatGLMTokenizer.from_pretrained(ROOT)


TALKS: list[dict[str, Any]] = [
    {"do_sample": False},
    {},
    {"top_p": 0.95, "temperature": 1.4},
    {"top_k": 7, "repetition_penalty": 1.1},
    {"stop": "。"},
]


@pytest.mark.parametrize("options", TALKS, ids=str)
def test_chat_says_what_generate_says(
    options: dict[str, Any], talking: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model, with each of both loops behind `chat` and `stream_chat`."""
    model, tokenizer = talking
    said, passes = [], []
    ways: list[list[str]] = [["generate"], []]
    for way in ways:
        monkeypatch.setattr(
            "chatglm_6b.conversation_chatglm.find_foreign_options",
            lambda model, options, way=way: passes.append(way) or way,
        )
        torch.manual_seed(5)
        text = model.chat(tokenizer, "你好，写一首诗。", max_new_tokens=24, **options)
        torch.manual_seed(5)
        stream = model.stream_chat(tokenizer, "你好，写一首诗。", max_new_tokens=24, **options)
        said.append((text, [*stream]))
    assert said[0] == said[1]
    assert said[1][1][-1] == said[1][0] and len(passes) == 4


def test_a_stream_needs_no_thread_and_no_generate(
    talking: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = talking

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers' own loop ran")

    for name in ("generate", "_get_logits_processor", "prepare_inputs_for_generation"):
        monkeypatch.setattr(GenerationMixin, name, refuse)
    before = threading.active_count()
    stream = model.stream_chat(tokenizer, "hello", max_new_tokens=6, do_sample=False)
    counts = {threading.active_count() for _ in stream}
    assert counts == {before}


def test_the_caches_of_a_row_are_the_ones_asked_for(model: Any) -> None:
    plain, packed = answer(model), answer(model, **OPTIONS["int8-cache"])
    kinds = [row.row.cache.layers[0].__class__.__name__ for row in (plain, packed)]
    assert kinds == ["ReservedLayer", "QuantizedReservedLayer"]


def test_a_prompt_of_several_answers_is_read_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each of them says what it says by itself, with a cache that is its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    alone = [answer(model, seed=seed, do_sample=True).answer_ids for seed in (3, 4, 5)]
    blocks: list[int] = []
    read = PromptReading.read_block
    monkeypatch.setattr(PromptReading, "read_block", lambda r: (blocks.append(1), read(r)))
    decoder, group = RowDecoder(model), object()
    options = {"max_new_tokens": NEW, "do_sample": True}
    answers = [decoder.add(PROMPT, one, group, **options) for one in generators]
    other = decoder.add(OTHERS[0], max_new_tokens=NEW)
    decoder.read()
    assert len(blocks) == 2 * len(model.transformer.layers)
    assert [len(one.answer_ids) for one in (*answers, other)] == [1] * 4
    while decoder.answers:
        decoder.step()
    assert [one.answer_ids for one in answers] == alone
    assert len({id(one.row.cache) for one in answers}) == 3 and len(set(map(tuple, alone))) == 3


def test_who_waits_for_a_prompt_reads_it_when_the_first_is_taken_out(model: Any) -> None:
    decoder, group = RowDecoder(model), object()
    first, second = (decoder.add(PROMPT, group=group, max_new_tokens=NEW) for _ in range(2))
    decoder.step()  # a block
    decoder.remove(first)
    while decoder.answers:
        decoder.step()
    assert second.answer_ids == answer(model).answer_ids and not first.answer_ids


def test_an_answer_of_one_token_takes_no_step(model: Any) -> None:
    decoder = RowDecoder(model)
    short = decoder.add(PROMPT, max_new_tokens=1)
    decoder.read()
    assert short.finish_reason == "length" and decoder.step() == [short]
    assert len(short.answer_ids) == 1 and not decoder.answers
