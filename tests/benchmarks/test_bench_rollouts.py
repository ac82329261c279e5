"""The measurement of roll-outs: that every way answers, and what is counted."""

from pathlib import Path

import pytest

pytest.importorskip("chatglm", reason="the benchmarks need the package")

from conftest import build_model

from benchmarks import bench_rollouts as bench
from benchmarks.results import Recorder, read_rows
from chatglm.answering import only_options

PROMPTS = [[5, 6, 301, 304], [7] * 9 + [301, 304], [9, 8, 301, 304], [5, 6, 301, 304]]


def test_seeds_give_the_same_answers_in_batches_and_as_rows() -> None:
    """In fewer passes as rows than in two batches, whose rows wait for the longest."""
    model = build_model(spread=5, eos_token_id=19)
    found = {way: bench.measure(way, model, PROMPTS, 2, 1, 9) for way in bench.WAYS}
    assert found[bench.ROWS].tokens == found[bench.BATCHES].tokens
    assert all(one.seconds > 0 for one in found.values())
    assert found[bench.BATCHES].passes <= 2 * 9
    assert found[bench.ROWS].passes >= found[bench.ROWS].tokens // 2
    assert not model.get_input_embeddings()._forward_hooks


def test_what_was_before_is_one_draw_for_a_batch() -> None:
    model = build_model(spread=5)
    options = bench.list_options(model, 5)
    with only_options(model, options):
        answers = bench.answer_as_before(model, PROMPTS, options, 3)
    assert len(answers) == 4 and all(0 < len(ids) <= 5 for ids in answers)


def test_every_line_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "FORMATS", {"float32": None})
    path = tmp_path / "results.csv"
    bench.run(bench.parse(["--quick"]), Recorder("bench_rollouts", 8, 1, path))
    rows = read_rows(path)
    lines = {(row.contender, row.case, row.batch, row.unit) for row in rows}
    assert len(lines) == len(rows) == len(bench.WAYS) * 2 * len(bench.SIZES) * 2
    assert {(row.size, row.rounds) for row in rows} == {(8, 1)}
    assert all((row.baseline == bench.BEFORE) == (row.ratio is not None) for row in rows)
    assert "roll-outs, groups, float32" in capsys.readouterr().out


def test_figures_of_a_trial_are_not_written() -> None:
    with pytest.raises(ValueError, match="--quick tries the lines"):
        bench.parse(["--quick", "--write"])
