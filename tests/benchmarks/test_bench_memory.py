"""The memory benchmark's checkpoint and its refusal of a full disk, at toy sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from benchmarks import bench_memory


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the benchmark's preset a tiny one, with two blocks in two shards."""
    preset = tmp_path / "preset"
    preset.mkdir()
    config = json.loads((bench_memory.PRESET / "config.json").read_text())
    (preset / "config.json").write_text(json.dumps({**config, **TINY}))
    index = json.loads((bench_memory.PRESET / bench_memory.INDEX).read_text())
    names = index["weight_map"]
    shards = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(names)}
    (preset / bench_memory.INDEX).write_text(json.dumps({"weight_map": shards}))
    monkeypatch.setattr(bench_memory, "PRESET", preset)
    return tmp_path


def test_the_random_checkpoint_loads_and_is_measured(small: Path) -> None:
    folder = small / "random_checkpoint"
    folder.mkdir()
    stored = bench_memory.make_checkpoint(folder, layers=2)
    tensors: dict[str, Any] = {}
    for shard in folder.glob("*.bin"):
        tensors |= torch.load(shard)
    assert stored > sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert not any(".layers.2." in name for name in tensors)
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"])
    for old_way in (False, True):
        row = bench_memory.measure_load(folder, 4, old_way)
        assert row["peak"] > 0.99 * row["start"] > 0  # Linux counts pages in batches
        assert row["over"] == row["peak"] - row["size"]
        # The packed blocks take a quarter of their half weights, and their scales.
        assert row["size"] < 0.6 * sum(tensor.nbytes for tensor in tensors.values())


def test_a_full_disk_is_refused_before_anything_is_written(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(small)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("sys.argv", ["bench_memory", "--layers", "1", "--dir", str(small)])
    assert bench_memory.main() == 2
    error = capsys.readouterr().err
    assert "has 0.0 GB free, and the checkpoint takes" in error and "fewer --layers" in error
    assert not list(small.rglob("*.bin"))
