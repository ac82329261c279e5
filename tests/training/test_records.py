"""What rows of training data mean, and what happens to bad ones."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from chatglm.data.dialects import read_answers, read_pairs, read_prompts, read_texts
from chatglm.data.files import RecordFiles
from chatglm.data.records import Columns, Record, RowProblem

COLUMNS = Columns()
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "再见"},
    {"role": "assistant", "content": "再见！"},
]


def read(reader: Any, row: dict[str, Any], columns: Columns = COLUMNS) -> list[Record]:
    """Return the records of a row, whatever its form is called."""
    return [record._replace(dialect="") for record in reader(row, columns)]


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def test_messages_teach_every_answer_behind_its_past() -> None:
    first, second = read(read_answers, {"messages": TALK})
    assert first == Record("", [], "你好", "你好！", system="Be kind.")
    assert second == Record("", [("你好", "你好！")], "再见", "再见！", system="Be kind.")
    assert second.frame() == ("再见", [("Be kind.\n\n你好", "你好！")])


@pytest.mark.parametrize(
    ("row", "history", "query", "answer"),
    [
        ({"prompt": "q", "response": "a", "history": [["x", "y"]]}, [("x", "y")], "q", "a"),
        ({"prompt": "q", "response": "a", "history": None}, [], "q", "a"),
        ({"instruction": "do", "input": "this", "output": "a"}, [], "do\nthis", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, [], "do", "a"),
        ({"prompt": "q", "answers": [{"answer": "b", "score": 1}, {"answer": "a", "score": 2}]},
         [], "q", "a"),
        ({"prompt": "q", "prefix": "p", "system": "s", "answers": [{"answer": "a", "score": 0}]},
         [], "qp", "a"),
    ],
)  # fmt: skip
def test_rows_of_every_format(
    row: dict[str, Any], history: list[Any], query: str, answer: str
) -> None:
    system = row.get("system", "")
    expected = Record("", history, query, answer, system=system)
    assert read(read_answers, row) == [expected]


def test_columns_may_have_other_names() -> None:
    columns = Columns("content", "summary", "past")
    row = {"content": "q", "summary": "a", "past": [["x", "y"]]}
    assert read(read_answers, row, columns) == [Record("", [("x", "y")], "q", "a")]


def test_pairs_of_every_format() -> None:
    expected = Record("", [], "q", "good", "bad")
    assert read(read_pairs, {"prompt": "q", "chosen": "good", "rejected": "bad"}) == [expected]
    talk = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    assert read(read_pairs, talk) == [expected]
    scored = [("c", 1.0), ("a", 3.0), ("b", 2.0), ("d", 1.0)]
    row = {"prompt": "q", "answers": [{"answer": a, "score": s} for a, s in scored]}
    assert [(r.answer, r.rejected) for r in read_pairs(row, COLUMNS)] == [("a", "b"), ("b", "c")]


def test_prompts_need_no_answer() -> None:
    assert read(read_prompts, {"prompt": "q"}) == [Record("", [], "q")]
    assert read(read_prompts, {"prompt": "q", "response": "a"}) == [Record("", [], "q", "a")]
    (record,) = read_prompts({"messages": TALK[:-1]}, COLUMNS)
    assert (record.query, record.answer, len(record.history)) == ("再见", "", 1)


@pytest.mark.parametrize(
    ("reader", "row", "reason"),
    [
        (read_answers, {"prompt": "q"}, "no answer"),
        (read_answers, {"prompt": "q", "response": "  "}, "no answer"),
        (read_answers, {"response": "a"}, "no prompt"),
        (read_answers, {"prompt": "q", "response": 3}, "no answer"),
        (read_answers, {"prompt": "q", "response": "a", "history": ["x"]}, "history"),
        (read_answers, {"messages": [TALK[2]]}, "role 'assistant' where 'user' was due"),
        (read_answers, {"messages": []}, "messages"),
        (read_answers, {"messages": [{"role": "user"}]}, "no text"),
        (read_pairs, {"prompt": "q", "chosen": "a"}, "no rejected"),
        (read_pairs, {"prompt": "q", "chosen": "a", "rejected": "a"}, "the same"),
        (read_pairs, {"prompt": "q", "answers": [{"answer": "a", "score": 1}] * 2}, "different"),
        (read_texts, {"words": "x"}, "no text"),
    ],
)
def test_rows_that_teach_nothing_say_why(reader: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        list(reader(row, COLUMNS))


def test_files_are_read_whenever_a_record_is_asked_for(tmp_path: Path) -> None:
    rows = [{"messages": TALK}, {"prompt": "q", "response": "a"}]
    path = write(tmp_path, rows[0], "", rows[1])
    records = RecordFiles([path], read_answers)
    assert [r.answer for r in records] == ["你好！", "再见！", "a"]
    assert records[-1].source == f"{path}:3"
    assert [r.answer for r in records[1:]] == ["再见！", "a"]
    again = pickle.loads(pickle.dumps(records))
    assert again[2] == records[2]
    with pytest.raises(IndexError):
        records[3]


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, {"text": "b"}, name="b.jsonl")
    write(tmp_path, {"text": "a"}, name="a.json")
    write(tmp_path, "not data", name="c.txt")
    assert [r.query for r in RecordFiles([str(tmp_path)], read_texts)] == ["a", "b", "not data"]


@pytest.mark.parametrize("bad", ["{broken", "[1, 2]", '{"prompt": "q"}'])
def test_a_bad_row_is_named_with_file_line_and_reason(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"prompt": "q", "response": "a"}\n'
    path.write_bytes(good + bad.encode("utf-8", "surrogateescape") + b"\n" + good)
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*bad_rows: skip"):
        RecordFiles([str(path)], read_answers)
    records = RecordFiles([str(path)], read_answers, skips=True)
    assert (len(records), records.num_skipped) == (2, 1)
    assert records.problems[0].startswith(f"{path}:2: ")
    assert records[1].source == f"{path}:3"


def test_files_that_are_missing_or_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no data file"):
        RecordFiles([str(tmp_path / "none.jsonl")], read_answers)
    with pytest.raises(ValueError, match=r"has no \.jsonl"):
        RecordFiles([str(tmp_path)], read_answers)
    with pytest.raises(ValueError, match="give files with train_data"):
        RecordFiles([], read_answers)
    with pytest.raises(ValueError, match="no usable row"):
        RecordFiles([write(tmp_path, "")], read_answers)
    path = write(tmp_path, "{}")
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no prompt.*another form"):
        RecordFiles([path], read_answers, skips=True)
