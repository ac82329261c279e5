"""The kernel benchmark's back ends, its copies, and the bandwidth probe."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_kernels, kernels
from benchmarks.kernels import BACKENDS, Backend
from benchmarks.probe import Probe, VectorSum
from benchmarks.results import Recorder, read_rows

INSTALLED = [backend for backend in BACKENDS if backend.is_installed]
# Of the result's length: rounding of the input to bfloat16 or to 8 bits; NF4 rounds the weights.
TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.01, torch.float16: 0.002}


@pytest.mark.parametrize("backend", INSTALLED, ids=lambda backend: backend.name)
@pytest.mark.parametrize("count", [1, 5])
def test_every_back_end_holds_the_same_matrix(backend: Backend, count: int) -> None:
    integers = kernels.draw_integers(160, 256)
    rows = torch.randn(count, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = backend.pack(integers)(rows.to(backend.dtype))
    error = kernels.relative_error(found, kernels.multiply_exactly(integers, rows, 160))
    limit = 0.15 if "nf4" in backend.name else TOLERANCE[backend.dtype]
    assert found.shape == (count, 160) and error < limit, error


def test_files_alone_use_torch_s_product_and_leave_the_engine_as_it_was() -> None:
    quantization = sys.modules[type(kernels.pack_ours(4)(kernels.draw_integers(64, 64))).__module__]
    own_products = sys.modules[quantization.ReorderedWeight.__module__]
    finder = quantization.KERNEL_FINDERS["cpu"]
    product: Any = kernels.pack_alone(kernels.draw_integers(192, 256))
    product(torch.ones(1, 256, dtype=torch.bfloat16))
    (layer,) = (
        c.cell_contents for c in product.__closure__ if isinstance(c.cell_contents, nn.Module)
    )
    stored = layer.__dict__["_parameters"]["weight"]
    assert bool(stored.numel()) == (not own_products.find_int4_block_rows())
    assert quantization.KERNEL_FINDERS["cpu"] is finder


def test_drawn_integers_are_exact_in_every_format() -> None:
    integers = kernels.draw_integers(32, 128)
    assert integers.min() == -7 and integers.max() == 7
    assert (integers.view(32, -1, 32).amax(2) == 7).all()


def test_copies_take_turns_and_are_more_than_the_caches_hold() -> None:
    backend = next(b for b in BACKENDS if b.name == "torch float16")
    rotation = bench_kernels.Rotation(backend, kernels.draw_integers(128, 128), 2**17)
    assert rotation.bytes == 128 * 128 * 2 and len(rotation.products) == 4
    used: list[int] = []
    rotation.products = [lambda rows, i=i: used.append(i) or rows for i in range(4)]
    for _ in range(5):
        rotation.multiply(torch.ones(1))
    assert used == [1, 2, 3, 0, 1]


def test_a_shape_is_measured_and_recorded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "LEAST_SECONDS", 0)
    path = tmp_path / "results.csv"
    recorder = Recorder("bench_kernels", 0, 1, path)
    integers = kernels.draw_integers(256, 128)
    chosen = bench_kernels.find_backends(["torch float32", "ours INT8"])
    rotations = [bench_kernels.Rotation(backend, integers, 0) for backend in chosen]
    figures = bench_kernels.measure_shape(rotations, integers, 4, Probe(1, 2**16), rounds=3)
    bench_kernels.record_shape(recorder, "128x256", 4, rotations, figures)
    cells = {(row.contender, row.unit): row for row in read_rows(path)}
    ours = {unit: cells["ours INT8", unit].value for unit in ("ms", "GB/s", "GOP/s", "error")}
    assert ours["GB/s"] == pytest.approx(128 * 256 / ours["ms"] / 1e6, rel=1e-3)
    assert ours["GOP/s"] == pytest.approx(2 * 4 * ours["GB/s"], rel=1e-3)
    assert cells["ours INT8", "ms"].baseline == "torch float32"
    assert cells["torch float32", "ms"].ratio is None
    assert cells["torch float32", "error"].value < 1e-6


@pytest.mark.parametrize("shape", ["4096", "100x128", "axb"])
def test_a_wrong_shape_is_one_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--shapes", shape, "--backends", "torch float32"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_kernels: a shape is COLUMNSxROWS") and error.count("\n") == 1


def test_every_back_end_is_tried_quickly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "LEAST_SECONDS", 0)
    threads = torch.get_num_threads()
    assert bench_kernels.main(["--quick", "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert all(f"{backend.name}: 256x384 3: " in said for backend in INSTALLED)
    assert bench_kernels.main(["--quick", "--write"]) == 2
    assert "leave out --write" in capsys.readouterr().err


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no back end abacus here, but ours INT4,"):
        bench_kernels.find_backends(["abacus"])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_vector_sum_reads_every_value_once(threads: int) -> None:
    pytest.importorskip("llvmlite")
    values = torch.arange(threads * 640, dtype=torch.float32)
    assert VectorSum(threads)(values) == values.sum().item()
    with pytest.raises(ValueError, match=f"{values.numel() + 1} values cannot be shared"):
        VectorSum(threads)(torch.ones(values.numel() + 1))


def test_the_probe_takes_the_fastest_way() -> None:
    probe = Probe(1, 2**12)
    probe.ways = {"lazy": lambda values: sum(values.tolist()), "quick": lambda values: None}
    assert probe.read()["way"] == "quick"
