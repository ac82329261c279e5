"""A8: what `chat` and `stream_chat` are asked for happens, or is refused by name.

`return_dict_in_generate=True` answered '', `num_return_sequences=3` gave one answer, a temperature
of 0 and `max_length=None` ended in errors from inside, and a `generation_config` was overruled by
defaults that nobody had given.
"""

from typing import Any

import pytest
import torch
from scripted_model import ScriptedModel, embedded_model, embedded_tokenizer, encode
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TextStreamer,
)

QUESTION = "What is water?"
BRIEF: dict[str, Any] = {"max_new_tokens": 6}
MANY = GenerationConfig(num_return_sequences=2, do_sample=True)


def ask(method: str, **options: Any) -> str:
    """An answer of the embedded model, by either method."""
    talk = getattr(embedded_model(), method)(embedded_tokenizer(), QUESTION, **options)
    return talk[0] if method == "chat" else [text for text, _ in talk][-1]


def is_refused(method: str, match: str, **options: Any) -> None:
    """The error comes at the call, before anything is generated or iterated."""
    with pytest.raises(ValueError, match=match):
        getattr(embedded_model(), method)(embedded_tokenizer(), QUESTION, **options)


methods = pytest.mark.parametrize("method", ["chat", "stream_chat"])


@methods
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate must be False, got True"),
        ({"output_scores": True}, "output_scores must be False, got True.*call generate"),
        ({"output_logits": True}, "output_logits"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"num_return_sequences": 3}, "num_return_sequences must be 1, got 3.*Ask several times"),
        ({"num_return_sequences": 0}, "num_return_sequences must be 1, got 0"),
        ({"max_length": "64"}, "max_length must be a whole number of at least 1, got '64'"),
        ({"max_length": True}, "max_length .* got True"),
        ({"max_length": -5}, "max_length .* got -5"),
        ({"max_length": 0}, "max_length .* got 0"),
        ({"max_length": 64.5}, "max_length .* got 64.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": "9"}, "max_new_tokens .* got '9'"),
        ({"max_new_tokens": False}, "max_new_tokens .* got False"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
        ({"do_sample": 2}, "do_sample .* got 2"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0 .*got -0.1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": float("inf")}, "temperature .* got inf"),
        ({"temperature": "0.5"}, "temperature .* got '0.5'"),
        ({"temperature": True}, "temperature .* got True"),
        ({"top_p": -0.5}, "top_p must be a number of from 0 to 1, got -0.5"),
        ({"top_p": 1.5}, "top_p .* got 1.5"),
        ({"top_p": "0.7"}, "top_p .* got '0.7'"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"top_k": 2.5}, "top_k .* got 2.5"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0"),
        ({"num_beams": "2"}, "num_beams .* got '2'"),
        ({"stop": 5}, "Stop texts must be non-empty texts"),
        ({"generation_config": {"do_sample": False}}, "must be a GenerationConfig"),
        (
            {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
            "num_return_sequences",
        ),
        ({"input_ids": torch.tensor([[1]])}, "input_ids is made of the query"),
        ({"inputs": torch.tensor([[1]])}, "inputs is made of the query"),
        ({"attention_mask": torch.ones(1, 1)}, "attention_mask is made of the query"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(method: str, options: dict[str, Any], match: str) -> None:
    is_refused(method, match, **options)


@methods
@pytest.mark.parametrize("tokenizer", [None, "chatglm-6b", 5], ids=repr)
def test_what_is_no_tokenizer_is_refused(method: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="first argument is the model's tokenizer, got"):
        getattr(embedded_model(), method)(tokenizer, QUESTION)


def test_a_stream_has_one_beam_and_is_no_streamer_s() -> None:
    for options in ({"num_beams": 2}, {"num_beams": 2, "do_sample": False}):
        is_refused("stream_chat", "needs num_beams=1, got 2: which beam wins", **options)
    config = GenerationConfig(num_beams=3)
    is_refused("stream_chat", "needs num_beams=1, got 3", generation_config=config)
    streamer = TextStreamer(embedded_tokenizer())
    is_refused("stream_chat", r"got a streamer: give it to chat\(\)", streamer=streamer)


def test_a_streamer_sees_the_answer_of_chat(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(embedded_tokenizer(), skip_prompt=True)
    answer = ask("chat", do_sample=False, streamer=streamer, **BRIEF)
    assert capsys.readouterr().out.strip() == answer


@methods
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 0, "do_sample": True},
        {"top_p": 0},
        {"top_p": 0.0},
        {"top_k": 1},
        {"do_sample": 0},
        {"generation_config": GenerationConfig(do_sample=False)},
        {"generation_config": GenerationConfig(temperature=0.0)},
    ],
    ids=str,
)
def test_no_sampling_has_many_names(method: str, options: dict[str, Any]) -> None:
    assert ask(method, **options, **BRIEF) == ask("chat", do_sample=False, **BRIEF)


def test_beams_without_sampling() -> None:
    wanted = ask("chat", do_sample=False, num_beams=3, **BRIEF)
    assert ask("chat", temperature=0, num_beams=3, **BRIEF) == wanted


@methods
def test_none_is_the_default(method: str) -> None:
    options = dict.fromkeys(("max_length", "do_sample", "top_p", "temperature", "max_new_tokens"))
    torch.manual_seed(3)
    wanted = ask(method)
    torch.manual_seed(3)
    assert ask(method, **options, stop=None, generation_config=None) == wanted
    if method == "chat":
        torch.manual_seed(3)
        assert ask(method, num_beams=None) == wanted


@methods
@pytest.mark.parametrize("options", [{"top_p": 1}, {"top_p": 1.0}, {"top_k": 0}, {"top_k": 5}])
def test_settings_of_sampling_that_are_fine(method: str, options: dict[str, Any]) -> None:
    assert ask(method, **options, **BRIEF)


@methods
def test_a_generation_config_acts(method: str) -> None:
    tokenizer = embedded_tokenizer()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=4)
    assert ask(method, generation_config=greedy) == ask("chat", do_sample=False, max_new_tokens=4)
    # What is given by name counts more, and what it leaves open is as ever.
    named = ask(method, generation_config=greedy, max_new_tokens=2)
    assert named == ask("chat", do_sample=False, max_new_tokens=2)
    long = ask(method, generation_config=GenerationConfig(do_sample=False))
    assert long == ask("chat", do_sample=False)
    bounded = GenerationConfig(do_sample=False, max_length=9)
    assert ask(method, generation_config=bounded) == ask("chat", do_sample=False, max_length=9)
    whole = ask("chat", do_sample=False)
    stopped = GenerationConfig(do_sample=False, stop_strings=[whole[4:6]])
    assert ask(method, generation_config=stopped) == whole[:4].strip()
    end = encode(tokenizer, whole)[3]
    ended = GenerationConfig(do_sample=False, eos_token_id=end)
    assert len(ask(method, generation_config=ended)) < len(whole)
    assert greedy == GenerationConfig(do_sample=False, max_new_tokens=4)  # the caller's own


@methods
def test_a_folder_s_defaults_for_generate_leave_an_answer_a_text(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ask("chat", do_sample=False, **BRIEF)
    config = embedded_model().generation_config
    for name, value in {
        "return_dict_in_generate": True,
        "num_return_sequences": 2,
        "num_beams": 2,
    }.items():
        monkeypatch.setattr(config, name, value)
    assert ask(method, do_sample=False, **BRIEF) == wanted


def test_a_processor_alone_is_a_list_of_one() -> None:
    penalty: LogitsProcessor = RepetitionPenaltyLogitsProcessor(penalty=5.0)
    alone = ask("chat", do_sample=False, logits_processor=penalty, **BRIEF)
    assert alone == ask("chat", do_sample=False, logits_processor=[penalty], **BRIEF)


def test_nothing_of_the_callers_options_changes() -> None:
    tokenizer = embedded_tokenizer()
    model = ScriptedModel(tokenizer, encode(tokenizer, "yes"))
    options: dict[str, Any] = {"temperature": 0, "stop_strings": ["no"], "top_k": 3}
    before = dict(options)
    model.chat(tokenizer, "hi", **options)
    assert options == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"streamer": "any"}, "is a stream itself, got a streamer: give it to generate"),
        ({"num_return_sequences": 3}, "num_return_sequences=1, got 3"),
        ({"generation_config": MANY}, "num_return_sequences=1, got 2"),
        ({"num_beams": 2}, "num_beams=1, got 2"),
        ({"num_beams": 2, "do_sample": False}, "num_beams=1, got 2"),
    ],
    ids=str,
)
def test_a_stream_of_ids_is_one_of_single_answers(options: dict[str, Any], match: str) -> None:
    """Three answers to a question were taken for three tokens of one."""
    inputs = embedded_tokenizer()("hi", return_tensors="pt")
    with pytest.raises(ValueError, match=match):
        next(embedded_model().stream_generate(**inputs, **options))
