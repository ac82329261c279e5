"""Speed of single matrix products: every shape of the 6B model, every back end that is here.

    python -m benchmarks.bench_kernels [--shapes 4096x12288 ...] [--rows 1 8 ...] [--backends NAME
        ...] [--rounds N] [--threads N] [--quick] [--write]

Of each product: seconds, the weights' bytes a second and their share of the bandwidth probe's
beside it, operations a second (two a weight and row), and the error against the exact product with
Gaussian input. Each back end has so many copies of its matrix, used in turn, that no cache holds
them; the back ends take turns within a round, and the probe reads before and after each of them.
`--write` appends to benchmarks/results.csv. `--quick` tries every back end with a small matrix in
seconds; its figures mean nothing and are not written.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import (
    BACKENDS,
    Backend,
    Product,
    draw_integers,
    multiply_exactly,
    relative_error,
)
from benchmarks.probe import FLOATS, Probe
from benchmarks.results import RESULTS, Case, Recorder
from benchmarks.workers import Spread

# Columns and rows of a block's matrices and of the head.
SHAPES = ("4096x12288", "4096x4096", "4096x16384", "16384x4096", "4096x130528")
ROWS = (1, 3, 8, 16, 32, 64, 512)
ROTATED_BYTES = 2**28  # more than the caches hold
CHECKED_OUTPUTS = 256
BASELINE = "torch float32"
LEAST_SECONDS = 0.02  # that a measurement takes
# What `--quick` puts in the place of the options' values.
QUICK = {
    "shapes": ["256x384"],
    "rows": [1, 3],
    "rounds": 1,
    "rotated_bytes": 0,
    "probe_floats": 2**18,
}


class Rotation:
    """Copies of one packed matrix, used in turn.

    Args:
        backend: that packs them.
        integers: int8 `(O, I)`.
        rotated_bytes: that the copies have at least.
    """

    def __init__(self, backend: Backend, integers: Tensor, rotated_bytes: int) -> None:
        self.backend = backend
        self.bytes = backend.weight_bytes * integers.numel()
        copies = max(2, -int(-rotated_bytes // self.bytes))
        self.products: list[Product] = [backend.pack(integers) for _ in range(copies)]
        self.turn = 0

    def multiply(self, inputs: Tensor) -> Tensor:
        """Multiply `(M, I)` with the next copy."""
        self.turn = (self.turn + 1) % len(self.products)
        return self.products[self.turn](inputs)

    def time(self, inputs: Tensor) -> float:
        """Return the middle seconds of a product."""
        seconds = []
        while sum(seconds) < LEAST_SECONDS or len(seconds) < 3:
            began = time.perf_counter()
            self.multiply(inputs)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)


class Figures(NamedTuple):
    """What the rounds of one back end gave: seconds, the probe's rate beside them, the error."""

    seconds: list[float]
    rates: list[float]
    error: float


@torch.inference_mode()
def measure_shape(
    rotations: Sequence[Rotation], integers: Tensor, count: int, probe: Probe, rounds: int
) -> dict[str, Figures]:
    """Time a product of so many rows with every back end, in turns with the probe.

    Args:
        rotations: one of each back end.
        integers: what they hold.
        count: rows M.
        probe: the bandwidth probe.
        rounds: of each back end.
    """
    rows = torch.randn(count, integers.shape[1], generator=torch.Generator().manual_seed(count))
    outputs = min(CHECKED_OUTPUTS, integers.shape[0])
    exact = multiply_exactly(integers, rows, outputs)
    figures = {}
    for rotation in rotations:
        inputs = rows.to(rotation.backend.dtype)
        # All copies: some back ends compile at the first product of a size.
        found = [product(inputs)[:, :outputs] for product in rotation.products][-1]
        figures[rotation.backend.name] = Figures([], [], relative_error(found, exact))
    rate = probe.read()["rate"]
    for _ in range(rounds):
        for rotation in rotations:
            inputs, found = rows.to(rotation.backend.dtype), figures[rotation.backend.name]
            found.seconds.append(rotation.time(inputs))
            before, rate = rate, probe.read()["rate"]
            found.rates.append((before + rate) / 2)
    return figures


def record_shape(
    recorder: Recorder,
    shape: str,
    count: int,
    rotations: Sequence[Rotation],
    figures: dict[str, Figures],
) -> None:
    """Record milliseconds, bandwidth, its share, operations and error of every back end."""
    base = figures.get(BASELINE)
    columns, rows = parse_shape(shape)
    for rotation in rotations:
        name = rotation.backend.name
        found = figures[name]
        case = Case(name, shape, f"torch {torch.__version__}", count, rounds=len(found.seconds))
        ratio = None
        if base is not None and base is not found:
            ratio = Spread.of([b / a for a, b in zip(found.seconds, base.seconds)])
        times = Spread.of([1000 * seconds for seconds in found.seconds])
        recorder.add(case, times, "ms", ratio, "" if ratio is None else BASELINE)
        rates = [rotation.bytes / seconds for seconds in found.seconds]
        recorder.add(case, Spread.of(rates).scaled(1e-9), "GB/s")
        shares = [rate / limit for rate, limit in zip(rates, found.rates)]
        recorder.add(case, Spread.of(shares), "of the probe")
        operations = [2e-9 * count * columns * rows / seconds for seconds in found.seconds]
        recorder.add(case, Spread.of(operations), "GOP/s")
        recorder.add(case, Spread.of([found.error]), "error")


def parse_shape(shape: str) -> tuple[int, int]:
    """Return columns and rows of a matrix that is named like "4096x12288".

    Raises:
        ValueError: for another form, or columns that the formats' groups do not divide.
    """
    columns, _, rows = shape.partition("x")
    if not (columns.isdecimal() and rows.isdecimal()) or int(columns) % 128:
        raise ValueError(
            f"a shape is COLUMNSxROWS with a multiple of 128 columns, as 4096x12288; got {shape}"
        )
    return int(columns), int(rows)


def find_backends(names: Sequence[str] | None) -> list[Backend]:
    """Return the back ends of these names; all that are installed if None.

    Raises:
        ValueError: for a name that there is not, or whose package is missing.
    """
    known = {backend.name: backend for backend in BACKENDS}
    for name in names or ():
        if name not in known or not known[name].is_installed:
            here = ", ".join(b.name for b in BACKENDS if b.is_installed)
            raise ValueError(f"there is no back end {name} here, but {here}")
    return [known[name] for name in names or known if known[name].is_installed]


def make_quick(args: argparse.Namespace) -> None:
    """Put sizes in the options with which every back end is tried in seconds.

    Raises:
        ValueError: if the figures are to be written.
    """
    if args.write:
        raise ValueError("--quick tries the lines, and its figures mean nothing: leave out --write")
    vars(args).update(QUICK)


def measure_all(args: argparse.Namespace) -> None:
    """Measure every shape with every number of rows."""
    if args.quick:
        make_quick(args)
    torch.set_num_threads(args.threads)
    backends, shapes = find_backends(args.backends), [(s, *parse_shape(s)) for s in args.shapes]
    recorder = Recorder("bench_kernels", 0, args.threads, RESULTS if args.write else None)
    probe = Probe(args.threads, args.probe_floats)
    for shape, columns, rows in shapes:
        integers = draw_integers(rows, columns)
        rotations = [Rotation(backend, integers, args.rotated_bytes) for backend in backends]
        for count in args.rows:
            figures = measure_shape(rotations, integers, count, probe, args.rounds)
            record_shape(recorder, shape, count, rotations, figures)


def make_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Speed of single matrix products.")
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(SHAPES), metavar="IxO", help="columns and rows")
    add("--rows", type=int, nargs="+", default=list(ROWS), metavar="M", help="of the input")
    add("--backends", nargs="+", metavar="NAME", help="all that are installed")
    add("--rounds", type=int, default=5, help="of each figure (5)")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--rotated-bytes", type=int, default=ROTATED_BYTES, help="of a back end's copies (2**28)")
    add("--probe-floats", type=int, default=FLOATS, help="values that the probe reads (2**28)")
    add("--quick", action="store_true", help="a small matrix, one round: to try the lines")
    add("--write", action="store_true", help="append to benchmarks/results.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; return the exit code."""
    args = make_parser().parse_args(argv)
    try:
        measure_all(args)
    except ValueError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
