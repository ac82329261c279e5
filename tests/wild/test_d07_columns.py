"""D7: columns that are named are used, once; a name that no row has is one error."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="training is the package's")
from chatglm.data.columns import check_named
from chatglm.data.dialects import read_answers, read_pairs, read_prompts, read_texts
from chatglm.data.files import open_records
from chatglm.data.records import ColumnProblem, Columns, RowProblem
from chatglm.training.keys.values import coerce
from chatglm.training.settings import KeyProblem, read_settings, write_settings
from chatglm.training.stage_settings import SftSettings

NONE: dict[str, Any] = {}


def read(row: dict[str, Any], reader: Any = read_answers, **told: str) -> list[tuple[Any, ...]]:
    return [tuple(r[1:7]) for r in reader(row, Columns(**told))]


def plain(query: str, answer: str = "", **more: Any) -> list[tuple[Any, ...]]:
    fields = {"history": [], "rejected": "", "kind": "", "system": ""} | more
    return [
        (fields["history"], query, answer, fields["rejected"], fields["kind"], fields["system"])
    ]


@pytest.mark.parametrize(
    "told", [{}, {"prompt": "input"}, {"prompt": "input", "response": "output"}]
)
def test_the_smallest_row_of_the_report_is_not_doubled(told: dict[str, str]) -> None:
    assert read({"input": "a", "output": "b"}, **told) == plain("a", "b")


@pytest.mark.parametrize(
    ("row", "told", "expected"),
    [
        ({"content": "q", "summary": "a"}, {"prompt": "content", "response": "summary"},
         plain("q", "a")),
        ({"q": "do", "more": "this", "a": "a"}, {"prompt": "q", "input": "more", "response": "a"},
         plain("do\nthis", "a")),
        ({"instruction": "do", "input": "this", "output": "a"}, {"prompt": "instruction"},
         plain("do\nthis", "a")),
        ({"instruction": "do", "input": "this", "output": "a"}, {"prompt": "input"},
         plain("this", "a")),
        ({"context": "q", "answer": "a"}, {"prompt": "context"}, plain("q", "a")),
        ({"prompt": "q", "response": "a", "answer": "b"}, {"response": "answer"}, plain("q", "b")),
        ({"question": "q", "instruction": "x", "output": "a"}, {"prompt": "question"},
         plain("q", "a")),
        ({"prompt": "a", "response": "q"}, {"prompt": "response", "response": "prompt"},
         plain("q", "a")),
        ({"q": "q", "a": "a", "past": [["x", "y"]], "rule": "s"},
         {"prompt": "q", "response": "a", "history": "past", "system": "rule"},
         plain("q", "a", history=[("x", "y")], system="s")),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "q", "response": "a"},
         {"response": "response"}, plain("q", "a")),
        ({"talk": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
          "prompt": "x", "response": "y"}, {"messages": "talk"}, plain("q", "a")),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"response": "chosen"}, plain("q", "a")),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
         {"messages": "chosen"}, plain("q", "a")),
        ({"prompt": [{"role": "user", "content": "q"}], "rejected": [],
          "chosen": [{"role": "assistant", "content": "a"}]}, {"response": "chosen"},
         plain("q", "a")),
    ],
)  # fmt: skip
def test_a_column_that_is_named_is_used_once(row: Any, told: Any, expected: Any) -> None:
    assert read(row, **told) == expected


def test_pairs_and_texts_and_questions_have_columns_too() -> None:
    row = {"q": "q", "good": "a", "bad": "b", "past": [["x", "y"]]}
    told = {"prompt": "q", "chosen": "good", "rejected": "bad", "history": "past"}
    expected = plain("q", "a", rejected="b", history=[("x", "y")])
    assert read(row, read_pairs, **told) == expected
    assert read({"body": "t", "text": "x"}, read_texts, text="body") == plain("t")
    assert read({"q": "q", "prompt": "x"}, read_prompts, prompt="q") == plain("q")
    talk = [{"role": "user", "content": "q"}]
    row = {"lead": talk, "good": {"role": "assistant", "content": "a"}, "rejected": "b"}
    assert read(row, read_pairs, messages="lead", chosen="good") == plain("q", "a", rejected="b")


def test_a_row_without_a_column_that_is_named_names_those_there_are() -> None:
    with pytest.raises(ColumnProblem, match=r"no column 'frage' \(prompt\); it has q, a"):
        read({"q": "q", "a": "a"}, prompt="frage")
    # Not every row has a history or a system text.
    assert read({"prompt": "q", "response": "a"}, history="past", system="rule") == plain("q", "a")


def test_a_name_that_no_row_has_is_one_error() -> None:
    keys = ["query", "reply"]
    check_named(Columns(prompt="query", response="reply"), keys)
    with pytest.raises(ColumnProblem, match=r"no row has the column 'histroy' \(history\)"):
        check_named(Columns(history="histroy"), keys)
    with pytest.raises(ColumnProblem, match=r"there are query, reply; did you mean 'reply'\?"):
        check_named(Columns(response="repl"), keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_column": "x", "response_column": "x"}, "'x' is named twice"),
        ({"prompt_column": "x", "columns": {"history": "x"}}, "'x' is named twice"),
        ({"prompt_column": "x", "columns": {"prompt": "y"}}, "prompt_column says 'x' and columns"),
        ({"dialect": "alpacca"}, "did you mean alpaca?"),
    ],
)
def test_names_that_go_against_each_other_are_refused(keys: Any, message: str) -> None:
    with pytest.raises(KeyProblem, match=re.escape(message)):
        SftSettings(output="out", **keys).check()


def test_columns_are_told_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    words = ["--output", "out", "--columns", "prompt=query", "response=reply"]
    settings, _ = read_settings(SftSettings, NONE, words)
    assert settings.columns == {"prompt": "query", "response": "reply"}
    assert read_settings(SftSettings, NONE, [*words[:4]])[0].columns == {"prompt": "query"}
    write_settings(settings, {}, tmp_path)
    again, _ = read_settings(SftSettings, NONE, ["--config", f"{tmp_path}/settings.yaml"])
    assert again == settings
    for wrong in ("prompt", "=x", "prompt="):
        with pytest.raises(KeyProblem, match="pairs as prompt=query response=reply"):
            coerce("columns", wrong, dict[str, str])
    with pytest.raises(KeyProblem, match="pairs as"):
        coerce("columns", ["prompt=a", "prompt=b"], dict[str, str])


def test_the_official_scripts_keys_name_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"content": "q", "summary": "a"}) + "\n", encoding="utf-8")
    keys = {"prompt_column": "content", "response_column": "summary"}
    settings = SftSettings(output="out", **keys)
    (record,) = open_records([str(path)], read_answers, settings)
    assert (record.query, record.answer) == ("q", "a")


ROW = {"prompt": "q", "response": "a", "instruction": "x", "output": "y", "tools": ["f"]}


def test_a_dialect_that_is_told_reads_its_own_columns_alone() -> None:
    assert read(ROW, dialect="prompt_response") == plain("q", "a")
    assert read(ROW, dialect="alpaca") == plain("x", "y")
    with pytest.raises(RowProblem, match="not of the dialect sharegpt: conversations is not among"):
        read(ROW, dialect="sharegpt")
    with pytest.raises(RowProblem, match="the dialect chosen_rejected hold no answers; such are"):
        read(ROW, dialect="chosen_rejected")


def test_files_are_asked_once_for_every_column_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"q": "q", "a": "a"}] * 3 + [{"q": "q", "a": "a", "past": [["x", "y"]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def count(**columns: str) -> int:
        settings = SftSettings(output="out", columns={"prompt": "q", "response": "a", **columns})
        return len(open_records([str(path)], read_answers, settings))

    assert count() == count(history="past") == 4
    with pytest.raises(ValueError, match=r"no row has the column 'rule' \(system\); there are"):
        count(system="rule")
    with pytest.raises(ValueError, match=r"no column 'frage' \(prompt\); it has q, a") as caught:
        count(prompt="frage")
    assert "bad_rows" not in str(caught.value) and str(caught.value).count("frage") < 5
