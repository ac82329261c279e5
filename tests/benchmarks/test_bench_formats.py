"""The benchmark of formats: sizes, statistics and the table it writes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from benchmarks import bench_formats as bench
from recipes.mini.corpus import Example

EXAMPLES = [Example([1], [2, 3]), Example([1], [2, 3, 4, 5])]


def test_perplexity_is_per_token_and_the_difference_per_answer() -> None:
    measured = bench.compare([1.0, 2.0], [0.5, 1.7], EXAMPLES)
    assert measured["perplexity"] == pytest.approx(math.exp((2 * 1.0 + 4 * 2.0) / 6))
    assert measured["added"] == pytest.approx(0.4)
    assert measured["error"] == pytest.approx(0.1)


@pytest.mark.parametrize("options", [{}, {"bits": 8}])
def test_sizes_of_the_6b_model_follow_from_its_shapes(options: dict[str, Any]) -> None:
    hidden, layers, vocabulary = 4096, 28, 130528
    matrices = layers * 12 * hidden**2
    norms = (layers * 4 + 2) * hidden
    biases = layers * (3 + 1 + 4 + 1) * hidden
    rest = 2 * (vocabulary * hidden + norms + biases)
    scales = 2 * biases if options else 0  # one half for each row, as many as biases
    expected = rest + scales + matrices * (1 if options else 2)
    assert bench.count_full_bytes(options) == expected


def test_held_out_questions_come_from_our_own_dialogues_without_data() -> None:
    model = bench.load_own_model()
    parts = bench.draw_examples(model, None)
    assert set(parts) == {"own"} and len(parts["own"]) > 800
    losses = bench.measure_answers(model.float(), parts["own"][:3])
    assert len(losses) == 3 and all(loss > 0 for loss in losses)


def test_the_table_has_a_row_for_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BLOCK_SIZES", ((256, 128), (128, 256)))
    times = bench.measure_times()
    assert times["not packed"]["relative"] == 1
    row = {"own_bytes": 17e6, "full_bytes": 6.2e9, "own": bench.compare([1, 2], [1, 2], EXAMPLES)}
    rows = [{**row, "name": name, "speed": times.get(name)} for name in ("not packed", "INT4 + x")]
    report = {"formats": rows, "questions": {"own": 2}, "machine": bench.describe_machine()}
    lines = bench.format_table(report).splitlines()
    assert lines[2].startswith("| not packed | 17.0 MB | 6.20 GB |") and "1.00 |" in lines[2]
    assert lines[3].endswith("|  |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert f"torch {torch.__version__}" in lines[-1]


def test_the_page_has_a_place_for_the_table() -> None:
    page = Path(ROOT, "docs", "quantization.md").read_text(encoding="utf-8")
    assert page.index(bench.MARKS[0]) < page.index(bench.MARKS[1])
