"""D1: a row that is left out is counted and shown; too many of them stop the run."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="these are the package's files")

from chatglm.data.dialects import read_answers, read_pairs
from chatglm.data.files import ReadingOptions, RecordFiles
from chatglm.data.report import MOST_REASONS, DataReport, name_reason
from chatglm.training.data.batches import Examples

GOOD = {"prompt": "q", "response": "a"}


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_an_array_with_one_object_a_line_is_read_whole(tmp_path: Path) -> None:
    """It was one of fifty rows, with rc 0, and the message recommended that."""
    lines = ",\n".join(json.dumps(GOOD) for _ in range(50))
    for skips in (False, True):
        records = RecordFiles(
            [write(tmp_path / "a.json", f"[\n{lines}\n]")], read_answers, None, skips
        )
        assert (len(records), records.num_skipped) == (50, 0)


@pytest.mark.parametrize(
    ("bad", "good", "share", "is_read"),
    [
        (1, 2, 0.1, True),  # few, and not most
        (3, 3, 0.1, True),
        (3, 2, 0.1, False),
        (1, 0, 0.1, False),
        (4, 36, 0.1, True),
        (4, 35, 0.1, False),
        (4, 35, 0.2, True),
        (4, 5, 0.0, False),
        (1, 5, 0.0, True),
        (30, 10, 0.8, True),
        (49, 1, 0.1, False),
        (49, 1, 1.0, True),
    ],
)
def test_a_share_of_bad_rows_stops_the_run(
    bad: int, good: int, share: float, is_read: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * good, *[{"prompt": "q"}] * bad)
    options = ReadingOptions(skips=True, max_bad_share=share)
    if is_read:
        records = RecordFiles([path], read_answers, options=options)
        assert (len(records), records.num_skipped) == (good, bad)
        assert records.report.files[0].skipped == bad
        return
    with pytest.raises(ValueError, match=rf"a\.jsonl:{good + 1}: no answer") as told:
        RecordFiles([path], read_answers, options=options)
    is_form = 2 * bad > bad + good
    assert ("another form" in str(told.value)) == is_form
    assert ("max_bad_share" in str(told.value)) != is_form


def test_a_bad_file_among_many_good_ones_is_seen(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", *[GOOD] * 1000)
    other = write(tmp_path / "b.jsonl", *[{"question_text": "q", "reply_text": "a"}] * 10)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: .*10 of 10 rows.*another form"):
        RecordFiles([good, other], read_answers, skips=True)


def test_many_files_with_a_few_bad_rows_each_are_too_much_together(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", GOOD, "{", GOOD) for i in range(4)]
    with pytest.raises(ValueError, match=r"4 of 12 rows cannot be used.*max_bad_share"):
        RecordFiles(paths, read_answers, skips=True)


def test_a_file_of_another_form_is_told_from_a_bad_row(tmp_path: Path) -> None:
    odd = {"question_text": "q", "reply_text": "a"}
    form = write(tmp_path / "a.jsonl", *[odd] * 30)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*21 of 21 rows cannot be used") as told:
        RecordFiles([form], read_answers)
    assert "skip" not in str(told.value) and "a.jsonl:2;" in str(told.value)
    row = write(tmp_path / "b.jsonl", *[GOOD] * 5, odd, *[GOOD] * 5)
    with pytest.raises(ValueError, match=r"b\.jsonl:6: .*bad_rows: skip"):
        RecordFiles([row], read_answers)
    pairs = write(tmp_path / "c.jsonl", *[GOOD] * 3)
    with pytest.raises(ValueError, match=r"c\.jsonl:1: no pair") as told:
        RecordFiles([pairs], read_pairs, skips=True)
    assert "skip" not in str(told.value)


def test_reasons_are_counted_and_the_first_of_each_shown(tmp_path: Path) -> None:
    bad = [{"prompt": "q"}, "{", '{"prompt": "q", "prompt": "q"}']
    path = write(tmp_path / "a.jsonl", *[GOOD] * 108, *(row for _ in range(4) for row in bad))
    report = RecordFiles([path], read_answers, skips=True).report
    assert report.kept == 108 and report.num_skipped == 12
    assert list(report.skipped.values()) == [4, 4, 4]
    assert [line.partition(": ")[0] for line in report.shown] == [
        f"{path}:{line}" for line in range(109, 118)
    ]
    lines = report.describe()
    assert lines[0] == f"{path}: JSON lines, UTF-8, 108 rows, 108 examples, 12 left out"
    assert "4 rows left out: no answer" in lines
    assert any(line.startswith(f"  {path}:109: no answer") for line in lines)


def test_reasons_without_end_are_counted_together() -> None:
    report = DataReport()
    for number in range(MOST_REASONS + 5):
        report.skip(f"a:{number}", f"reason {number}: of its own")
    assert len(report.skipped) == MOST_REASONS + 1 and report.num_skipped == MOST_REASONS + 5
    assert report.skipped["other reasons"] == 5
    assert name_reason("no row (of a table): x") == "no row"


def test_rows_that_are_too_long_are_counted_apart_and_have_a_share_of_their_own(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 4, *[{**GOOD, "response": "long"}] * 6)
    for share, is_read in ((0.6, True), (0.5, False)):
        options = ReadingOptions(skips=True, max_long_share=share)
        records = RecordFiles([path], read_answers, options=options)

        def render(record: Any) -> Any:
            return None if record.answer == "long" else [1, 2, 3]

        if is_read:
            examples = Examples(records, render)
            assert (len(examples), examples.num_skipped, list(examples.lengths)) == (4, 6, [3] * 4)
            assert (records.report.too_long, records.num_skipped) == (6, 0)
            assert "6 examples left out: too long" in records.report.describe()
        else:
            with pytest.raises(
                ValueError, match=r"6 of 10 examples are too long.*long_rows to cut"
            ):
                Examples(records, render)


def test_a_named_column_that_is_not_there_is_no_row_to_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 5)
    for skips in (False, True):
        with pytest.raises(ValueError, match=r"'reply'.*name the column") as told:
            RecordFiles(
                [{"path": path, "columns": {"prompt": "prompt", "response": "reply"}}],
                read_answers,
                skips=skips,
            )
        assert "bad_rows" not in str(told.value)
