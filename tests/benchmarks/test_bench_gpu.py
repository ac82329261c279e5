"""The measurement for GPUs: what it prints without one, and that it measures, on a CPU."""

import pytest
import torch

pytest.importorskip("chatglm", reason="the benchmarks need the package")

from benchmarks import bench_gpu

SIZES = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "inner_hidden_size": 128}


def test_without_a_gpu_it_says_what_to_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == 2
    printed = capsys.readouterr().out
    assert "python -m pytest tests/gpu" in printed
    assert "python -m benchmarks.bench_gpu" in printed


def test_formats_have_the_same_weights_but_for_their_rounding() -> None:
    plain, packed = (bench_gpu.make_model(bits, "cpu", **SIZES) for bits in (None, 4))
    weights = [m.transformer.layers[1].mlp.dense_h_to_4h for m in (plain, packed)]
    largest = weights[0].weight.abs().max().item()
    difference = weights[0].weight - weights[1].unpack(torch.float16)
    assert 0 < difference.abs().max().item() < largest / 10


def test_every_format_way_and_number_of_rows_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = bench_gpu.parse(["--rows", "1", "3", "--tokens", "4", "--rounds", "1"])
    lines = bench_gpu.run(settings, "cpu", **SIZES)
    kinds = {(line["weights"], line["cache"], line["rows"]) for line in lines}
    assert len(kinds) == len(lines) == 2 * 2 * 2
    assert capsys.readouterr().out.count("ms a step") == len(lines)
