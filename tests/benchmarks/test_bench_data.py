"""The benchmark of reading rows, at a tiny size."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_data


def test_all_readings_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    assert bench_data.main(["--rows", "50", "--rounds", "1"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("50 rows") and len(lines) == 3
    assert lines[1].startswith("datasets: ") and "(1.00 x datasets)" in lines[1]


def test_rows_are_those_that_are_read(tmp_path: Path) -> None:
    bench_data.write_rows(tmp_path / "a.jsonl", 30)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    records = bench_data.prepare_ours(str(tmp_path / "a.jsonl"))()
    assert [r.answer for r in records] == [row["output"] for row in rows]
