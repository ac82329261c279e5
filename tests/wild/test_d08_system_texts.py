"""D8: one rule for system texts: in front of the first question, however the row tells them.

What is rendered for a training is, id for id, what `apply_chat_template` and `chat` make of the
same talk, on the vocabularies of both generations.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="training is the package's")
from chatglm_6b.conversation_chatglm import ChatMixin
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import PRESETS, ROOT, SHARED
from dialect_rows import ROWS, Case, Expected

from chatglm.data.dialects import read_answers, read_messages, read_pairs, read_prompts
from chatglm.data.files import open_records
from chatglm.data.records import Columns, Record, RowProblem
from chatglm.evaluating.settings import EvalSettings
from chatglm.training.data.rendering import SHORTEST_PROMPT, Renderer
from chatglm.training.ppo.rollouts import Prompts
from chatglm.training.progress import frame_prompts
from chatglm.training.settings import KeyProblem
from chatglm.training.stage_settings import PretrainSettings, SftSettings

TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
OFFICIAL = {
    "chatglm-6b": SHARED / "tokenizers/ice_text.v1.1.model",
    "chatglm-6b-v0": SHARED / "tokenizers/ice_text.v0.model",
}
CASES = [
    pytest.param(case, id=f"{name}-{number}")
    for name, cases in ROWS.items()
    for number, case in enumerate(cases)
    if case.aim == "answers"
]


def build(preset: str, path: Path) -> tuple[Any, ChatGLMTokenizer]:
    """Return a vocabulary as a preset has it, and what a renderer asks a model for."""
    fields = json.loads((PRESETS / preset / "tokenizer_config.json").read_text())
    fields = {k: v for k, v in fields.items() if k not in ("auto_map", "tokenizer_class")}
    tokenizer = ChatGLMTokenizer(str(path), chat_template=TEMPLATE, **fields)
    config = SimpleNamespace(
        max_sequence_length=2048,
        eos_token_id=tokenizer.convert_tokens_to_ids("<eop>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return SimpleNamespace(config=config, build_prompt=ChatMixin.build_prompt), tokenizer


@pytest.fixture(scope="module", params=["own", *OFFICIAL])
def parts(request: pytest.FixtureRequest) -> tuple[Any, ChatGLMTokenizer]:
    if request.param == "own":
        return build("chatglm-6b", ROOT / "ice_text.model")
    if not OFFICIAL[request.param].is_file():
        pytest.skip("the official vocabularies are not here")
    return build(request.param, OFFICIAL[request.param])


def list_messages(expected: Expected) -> list[dict[str, str]]:
    """Return the messages of a record."""
    system = [{"role": "system", "content": expected.system}] if expected.system else []
    texts = [*(text for pair in expected.history for text in pair), expected.query]
    texts += [expected.answer] if expected.answer else []
    roles = ("user", "assistant")
    return [*system, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


@pytest.mark.parametrize("case", CASES)
def test_every_dialect_is_rendered_as_the_template_does(case: Case, parts: Any) -> None:
    renderer = Renderer(*parts)
    records = list(read_answers(case.row, Columns()))
    assert len(records) == len(case.records)
    for record, expected in zip(records, case.records):
        example = renderer.render(record)
        assert example is not None
        messages = list_messages(expected)
        told = parts[1].apply_chat_template(messages, tokenize=True, return_dict=False)
        assert example.input_ids == told
        asked = parts[1].apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert example.prompt_ids == asked == renderer.render_prompt(record, 1)


SYSTEM, FIRST, LAST = "Be kind.", ("你好", "你好！"), ("why?", "because.")
TALK = [
    {"role": "user", "content": FIRST[0]},
    {"role": "assistant", "content": FIRST[1]},
    {"role": "user", "content": LAST[0]},
    {"role": "assistant", "content": LAST[1]},
]
RULE = {"role": "system", "content": SYSTEM}
PAST = {"prompt": LAST[0], "response": LAST[1], "history": [list(FIRST)]}
WAYS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"messages": [RULE, *TALK]}, {}),
    ({"messages": TALK, "system": SYSTEM}, {}),
    ({"messages": [{"role": "developer", "content": SYSTEM}, *TALK]}, {}),
    ({"messages": [RULE, *TALK], "system": SYSTEM}, {}),
    ({"messages": TALK}, {"default_system": SYSTEM}),
    ({"messages": [{"role": "system", "content": " "}, *TALK]}, {"default_system": SYSTEM}),
    ({"messages": [RULE, *TALK]}, {"default_system": "Be brief."}),
    ({**PAST, "system": SYSTEM}, {}),
    ({**PAST, "system": ""}, {"default_system": SYSTEM}),
    ({**PAST, "rule": SYSTEM}, {"system": "rule"}),
    ({**PAST, "prompt": [RULE, *TALK[:3]], "history": None}, {}),
    ({"prompt": [RULE, *TALK[:3]], "completion": TALK[3:]}, {}),
]


@pytest.mark.parametrize(("row", "told"), WAYS)
def test_one_talk_is_one_prompt_however_it_is_told(row: Any, told: Any) -> None:
    *_, record = read_answers(row, Columns(**told))
    assert record[1:4] == ([FIRST], *LAST) and record.system == SYSTEM
    assert record.frame() == (LAST[0], [(f"{SYSTEM}\n\n{FIRST[0]}", FIRST[1])])
    assert next(read_prompts(row, Columns(**told))).frame() == record.frame()


@pytest.mark.parametrize(
    "row",
    [
        {**PAST, "system": SYSTEM, "chosen": "a", "rejected": "b"},
        {"messages": [RULE, *TALK[:3]], "chosen": "a", "rejected": "b"},
        {"chosen": [RULE, *TALK[:3], {"role": "assistant", "content": "a"}],
         "rejected": [RULE, *TALK[:3], {"role": "assistant", "content": "b"}]},
        {"messages": [RULE, *TALK[:3], {"role": "assistant", "content": "a"}],
         "rejected_response": "b"},
    ],
)  # fmt: skip
def test_pairs_have_it_in_the_same_place(row: dict[str, Any]) -> None:
    (record,) = read_pairs(row, Columns())
    assert record.frame() == (LAST[0], [(f"{SYSTEM}\n\n{FIRST[0]}", FIRST[1])])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*TALK, RULE]}, "system messages come first"),
        ({"messages": [TALK[0], RULE, TALK[1]]}, "system messages come first"),
        ({"messages": [RULE, *TALK], "system": "Be brief."}, "two system texts, 'Be kind.' in"),
        ({**PAST, "prompt": [RULE, *TALK[:3]], "system": "x"}, "two system texts"),
        ({**PAST, "system": ["Be kind."]}, "no system text: the column system holds no text"),
        ({"messages": [{"role": "system", "content": None}, *TALK]}, "no text as its content"),
    ],
)
def test_what_could_only_be_guessed_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=re.escape(reason)):
        list(read_answers(row, Columns()))


def test_several_system_messages_are_joined_as_the_template_does(parts: Any) -> None:
    messages = [RULE, {"role": "developer", "content": ""}, {"role": "system", "content": "s"}]
    messages += TALK
    *_, record = read_answers({"messages": messages}, Columns())
    example = Renderer(*parts).render(record)
    assert example is not None
    told = parts[1].apply_chat_template(messages, tokenize=True, return_dict=False)
    assert example.input_ids == told
    rounds = read_messages(messages)
    assert rounds == [(f"{SYSTEM}\n\ns\n\n{FIRST[0]}", FIRST[1]), LAST]


RULED = Record("data.jsonl:1", [FIRST, FIRST], *LAST, system=SYSTEM)


def test_cut_keeps_it_before_the_first_question_that_is_left(parts: Any) -> None:
    whole = Renderer(*parts).render(RULED)
    one = Renderer(*parts).render(RULED._replace(history=[FIRST]))
    none = Renderer(*parts).render(RULED._replace(history=[]))
    assert whole is not None and one is not None and none is not None
    limit = len(whole.input_ids) - 1
    assert Renderer(*parts, limit, "cut").render(RULED) == one
    assert Renderer(*parts, len(one.input_ids) - 1, "cut").render(RULED) == none
    told = parts[1].apply_chat_template([RULE, *TALK[2:]], tokenize=True, return_dict=False)
    assert none.input_ids == told


@pytest.mark.parametrize("limit", [24, 30, 60])
def test_cut_takes_the_question_s_beginning_and_leaves_the_system_text(
    parts: Any, limit: int
) -> None:
    record = RULED._replace(query="why? " * 50, answer="because. " * 50)
    renderer = Renderer(*parts, limit, "cut")
    head = renderer.encode_text(f"{SYSTEM}\n\n")
    example = renderer.render(record)
    assert example is not None and len(example.input_ids) <= limit
    assert example.prompt_ids[: len(head)] == head
    whole = renderer.encode_prompt(*record.frame(2))
    rest = example.prompt_ids[len(head) :]
    assert len(rest) >= SHORTEST_PROMPT and rest == whole[-len(rest) :]
    assert example.answer_ids[-1] == renderer.end_id
    pair = renderer.render_pair(record._replace(rejected="no. " * 50))
    assert pair is not None and pair[0].prompt_ids[: len(head)] == head


def test_a_system_text_that_fills_the_window_is_refused_not_cut(parts: Any) -> None:
    record = RULED._replace(system="kind " * 40)
    with pytest.raises(RowProblem, match=r"data\.jsonl:1: the system text has \d+ tokens"):
        Renderer(*parts, 40, "cut").render(record)
    assert Renderer(*parts, 40, "skip").render(record) is None


def test_settings_give_it_to_rows_rollouts_and_samples(parts: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n", encoding="utf-8")
    keys: dict[str, Any] = {"train_data": [str(path)], "output": "out", "default_system": SYSTEM}
    settings = SftSettings(**keys, sample_prompts=["q"])
    settings.check()
    (record,) = open_records([str(path)], read_answers, settings)
    assert (record.query, record.system) == ("q", SYSTEM)
    prompt = Prompts([str(path)], settings, Renderer(*parts), 8)[0]
    assert prompt.text == f"{SYSTEM}\n\nq" == frame_prompts(settings)[0]
    assert prompt.ids == parts[1](prompt.text, split_special_tokens=True)["input_ids"]
    assert frame_prompts(SftSettings(output="out", sample_prompts=["q"])) == ["q"]


def test_where_it_would_do_nothing_the_key_is_refused() -> None:
    with pytest.raises(KeyProblem, match="default_system must be left out: plain texts"):
        PretrainSettings(output="out", default_system=SYSTEM).check()
    with pytest.raises(KeyProblem, match="default_system must be left out: a test has no rows"):
        EvalSettings(output="out", eval_data=["x"], task="choices", default_system=SYSTEM).check()
