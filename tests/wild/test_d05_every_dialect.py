"""D5: every dialect of the world's trainers is read by its keys, or refused with what is wrong."""

import importlib
import re
import sys
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="training is the package's")
from conftest import ROOT
from dialect_rows import REFUSED, ROWS, Case, Expected

from chatglm.data.dialects import read_answers, read_pairs, read_prompts, read_texts
from chatglm.data.records import Columns, Record, RowProblem
from chatglm.data.registry import DIALECTS

READERS = {
    "answers": read_answers,
    "pairs": read_pairs,
    "prompts": read_prompts,
    "texts": read_texts,
}
CASES = [(name, case) for name, cases in ROWS.items() for case in cases]


def read(row: dict[str, Any], aim: str, **told: str) -> list[Record]:
    return list(READERS[aim](row, Columns(**told)))


def strip(record: Record) -> Expected:
    return Expected(*record[1:7])


@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)]
)
def test_rows_are_read_as_what_they_mean(name: str, case: Case) -> None:
    records = read(case.row, case.aim)
    assert [strip(record) for record in records] == case.records
    assert {record.dialect for record in records} == {name}
    # A name that is told makes no difference where the row is of that form.
    assert read(case.row, case.aim, dialect=name) == records


@pytest.mark.parametrize(("row", "aim", "reason"), REFUSED)
def test_rows_that_are_not_clear_are_refused(row: dict[str, Any], aim: str, reason: str) -> None:
    with pytest.raises(RowProblem, match=re.escape(reason)):
        read(row, aim)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.meaning], ids=lambda d: d.name)
def test_the_table_s_examples_are_read_as_their_dialect(dialect: Any) -> None:
    assert dialect.name in ROWS
    for aim in dialect.aims:
        assert {record.dialect for record in read(dialect.example, aim)} == {dialect.name}


def test_the_page_has_the_table_of_dialects() -> None:
    """The table of docs/training.md is what `python tools/list_dialects.py` writes."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        tool = importlib.import_module("list_dialects")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert tool.build_page(page) == page
    for dialect in DIALECTS:
        assert (tool.describe(dialect) in page) == bool(dialect.meaning)
