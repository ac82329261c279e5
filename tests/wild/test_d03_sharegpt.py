"""D3: ShareGPT's conversations, under its names of roles and keys or under any that are told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="training is the package's")
from chatglm.data.dialects import read_answers, read_pairs, read_prompts
from chatglm.data.files import open_records
from chatglm.data.records import Columns, Record, RowProblem
from chatglm.training.settings import KeyProblem
from chatglm.training.stage_settings import SftSettings

PAIR = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def read(row: dict[str, Any], **told: str) -> list[tuple[Any, ...]]:
    return [(r.history, r.query, r.answer, r.system) for r in read_answers(row, Columns(**told))]


def open_rows(folder: Path, row: dict[str, Any], **keys: Any) -> list[Record]:
    path = folder / "data.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = SftSettings(train_data=[str(path)], output="out", **keys)
    settings.check()
    return list(open_records(settings.train_data, read_answers, settings))


def test_the_smallest_row_of_the_report() -> None:
    (record,) = read_answers({"conversations": PAIR}, Columns())
    assert (record.query, record.answer, record.dialect) == ("a", "b", "sharegpt")


@pytest.mark.parametrize("human", ["human", "user", "Human", "prompter"])
@pytest.mark.parametrize("bot", ["gpt", "assistant", "bing", "chatgpt", "bard", "model"])
def test_roles_of_every_name(human: str, bot: str) -> None:
    row = {"conversations": [{"from": human, "value": "a"}, {"from": bot, "value": "b"}]}
    assert read(row) == [([], "a", "b", "")]


def test_tags_are_told_as_llama_factory_tells_them(tmp_path: Path) -> None:
    talk = [
        {"speaker": "boss", "words": "Be kind."},
        {"speaker": "guest", "words": "a"},
        {"speaker": "host", "words": "b"},
    ]
    columns = {
        "messages": "dialog",
        "role_tag": "speaker",
        "content_tag": "words",
        "user_tag": "guest",
        "assistant_tag": "host",
        "system_tag": "boss",
        "observation_tag": "observation",
    }
    (record,) = open_rows(tmp_path, {"dialog": talk}, columns=columns)
    assert (record.query, record.answer, record.system) == ("a", "b", "Be kind.")
    with pytest.raises(ValueError, match="no 'speaker'"):
        open_rows(tmp_path, {"dialog": PAIR}, columns=columns)


def test_tags_hold_for_answers_to_compare_too() -> None:
    told = Columns(role_tag="who", content_tag="said", user_tag="guest", assistant_tag="host")
    row = {
        "conversations": [{"who": "guest", "said": "a"}],
        "chosen": {"who": "host", "said": "b"},
        "rejected": {"who": "host", "said": "c"},
    }
    (record,) = read_pairs(row, told)
    assert (record.query, record.answer, record.rejected) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        ([*PAIR[1:], *PAIR], "message 0): a dialogue begins with a question"),
        ([PAIR[0], *PAIR], "message 1): questions and answers take turns"),
        ([*PAIR, PAIR[1]], "role 'gpt' where 'user' was due (message 2)"),
        ([*PAIR, {"from": "system", "value": "s"}], "system messages come first"),
        ([*PAIR, {"from": "observation", "value": "3"}], "('observation') is about a tool"),
        ([*PAIR, {"from": "function_call", "value": "f()"}], "('function_call') is about a tool"),
        ([*PAIR, {"from": "nobody", "value": "x"}], "role 'nobody'"),
        ([*PAIR, {"who": "human", "value": "x"}], "columns: role_tag=NAME"),
        ([*PAIR, {"from": "human", "text": "x"}], "no text as its content"),
        ([*PAIR, "and?"], "no message"),
    ],
)
def test_disorder_is_refused_with_the_message_and_the_remedy(talk: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=re.escape(reason)):
        read({"conversations": talk})


def test_a_question_at_the_end_is_left_to_others() -> None:
    row = {"conversations": [*PAIR, {"from": "human", "value": "c"}]}
    assert read(row) == [([], "a", "b", "")]
    (prompt,) = read_prompts(row, Columns())
    assert (prompt.history, prompt.query, prompt.answer) == ([("a", "b")], "c", "")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mesages": "x"}, "no role 'mesages': there are prompt, response"),
        ({"mesages": "x"}, "did you mean messages?"),
        ({"q": "prompt"}, "did you mean prompt=q? The role comes first"),
        ({"prompt": "x", "response": "x"}, "'x' is named twice, as prompt and as response"),
        ({"prompt": ""}, "prompt must name one column"),
        ({"query": "x", "input": "y"}, "input must name one column"),
    ],
)
def test_roles_that_there_are_not_are_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(KeyProblem, match=re.escape(message)):
        SftSettings(output="out", columns=columns).check()
