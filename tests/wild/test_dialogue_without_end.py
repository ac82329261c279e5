"""Dialogues longer than the window: what the model reads of them, and what the caller is told.

`overflow="error"` is the default of the methods, "rounds" that of the command.
"""

import re
import warnings
from typing import Any

import pytest
import torch
from chatglm_6b.conversation_chatglm import (
    ANSWER_SHARE,
    ROUND,
    SUMMARY_REQUESTS,
    SUMMARY_SHARE,
    ChatMixin,
    ChatOverflowWarning,
    condense,
    keep_newest_rounds,
)
from conftest import import_from_package
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import (
    GENERATIONS,
    ScriptedModel,
    embedded_model,
    embedded_tokenizer,
    encode,
    load_tokenizer,
)
from test_a03_stop_texts import TEXTS

ROUNDS = [(f"Question {i}?", f"这是第{i}个回答, and it has\nseveral words.") for i in range(40)]
NOTICE = (
    r"chatglm: 对话超出窗口，略去最早 \d+ 轮 / Left out: the oldest \d+ of \d+ rounds\. "
    r"The window has 64 tokens, 16 of them for the answer\."
)


class Reader(ScriptedModel):
    """Notes the prompts that it is given, and has a small window."""

    def __init__(self, tokenizer: Any, window: int, answer: str = "yes") -> None:
        super().__init__(tokenizer, encode(tokenizer, answer))
        self.config.max_sequence_length = window
        self.prompts: list[list[int]] = []

    def stream_generate(self, **options: Any) -> Any:
        self.prompts.append(options["input_ids"][0].tolist())
        return super().stream_generate(**options)


def count_tokens(tokenizer: Any, query: str, rounds: Any) -> int:
    prompt = ChatMixin.build_prompt(query, rounds)
    return len(tokenizer(prompt, split_special_tokens=True)["input_ids"])


def keep_one_by_one(tokenizer: Any, query: str, rounds: Any, room: int) -> Any:
    """The slow twin: the whole prompt again for every round."""
    while rounds and count_tokens(tokenizer, query, rounds) > room:
        rounds = rounds[1:]
    return rounds


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, TEXTS), max_size=14),
    TEXTS.filter(str.strip),
    st.integers(0, 200),
    st.sampled_from(GENERATIONS),
)
def test_as_many_rounds_as_fit(
    rounds: list[tuple[str, str]], query: str, room: int, generation: str
) -> None:
    tokenizer = load_tokenizer(generation)
    kept = keep_newest_rounds(tokenizer, query, rounds, room)
    assert kept == keep_one_by_one(tokenizer, query, rounds, room)


def test_numbers_of_rounds_of_any_length() -> None:
    tokenizer, rounds = embedded_tokenizer(), [("a", "b")] * 130
    for room in range(60, 1400, 97):
        kept = keep_newest_rounds(tokenizer, "c", rounds, room)
        assert kept == keep_one_by_one(tokenizer, "c", rounds, room)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("options", "limit", "room"),
    [
        ({}, 256, int(256 * ANSWER_SHARE)),
        ({"max_new_tokens": 100}, 256, 100),
        ({"max_length": 128}, 128, 32),
        ({"max_length": 128, "max_new_tokens": 10}, 128, 10),
        ({"max_length": 9000}, 256, 64),
    ],
    ids=str,
)
def test_the_newest_rounds_leave_room_for_the_answer(
    generation: str, options: dict[str, Any], limit: int, room: int
) -> None:
    tokenizer = load_tokenizer(generation)
    model = Reader(tokenizer, 256)
    kept = keep_one_by_one(tokenizer, "And now?", ROUNDS, limit - room)
    assert 0 < len(kept) < len(ROUNDS)
    words = f"Left out: the oldest {40 - len(kept)} of 40 rounds. .* {limit} tokens, {room} of them"
    options = {"overflow": "rounds", **options}
    with pytest.warns(ChatOverflowWarning, match=words) as caught:
        answer, history = model.chat(tokenizer, "And now?", ROUNDS, **options)
    with pytest.warns(ChatOverflowWarning, match=words):  # at the call
        stream = model.stream_chat(tokenizer, "And now?", ROUNDS, **options)
    assert list(stream)[-1] == (answer, history)
    assert history == [*ROUNDS, ("And now?", answer)]  # nothing of the caller's is lost
    prompt = ChatMixin.build_prompt("And now?", kept)
    wanted = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    assert model.prompts == [wanted, wanted]
    assert caught[0].filename == __file__
    assert getattr(caught[0].message, "left_out") == 40 - len(kept)  # noqa: B009


def test_what_fits_is_given_whole_and_without_a_word() -> None:
    tokenizer = embedded_tokenizer()
    model = Reader(tokenizer, 256)
    for overflow in ("error", "rounds"):
        model.chat(tokenizer, "And now?", ROUNDS[:3], overflow=overflow)
    assert model.prompts[0] == model.prompts[1]
    assert len(model.prompts[0]) == count_tokens(tokenizer, "And now?", ROUNDS[:3])


def test_an_answer_is_that_of_the_rounds_alone() -> None:
    model, tokenizer = embedded_model(), embedded_tokenizer()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    kept = keep_one_by_one(tokenizer, "What is water?", ROUNDS, 200 - 12)
    with pytest.warns(ChatOverflowWarning):
        answer = model.chat(
            tokenizer, "What is water?", ROUNDS, max_length=200, overflow="rounds", **options
        )[0]
    assert answer == model.chat(tokenizer, "What is water?", kept, **options)[0]


def test_errors_stay_the_default() -> None:
    tokenizer = embedded_tokenizer()
    model = Reader(tokenizer, 256)
    with pytest.raises(ValueError, match=r"leaves no room .* limit of 256: .*overflow='rounds'"):
        model.chat(tokenizer, "And now?", ROUNDS, max_length=256)
    with pytest.raises(ValueError, match="limit of 256"):
        model.stream_chat(tokenizer, "And now?", ROUNDS, max_length=256)
    assert model.prompts == []


@pytest.mark.parametrize("overflow", ["error", "rounds"])
def test_a_question_beyond_the_window_says_by_how_much(overflow: str) -> None:
    tokenizer = embedded_tokenizer()
    model = Reader(tokenizer, 64)
    query = "word " * 90
    excess = count_tokens(tokenizer, query, []) - 64 + 1
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=f"limit of 64: shorten the query by {excess} or more"),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        model.chat(tokenizer, query, overflow=overflow, max_length=64)


@pytest.mark.parametrize("overflow", ["", "drop", None, True], ids=repr)
def test_other_words_are_refused(overflow: Any) -> None:
    tokenizer = embedded_tokenizer()
    with pytest.raises(ValueError, match=r"overflow must be one of error, rounds, summarize, got"):
        Reader(tokenizer, 64).chat(tokenizer, "hi", overflow=overflow)


def test_hundreds_of_rounds_cost_what_the_window_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = embedded_tokenizer()
    model = Reader(tokenizer, 128)
    calls = []
    encode_text = type(tokenizer).tokenize
    monkeypatch.setattr(
        type(tokenizer), "tokenize", lambda *a, **k: calls.append(a) or encode_text(*a, **k)
    )
    history: Any = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for i in range(300):
            del calls[:]
            _, history = model.chat(tokenizer, f"Round {i}", history, overflow="rounds")
            assert len(model.prompts[-1]) <= 96 and len(calls) < 60
    assert len(history) == 300


def test_torch_keeps_no_graph() -> None:
    with torch.enable_grad():
        assert embedded_model().chat(embedded_tokenizer(), "hi", overflow="rounds", max_length=9)


def test_the_command_talks_on_and_says_what_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    serving = import_from_package("chatglm.serving.chat")
    options = {"max_length": 64, "overflow": "rounds", "do_sample": False}
    talk = serving.Conversation(embedded_model(), embedded_tokenizer(), options)
    for i in range(5):
        assert talk.take(f"What is water {i}?")
    out, err = capsys.readouterr()
    assert out.count("\n") == 5 == len(talk.history)
    lines = err.splitlines()
    assert lines and all(re.fullmatch(NOTICE, line) for line in lines)
    with pytest.raises(ValueError, match="limit of 64: shorten the query"):
        talk.take("word " * 90)
    assert len(talk.history) == 5


# --- summaries


def talk_on(model: Any, query: str, rounds: Any, **options: Any) -> tuple[Any, list[str], Any]:
    """Chat with summaries: `(answer and history, the texts of all prompts, the warning)`."""
    tokenizer = embedded_tokenizer()
    with pytest.warns(ChatOverflowWarning) as caught:
        result = model.chat(tokenizer, query, rounds, overflow="summarize", **options)
    return result, [tokenizer.decode(ids) for ids in model.prompts], caught[0].message


def read_back(text: str) -> str:
    """A text as the vocabulary has it, which knows no wide colon."""
    tokenizer = embedded_tokenizer()
    return tokenizer.decode(encode(tokenizer, text))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_falls_out_is_carried_as_the_first_round(language: str) -> None:
    model = Reader(embedded_tokenizer(), 256, "short")
    line = "what was said then?" if language == "en" else "那时候我们说了什么话呢？"
    rounds = [(f"{i} {line}", line) for i in range(40)]
    (answer, history), texts, warning = talk_on(model, "And now?", rounds)
    request, asked = SUMMARY_REQUESTS[language]
    *requests, prompt = texts
    kept = history[1:-1]
    assert 0 < len(kept) < 20 and kept == rounds[-len(kept) :]
    assert history == [(asked, "short"), *kept, ("And now?", "short")] and answer == "short"
    assert prompt == read_back(ChatMixin.build_prompt("And now?", [(asked, "short"), *kept]))
    assert getattr(warning, "left_out") == 40 - len(kept)  # noqa: B009
    assert getattr(warning, "summary") == "short"  # noqa: B009
    # Each request fits, carries what the one before it came to, and nothing is passed over.
    head = read_back(request.format(""))
    assert len(requests) > 2 and all(text.startswith(head) for text in requests)
    assert all(text.startswith(head + "short\n") for text in requests[1:])
    assert max(map(len, model.prompts)) <= 256 * (1 - SUMMARY_SHARE)
    read = "".join(text.removeprefix(head).removeprefix("short\n") for text in requests)
    old = "\n".join(ROUND.format(*pair) for pair in rounds[: 40 - len(kept)])
    assert "".join(read.split()) == "".join(read_back(old).split())


def test_a_summary_lasts_some_rounds() -> None:
    model = Reader(embedded_tokenizer(), 512, "one two three")
    history: Any = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for i in range(60):
            query = f"And what about the number {i}?"
            _, history = model.chat(embedded_tokenizer(), query, history, overflow="summarize")
    assert history[0] == (SUMMARY_REQUESTS["en"][1], "one two three")
    assert history[-1][0] == "And what about the number 59?"
    num_summaries = len(model.prompts) - 60
    assert 1 < num_summaries < 15
    assert max(map(len, model.prompts)) <= 512 * (1 - SUMMARY_SHARE)


@pytest.mark.parametrize("options", [{}, {"max_length": 200}, {"max_new_tokens": 40}], ids=str)
def test_a_long_question_is_read_piece_by_piece(options: dict[str, Any]) -> None:
    model = Reader(embedded_tokenizer(), 256, "short")
    query = "Water is wet and cold. " * 200 + "Why is it so?"
    rounds = [("hi", "hello")]
    (_, history), texts, warning = talk_on(model, query, rounds, **options)
    assert history[-1] == (query, "short")  # as it was asked
    assert history[0] == (SUMMARY_REQUESTS["en"][1], "short")
    assert texts[-1].endswith(read_back("Why is it so?\n答：")) and "Water is wet" in texts[-1]
    assert len(model.prompts[-1]) <= options.get("max_length", 256) * 3 / 4
    assert "beginning of the question" in str(warning)
    assert sum(text.count("Water") for text in texts) == 200


def test_a_question_that_fits_stays_whole() -> None:
    model = Reader(embedded_tokenizer(), 256, "short")
    query = "Water is wet and cold. " * 12
    (_, history), texts, _ = talk_on(model, query, ROUNDS)
    assert texts[-1].count("Water") == 12
    assert history[-1] == (query, "short")


def test_an_empty_summary_is_none() -> None:
    tokenizer = embedded_tokenizer()
    model = Reader(tokenizer, 256)
    model.ids = [tokenizer.eop_token_id]
    (answer, history), _, warning = talk_on(model, "And now?", ROUNDS)
    assert (answer, history) == ("", [*ROUNDS, ("And now?", "")])
    assert "condensed" not in str(warning)


def test_a_summary_that_grows_is_cut() -> None:
    tokenizer = embedded_tokenizer()
    model = Reader(tokenizer, 128, "word " * 50)
    summary = condense(model, tokenizer, "a text", 128)
    assert 0 < len(tokenizer(summary, split_special_tokens=True)["input_ids"]) <= 16


def test_a_small_window_has_no_summary() -> None:
    tokenizer = embedded_tokenizer()
    with pytest.raises(ValueError, match="at least 128 tokens, got 100: raise max_length"):
        Reader(tokenizer, 100).chat(tokenizer, "And now?", ROUNDS, overflow="summarize")
    fitting = Reader(tokenizer, 100).chat(tokenizer, "hi", overflow="summarize")
    assert fitting == ("yes", [("hi", "yes")])


def test_the_embedded_model_sums_up() -> None:
    model, tokenizer = embedded_model(), embedded_tokenizer()
    options: dict[str, Any] = {"max_length": 128, "overflow": "summarize"}
    for talk in (model.chat, lambda *a, **k: list(model.stream_chat(*a, **k))[-1]):
        torch.manual_seed(0)
        with pytest.warns(ChatOverflowWarning, match="condensed to '"):
            answer, history = talk(tokenizer, "What is water?", ROUNDS[:8], **options)
        torch.manual_seed(0)  # summaries draw no random numbers
        assert model.chat(tokenizer, "What is water?", history[:-1], max_length=128)[0] == answer
