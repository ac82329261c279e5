"""Conversations: prompts and answers as the original's, and what users can get wrong.

The scripted answers below come out of the real `generate`: a processor leaves one token a step.
"""

import copy
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b.answer_text_chatglm import StopOnText, cut_at_stops
from chatglm_6b.conversation_chatglm import ChatMixin, check_history
from chatglm_6b.generation_chatglm import InvalidScoreLogitsProcessor
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import PRESETS, ROOT, SHARED, build_model
from peft import LoraConfig, get_peft_model
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

GOLDEN = SHARED / "golden" / "tokenizer"
GENERATIONS = {"late130528": "chatglm-6b", "fork150528": "chatglm-6b-v0"}
VOCABULARIES = {"late130528": "ice_text.v1.1.model", "fork150528": "ice_text.v0.model"}
SPECIALS = ("[MASK]", "[gMASK]", "<sop>", "<eop>", "</s>")

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden")


def read_fields(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {k: v for k, v in fields.items() if k not in ("auto_map", "tokenizer_class")}


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    """The repository's own."""
    return ChatGLMTokenizer(str(ROOT / "ice_text.model"), **read_fields(ROOT))


@pytest.fixture(scope="module")
def model() -> Any:
    """A model for that tokenizer. Not to be changed."""
    fields = json.loads((ROOT / "config.json").read_text())
    ids = {key: value for key, value in fields.items() if key.endswith("_token_id")}
    sizes = {"vocab_size": fields["vocab_size"], "hidden_size": 32, "num_attention_heads": 2}
    return build_model(**ids, **sizes, num_layers=2, max_sequence_length=64, spread=5)


class Script(LogitsProcessor):
    """Leaves only the next token of a script as a choice, and counts the steps."""

    def __init__(self, tokenizer: Any, text: str | list[int], ends: bool = True) -> None:
        self.ids = encode(tokenizer, text) if isinstance(text, str) else list(text)
        self.ids += [tokenizer.eop_token_id] if ends else []
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids[self.steps % len(self.ids)]] = 0.0
        self.steps += 1
        return forced


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def say(model: Any, tokenizer: Any, text: str | list[int], **options: Any) -> str:
    """Return what `chat` makes of a scripted answer, having checked that streaming ends with it."""
    ends = options.pop("ends", True)
    answers = []
    for talk in (model.chat, lambda *a, **k: list(model.stream_chat(*a, **k))[-1]):
        script = LogitsProcessorList([Script(tokenizer, text, ends)])
        answers.append(talk(tokenizer, "hello", logits_processor=script, **options))
    assert answers[0] == answers[1]
    response, history = answers[0]
    assert history == [("hello", response)]
    return response


# --- as the original


class Recorder(ChatMixin):
    """Stands in for a model: notes what it is asked for, answers with given ids."""

    device = "cpu"

    def __init__(self, tokenizer: Any, answer: list[int]) -> None:
        self.answer = answer
        self.config = SimpleNamespace(
            gmask_token_id=tokenizer.gmask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eop_token_id,
            max_sequence_length=2048,
        )

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def generate(self, **options: Any) -> torch.Tensor:
        self.options = options
        return torch.cat((options["input_ids"], torch.tensor([self.answer])), dim=1)

    def stream_generate(self, **options: Any) -> Iterator[torch.Tensor]:
        outputs = self.generate(**options)
        for length in range(1, len(self.answer) + 1):
            yield outputs[:, : options["input_ids"].shape[1] + length]


def golden_tokenizer(name: str) -> ChatGLMTokenizer:
    fields = read_fields(PRESETS / GENERATIONS[name])
    return ChatGLMTokenizer(str(SHARED / "tokenizers" / VOCABULARIES[name]), **fields)


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}_chat.json").read_text(encoding="utf-8"))


@needs_golden
@pytest.mark.parametrize("name", GENERATIONS)
def test_prompts_and_tidied_answers_of_the_original(name: str) -> None:
    runs = [run for run in golden(name)["chat"] if run["query"]]
    assert len(runs) > 10
    for run in runs:
        history = [(question, answer) for question, answer in run["history"]]
        assert [ChatMixin.build_prompt(run["query"], history)] == run["prompt"]
    pairs = golden(name)["process_response"]
    assert len(pairs) >= 30
    for pair in pairs:
        assert ChatMixin.process_response(pair["in"]) == pair["out"]


@needs_golden
def test_conversations_of_the_original() -> None:
    """Its decode is that of the later checkpoints; the fork's shows raw pieces."""
    tokenizer = golden_tokenizer("late130528")
    for run in golden("late130528")["chat"]:
        if not run["query"]:
            continue  # an empty question is an error here
        model = Recorder(tokenizer, run["generated_ids"])
        response, history = model.chat(tokenizer, run["query"], run["history"])
        assert response == run["response"]
        assert [list(pair) for pair in history] == run["new_history"]
        check_options(model.options, run["gen_kwargs"])
        ids = model.options["input_ids"].tolist()
        has_specials = any(mark in run["prompt"][0] for mark in SPECIALS)
        assert (ids == run["encoded"]["input_ids"]["data"]) is not has_specials
        assert sum(token >= 130000 and token < 130008 for token in ids[0]) == 2
        stream = [text for text, _ in model.stream_chat(tokenizer, run["query"], run["history"])]
        # What later tokens may change is held back; once the last is there, all is shown.
        assert all(map(str.startswith, run["stream"], stream))
        assert len(run["stream"]) <= len(stream) <= len(run["stream"]) + 1
        assert stream[-1] == run["stream"][-1].rstrip("\ufffd")
        check_options(model.options, run["stream_gen_kwargs"])


def check_options(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Ours has a mask, and no processor but the original's."""
    assert set(ours) == set(theirs) | {"attention_mask"}
    for name, value in theirs.items():
        if name == "logits_processor":
            assert [type(processor).__name__ for processor in ours[name]] == value
        elif value != "tensor":
            assert ours[name] == value, name


# --- what a conversation is


@pytest.mark.parametrize(
    "history",
    [
        "a text",
        {"q": "a"},
        7,
        [("a", "b", "c")],
        [("a",)],
        ["ab"],
        [("a", None)],
        [{"q": "a", "a": "b"}],
        [("a", "b"), ("c", 1)],
    ],
    ids=str,
)
def test_histories_of_another_form(model: Any, tokenizer: Any, history: Any) -> None:
    with pytest.raises(ValueError, match=r"history(\[\d\])? must be a .*\(question, answer\) pair"):
        model.chat(tokenizer, "hello", history)
    with pytest.raises(ValueError, match="history"):
        next(model.stream_chat(tokenizer, "hello", history=history))


def test_the_bad_round_is_named() -> None:
    with pytest.raises(ValueError, match=r"history\[1\].*got \('c', 1\)"):
        check_history([("a", "b"), ("c", 1)])  # type: ignore[list-item]


@pytest.mark.parametrize("query", ["", "  \n\t", None, 5], ids=repr)
def test_empty_questions(model: Any, tokenizer: Any, query: Any) -> None:
    with pytest.raises(ValueError, match="query must be a non-empty text"):
        model.chat(tokenizer, query)


def test_nothing_of_the_callers_changes(model: Any, tokenizer: Any) -> None:
    history = [["hi", "Hello!"]]  # as JSON has it
    processors = LogitsProcessorList([Script(tokenizer, "yes")])
    criteria = StoppingCriteriaList([MaxLengthCriteria(60)])
    options = {"logits_processor": processors, "stopping_criteria": criteria, "stop": ["no"]}
    response, new_history = model.chat(tokenizer, "and now?", history, **options)
    assert response == "yes"
    assert new_history == [("hi", "Hello!"), ("and now?", "yes")]
    assert history == [["hi", "Hello!"]]
    assert (len(processors), len(criteria), options["stop"]) == (1, 1, ["no"])
    before = copy.deepcopy(new_history)
    for _, streamed in model.stream_chat(tokenizer, "again", new_history, max_new_tokens=3):
        assert streamed[:2] == before and streamed is not new_history
    assert new_history == before


def test_typed_special_tokens_are_text(model: Any, tokenizer: Any) -> None:
    asked = Recorder(tokenizer, [5])
    text = "a <sop> [gMASK] [MASK] </s><eop> b"
    asked.chat(tokenizer, text, [(text, text)])
    ids = asked.options["input_ids"][0].tolist()
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    special = {tokenizer.convert_tokens_to_ids(mark) for mark in SPECIALS}
    assert special.isdisjoint(ids[:-2])


def test_sampling_options_reach_generate(tokenizer: Any) -> None:
    model = Recorder(tokenizer, [5])
    model.chat(tokenizer, "hi", num_beams=2, top_p=0.5, temperature=0.2, top_k=3, max_length=99)
    expected = {"num_beams": 2, "top_p": 0.5, "temperature": 0.2, "top_k": 3, "max_length": 99}
    assert {name: model.options[name] for name in expected} == expected
    for talk in (model.chat, lambda *args, **options: list(model.stream_chat(*args, **options))):
        talk(tokenizer, "hi", do_sample=False)
        # What belongs to sampling alone would only be warned about.
        assert (model.options["top_p"], model.options["temperature"]) == (1.0, 1.0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": False}], ids=str)
def test_chat_runs_without_a_warning(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    response, history = model.chat(tokenizer, "你好", max_new_tokens=4, **options)
    assert history == [("你好", response)]


def test_the_same_seed_gives_the_same_answer(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(7)
    chatted = model.chat(tokenizer, "你好", max_length=24)
    torch.manual_seed(7)
    streamed = list(model.stream_chat(tokenizer, "你好", max_length=24))
    assert streamed[-1] == chatted
    torch.manual_seed(8)
    assert model.chat(tokenizer, "你好", max_length=24) != chatted


# --- where an answer ends


def test_an_answer_ends_with_its_end_token(model: Any, tokenizer: Any) -> None:
    text = "你好，world!"
    end = {"eos_token_id": tokenizer.eos_token_id}
    # As read from generation_config.json, or from the model's configuration without that file.
    assert say(model, tokenizer, text) == text
    assert say(model, tokenizer, text, **end) == text
    assert say(model, tokenizer, text, eos_token_id=[tokenizer.end_token_id]) == text
    ids = [*encode(tokenizer, text), tokenizer.end_token_id, *encode(tokenizer, "more")]
    assert say(model, tokenizer, ids, eos_token_id=tokenizer.end_token_id) == text


def test_limits_of_length(model: Any, tokenizer: Any) -> None:
    text = "one two three four five six seven"
    ids = encode(tokenizer, text)
    prompt = len(encode(tokenizer, "hello")) + 2
    for options in ({"max_new_tokens": 3}, {"max_length": prompt + 3}):
        assert say(model, tokenizer, ids, **options) == tokenizer.decode(ids[:3])
    both = {"max_new_tokens": 4, "max_length": prompt}
    assert say(model, tokenizer, ids, **both) == tokenizer.decode(ids[:4])


@pytest.mark.parametrize(
    ("options", "limit"), [({"max_length": 6}, 6), ({"max_new_tokens": 5}, 64)], ids=str
)
def test_prompts_beyond_the_window(
    model: Any, tokenizer: Any, options: dict[str, int], limit: int
) -> None:
    query = "long " * 80
    length = len(encode(tokenizer, query)) + 2
    with pytest.raises(ValueError, match=f"{length} tokens .* limit of {limit}: shorten the query"):
        model.chat(tokenizer, query, **options)
    with pytest.raises(ValueError, match="drop old rounds"):
        next(model.stream_chat(tokenizer, "hi", [(query, "yes")], **options))


@pytest.mark.parametrize("name", ["stop", "stop_strings"])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("three", "one two"),
        (["nowhere", "four"], "one two three"),
        (["four", "two"], "one"),
        ("wo thr", "one t"),
        ("。", "one two three four"),
        ([], "one two three four"),
    ],
)
def test_stop_texts(model: Any, tokenizer: Any, name: str, stop: Any, expected: str) -> None:
    """Wherever the borders of the tokens are; what follows is not generated."""
    text = "one two three four"
    script = Script(tokenizer, text)
    processors = LogitsProcessorList([script])
    response, history = model.chat(tokenizer, "hello", logits_processor=processors, **{name: stop})
    assert (response, history) == (expected, [("hello", expected)])
    assert say(model, tokenizer, text, **{name: stop}) == expected
    rest = len(text) - len(expected)
    assert (script.steps < len(script.ids)) is (rest > 0)


def test_a_stop_text_in_the_prompt_stops_nothing(model: Any, tokenizer: Any) -> None:
    script = LogitsProcessorList([Script(tokenizer, "yes")])
    options = {"logits_processor": script, "stop": "问："}
    assert model.chat(tokenizer, "问：", [("问：", "答：")], **options)[0] == "yes"


@pytest.mark.parametrize("step", [1, 7, 100])
def test_stop_texts_are_found_however_many_tokens_come_at_once(tokenizer: Any, step: int) -> None:
    """Drafts bring several; the stop text may be the first of them."""
    ids = torch.tensor([encode(tokenizer, "hello" + " no" + " yes" * 40)] * 2)
    ids[1] = ids[0, -1]
    place = next(i for i in range(1, 20) if "no" in tokenizer.decode(ids[0, :i].tolist()))
    criterion = StopOnText(tokenizer, ["no"], prompt_length=1)
    ends = range(1 + step, ids.shape[1] + step, step)
    found = [criterion(ids[:, :end], torch.tensor(0)).tolist() for end in ends]
    first = next(i for i, end in enumerate(ends) if end >= place)
    assert found[: first + 1] == [[False, False]] * first + [[True, False]]


@pytest.mark.parametrize("stop", ["", ["a", ""], [1]], ids=repr)
def test_stop_texts_of_another_form(model: Any, tokenizer: Any, stop: Any) -> None:
    with pytest.raises(ValueError, match="non-empty texts"):
        model.chat(tokenizer, "hello", stop=stop)


def test_cutting_at_stops() -> None:
    assert cut_at_stops("abcabc", ["c", "b"]) == "a"
    assert cut_at_stops("abc", []) == "abc"


# --- what an answer looks like


def test_answers_are_tidied(model: Any, tokenizer: Any) -> None:
    assert say(model, tokenizer, " 好,的 [[训练时间]] a,b ") == "好，的 2023年 a,b"


def test_half_characters_are_never_shown(model: Any, tokenizer: Any) -> None:
    text = "ok 👋🏽 𠀀 好"
    ids = encode(tokenizer, text)
    parts = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    assert any("\ufffd" in part for part in parts)  # else this would test nothing
    script = LogitsProcessorList([Script(tokenizer, text)])
    shown = [r for r, _ in model.stream_chat(tokenizer, "hello", logits_processor=script)]
    assert shown[-1] == text
    assert all(text.startswith(part) for part in shown)
    half = next(i for i, part in enumerate(parts) if part.endswith("\ufffd")) + 1
    assert say(model, tokenizer, ids, ends=False, max_new_tokens=half) == "ok"


def test_scores_that_are_no_numbers_are_survived(tokenizer: Any, model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    for options in ({}, {"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        with pytest.warns(RuntimeWarning, match="not finite"):
            assert broken.chat(tokenizer, "hello", max_new_tokens=3, **options)[0] == ""
    recorder = Recorder(tokenizer, [5])
    recorder.chat(tokenizer, "hello")
    (processor,) = recorder.options["logits_processor"]
    assert isinstance(processor, InvalidScoreLogitsProcessor)
    assert tokenizer.convert_ids_to_tokens(processor.fallback_id) == "▁"


@pytest.mark.parametrize("stops_early", [False, True])
def test_one_broken_weight_is_warned_of_once_an_answer(
    tokenizer: Any, model: Any, stops_early: bool
) -> None:
    broken = copy.deepcopy(model)
    broken.transformer.layers[1].mlp.dense_h_to_4h.weight.data[3, 5] = float("nan")

    def talk() -> None:
        options = {"do_sample": False, "max_new_tokens": 4}
        if stops_early:
            stream = broken.stream_chat(tokenizer, "hello", **options)
            assert next(stream)[0] == ""
            stream.close()
        else:
            assert list(broken.stream_chat(tokenizer, "hello", **options))[-1][0] == ""

    for _ in range(2):
        with pytest.warns(RuntimeWarning) as caught:
            talk()
        (warning,) = caught
        assert re.search("not finite.*SHA256SUMS.*--verify", str(warning.message))
        assert "float16" not in str(warning.message)
        assert warning.filename == __file__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_beyond_float16_are_told_from_damage(
    tokenizer: Any, model: Any, dtype: torch.dtype
) -> None:
    wide = copy.deepcopy(model).to(dtype)
    wide.transformer.final_layernorm.bias.data.fill_(3e4)
    wide.lm_head.weight.data.fill_(3.0)
    options = {"do_sample": False, "max_new_tokens": 2}
    if dtype == torch.bfloat16:
        wide.chat(tokenizer, "hello", **options)  # a warning would be an error
        return
    with pytest.warns(RuntimeWarning, match="beyond float16: load the model in bfloat16"):
        wide.chat(tokenizer, "hello", **options)


# --- whom one talks to


def test_a_tokenizer_of_another_generation(model: Any) -> None:
    fields = read_fields(PRESETS / "chatglm-6b-v0")
    other = ChatGLMTokenizer(str(ROOT / "ice_text.model"), **fields)
    gmask = model.config.gmask_token_id
    words = rf"\[gMASK\] is {gmask + 20000}, the model's is {gmask}: .* different generations"
    with pytest.raises(ValueError, match=words):
        model.chat(other, "hello")
    with pytest.raises(ValueError, match=words):
        next(model.stream_chat(other, "hello"))


# peft says the old names of checkpointing, for which transformers 5.23 has new ones.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_models_wrapped_by_peft(model: Any, tokenizer: Any) -> None:
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2)).eval()
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = model.chat(tokenizer, "hello", **options)
    assert wrapped.chat(tokenizer, "hello", **options) == expected
    assert list(wrapped.stream_chat(tokenizer, "hello", **options))[-1] == expected
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert wrapped.chat(tokenizer, "hello", **options) != expected


def test_a_closed_conversation_leaves_nothing_behind(model: Any, tokenizer: Any) -> None:
    before = set(threading.enumerate())
    script = Script(tokenizer, "one two three ", ends=False)
    processors = LogitsProcessorList([script])
    stream = model.stream_chat(tokenizer, "hello", logits_processor=processors, max_length=2000)
    assert next(stream)[0] == "one"
    stream.close()
    assert set(threading.enumerate()) == before
    assert script.steps < 500
    with pytest.raises(StopIteration):
        next(stream)
